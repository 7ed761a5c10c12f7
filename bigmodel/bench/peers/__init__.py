"""Other libraries that run the same checkpoint, each at its best documented settings."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

__all__ = ["CANDIDATES", "PEERS", "Peer"]


class Peer(Protocol):
    """One way in which another library runs a checkpoint: greedy, one sequence. Its packages are imported when it is asked.

    Attributes:
        limits: tier -> bytes that it may use, as `max_memory` has them; None where nothing limits it. Set by the caller.
        num_positions: tokens of the longest text, prompt and answer. Set by the caller.
        environment: variables that its process is started with.
    """

    limits: Mapping[Any, int] | None
    num_positions: int
    environment: Mapping[str, str]

    def settings(self) -> str:
        """Versions, and how it is set up, in one line.

        Raises:
            ImportError: it is not installed; the message names the package.
        """

    def prepare(self, path: str, scratch: str) -> list[str]:
        """Write what it needs below a folder, unless that is there; all files that it reads.

        Raises:
            InvalidArgumentError: it does not run this checkpoint.
        """

    def load(self, path: str, scratch: str) -> None:
        """Load what was prepared."""

    def generate(self, ids: list[int], new_tokens: int, on_token: Callable[[int], None]) -> None:
        """Give exactly so many tokens, each as soon as the host has it."""


def _candidate(module: str, name: str, *arguments: Any) -> Callable[[], Peer]:
    def make() -> Peer:
        peer: Peer = getattr(importlib.import_module(f"bigmodel.bench.peers.{module}"), name)(*arguments)
        return peer

    return make


CANDIDATES: dict[str, Callable[[], Peer]] = {
    "transformers, auto": _candidate("hugging_face", "TransformersAuto"),
    "transformers, disk": _candidate("hugging_face", "TransformersDisk"),
    "accelerate, disk_offload": _candidate("hugging_face", "AccelerateDiskOffload"),
    "llama.cpp, f16": _candidate("llama_cpp", "LlamaCpp", "f16"),
    "llama.cpp, bf16": _candidate("llama_cpp", "LlamaCpp", "bf16"),
    "deepspeed, ZeRO-3": _candidate("deepspeed", "DeepSpeedZero"),
    "airllm": _candidate("airllm", "AirLlm"),
}
"""What is run: title -> its maker."""

PEERS: dict[str, tuple[str, ...]] = {
    name: tuple(title for title in CANDIDATES if title.split(",")[0] == name)
    for name in ("transformers", "accelerate", "llama.cpp", "deepspeed", "airllm")
}
"""What may be asked for: name -> titles of its candidates."""
