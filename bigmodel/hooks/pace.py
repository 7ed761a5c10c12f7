"""What passes take once everything is warm: the account that the limit is judged by."""

from __future__ import annotations

import functools
import math
import os
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from bigmodel.device_map.control_groups import ControlGroups
from bigmodel.hooks.hops import Phase
from bigmodel.offload.meter import Flow, Moved

__all__ = ["Pace", "PassKind", "Passes", "Steady"]


@dataclass(frozen=True, slots=True)
class PassKind:
    """What is known of a pass before it begins.

    Attributes:
        phase: where its units run.
        is_step: whether it goes on with sequences that are under way; otherwise it begins them.
        num_tokens: in all its sequences; 0 where it has none.
        is_whole: whether it is of the whole model, and not of a part that was called by itself.
    """

    phase: Phase
    is_step: bool = False
    num_tokens: int = 0
    is_whole: bool = True


@dataclass(frozen=True, slots=True)
class Passes:
    """Passes of one kind.

    Attributes:
        num_passes: of the whole model.
        num_tokens: of those passes, in all their sequences.
        read_bytes: that came from the disk since the pass before each of them ended.
        copied_bytes: device -> the same, over its link.
    """

    num_passes: int = 0
    num_tokens: int = 0
    read_bytes: int = 0
    copied_bytes: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: Passes) -> Passes:
        return self._with(other, 1)

    def __sub__(self, earlier: Passes) -> Passes:
        return self._with(earlier, -1)

    def without(self, idle: Flow) -> Passes:
        """The same, less what was read and copied for them beforehand."""
        copied = {
            device: max(0, size - idle.copies.get(device, Moved()).num_bytes)
            for device, size in self.copied_bytes.items()
        }
        return replace(self, read_bytes=max(0, self.read_bytes - idle.reads.num_bytes), copied_bytes=copied)

    def _with(self, other: Passes, times: int) -> Passes:
        devices = {*self.copied_bytes, *other.copied_bytes}
        return Passes(
            self.num_passes + times * other.num_passes,
            self.num_tokens + times * other.num_tokens,
            self.read_bytes + times * other.read_bytes,
            {
                device: self.copied_bytes.get(device, 0) + times * other.copied_bytes.get(device, 0)
                for device in sorted(devices)
            },
        )


@dataclass(frozen=True, slots=True)
class Steady:
    """From the end of the first pass, which fills empty slots and touches memory for the first time, to the end of the last one.

    Attributes:
        prefills, steps: passes that begin sequences, and those that go on with them.
        wall_s: wall seconds, those between passes included.
        pass_s: of them, inside passes.
        stall_s: of those, in which the computation on the host waited for weights.
        num_hits, num_misses: entries whose unit was read ahead, or only then.
        cpu_s: processor seconds of this process.
        num_threads, num_processors: that torch computes with on the host, and cores that this process may use.
        flow: what was read and copied.
        idle_s: since the last pass, when this was taken; 0 before the first, and during one.
        idle_flow: what was read and copied in that time, for passes to come.
    """

    prefills: Passes = Passes()
    steps: Passes = Passes()
    wall_s: float = 0.0
    pass_s: float = 0.0
    stall_s: float = 0.0
    num_hits: int = 0
    num_misses: int = 0
    cpu_s: float = 0.0
    num_threads: int = 1
    num_processors: int = 1
    flow: Flow = field(default_factory=Flow)
    idle_s: float = 0.0
    idle_flow: Flow = field(default_factory=Flow)

    @property
    def outside_s(self) -> float:
        """Wall seconds between passes."""
        return max(0.0, self.wall_s - self.pass_s)

    @property
    def num_passes(self) -> int:
        """Of the whole model."""
        return self.prefills.num_passes + self.steps.num_passes

    def __sub__(self, earlier: Steady) -> Steady:
        """What happened since `earlier` was taken."""
        prefills, steps = self.prefills - earlier.prefills, self.steps - earlier.steps
        flow = self.flow - earlier.flow
        is_later = self.wall_s > earlier.wall_s
        if is_later:  # what came before is not of its time: the next pass, of a prompt as a rule, found it there
            flow -= earlier.idle_flow
            if prefills.num_passes:
                prefills = prefills.without(earlier.idle_flow)
            else:
                steps = steps.without(earlier.idle_flow)
        return Steady(
            prefills=prefills,
            steps=steps,
            wall_s=self.wall_s - earlier.wall_s - (earlier.idle_s if is_later else 0.0),
            pass_s=self.pass_s - earlier.pass_s,
            stall_s=self.stall_s - earlier.stall_s,
            num_hits=self.num_hits - earlier.num_hits,
            num_misses=self.num_misses - earlier.num_misses,
            cpu_s=self.cpu_s - earlier.cpu_s,
            num_threads=self.num_threads,
            num_processors=self.num_processors,
            flow=flow,
            idle_s=self.idle_s,
            idle_flow=self.idle_flow,
        )


@dataclass(frozen=True, slots=True)
class Reading:
    """Counters at the end of a pass.

    Attributes:
        stall_s, num_hits, num_misses, flow: as in `Steady`, since the model was loaded.
    """

    stall_s: float = 0.0
    num_hits: int = 0
    num_misses: int = 0
    flow: Flow = field(default_factory=Flow)


class Pace:
    """Keeps the account, pass by pass."""

    def __init__(self) -> None:
        self._steady = Steady()
        self._first = self._last = Reading()
        self._last_cpu_s = 0.0
        self._ended_s: float | None = None  # the last pass; None before the first

    def ended(self, kind: PassKind, pass_s: float, reading: Reading) -> None:
        """Note that a pass ended now.

        Args:
            kind: of the pass.
            pass_s: wall seconds that it took.
            reading: counters as they are now.
        """
        now_s, usage = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = usage.ru_utime + usage.ru_stime
        if self._ended_s is not None:
            steady, last = self._steady, self._last
            moved = reading.flow - last.flow
            copied = {device: each.num_bytes for device, each in moved.copies.items()}
            num_tokens = kind.num_tokens if kind.is_whole else 0
            new = Passes(int(kind.is_whole), num_tokens, moved.reads.num_bytes, copied)
            self._steady = Steady(
                prefills=steady.prefills + (Passes() if kind.is_step else new),
                steps=steady.steps + (new if kind.is_step else Passes()),
                wall_s=steady.wall_s + now_s - self._ended_s,
                pass_s=steady.pass_s + pass_s,
                stall_s=steady.stall_s + reading.stall_s - last.stall_s,
                num_hits=steady.num_hits + reading.num_hits - last.num_hits,
                num_misses=steady.num_misses + reading.num_misses - last.num_misses,
                cpu_s=steady.cpu_s + cpu_s - self._last_cpu_s,
                num_threads=torch.get_num_threads(),
                num_processors=_num_cores(frozenset(os.sched_getaffinity(0))),
                flow=reading.flow - self._first.flow,
            )
        else:
            self._first = reading
        self._last, self._last_cpu_s, self._ended_s = reading, cpu_s, now_s

    def steady(self, flow: Flow, *, is_running: bool) -> Steady:
        """The account up to the last pass.

        Args:
            flow: what has moved up to now.
            is_running: whether a pass is under way.
        """
        if self._ended_s is None or is_running:
            return self._steady
        idle_s = time.perf_counter() - self._ended_s
        return replace(self._steady, idle_s=idle_s, idle_flow=flow - self._last.flow)


@functools.cache
def _num_cores(processors: frozenset[int]) -> int:
    """Cores of these processors: hardware threads of one core count once, and control groups' quotas hold."""
    cores = {_siblings(number) for number in processors}
    return max(1, math.floor(min([len(cores), *ControlGroups(Path("/")).processors()])))


def _siblings(processor: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list").read_text()
    except OSError:  # a core of its own, as far as is known
        return str(processor)
