"""Random-weight checkpoints for benchmarks.gpu: true shapes in as many layers as there is room for.

They are written from one pool of random numbers, straight to the files: as fast as the disk takes them.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

__all__ = ["bytes_of", "files_of", "make", "sizes"]

GIB = 1 << 30
# Layers of a dense model of 34 billion parameters; and of BLOOM, with a small vocabulary: its table is larger than a layer.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 64000,
    "max_position_embeddings": 16384,
    "dtype": "bfloat16",
}
BLOOM = {
    "architectures": ["BloomForCausalLM"],
    "model_type": "bloom",
    "hidden_size": 14336,
    "n_head": 112,
    "vocab_size": 16384,
    "dtype": "bfloat16",
}
SMALL = LLAMA | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 16000,
}
TINY = SMALL | {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 1024,
}
TINY_BLOOM = BLOOM | {"hidden_size": 512, "n_head": 8, "vocab_size": 1024}
SHAPES = {
    "llama": LLAMA,
    "bloom": BLOOM,
    "small": SMALL,
    "quick-llama": TINY,
    "quick-bloom": TINY_BLOOM,
}
# Of the free disk and of the host's memory; and the most, so that a load takes seconds. Together 0.59 of the disk.
ROOM = {"llama": (0.23, 0.5, 14 * GIB), "bloom": (0.34, 0.5, 20 * GIB), "small": (0.02, 0.1, 2 * GIB)}
QUICK_BYTES = 48 << 20
# With fewer of them nothing takes turns: the shape is made narrower until so many fit.
LEAST_LAYERS = 4
FILE_BYTES = 2 * GIB
POOL_ELEMENTS = 64 << 20


def sizes(free_disk_bytes: int, host_bytes: int, *, is_quick: bool) -> dict[str, int]:
    """Name -> bytes that the checkpoint may have, such that all of them leave two fifths of the disk."""
    if is_quick:
        return dict.fromkeys(("quick-llama", "quick-bloom"), QUICK_BYTES)
    return {
        name: int(min(of_disk * free_disk_bytes, of_host * host_bytes, most))
        for name, (of_disk, of_host, most) in ROOM.items()
    }


def files_of(folder: str | os.PathLike[str]) -> list[Path]:
    return sorted(Path(folder).glob("*.safetensors"))


def bytes_of(folder: str | os.PathLike[str]) -> int:
    return sum(file.stat().st_size for file in files_of(folder))


def make(out: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Write checkpoints into ``out / name``, once; an interrupted call leaves nothing that looks whole.

    Args:
        out: the folder of all of them.
        sizes: name, of SHAPES -> bytes that its weights have at most.

    Returns:
        ``num_bytes`` of them, and the ``seconds`` that it took.
    """
    begun = time.perf_counter()
    folders = [_made(out, name, num_bytes) for name, num_bytes in sizes.items()]
    return {"num_bytes": sum(map(bytes_of, folders)), "seconds": time.perf_counter() - begun}


def _made(out: str, name: str, num_bytes: int) -> Path:
    folder = Path(out) / name
    if not (folder / "config.json").exists():
        partial = Path(out) / f".{name}.partial-{os.getpid()}"
        for left in Path(out).glob(f".{name}.partial-*"):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        config, shapes = _fitted(SHAPES[name], num_bytes)
        _write(partial, shapes)
        (partial / "config.json").write_text(json.dumps(config, indent=1))
        partial.rename(folder)
    return folder


def _depth_key(config: Mapping[str, Any]) -> str:
    return "n_layer" if config["model_type"] == "bloom" else "num_hidden_layers"


def _fitted(config: dict[str, Any], num_bytes: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The shape, narrower where too few layers would fit, with as many layers as fit; and its tensors."""
    key = _depth_key(config)
    while True:
        one, two = (_nbytes(_tensors(config | {key: layers})) for layers in (1, 2))
        layers = 1 + (num_bytes - one) // (two - one)
        if layers >= LEAST_LAYERS or config["hidden_size"] <= 256:
            fitted = config | {key: max(2, layers)}
            return fitted, _tensors(fitted)
        heads = [name for name in ("n_head", "num_attention_heads") if name in config]
        config = config | {name: config[name] // 2 for name in ("hidden_size", *heads)}
        if "intermediate_size" in config:
            config["intermediate_size"] //= 2
        if "num_key_value_heads" in config:
            config["num_key_value_heads"] = min(config["num_key_value_heads"], config["num_attention_heads"])


def _tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **settings), dtype=torch.bfloat16
        )
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _nbytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(map(_size, shapes.values()))


def _size(shape: tuple[int, ...]) -> int:
    count = 2
    for length in shape:
        count *= length
    return count


def _write(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    import torch

    elements = min(POOL_ELEMENTS, max(1 << 16, _nbytes(shapes) // 8))
    pool = torch.empty(elements, dtype=torch.bfloat16).normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    random_bytes = memoryview(pool.view(torch.uint8).numpy())
    ones = bytes(torch.ones(1, dtype=torch.bfloat16).view(torch.uint8).tolist())
    groups: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        if groups[-1] and held + _size(shape) > FILE_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += _size(shape)

    def write(number: int) -> None:
        with (folder / f"model-{number:05d}.safetensors").open("wb") as stream:
            header, at_byte = {}, 0
            for name in groups[number]:
                size = _size(shapes[name])
                header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [at_byte, at_byte + size]}
                at_byte += size
            text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
            text += b" " * (-len(text) % 8)
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in groups[number]:
                size = _size(shapes[name])
                if len(shapes[name]) == 1:
                    stream.write(bytes(size) if name.endswith("bias") else ones * (size // 2))
                    continue
                begin = 2 * random.Random(name).randrange(elements)
                while size:
                    part = random_bytes[begin : begin + size]
                    stream.write(part)
                    size, begin = size - len(part), 0

    with ThreadPoolExecutor(max_workers=4) as threads:
        list(threads.map(write, range(len(groups))))
    weight_map = {name: f"model-{number:05d}.safetensors" for number, group in enumerate(groups) for name in group}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
