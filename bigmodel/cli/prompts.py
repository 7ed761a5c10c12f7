"""Many prompts: JSON lines in, JSON lines out, in order; what was answered before a kill is not answered again."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from bigmodel.errors import InvalidArgumentError, reason, shown

__all__ = ["Answers", "read_prompts"]

_ANSWER_FIELDS = ("text", "num_tokens")


def read_prompts(file: str, other: str | None = None) -> list[dict[str, Any]]:
    """The lines of a file, each an object with the text "prompt"; a line that is a string is one too. ``-`` is stdin.

    Args:
        file: what --prompts names.
        other: what --prompt or --prompt-file gave.

    Raises:
        InvalidArgumentError: with the number of the line that is none, or because there is another prompt.
    """
    if other is not None:
        raise InvalidArgumentError("--prompts stands for --prompt and --prompt-file. Give one of the three.")
    if file == "-" and os.environ.get("WORLD_SIZE", "1") != "1":
        raise InvalidArgumentError(
            "--prompts is -, and several processes were launched, which cannot share stdin. Give a file."
        )
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"--prompts {file} cannot be read: {reason(error)}.") from error
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidArgumentError(f"Line {number} of --prompts {file} is not JSON: {error}.") from error
        prompt = {"prompt": value} if isinstance(value, str) else value
        if not isinstance(prompt, dict) or not isinstance(prompt.get("prompt"), str) or not prompt["prompt"]:
            raise InvalidArgumentError(
                f'Line {number} of --prompts {file} is {shown(value)}. Give an object with a text, {{"prompt": "..."}}.'
            )
        taken = [name for name in _ANSWER_FIELDS if name in prompt]
        if taken:
            raise InvalidArgumentError(
                f"Line {number} of --prompts {file} has the field {taken[0]!r}, where the answer goes. Rename it."
            )
        found.append(prompt)
    if not found:
        raise InvalidArgumentError(f"--prompts {file} has no line. Give one object a line.")
    return found


class Answers:
    """Where answers are written, each the line of its prompt with "text" and "num_tokens" added.

    Args:
        file: continued where a run that ended early left it, a torn last line taken back; stdout if None.
        prompts: all of them, in order.

    Attributes:
        num_done: prompts that are answered in it already.

    Raises:
        InvalidArgumentError: the file holds answers to other prompts, or cannot be written.
    """

    def __init__(self, file: str | None, prompts: Sequence[Mapping[str, Any]]) -> None:
        self._file: IO[bytes] = sys.stdout.buffer
        self._is_file = file is not None
        self.num_done = 0
        if file is None:
            return
        try:
            self._file = open(file, "ab+")  # noqa: SIM115
            self._file.seek(0)
            written = self._file.read()
        except OSError as error:
            raise InvalidArgumentError(f"--output {file} cannot be written: {reason(error)}.") from error
        try:
            whole = written[: written.rfind(b"\n") + 1]
            for line in whole.splitlines():
                self._check(line, file, prompts)
                self.num_done += 1
            if len(whole) < len(written):
                self._file.truncate(len(whole))
        except BaseException:
            self._file.close()
            raise

    def write(self, answered: Sequence[Mapping[str, Any]]) -> None:
        """Lines that are on the disk when this returns."""
        for line in answered:
            self._file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        self._file.flush()
        if self._is_file:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; stdout stays open."""
        if self._is_file:
            self._file.close()

    def _check(self, line: bytes, file: str, prompts: Sequence[Mapping[str, Any]]) -> None:
        number = self.num_done + 1
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        asked = (
            {key: value for key, value in answer.items() if key not in _ANSWER_FIELDS} if _is_answer(answer) else None
        )
        if number > len(prompts) or asked != prompts[number - 1]:
            raise InvalidArgumentError(
                f"Line {number} of --output {file} is no answer to prompt {number}. Give the prompts that it was begun with, or "
                "another file."
            )


def _is_answer(value: Any) -> bool:
    return isinstance(value, dict) and all(name in value for name in _ANSWER_FIELDS)
