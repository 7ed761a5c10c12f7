"""transformers and Accelerate, with the offloading that comes with them."""

from __future__ import annotations

import hashlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bigmodel.bench.peers.greedy import generate_greedily
from bigmodel.bench.peers.packages import versions_of
from bigmodel.units import format_bytes

__all__ = ["AccelerateDiskOffload", "TransformersAuto", "TransformersDisk"]


class _HuggingFace(ABC):
    """A model of transformers' own, and its `generate`."""

    limits: Mapping[Any, int] | None = None
    num_positions = 0
    environment: Mapping[str, str] = {}
    packages: tuple[str, ...] = ("transformers", "accelerate")
    _model: Any = None

    @abstractmethod
    def how(self) -> str:
        """The call."""

    def settings(self) -> str:
        return f"{versions_of(*self.packages)}, {self.how()}"

    def prepare(self, path: str, scratch: str) -> list[str]:
        return [str(file) for file in Path(path).iterdir() if file.is_file()]

    @abstractmethod
    def load(self, path: str, scratch: str) -> None: ...

    def generate(self, ids: list[int], new_tokens: int, on_token: Callable[[int], None]) -> None:
        device = self._model.device
        generate_greedily(
            self._model, ids, new_tokens, on_token, device="cpu" if device.type == "meta" else str(device)
        )


class TransformersAuto(_HuggingFace):
    """As much in memory as is allowed, the rest on disk."""

    def how(self) -> str:
        allowed = ", ".join(f"{tier}: {format_bytes(size)}" for tier, size in (self.limits or {}).items())
        return f'from_pretrained(device_map="auto", max_memory={{{allowed}}})' if allowed else 'device_map="auto"'

    def load(self, path: str, scratch: str) -> None:
        # Accelerate knows accelerators by their index.
        limits = {_index(tier): size for tier, size in (self.limits or {}).items() if tier != "disk"}
        self._model = _load(path, scratch, "auto", limits or None)


class TransformersDisk(_HuggingFace):
    """All weights on disk."""

    def how(self) -> str:
        return 'from_pretrained(device_map={"": "disk"})'

    def load(self, path: str, scratch: str) -> None:
        self._model = _load(path, scratch, {"": "disk"}, None)


class AccelerateDiskOffload(_HuggingFace):
    """`disk_offload` of a model whose weights its folder holds."""

    def how(self) -> str:
        return "disk_offload from a folder that holds the weights"

    def prepare(self, path: str, scratch: str) -> list[str]:
        from accelerate.utils import offload_state_dict

        import bigmodel

        folder = _offload_folder(path, scratch)
        if not (folder / "index.json").exists():
            for other in folder.parent.glob("*"):  # of a checkpoint as it was before
                shutil.rmtree(other)
            # Under transformers' names, as views of the files: nothing is in memory but what is being written.
            at_rest = bigmodel.load_sharded(path, device_map={"": "disk"}, progress=False)
            offload_state_dict(str(folder), at_rest.state_dict())
        return [str(file) for file in folder.iterdir()]

    def load(self, path: str, scratch: str) -> None:
        import torch
        from accelerate import disk_offload, init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(path)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)  # type: ignore[no-untyped-call]
        model.eval().tie_weights()
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        self._model = disk_offload(model, str(_offload_folder(path, scratch)), execution_device=device)


def _load(path: str, scratch: str, device_map: Any, max_memory: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype="auto",
        device_map=device_map,
        max_memory=max_memory,
        offload_folder=str(Path(scratch) / "transformers"),
    )
    return model.eval()


def _offload_folder(path: str, scratch: str) -> Path:
    """Of this content of this checkpoint."""
    stamps = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(Path(path).iterdir())
        if file.is_file()
    ]
    key = hashlib.sha256(f"{os.path.realpath(path)} {stamps}".encode()).hexdigest()[:16]
    return Path(scratch) / "accelerate" / key


def _index(tier: Any) -> Any:
    number = str(tier).rpartition(":")[2]
    return int(number) if number.isdigit() else tier
