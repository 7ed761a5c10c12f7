"""How near passes came to what the slowest resource allows, and what kept them from it. Pure: a plan and counts in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bigmodel.device_map.machine import DEFAULT_RATES, OTHER_DISK
from bigmodel.units import MIB, format_bytes

if TYPE_CHECKING:
    from bigmodel.device_map.plan import Plan
    from bigmodel.hooks.pace import Passes, Steady

__all__ = ["Limit", "limit_of"]

_LINK = "link to "
# Causes are told where less than this part of the limit was reached ...
_NEAR = 0.7
# ... and of these only what takes a good part of the time, or of the bytes.
_MUCH = 0.1
_SLOTS = 3  # one is computed with, one is ready, one is being filled
# A disk gives its rate to reads of megabytes.
_SHORT_BYTES = MIB
# Computation is slower than planned beyond what plans are off by.
_SLOWER = 1.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What bound the passes that were done, and how near they came to it.

    Attributes:
        binds: the resource that needed the most time for what was done: "disk", "link to cuda:0", "memory of cpu", ...
        fraction: of the limit that was reached: the seconds that the slowest resource of each kind of pass needed at least, over
            those that passed, by the host's clock: where an accelerator computes and nobody waits for its tokens it means little.
        least_s: resource -> seconds that it needed at least for what was done.
        rate_bytes_per_s: that the binding resource gave, over all of the time; None for arithmetic.
        rests_on: "rates" (measured by `calibrate`, or stated in a machine file), "reached" (the best that the binding
            resource gave in this process, where nobody measured it), or "defaults" (an assumed rate: the fraction is a guess).
        causes: why less than 0.7 of it was reached, as far as that was measured, and what to change.
    """

    binds: str
    fraction: float
    least_s: Mapping[str, float]
    rate_bytes_per_s: float | None = None
    rests_on: str = "rates"
    causes: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """As one reads it at a glance: ``disk 2.15 GiB/s, 94% of the limit``."""
        rate = "" if self.rate_bytes_per_s is None else f" {format_bytes(self.rate_bytes_per_s)}/s"
        of = {"reached": "the best rate it reached", "defaults": "an assumed limit"}.get(self.rests_on, "the limit")
        return f"{self.binds}{rate}, {self.fraction:.0%} of {of}"

    def __str__(self) -> str:
        return "\n".join([self.headline, *self.causes])


def limit_of(plan: Plan, steady: Steady) -> Limit | None:
    """What bound passes that were done.

    Bytes that were read and copied count as they were measured. What memory and arithmetic need at least is the plan's, by the
    tokens of the passes.

    Args:
        plan: that was carried out.
        steady: a difference of two counts.

    Returns:
        None where no pass was done, or nothing is known of what it needs.
    """
    if steady.wall_s <= 0:
        return None
    rates = _Rates(plan, steady)
    needed = [_needed(plan, rates, steady, phase) for phase in ("prefill", "decode")]
    least: dict[str, float] = {}
    for each in needed:
        for resource, seconds in each.items():
            least[resource] = least.get(resource, 0.0) + seconds
    # An assumed rate that would have taken longer than everything took is disproved.
    least = {name: s for name, s in least.items() if s > 0 and (not rates.are_assumed(name) or s <= steady.wall_s)}
    if not least:
        return None
    binds = max(least, key=lambda resource: least[resource])
    bound_s = sum(max((each.get(resource, 0.0) for resource in least), default=0.0) for each in needed)
    fraction, rate = bound_s / steady.wall_s, rates.of(binds)
    return Limit(
        binds=binds,
        fraction=fraction,
        least_s=least,
        rate_bytes_per_s=None if rate is None else least[binds] * rate / steady.wall_s,
        rests_on=rates.rest_on(binds),
        causes=() if fraction >= _NEAR else tuple(_causes(plan, steady, rates, bound_s)),
    )


class _Rates:
    """Bytes/s of each resource: the plan's, or where nobody measured them, the best that was reached."""

    def __init__(self, plan: Plan, steady: Steady) -> None:
        self._known = plan.estimate.bytes_per_s
        self._are_defaults = plan.rates_from in ("", DEFAULT_RATES)
        self._reached: dict[str, float] = {}
        if self._are_defaults or plan.rates_from.endswith(OTHER_DISK):
            self._reached["disk"] = steady.flow.reads.best_bytes_per_s
        if self._are_defaults:
            for device, moved in steady.flow.copies.items():
                self._reached[_LINK + device] = moved.num_bytes / moved.busy_s if moved.busy_s > 0 else 0.0

    def of(self, resource: str) -> float | None:
        return self._reached.get(resource) or self._known.get(resource)

    def rest_on(self, resource: str) -> str:
        if self._reached.get(resource):
            return "reached"
        return "defaults" if self.are_assumed(resource) else "rates"

    def are_assumed(self, resource: str) -> bool:
        if resource in self._reached:
            return not self._reached[resource]
        return self._are_defaults


def _needed(plan: Plan, rates: _Rates, steady: Steady, phase: str) -> dict[str, float]:
    """Resource -> seconds that passes of one kind needed at least."""
    passes = steady.prefills if phase == "prefill" else steady.steps
    found: dict[str, float] = {}
    moved = {"disk": passes.read_bytes} | {_LINK + device: size for device, size in passes.copied_bytes.items()}
    for resource, num_bytes in moved.items():
        rate = rates.of(resource)
        if num_bytes > 0 and rate:
            found[resource] = num_bytes / rate
    least = plan.estimate.least_s
    at_prompt, at_step = least.get("prefill", {}), least.get("decode", {})
    for resource in {**at_prompt, **at_step}:
        if resource != "disk" and not resource.startswith(_LINK):
            ends = at_step.get(resource, 0.0), at_prompt.get(resource, 0.0)
            found[resource] = _by_tokens(plan, passes, *ends, is_prefill=phase == "prefill")
    return found


def _by_tokens(plan: Plan, passes: Passes, at_step: float, at_prompt: float, *, is_prefill: bool) -> float:
    """Seconds of passes, on the line through a step and the planned prompt."""
    few = plan.workload.num_sequences
    many = few * plan.workload.prompt_tokens
    if not passes.num_tokens or many <= few:
        return passes.num_passes * (at_prompt if is_prefill else at_step)
    slope = (at_prompt - at_step) / (many - few)
    return max(0.0, passes.num_passes * at_step + slope * (passes.num_tokens - passes.num_passes * few))


def _causes(plan: Plan, steady: Steady, rates: _Rates, bound_s: float) -> Iterator[str]:
    found = [
        *_of_page_cache(plan, steady),
        *_of_disk(steady, rates),
        *_of_links(steady, rates),
        *_of_slots(plan, steady),
        *_of_computation(plan, steady, rates, bound_s),
        *_of_outside(steady),
    ]
    if found:
        yield from found
        return
    yield (
        f"nothing that was measured explains it: of {steady.wall_s:.3g} s, {steady.flow.reads.busy_s:.3g} s were spent reading "
        f"and {steady.stall_s:.3g} s waiting for weights; bigmodel calibrate measures again what this machine gives"
    )


def _of_page_cache(plan: Plan, steady: Steady) -> Iterator[str]:
    reads = steady.flow.reads
    total = reads.num_bytes + reads.cached_bytes
    if reads.buffered_bytes > _MUCH * total:
        yield (
            f"{format_bytes(reads.buffered_bytes)} of {format_bytes(total)} were read through the page cache, because this file "
            "system refuses direct reads (O_DIRECT): move the checkpoint to one that has them, such as ext4, xfs or btrfs"
        )
    if reads.cached_bytes > _MUCH * total:
        yield (
            f"{format_bytes(reads.cached_bytes)} of {format_bytes(total)} were copied out of the page cache, so there is memory "
            f"for them: raise max_memory['cpu'] by up to {format_bytes(plan.streamed_bytes_from('disk'))}, and where the map is "
            "'auto' they stay"
        )


def _of_disk(steady: Steady, rates: _Rates) -> Iterator[str]:
    reads, known = steady.flow.reads, rates.of("disk")
    if not known or reads.busy_s <= _MUCH * steady.wall_s or reads.num_bytes >= _NEAR * known * reads.busy_s:
        return
    gave = f"the disk gave {format_bytes(reads.num_bytes / reads.busy_s)}/s while it was read"
    mean = reads.num_bytes / max(1, reads.num_blocks)
    if mean < _SHORT_BYTES:
        yield (
            f"{gave}, in reads of {format_bytes(mean)}, too short for its rate of {format_bytes(known)}/s: the units are small, "
            "keep them in memory with a larger max_memory['cpu']"
        )
        return
    before = "gave before" if rates.rest_on("disk") == "reached" else "was measured to give"
    yield (
        f"{gave}, and {before} {format_bytes(known)}/s: end what else reads it (iotop -o shows that) or lift the volume's "
        "throttle; if that is its rate now, run bigmodel calibrate"
    )


def _of_links(steady: Steady, rates: _Rates) -> Iterator[str]:
    flow = steady.flow
    if not flow.is_page_locked and any(moved.busy_s > _MUCH * steady.wall_s for moved in flow.copies.values()):
        yield (
            "the system refused to page-lock host memory, and weights are copied through small buffers: raise the limit on "
            "locked memory (ulimit -l), or state less max_memory['cpu']"
        )
    for device, moved in flow.copies.items():
        known = rates.of(_LINK + device)
        is_slow = known and moved.num_bytes < _NEAR * known * moved.busy_s
        if is_slow and moved.busy_s > _MUCH * steady.wall_s and rates.rest_on(_LINK + device) == "rates":
            yield (
                f"the link to {device} gave {format_bytes(moved.num_bytes / moved.busy_s)}/s while it copied, and was measured "
                f"to give {format_bytes(known or 0)}/s: end what else uses it, and look at its width (nvidia-smi -q, or "
                "lspci -vv); if that is its rate now, run bigmodel calibrate"
            )


def _of_slots(plan: Plan, steady: Steady) -> Iterator[str]:
    """Fetching and computing took turns: neither the disk nor a link was busy all of the time, and weights were waited for."""
    busy_s = max([steady.flow.reads.busy_s, *(moved.busy_s for moved in steady.flow.copies.values())])
    num_entries = steady.num_hits + steady.num_misses
    waits = steady.stall_s > _MUCH * steady.wall_s or steady.num_misses > _MUCH * num_entries
    if not waits or busy_s >= (1 - _MUCH) * steady.wall_s:
        return
    is_told = False
    for group in plan.slots:
        missing = min(_SLOTS, len(group.units)) - group.num_slots
        if missing > 0:
            is_told = True
            slots = "1 slot" if group.num_slots == 1 else f"{group.num_slots} slots"
            yield (
                f"{len(group.units)} units take turns in {slots}, so that reading waits for the computation and the computation "
                f"for reading: raise max_memory[{group.device!r}] by {format_bytes(missing * group.slot_bytes)}"
            )
    if not is_told and steady.num_misses > _MUCH * num_entries:
        yield (
            f"{steady.num_misses} of {num_entries} units were asked for only when they were needed, because passes differ in the "
            "order of their units: run passes of one kind after each other"
        )


def _of_computation(plan: Plan, steady: Steady, rates: _Rates, bound_s: float) -> Iterator[str]:
    if plan.run_devices != {"cpu"}:  # an accelerator waits by itself: what it computes is not known
        return
    computed_s = steady.pass_s - steady.stall_s
    if computed_s < 0.5 * steady.wall_s:
        return
    per_pass = f"passes computed for {computed_s / max(1, steady.num_passes):.3g} s each"
    estimate = plan.estimate
    ends = estimate.time_per_token_s or 0.0, estimate.ttft_s or 0.0
    planned_s = _by_tokens(plan, steady.prefills, *ends, is_prefill=True)
    planned_s += _by_tokens(plan, steady.steps, *ends, is_prefill=False)
    used = steady.cpu_s / computed_s
    if steady.num_threads < steady.num_processors:
        yield (
            f"{per_pass} with {steady.num_threads} of {steady.num_processors} processors: call "
            f"torch.set_num_threads({steady.num_processors}), or set OMP_NUM_THREADS={steady.num_processors}"
        )
    elif rates.rest_on("memory of cpu") == "rates" and computed_s > _SLOWER * planned_s:
        yield (
            f"{per_pass} on {used:.1f} of {steady.num_threads} processors, and {planned_s / max(1, steady.num_passes):.3g} s "
            "were planned: end what else computes (top shows that); if the processors are slower now, run bigmodel calibrate"
        )
    elif rates.rest_on("memory of cpu") == "rates":
        yield (
            f"{per_pass}, where moving bytes and arithmetic need {bound_s / max(1, steady.num_passes):.3g} s: the rest is what "
            "each operator takes by itself; do more in a pass, with a larger Workload(batch_size=...), --prompts or --lookup"
        )


def _of_outside(steady: Steady) -> Iterator[str]:
    if steady.outside_s > _MUCH * steady.wall_s:
        yield (
            f"{steady.outside_s / steady.wall_s:.0%} of the time lay between passes, where a draft guesses, and tokens are "
            "sampled, decoded and taken: do slow work in another thread (transformers' TextIteratorStreamer), or after generate"
        )
