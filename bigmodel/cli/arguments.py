"""What stands on a command line, as values: sizes per tier, device maps, prompts."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigmodel.checks import parse_json
from bigmodel.errors import InvalidArgumentError, reason, shown
from bigmodel.units import parse_bytes

if TYPE_CHECKING:
    from bigmodel.device_map.plan import Plan

__all__ = [
    "check_guesses",
    "check_sampling",
    "check_training",
    "parse_batch_size",
    "parse_device_map",
    "parse_limits",
    "read_prompt",
    "write_page",
]

_MOST_DIGITS = 30
# Of `bigmodel plan`: what only one of the two plans knows.
_OF_TRAINING = ("nodes", "gpus", "seq", "global_batch", "micro_batch", "strategy", "precision", "lora", "quantize_base")
_OF_RUNNING = (
    *("batch_size", "prompt_tokens", "new_tokens", "device_map", "dtype", "allow_cpu_compute", "html_file"),
    *("revision", "subfolder", "variant", "offload_folder"),
)


def check_sampling(
    sample: bool, *, temperature: float | None, top_p: float | None, top_k: int | None, seed: int | None
) -> None:
    """Refuses sampling options without --sample, and values that draw nothing."""
    if not sample and any(value is not None for value in (temperature, top_p, top_k, seed)):
        raise InvalidArgumentError("--temperature, --top-p, --top-k and --seed mean something only with --sample.")
    if temperature is not None and not 0 < temperature < math.inf:
        raise InvalidArgumentError(f"--temperature is {temperature}. Give a number above 0, or leave --sample out.")
    if top_p is not None and not 0 < top_p <= 1:
        raise InvalidArgumentError(f"--top-p is {top_p}. Give a number above 0 and at most 1.")


def check_guesses(*, lookup: bool, draft: str | None, prompts: str | None, output: str | None) -> None:
    """Refuses two kinds of guesses at once, guesses for many prompts, and a file for the answer to one."""
    if lookup and draft is not None:
        raise InvalidArgumentError("--lookup and --draft both guess tokens. Give one of them.")
    if prompts is not None and (lookup or draft is not None):
        raise InvalidArgumentError("--lookup and --draft guess for one text at a time. Leave them out with --prompts.")
    if output is not None and prompts is None:
        raise InvalidArgumentError("--output is for the answers to --prompts. Redirect stdout for the answer to one.")


def check_training(train: bool, stated: Collection[str]) -> None:
    """Refuses what a plan of training does not heed, and without --train what nothing else does.

    Args:
        stated: parameters of the command that stand on the command line.
    """
    unheeded = [
        f"--{name.removesuffix('_file').replace('_', '-')}"
        for name in (_OF_RUNNING if train else _OF_TRAINING)
        if name in stated
    ]
    if unheeded and train:
        raise InvalidArgumentError(
            f"{' and '.join(unheeded)} {_are(unheeded)} for a model that runs, and --train plans one that is trained. Leave "
            "them out, or --train."
        )
    if unheeded:
        raise InvalidArgumentError(
            f"{' and '.join(unheeded)} {_are(unheeded)} for a plan of training. Give --train with them."
        )


def _are(names: Collection[str]) -> str:
    return "is" if len(names) == 1 else "are"


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The text of --prompt, or of the file that --prompt-file names, without the newline that ends the file."""
    if (prompt is None) == (prompt_file is None):
        raise InvalidArgumentError("Give the text with --prompt or with --prompt-file, one of the two.")
    if prompt is not None:
        return prompt
    assert prompt_file is not None
    try:
        text = sys.stdin.read() if prompt_file == "-" else Path(prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"--prompt-file {prompt_file} cannot be read: {reason(error)}.") from error
    return text.removesuffix("\n")


def parse_batch_size(text: str) -> int | str:
    """A number, or ``auto``."""
    if text == "auto":
        return text
    if not _is_count(text) or int(text) < 1:
        raise InvalidArgumentError(f"--batch-size is {shown(text)}. Give a number from 1 on, or auto.")
    return int(text)


def parse_limits(text: str | None) -> dict[int | str, int] | None:
    """``cpu=8GiB,disk=500GB,0=20GiB`` as max_memory takes it."""
    if text is None:
        return None
    limits: dict[int | str, int] = {}
    for part in text.split(","):
        tier, equals, size = (piece.strip() for piece in part.partition("="))
        if not (tier and equals and size):
            raise InvalidArgumentError(
                f"--max-memory has {shown(part)}. Give TIER=SIZE pairs, such as cpu=8GiB,disk=500GB."
            )
        key = int(tier) if _is_count(tier) else tier
        if key in limits:
            raise InvalidArgumentError(f"--max-memory names {shown(tier)} twice. Give each tier once.")
        limits[key] = parse_bytes(int(size) if _is_count(size) else size, f"--max-memory {tier[:40]}")
    return limits


def _is_count(text: str) -> bool:
    """Whether it is a number that has not thousands of digits, which Python would not read."""
    return text.isdecimal() and len(text) <= _MOST_DIGITS


def parse_device_map(text: str) -> str | dict[str, Any] | Plan:
    """A map's name as it is; a JSON object, here or in a file, as a dict or as the plan that it is."""
    if text == "disk":
        return {"": "disk"}
    if text.endswith(".json") or (os.sep in text and not text.lstrip().startswith("{")):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgumentError(f"--device-map {text} cannot be read: {reason(error)}.") from error
    elif not text.lstrip().startswith("{"):
        return text
    value = parse_json(text, "--device-map")
    if not isinstance(value, dict):
        raise InvalidArgumentError(
            f"--device-map holds a JSON {type(value).__name__}. Give an object of names and tiers."
        )
    if isinstance(value.get("placements"), list):
        from bigmodel.device_map.plan import Plan

        return Plan.from_json(text)
    return value


def write_page(file: str, text: str | None) -> None:
    """Writes what --html asked for; None only tries whether that is possible, and leaves what is there, or is not."""
    place = Path(file)
    try:
        if text is None:
            was_there = place.exists()
            place.open("a").close()
            if not was_there:
                place.unlink()
        else:
            place.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(f"--html {file} cannot be written: {reason(error)}.") from error
