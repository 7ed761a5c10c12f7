"""The exception tree. Everything that bigmodel raises on purpose is one of these.

::

    BigModelError
    |-- CheckpointError              the files are not what they should be
    |   |-- MissingFilesError        named by the index, or needed, and not there
    |   |-- MalformedFileError       truncated, overlapping, out of range, unknown dtype
    |   |-- UnsafeFileError          leaves the folder, or a pickle with code in it
    |   |-- UnsupportedCheckpointError   pre-quantised, or of a format that is not read
    |   `-- KeyMismatchError         missing, unexpected or mis-shaped weights
    |-- InvalidArgumentError         a wrong size, map, dtype or option (also a ValueError)
    |   `-- DeviceMapError           unknown or uncovered names, unknown tiers
    |-- DoesNotFitError              a tier's limit is too small: needed, available, what would do
    |-- BenchmarkError               nothing could be measured: why
    |-- TrainingError                a training loop cannot go on: why
    |-- LaunchError                  a process that was started failed: which one first, and why
    |-- SavingError                  a model cannot be written as asked; what was there is left as it was
    `-- StreamingError               while a loaded model runs
        |-- ReadError                the bytes of a unit could not be read
        |-- WeightNotResidentError   a weight was used where it cannot be shown
        |-- MoveRefusedError         .to(), .half() and the like on a streamed model
        |-- GradientRefusedError     a streamed unit was entered with gradients to keep
        `-- ForkedError              a forward in a forked child

Foreign errors (OSError, safetensors, huggingface_hub, pickle) are translated where the foreign package is owned.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = [
    "BenchmarkError",
    "BigModelError",
    "CheckpointError",
    "DeviceMapError",
    "DoesNotFitError",
    "ForkedError",
    "GradientRefusedError",
    "InvalidArgumentError",
    "KeyMismatchError",
    "LaunchError",
    "MalformedFileError",
    "MissingFilesError",
    "MoveRefusedError",
    "ReadError",
    "SavingError",
    "StreamingError",
    "TrainingError",
    "UnsafeFileError",
    "UnsupportedCheckpointError",
    "WeightNotResidentError",
    "join_some",
    "reason",
    "shown",
]


_SHOWN = 80  # characters of a value, in an error


class BigModelError(Exception):
    """Base of every error that bigmodel raises on purpose."""


class CheckpointError(BigModelError):
    """The files of a checkpoint are not what they should be."""


class MissingFilesError(CheckpointError, FileNotFoundError):
    """Files that the checkpoint needs are not there; the message says which of how many."""


class MalformedFileError(CheckpointError):
    """A file contradicts itself or its size: truncated, overlapping, out of range, unknown dtype."""


class UnsafeFileError(CheckpointError):
    """A file name leaves the checkpoint's folder, or a pickle holds more than weights."""


class UnsupportedCheckpointError(CheckpointError):
    """A checkpoint that is sound but not read, such as a pre-quantised one."""


class KeyMismatchError(CheckpointError):
    """Weights of the checkpoint and parameters of the model do not match; all differences are listed."""


class InvalidArgumentError(BigModelError, ValueError):
    """An argument has a value that means nothing here; the message names it and what would do."""


class DeviceMapError(InvalidArgumentError):
    """A device map names unknown modules or tiers, or leaves weights uncovered."""


class DoesNotFitError(BigModelError):
    """A tier's limit is too small.

    Attributes:
        tier: the tier's name, such as ``"cpu"`` or ``"cuda:0"``.
        needed_bytes: what would have to be there.
        available_bytes: what the limit leaves.
    """

    def __init__(self, message: str, *, tier: str, needed_bytes: int, available_bytes: int) -> None:
        super().__init__(message)
        self.tier = tier
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles with its numbers: a worker's error crosses to its parent."""
        return _rebuild, (str(self), self.tier, self.needed_bytes, self.available_bytes)


class BenchmarkError(BigModelError):
    """What was to be measured could not be run."""


class TrainingError(BigModelError):
    """A training loop cannot go on; the message says why."""


class LaunchError(BigModelError):
    """Of processes that were started together, one failed, or they did not come together.

    Attributes:
        exit_code: of the process that failed first; 128 and its number for a signal.
    """

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class SavingError(BigModelError):
    """A model cannot be written as asked; what was in the folder before is left as it was."""


class StreamingError(BigModelError):
    """Something went wrong, or was refused, while a loaded model ran."""


class ReadError(StreamingError):
    """The bytes of a unit could not be read; raised at the next step, with the unit's name."""


class WeightNotResidentError(StreamingError):
    """A weight was used outside its unit's forward where its bytes cannot be shown within the budget."""


class MoveRefusedError(StreamingError):
    """A streamed model cannot be moved or cast in place."""


class GradientRefusedError(StreamingError):
    """A streamed unit was entered in grad mode with an input or a parameter that requires grad."""


class ForkedError(StreamingError):
    """A streamed model was run in a forked child, where its reader threads do not exist."""


def join_some(items: Iterable[str], limit: int = 8, separator: str = ", ") -> str:
    """The first few of many names, and how many more there are."""
    items = list(items)
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join([*items[:limit], *more])


def shown(value: Any) -> str:
    """A value as an error shows it: cut where it is long, and described where it cannot be written at all."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits, or lists in lists in lists
        return f"a huge {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def reason(error: Exception) -> str:
    """Why something failed, as a clause inside an error that names the file itself: "No such file or directory"."""
    return (isinstance(error, OSError) and error.strerror) or str(error).rstrip(".")


def _rebuild(message: str, tier: str, needed_bytes: int, available_bytes: int) -> DoesNotFitError:
    return DoesNotFitError(message, tier=tier, needed_bytes=needed_bytes, available_bytes=available_bytes)
