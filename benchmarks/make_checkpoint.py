"""Random-weight checkpoints in the true shapes of Llama models, written one file at a time.

``python -m benchmarks.make_checkpoint 1.3b --out FOLDER`` writes FOLDER/1.3b (once) and prints its path.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SHAPES", "LlamaShape", "delete_checkpoint", "make_checkpoint", "weight_files"]

INDEX = "model.safetensors.index.json"
WRITTEN_BY = "bigmodel benchmarks"
# Small enough that logits and activations of random layers stay finite, large enough that bf16 keeps the differences.
INIT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """The sizes of one Llama model with untied embeddings, stored in bf16.

    Attributes:
        hidden, layers, intermediate, heads, vocabulary: as in its config.json.
        file_bytes: weights of one file, at most (a single larger tensor gets its own file).
    """

    hidden: int
    layers: int
    intermediate: int
    heads: int
    vocabulary: int
    file_bytes: int = 500_000_000

    @property
    def config(self) -> dict[str, object]:
        """What config.json says."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocabulary,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "use_cache": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order in which transformers saves them."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            for projection in ("q", "k", "v", "o"):
                yield f"{prefix}self_attn.{projection}_proj.weight", (self.hidden, self.hidden)
            for projection in ("gate", "up"):
                yield f"{prefix}mlp.{projection}_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}mlp.down_proj.weight", (self.hidden, self.intermediate)
            yield f"{prefix}input_layernorm.weight", (self.hidden,)
            yield f"{prefix}post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)


SHAPES = {
    # For finding out which modules a load imports; never timed.
    "tiny": LlamaShape(hidden=64, layers=2, intermediate=128, heads=4, vocabulary=256, file_bytes=60_000),
    "quick": LlamaShape(hidden=1024, layers=12, intermediate=2816, heads=16, vocabulary=16000, file_bytes=70_000_000),
    "400m": LlamaShape(hidden=1024, layers=28, intermediate=2816, heads=16, vocabulary=16000, file_bytes=70_000_000),
    "many": LlamaShape(hidden=512, layers=48, intermediate=1408, heads=8, vocabulary=4096, file_bytes=70_000_000),
    "1.3b": LlamaShape(hidden=2048, layers=24, intermediate=5504, heads=16, vocabulary=32000),
    "3b": LlamaShape(hidden=3200, layers=26, intermediate=8640, heads=32, vocabulary=32000),
}


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files, in order."""
    return sorted(folder.glob("*.safetensors"))


def make_checkpoint(name: str, out: Path, *, seed: int = 0) -> Path:
    """Write the checkpoint `name` into ``out / name``, or leave it as it is when it is complete.

    Args:
        name: one of SHAPES.
        out: the cache folder.
        seed: of the random weights.

    Returns:
        The checkpoint's folder.
    """
    shape, folder = SHAPES[name], out / name
    if _is_complete(folder, shape):
        return folder
    partial = out / f".{name}.partial-{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        _write(shape, partial, seed)
        if folder.exists():
            delete_checkpoint(folder)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def delete_checkpoint(folder: Path) -> None:
    """Remove a checkpoint that this script wrote.

    Raises:
        SystemExit: when the folder does not carry this script's mark; nothing is removed then.
    """
    if not folder.exists():
        return
    try:
        ours = json.loads((folder / INDEX).read_text())["metadata"]["written_by"] == WRITTEN_BY
    except (OSError, KeyError, ValueError):
        ours = False
    if not ours:
        raise SystemExit(f"{folder} was not written by this script. Remove it by hand if it is not needed.")
    shutil.rmtree(folder)


def _groups(shape: LlamaShape) -> list[list[tuple[str, tuple[int, ...]]]]:
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    held = 0
    for name, size in shape.tensors():
        nbytes = _nbytes(size)
        if groups[-1] and held + nbytes > shape.file_bytes:
            groups.append([])
            held = 0
        groups[-1].append((name, size))
        held += nbytes
    return groups


def _nbytes(size: tuple[int, ...]) -> int:
    total = 2
    for length in size:
        total *= length
    return total


def _write(shape: LlamaShape, folder: Path, seed: int) -> None:
    # Imported here: the parent process of a benchmark asks for a path and must stay small.
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    groups = _groups(shape)
    weight_map: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {}
        for name, size in group:
            weight = torch.empty(size, dtype=torch.bfloat16)
            if len(size) == 1:
                weight.fill_(1.0)
            else:
                weight.normal_(std=INIT_STD, generator=generator)
            tensors[name] = weight
            weight_map[name] = file
            total += weight.nbytes
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
        del tensors
        # Written pages must reach the disk before a benchmark drops them from the cache.
        descriptor = os.open(folder / file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    (folder / "config.json").write_text(json.dumps(shape.config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}) + "\n")
    index = {"metadata": {"total_size": total, "written_by": WRITTEN_BY, "seed": seed}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _is_complete(folder: Path, shape: LlamaShape) -> bool:
    try:
        index = json.loads((folder / INDEX).read_text())
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    total = sum(_nbytes(size) for _, size in shape.tensors())
    files = weight_files(folder)
    return (
        config == shape.config
        and index["metadata"]["total_size"] == total
        and {file.name for file in files} == set(index["weight_map"].values())
        and sum(file.stat().st_size for file in files) > total
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random-weight checkpoint in a true Llama shape.")
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("--out", type=Path, required=True, help="cache folder; the checkpoint goes into OUT/NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--delete", action="store_true", help="remove it instead")
    arguments = parser.parse_args()
    if arguments.delete:
        delete_checkpoint(arguments.out / arguments.name)
        return
    folder = make_checkpoint(arguments.name, arguments.out, seed=arguments.seed)
    files = weight_files(folder)
    print(f"{sum(file.stat().st_size for file in files) / 1e9:.2f} GB in {len(files)} files", file=sys.stderr)
    print(folder)


if __name__ == "__main__":
    main()
