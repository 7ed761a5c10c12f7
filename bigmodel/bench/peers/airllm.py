"""AirLLM: one file per layer, read when the layer runs and dropped after it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bigmodel.bench.peers.greedy import generate_greedily, open_text_model
from bigmodel.bench.peers.packages import versions_of
from bigmodel.checkpoint import Checkpoint
from bigmodel.errors import InvalidArgumentError, join_some
from bigmodel.models import Skeleton

__all__ = ["AirLlm"]

_PACKAGES = ("airllm", "transformers", "accelerate")
_FOLDER = "airllm"
_RECORD = "prepared.json"
# AirLLM takes these where they are there, and only then safetensors.
_READ_FIRST = "pytorch_model.bin.index.json"
_READ = ("model.safetensors.index.json", "model.safetensors")


class AirLlm:
    """Its layer-by-layer mode, with the prefetching that is its default, in the checkpoint's dtype."""

    name = "AirLLM"
    environment: Mapping[str, str] = {}

    def __init__(self) -> None:
        self._model: Any = None

    def settings(self) -> str:
        """Versions and settings, in one line.

        Raises:
            ImportError: a package is missing; the message names it.
        """
        return f"{versions_of(*_PACKAGES)}, a file per layer, prefetching, no compression, on {_device()}"

    def prepare(self, path: str, scratch: str) -> list[str]:
        """Has AirLLM split the checkpoint into a file per layer below `scratch`; once.

        Returns:
            All files that it will read.

        Raises:
            ImportError: a package is missing; the message names it.
            InvalidArgumentError: AirLLM cannot run this checkpoint; the message says why.
        """
        versions = versions_of(*_PACKAGES)
        checkpoint, skeleton = open_text_model(path, self.name)
        class_name = _refuse_what_it_cannot_place(checkpoint, skeleton)
        folder = Path(scratch) / _FOLDER
        settings = [
            str(file)
            for name in ("config.json", "generation_config.json")
            if (file := checkpoint.path / name).is_file()
        ]
        key = f"{checkpoint.content_key} {versions}"
        if (record := _read_record(folder)) is not None and record["key"] == key:
            return [*record["sizes"], *settings]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        import airllm

        names = _layer_names(class_name)
        written = Path(airllm.split_and_save_layers(checkpoint.path, str(folder), layer_names=names))
        sizes = {str(file): file.stat().st_size for file in sorted(written.glob("*.safetensors"))}
        partial = folder / f"{_RECORD}.partial"
        partial.write_text(json.dumps({"key": key, "class_name": class_name, "sizes": sizes}))
        os.replace(partial, folder / _RECORD)
        return [*sizes, *settings]

    def load(self, path: str, scratch: str) -> None:
        """Builds the model without its weights, and the hooks that bring them.

        Raises:
            InvalidArgumentError: `prepare` has not been called with these two.
        """
        import airllm

        folder = Path(scratch) / _FOLDER
        record = _read_record(folder)
        if record is None:
            raise InvalidArgumentError(f"{folder} holds no layers of {path}. Call prepare first.")

        class WithoutTokenizer(getattr(airllm, record["class_name"])):  # type: ignore[misc]
            def get_tokenizer(self, hf_token: str | None = None) -> None:
                """None: ids come in and ids go out, and a checkpoint need not have one."""

        self._model = WithoutTokenizer(path, device=_device(), layer_shards_saving_path=str(folder), prefetching=True)

    def generate(self, ids: list[int], new_tokens: int, on_token: Callable[[int], None]) -> None:
        """Exactly `new_tokens` tokens, greedy; `on_token` is called with each."""
        generate_greedily(self._model, ids, new_tokens, on_token, device=_device())


def _device() -> str:
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def _layer_names(class_name: str) -> dict[str, Any]:
    """What a class of AirLLM calls the modules that it streams; asked of an object that nothing was loaded for."""
    import airllm

    blank = object.__new__(getattr(airllm, class_name))
    blank.set_layer_names_dict()
    names: dict[str, Any] = blank.layer_names_dict
    return names


def _refuse_what_it_cannot_place(checkpoint: Checkpoint, skeleton: Skeleton) -> str:
    """The name of the class that AirLLM has for the checkpoint.

    AirLLM puts tensors into the parameters of their names, module by module. What no module of its list holds stays away,
    silently, and what transformers renames or merges while it loads has no parameter to go to.
    """
    from airllm.auto_model import ARCH_OVERRIDES

    if (checkpoint.path / _READ_FIRST).exists() or not any((checkpoint.path / name).exists() for name in _READ):
        raise InvalidArgumentError(
            f"AirLLM looks for {_READ_FIRST}, {' and '.join(_READ)}, in this order, and {checkpoint.path} should have "
            "one of the last two and not the first."
        )
    architecture = ((checkpoint.config or {}).get("architectures") or [""])[0]
    class_name: str = ARCH_OVERRIDES.get(architecture, "AirLLMBaseModel")
    named = _layer_names(class_name).values()
    places = tuple(f"{name}." for value in named for name in ([value] if isinstance(value, str) else value))
    if homeless := [name for name in checkpoint.tensors if not name.startswith(places)]:
        raise InvalidArgumentError(
            f"AirLLM ({class_name}) streams {join_some(places)} and would leave out {join_some(homeless)}."
        )
    if moved := [name for name in skeleton.sources if name not in checkpoint.tensors]:
        raise InvalidArgumentError(
            f"AirLLM places tensors by their names in the checkpoint, and transformers makes {join_some(moved)} "
            "of others while it loads."
        )
    return class_name


def _read_record(folder: Path) -> dict[str, Any] | None:
    """What `prepare` left, if all files are there in their lengths."""
    try:
        record: dict[str, Any] = json.loads((folder / _RECORD).read_text())
        whole = all(os.path.getsize(file) == size for file, size in record["sizes"].items())
    except (OSError, ValueError):
        return None
    return record if whole else None
