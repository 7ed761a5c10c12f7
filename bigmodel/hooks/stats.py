"""What a streamed model did: the measured twin of the plan's estimate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bigmodel.hooks.limit import Limit, limit_of
from bigmodel.hooks.pace import Steady

if TYPE_CHECKING:
    from bigmodel.device_map.plan import Plan

__all__ = ["StreamStats"]


@dataclass(frozen=True, slots=True)
class StreamStats:
    """Counts since the model was loaded. Subtract two of them for what happened in between.

    Attributes:
        num_passes: forward passes that were completed: of the root, or of a part that was called by itself (an encoder).
        pass_s: wall seconds inside passes.
        stall_s: wall seconds in which the computation on the host waited for weights; an accelerator waits by itself, uncounted.
        num_reads: units that were read into a slot.
        read_bytes: bytes read from files for them.
        num_hits: entries that found their unit in a slot, or on its way there.
        num_misses: entries for which the read began only then.
        resident_bytes: weights that rest in host memory, as private memory or as a map.
        mapped_bytes: those of them that are a map of the file: shared with the page cache, and read again if it is evicted.
        slot_bytes: memory of the slots.
        copied_bytes: of weights that were copied to accelerators, for units that were put into a slot there.
        steady: passes after the first one: when they were, and what was read and copied meanwhile.
        plan: that was carried out; None where nobody made one.
    """

    num_passes: int = 0
    pass_s: float = 0.0
    stall_s: float = 0.0
    num_reads: int = 0
    read_bytes: int = 0
    num_hits: int = 0
    num_misses: int = 0
    resident_bytes: int = 0
    mapped_bytes: int = 0
    slot_bytes: int = 0
    copied_bytes: int = 0
    steady: Steady = field(default_factory=Steady, repr=False)
    plan: Plan | None = field(default=None, repr=False, compare=False)

    @property
    def bytes_per_pass(self) -> float:
        """Bytes read for one pass, on average."""
        return self.read_bytes / self.num_passes if self.num_passes else 0.0

    @property
    def stall_fraction(self) -> float:
        """Share of the time inside passes that was spent waiting for weights, 0..1."""
        return self.stall_s / self.pass_s if self.pass_s else 0.0

    @property
    def limit(self) -> Limit | None:
        """What bound the passes after the model's first one, and how near they came to it; None where there were none."""
        if self.plan is None:
            return None
        return limit_of(self.plan, self.steady)

    def __sub__(self, earlier: StreamStats) -> StreamStats:
        """What happened since `earlier`; sizes are as they are now."""
        return StreamStats(
            num_passes=self.num_passes - earlier.num_passes,
            pass_s=self.pass_s - earlier.pass_s,
            stall_s=self.stall_s - earlier.stall_s,
            num_reads=self.num_reads - earlier.num_reads,
            read_bytes=self.read_bytes - earlier.read_bytes,
            copied_bytes=self.copied_bytes - earlier.copied_bytes,
            num_hits=self.num_hits - earlier.num_hits,
            num_misses=self.num_misses - earlier.num_misses,
            resident_bytes=self.resident_bytes,
            mapped_bytes=self.mapped_bytes,
            slot_bytes=self.slot_bytes,
            steady=self.steady - earlier.steady,
            plan=self.plan,
        )
