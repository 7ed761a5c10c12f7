"""What is wrong with a config.json, told as an error about it: sizes that cannot be, and whatever a model's own code raises."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from bigmodel.checkpoint import Checkpoint
from bigmodel.errors import CheckpointError, UnsupportedCheckpointError, join_some, shown
from bigmodel.units import GIB, format_bytes

__all__ = ["naming_config", "refuse_counts", "refuse_impossible", "refuse_no_blocks"]

# What a config may ask for: of what is built one by one, and of weights.
_MOST_COUNTS = {
    re.compile(r"(n|num)_(\w+_)?(layers?|experts|blocks)|(en|de)coder_layers"): 10_000,
    re.compile(r"num_labels"): 1_000_000,
}
_MOST_BYTES = 2**60


@contextlib.contextmanager
def naming_config(checkpoint: Checkpoint, class_name: str) -> Iterator[None]:
    """Whatever a model's own code raises, as an error about config.json."""
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines()] or [""]
        reason = " ".join(lines[: 2 if lines[0].endswith(":") else 1])  # torch goes on with frames of C++
        raise UnsupportedCheckpointError(
            f"{class_name} could not be built from {checkpoint.path / 'config.json'}: {type(error).__name__}: "
            f"{reason.rstrip('.')}. Check the file against the model's documentation, or give model=, a callable that "
            "builds it."
        ) from error


def refuse_counts(stated: Mapping[str, Any]) -> None:
    """ValueError where a config.json asks for so many of something that building them would not end."""
    parts = {"": stated} | {f"{name}.": part for name, part in stated.items() if isinstance(part, dict)}
    for where, part in parts.items():
        for name, value in part.items():
            most = next((most for pattern, most in _MOST_COUNTS.items() if pattern.fullmatch(name)), None)
            if most is not None and isinstance(value, (int, float)) and value > most:
                raise ValueError(f"{where}{name} is {shown(value)}, and at most {most} are built")


def refuse_no_blocks(config: Any) -> None:
    """ValueError where a model would be built without any block."""
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(count, int) and count < 1:
        raise ValueError(f"num_hidden_layers is {count}, and at least 1 must be there")


def refuse_impossible(model: nn.Module, checkpoint: Checkpoint) -> None:
    """CheckpointError for sizes that cannot be, before memory is given to buffers of such sizes."""
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    buffers = {name: buffer.nbytes for name, buffer in model.named_buffers() if buffer.is_meta}
    wrong = [f"{name} would have no elements" for name, size in sizes.items() if size == 0]
    wrong += [f"the buffer {name} would take {format_bytes(buffers[name])}" for name in buffers if buffers[name] > GIB]
    if sum(sizes.values()) > _MOST_BYTES:
        wrong.append(f"the weights would take {format_bytes(sum(sizes.values()))}")
    if wrong:
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'} describes a {type(model).__name__} that cannot be: "
            f"{join_some(wrong, limit=3)}. Check its sizes against the model's documentation."
        )
