"""What to try next after a pass that memory was too small for: a note on the error, which stays the one that was raised."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from bigmodel.training.config import TrainingConfig
from bigmodel.training.place import Division

__all__ = ["note_shortage", "smaller"]

_TOLD = "bigmodel: "
_OF_EVALUATION = (
    "memory ran out in a pass that is not trained on. Give it fewer or shorter samples (a DataLoader's batch_size)."
)


def note_shortage(config: TrainingConfig, division: Division, *, is_training: bool, is_host: bool) -> None:
    """Add a note to the error that is being handled, if memory ran out, and none was added yet.

    Args:
        config: of the run.
        division: of its global batches.
        is_training: whether the pass was to be trained on.
        is_host: whether it was computed in the host's memory.
    """
    error = sys.exc_info()[1]
    if error is None or not _is_shortage(error):
        return
    if not any(each.startswith(_TOLD) for each in getattr(error, "__notes__", ())):
        error.add_note(_TOLD + (_advice(config, division, is_host) if is_training else _OF_EVALUATION))


def smaller(micro_batch_size: int, num_each: int) -> int:
    """The largest smaller size that needs more passes for as many samples; 0 where there is none."""
    if micro_batch_size <= 1:
        return 0
    passes = math.ceil(num_each / micro_batch_size)
    return min(math.ceil(num_each / (passes + 1)), micro_batch_size - 1)


def _advice(config: TrainingConfig, division: Division, is_host: bool) -> str:
    together, micro = division.global_batch_size, division.micro_batch_size
    following = smaller(micro, math.ceil(together / division.num_processes))
    told = f"memory ran out in a pass of {micro} sample{'s' if micro > 1 else ''}. "
    if following:
        return (
            f"{told}The next to try is micro_batch_size={following} (of a DataLoader: its batch_size), with "
            f"global_batch_size={together}, which trains to the same."
        )
    others = []
    if config.activation_checkpointing != "on":
        others.append('activation_checkpointing="on"')
    if config.strategy in ("auto", "single", "ddp"):
        others.append('strategy="fsdp" over more processes')
    elif config.offload_params == config.offload_optimizer == "none" and not is_host:
        others.append('offload_optimizer="cpu"' + (' with offload_params="cpu"' if config.strategy == "fsdp" else ""))
    others.append("shorter samples")
    return told + f"It cannot be smaller; what is left to try: {', '.join(others)}."


def _is_shortage(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text: Any = str(error)
    # What torch's allocator on the host raises has no class of its own.
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)
