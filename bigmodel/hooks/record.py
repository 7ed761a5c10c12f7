"""Notes when each unit is read, copied and computed while a model runs: the measured twin of the predicted timeline."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from bigmodel.device_map.plan import Plan
from bigmodel.device_map.simulation import Step
from bigmodel.device_map.unit import Unit
from bigmodel.hooks.attach import Attachment, opaque
from bigmodel.hooks.hops import Phase
from bigmodel.hooks.pass_lock import num_calls
from bigmodel.offload.arena import Arena
from bigmodel.offload.link import DeviceMemory, TimedLink
from bigmodel.offload.reader import Ticket
from bigmodel.offload.store import Store

__all__ = ["recorded"]

# A moment: seconds of the host's clock, or an event of a device.
Mark = float | torch.Event


@contextlib.contextmanager
def recorded(
    model: nn.Module, root: nn.Module, plan: Plan, units: Sequence[Unit], attachment: Attachment | None
) -> Iterator[list[Step]]:
    """Steps of all passes until the block ends; the list is filled then, in the order in which they were computed.

    Args:
        model: whose forward is a pass: the root, or a module around it. So is the root's by itself; what of it is called
            alone, such as an encoder, belongs to the pass that follows.
        root: what was loaded.
        plan, units: that were carried out; numbers of units are their places in both.
        attachment: the root's hooks; None where it has none.
    """
    steps: list[Step] = []
    sites: dict[str, list[int]] = {}
    for number, unit in enumerate(units):
        for name in unit.sites:
            sites.setdefault(name, []).append(number)
    modules = dict(root.named_modules(remove_duplicate=False))
    recorder = _Recorder({root, model}, plan, attachment)
    with contextlib.ExitStack() as stack:
        if attachment is not None:
            stack.enter_context(attachment.fetching_from(functools.partial(_TimedStore, recorder.fetches)))
        stack.callback(recorder.remove)
        for name, numbers in sites.items():
            recorder.watch(modules[name], numbers)
        recorder.watch_passes()
        yield steps
    steps += recorder.steps()


@dataclass(eq=False, slots=True)
class _Fetch:
    """One filling of a slot.

    Attributes:
        ticket: which knows when it was read.
        link: which knows when it was copied; None where it was not.
    """

    ticket: Ticket
    link: TimedLink | None


class _TimedStore:
    """A store whose fetches are noted.

    Args:
        fetches: unit name -> its latest fetch that no computation has used yet; filled here.
        store: fetches them.
    """

    def __init__(self, fetches: dict[str, _Fetch], store: Store) -> None:
        self._fetches = fetches
        self._store = store

    def fetch(self, unit: str, slot: Arena | DeviceMemory, *, is_urgent: bool) -> Ticket:
        link = None
        if isinstance(slot, DeviceMemory):
            link = TimedLink(slot.link)
            slot = slot.over(link)
        ticket = self._store.fetch(unit, slot, is_urgent=is_urgent)
        self._fetches[unit] = _Fetch(ticket, link)
        return ticket

    def read_bytes(self, unit: str) -> int:
        return self._store.read_bytes(unit)

    def close(self) -> None:
        self._store.close()


@dataclass(eq=False, slots=True)
class _Stretch:
    """Computation of the units at one module, without interruption by other units."""

    units: Sequence[int]
    device: torch.device
    begin: Mark
    fetches: Mapping[int, _Fetch] = field(default_factory=dict)
    end: Mark | None = None


class _Site:
    """The hooks of one module; the last before its forward and the first after it, so that nothing else is in between."""

    def __init__(self, recorder: _Recorder, units: Sequence[int]) -> None:
        self._recorder = recorder
        self.units = units

    def arrive(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._recorder.interrupt()

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._recorder.begin(self)

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._recorder.end(self)


class _Recorder:
    """What is known while passes run: marks, which become seconds when they are over.

    Args:
        roots: modules whose outermost call is a pass.
        plan: says where units run.
        attachment: says of which phase a pass is; None where all are steps.
    """

    def __init__(self, roots: set[nn.Module], plan: Plan, attachment: Attachment | None) -> None:
        self.fetches: dict[str, _Fetch] = {}
        self._roots = roots
        self._attachment = attachment
        self._names = [place.unit for place in plan.placements]
        self._devices = {
            Phase.STEP: [torch.device(place.run_on) for place in plan.placements],
            Phase.PREFILL: [torch.device(place.prefill_on) for place in plan.placements],
        }
        self._handles: list[RemovableHandle] = []
        self._passes: list[list[_Stretch]] = []
        self._current: list[_Stretch] = []
        self._is_running = False
        self._open: list[tuple[_Site, _Stretch]] = []  # what encloses what runs now, and that
        self._zero_s: float | None = None
        self._clocks = {
            device: _Clock(device)
            for device in {torch.device(name) for name in plan.run_devices}
            if device.type != "cpu"
        }

    def watch(self, module: nn.Module, units: Sequence[int]) -> None:
        """Put hooks on a module that uses units."""
        site = _Site(self, units)
        self._handles += [
            module.register_forward_pre_hook(opaque(site.arrive), prepend=True),
            module.register_forward_pre_hook(opaque(site.begin)),
            module.register_forward_hook(opaque(site.end), prepend=True, always_call=True),
        ]

    def watch_passes(self) -> None:
        """Put hooks on the roots, around all others of theirs."""
        for root in self._roots:
            self._handles += [
                root.register_forward_pre_hook(opaque(self.begin_pass), prepend=True),
                root.register_forward_hook(opaque(self.end_pass), always_call=True),
            ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin_pass(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self._is_outermost():
            return
        if self._is_running:  # the last one was interrupted (Ctrl-C) where no hook saw it
            self._current = []
        self._is_running, self._open = True, []
        self._begin_clock()

    def end_pass(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._is_outermost():
            return
        if output is not None:  # it was completed
            self._passes.append(self._current)
        self._current, self._is_running = [], False

    def interrupt(self) -> None:
        """A unit is about to run: the one around it pauses."""
        self._begin_clock()
        if self._open:
            _, stretch = self._open[-1]
            stretch.end = self._now(stretch.device)

    def begin(self, site: _Site) -> None:
        """The weights of a module are there, and its forward begins."""
        fetches = {
            unit: self.fetches.pop(self._names[unit]) for unit in site.units if self._names[unit] in self.fetches
        }
        self._open.append((site, self._stretch(site, fetches)))

    def end(self, site: _Site) -> None:
        """Its forward is done: the one around it goes on. Nothing happens for one that did not begin."""
        if not self._open or self._open[-1][0] is not site:
            return
        _, stretch = self._open.pop()
        stretch.end = self._now(stretch.device)
        if self._open:
            around, _ = self._open[-1]
            self._open[-1] = around, self._stretch(around, {})

    def steps(self) -> list[Step]:
        """Of the passes that were completed, and of what was called alone after them; waits for the devices."""
        for clock in self._clocks.values():
            clock.settle()
        is_whole = bool(self._current) and not self._is_running  # not one that was interrupted where no hook saw it
        passes = [*self._passes, self._current] if is_whole else self._passes
        return [
            step for number, stretches in enumerate(passes) for each in stretches for step in self._steps(number, each)
        ]

    def _steps(self, number: int, stretch: _Stretch) -> Iterator[Step]:
        if stretch.end is None:
            return
        begin, end = self._seconds(stretch.begin, stretch.device), self._seconds(stretch.end, stretch.device)
        for unit in stretch.units:
            read, copy = self._fetched(stretch.fetches.get(unit))
            yield Step(unit, number, str(stretch.device), read, copy, (begin, end))
            begin = end  # what uses several units at once is counted for the first

    def _fetched(self, fetch: _Fetch | None) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
        """When it was read, and when it was copied."""
        read = copy = None
        if fetch is None or fetch.ticket.is_cancelled or fetch.ticket.error is not None:
            return None, None
        ticket, link = fetch.ticket, fetch.link
        if ticket.begun_s is not None and ticket.ended_s is not None:
            read = self._since_zero(ticket.begun_s), self._since_zero(ticket.ended_s)
        if link is not None and link.begun and ticket.filled is not None:
            begun = min(self._seconds(each, link.device) for each in link.begun)
            copy = begun, self._seconds(ticket.filled, link.device)
        return read, copy

    def _stretch(self, site: _Site, fetches: Mapping[int, _Fetch]) -> _Stretch:
        phase = Phase.STEP if self._attachment is None else self._attachment.phase
        device = self._devices[phase][site.units[0]]
        stretch = _Stretch(site.units, device, self._now(device), fetches)
        self._current.append(stretch)
        return stretch

    def _now(self, device: torch.device) -> Mark:
        return time.perf_counter() if device.type == "cpu" else _timed_event(device)

    def _begin_clock(self) -> None:
        if self._zero_s is None:
            self._zero_s = time.perf_counter()

    def _seconds(self, mark: Mark, device: torch.device) -> float:
        return self._since_zero(mark if isinstance(mark, float) else self._clocks[device].host_s(mark))

    def _since_zero(self, host_s: float) -> float:
        assert self._zero_s is not None
        return host_s - self._zero_s

    def _is_outermost(self) -> bool:
        return sum(map(num_calls, self._roots)) <= 1


class _Clock:
    """A device's events on the host's clock: one moment is known on both.

    Args:
        device: an accelerator; the host waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.settle()
        self._event = _timed_event(device)
        self._event.synchronize()
        self._host_s = time.perf_counter()

    def settle(self) -> None:
        """Wait until every event has happened."""
        torch.accelerator.synchronize(self._device)

    def host_s(self, event: torch.Event) -> float:
        """When an event happened, by `time.perf_counter`."""
        return self._host_s + self._event.elapsed_time(event) / 1e3


def _timed_event(device: torch.device) -> torch.Event:
    """On the device's current stream, after all that was given to it."""
    return torch.accelerator.current_stream(device).record_event(torch.Event(device, enable_timing=True))
