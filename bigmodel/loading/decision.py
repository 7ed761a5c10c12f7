"""From a model without weights, and what may be used, to a plan: new, or one that was made before."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from bigmodel.device_map.machine import Machine
from bigmodel.device_map.named import NAMED
from bigmodel.device_map.plan import Plan, Workload
from bigmodel.device_map.planner import advise, pass_times, timeline
from bigmodel.device_map.simulation import Step
from bigmodel.device_map.unit import Unit
from bigmodel.errors import DeviceMapError, DoesNotFitError
from bigmodel.loading.divisions import Divisions
from bigmodel.loading.pass_limit import PassLimit, shares_of
from bigmodel.loading.problem import Problem
from bigmodel.progress import Report

__all__ = ["MOST_SEQUENCES", "Decider", "Decision", "DeviceMap", "refuse_unknown"]

DeviceMap = str | Mapping[str, Any] | Plan

_AUTOMATIC = ("auto", *NAMED)
# A finer division must promise this much: more units are more work of a kind that no rate knows.
_FINER_GAIN = 0.97
# Twice as many sequences must give this much more, and there are never more than so many.
_BATCH_GAIN, MOST_SEQUENCES = 1.03, 4096
_GUESSED = "activations and KV cache are estimates, because no pass could be tried ({reason})"
_STEP_GUESSED = "the time per token is an estimate, because no step could be tried ({reason})"


@dataclass(frozen=True, slots=True)
class Decision:
    """A plan, the units that it places, and what a pass is checked with."""

    plan: Plan
    units: tuple[Unit, ...]
    check_pass: PassLimit


class Decider:
    """Makes decisions about one model.

    Args:
        divisions: of the model, and what they take.
        progress: called with (phase, steps done, steps at most) while a plan is looked for.
    """

    def __init__(self, divisions: Divisions, progress: Report | None = None) -> None:
        self._divisions = divisions
        self._progress = progress

    def __call__(
        self,
        device_map: DeviceMap,
        limits: Mapping[str, int],
        workload: Workload,
        machine: Machine,
        *,
        is_loaded: bool = False,
        allow_cpu_compute: bool = False,
        with_advice: bool = False,
        most_sequences: int = MOST_SEQUENCES,
    ) -> Decision:
        """Where every unit rests and runs.

        Args:
            device_map: as the user gave it.
            limits: tier -> bytes.
            workload: what must fit beside the weights.
            machine: whose tiers are meant, and whose rates count.
            is_loaded: all weights are in memory already: the plan says what that takes, and refuses nothing.
            allow_cpu_compute: beside accelerators, whether units may run on the CPU.
            with_advice: whether the plan says what more memory would gain, which takes as long again.
            most_sequences: where the workload's batch size is "auto".

        Raises:
            DeviceMapError: names or tiers that are not there, or a plan of something else.
            DoesNotFitError: a limit is too small, however finely the model is divided.
        """
        refuse_unknown(device_map, machine)
        if workload.batch_size == "auto":
            workload = self._best_batch(device_map, limits, workload, machine, allow_cpu_compute, most_sequences)
        problem = Problem(self._divisions, self._progress, limits, workload, machine, allow_cpu_compute, is_loaded)

        def settled(plan: Plan, units: tuple[Unit, ...]) -> Decision:
            if with_advice and device_map == "auto":
                plan = advise(plan, problem.costs_of(units), machine, allow_cpu_compute=allow_cpu_compute)
            pass_s = pass_times(plan, problem.costs_of(units), machine)
            plan = replace(plan, estimate=replace(plan.estimate, pass_s=pass_s))
            measured = problem.measured
            if not measured.is_measured:
                plan = replace(plan, notes=(*plan.notes, _GUESSED.format(reason=measured.reason)))
            elif measured.reason:
                plan = replace(plan, notes=(*plan.notes, _STEP_GUESSED.format(reason=measured.reason)))
            shapes = self._divisions.planned_shapes(workload)
            shares = shares_of(plan, problem.costs_of(units))
            return Decision(
                plan,
                units,
                PassLimit(measured, plan, self._divisions.trial, shapes, shares, self._divisions.recorded),
            )

        if isinstance(device_map, Plan):
            return settled(*self._follow(device_map, problem))
        error: DoesNotFitError | None = None
        divisions = iter(self._divisions)
        for units in itertools.chain(divisions, self._divisions.last_resorts()):
            try:
                plan, settled_units = problem.decide(device_map, units)
            except DoesNotFitError as too_large:
                # Smaller units need smaller slots; what is told is what the finest division would need.
                error = too_large
                if device_map in ("cpu", "cuda"):
                    break
                continue
            if isinstance(device_map, str) and _slots_share(plan) > 1 - _FINER_GAIN:
                finer = next(divisions, None)
                if finer is not None:
                    with contextlib.suppress(DoesNotFitError):
                        other, other_units = problem.decide(device_map, finer)
                        if _seconds(other) < _FINER_GAIN * _seconds(plan):
                            plan, settled_units = other, other_units
            return settled(plan, settled_units)
        assert error is not None
        raise error

    def _best_batch(
        self,
        device_map: DeviceMap,
        limits: Mapping[str, int],
        workload: Workload,
        machine: Machine,
        allow_cpu_compute: bool,
        most: int,
    ) -> Workload:
        """The batch with the most tokens per second: doubled from one while that gains something and fits, then by half."""
        best: tuple[float, Workload] | None = None
        batch_size, step = 1, 1
        while True:
            tried = replace(workload, batch_size=batch_size)
            try:
                plan = self(device_map, limits, tried, machine, allow_cpu_compute=allow_cpu_compute).plan
            except DoesNotFitError:
                if best is None:
                    raise
                if step < batch_size // 2 or batch_size < 3:
                    break
                batch_size, step = batch_size - batch_size // 4, 0  # half as much more than the last, and no further
                continue
            rate = batch_size * max(1, workload.new_tokens) / max(_seconds(plan), 1e-12)
            if best is not None and rate < _BATCH_GAIN * best[0]:
                break
            best = rate, tried
            if not step or batch_size >= most:
                break
            batch_size, step = min(2 * batch_size, most), batch_size
        assert best is not None
        return best[1]

    def timeline(self, plan: Plan, machine: Machine) -> list[Step]:
        """When each unit of a plan would be read, copied and computed."""
        with torch.inference_mode(False):
            problem = Problem(self._divisions, self._progress, plan.limits, plan.workload, machine, False, False)
            units, whole = self._divisions.of_plan(plan)
            return timeline(plan, problem.costs_of(units, whole), machine)

    def _follow(self, plan: Plan, problem: Problem) -> tuple[Plan, tuple[Unit, ...]]:
        """A plan that was made before: refused where it is another checkpoint's, or does not fit here and now."""
        if plan.fingerprint and plan.fingerprint != self._divisions.fingerprint:
            raise DeviceMapError(
                f"The plan was made for another checkpoint (fingerprint {plan.fingerprint[:12]}, this one has "
                f"{self._divisions.fingerprint[:12]}). Make one with bigmodel.make_plan(path)."
            )
        units, whole = self._divisions.of_plan(plan)
        homes = {placement.unit: placement.home for placement in plan.placements}
        runs = {placement.unit: (placement.run_on, placement.prefill_on) for placement in plan.placements}
        missing = sorted({*homes.values(), *plan.run_devices} - {*problem.tiers})
        if missing:
            raise DeviceMapError(
                f"The plan uses {', '.join(missing)}, and there is {', '.join(sorted(problem.tiers))} here. Make one for this "
                "machine with bigmodel.make_plan(path)."
            )
        # Decided again with these homes: the plan's own figures may be of another dtype, workload or machine.
        max_slots = max((group.num_slots for group in plan.slots), default=1)
        on_host = plan.run_devices == {"cpu"}
        followed = problem.settle(units, whole, homes=homes, runs=runs, max_slots=max_slots, on_host=on_host)
        if plan.rates_from and (plan.machine, plan.rates_from) != (followed.machine, followed.rates_from):
            note = f"it was made for {plan.machine} (rates: {plan.rates_from}); the times here are for this machine"
            followed = replace(followed, notes=(*followed.notes, note))
        return followed, units


def refuse_unknown(device_map: DeviceMap, machine: Machine) -> None:
    """DeviceMapError for what is no map, and for a map that needs an accelerator that the machine has not."""
    if not isinstance(device_map, (str, Mapping, Plan)):
        raise DeviceMapError(f"device_map is a {type(device_map).__name__}. Give a string, a dict or a Plan.")
    if isinstance(device_map, str) and device_map not in (*_AUTOMATIC, "cpu", "cuda"):
        raise DeviceMapError(
            f"device_map is {device_map!r}. Give 'auto', 'balanced', 'balanced_low_0', 'sequential', 'cpu', 'cuda', a dict of "
            "module names to tiers, or a Plan."
        )
    if device_map == "cuda" and not machine.accelerators:
        raise DeviceMapError(
            "device_map='cuda' wants everything on an accelerator, and there is none here. Use 'auto' or 'cpu'."
        )


def _slots_share(plan: Plan) -> float:
    """Bytes of slots over bytes that stream: what smaller slots could save at most."""
    slots = sum(group.num_slots * group.slot_bytes for group in plan.slots)
    return slots / plan.streamed_bytes if plan.streamed_bytes else 0.0


def _seconds(plan: Plan) -> float:
    """Of the plan's workload."""
    estimate = plan.estimate
    return (estimate.ttft_s or 0.0) + plan.workload.num_steps * (estimate.time_per_token_s or 0.0)
