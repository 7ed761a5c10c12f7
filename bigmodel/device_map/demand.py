"""What has to be placed: the units of a model with what each takes, and what is in memory beside them."""

from __future__ import annotations

from dataclasses import dataclass

from bigmodel.device_map.plan import Workload
from bigmodel.device_map.rates import NOTHING, Work
from bigmodel.device_map.unit import Unit

__all__ = ["CONTEXT_BYTES", "RESERVE_BYTES", "Costs", "Demand", "UnitCost"]

# Threads' stacks, the allocator's holes, caches of the interpreter and of oneDNN: what no formula below sees (measured on
# tiny models, where it is all there is: 10-30 MiB; with 48 MiB, 2 of 50 runs of a 1.3B model were 2 MiB over).
RESERVE_BYTES = 56 << 20
# Of an accelerator's memory: its context and kernels (300-500 MiB on CUDA by nvidia-smi, an assumption until it is measured
# here), and holes of its allocator.
CONTEXT_BYTES = 768 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitCost:
    """What one unit takes, wherever it rests.

    Attributes:
        unit: which.
        weight_bytes: in the dtypes that the model has.
        resident_bytes: in host memory, alignment included.
        slot_bytes: of a slot that it can be fetched into.
        read_bytes: that one fetch reads from disk; `slot_bytes` if 0.
        staging_bytes: of the buffer that one of its reads goes through, 0 if all go straight into place.
        conversion_bytes: held for a moment while its weights are converted: what goes in, what comes out, and a copy.
        converted_bytes: written to the disk tier where it rests there, because its bytes do not stand in the files.
        can_gather: it may rest on disk without a slot: its rows are looked up in a map of the file.
        must_stay: it cannot stream: it encloses other units, or its weights are in no file.
        is_part: a map divides the unit that it belongs to.
        prefill, decode: its work in the workload's first pass, and in one in the middle of what is generated; None where it does
            not run in it.
        kv_bytes: of the cache that it makes, at the workload's last token.
        can_move_cache: its part of the cache can be told from the others', so that different devices may run it by turns.
        experts: (number, how many of them a token is given to, bytes of each), where it has experts.
    """

    unit: Unit
    weight_bytes: int
    resident_bytes: int
    slot_bytes: int
    read_bytes: int = 0
    staging_bytes: int = 0
    conversion_bytes: int = 0
    converted_bytes: int = 0
    can_gather: bool = False
    must_stay: bool = False
    is_part: bool = False
    prefill: Work | None = NOTHING
    decode: Work | None = NOTHING
    kv_bytes: int = 0
    can_move_cache: bool = False
    experts: tuple[int, float, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What has to be in memory beside the weights, in bytes.

    Attributes:
        kv_bytes: the cache at the workload's last token, that of units included.
        activation_bytes: the largest that a pass of the workload holds beside it.
        buffer_bytes: the model's buffers.
        baseline_bytes: what the interpreter holds, outside the budget.
        device_activation_bytes: as `activation_bytes`, on an accelerator, whose kernels and allocator keep other things.
        prompt_kv_bytes: the cache after the first pass.
        prefill_activation_bytes, decode_activation_bytes: as `activation_bytes`, of the first pass, and of a step.
    """

    kv_bytes: int
    activation_bytes: int
    buffer_bytes: int
    baseline_bytes: int = 0
    device_activation_bytes: int = 0
    prompt_kv_bytes: int = 0
    prefill_activation_bytes: int = 0
    decode_activation_bytes: int = 0

    @property
    def prompt_share(self) -> float:
        """Of the cache at the workload's last token, what is there after the first pass."""
        return self.prompt_kv_bytes / max(1, self.kv_bytes)

    @property
    def total_bytes(self) -> int:
        """Of host memory, where everything runs on the CPU."""
        return self.kv_bytes + self.activation_bytes + self.buffer_bytes + RESERVE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """All that a plan is made from, beside the machine and its limits.

    Attributes:
        units: in order of definition, which is taken for the order in which they run.
        demand: beside their weights.
        workload: what both were measured for.
        prefill, decode: work of a pass outside all units.
        recorded: work of a pass that is recorded and its backward, where the workload trains and it could be tried.
        hidden_bytes: that one token of one sequence hands from one unit to the next.
        num_readers: threads that read at once; each has a buffer where reads cannot go straight into place.
        ring_bytes: of the host's buffers on the way to accelerators, where there are any.
    """

    units: tuple[UnitCost, ...]
    demand: Demand
    workload: Workload
    prefill: Work = NOTHING
    decode: Work = NOTHING
    recorded: Work | None = None
    hidden_bytes: int = 0
    num_readers: int = 1
    ring_bytes: int = 0
