"""A checkpoint as a GGUF file, for llama.cpp: the same weights under its names, written tensor by tensor. The owner of gguf."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bigmodel.allowance import DiskAllowance
from bigmodel.checkpoint import Checkpoint
from bigmodel.errors import InvalidArgumentError, join_some
from bigmodel.models.pretrained import build_skeleton, load_generation_config
from bigmodel.models.skeleton import Skeleton
from bigmodel.offload.direct import DirectReads
from bigmodel.offload.spill import trim_heap

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["DTYPES", "REVISION", "Convertible", "convertible", "write_gguf"]

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
"""GGUF's names of what matrices are written in."""

REVISION = 1
"""Of what is written: raised when the same checkpoint begins to give another file."""

# model_type -> llama.cpp's architecture, for those whose tensors are renamed and no more, but for llama's rotated rows.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# Those whose rotation takes neighbours for pairs, where transformers takes the two halves of a head, and may divide frequencies.
_PAIRED = frozenset({"llama"})
# Biases that llama.cpp looks for, by the last two parts of the name.
_BIASES = {
    "llama": frozenset(f"{name}_proj.bias" for name in ("q", "k", "v", "o", "gate", "up", "down")),
    "qwen2": frozenset(f"{name}_proj.bias" for name in ("q", "k", "v")),
    "qwen3": frozenset[str](),
}
# What is kept of a parameter's dtype: nothing may be rounded but bf16's very small numbers in f16.
_KEEPS = {torch.bfloat16: ("bf16", "f16", "f32"), torch.float16: ("f16", "f32"), torch.float32: ("f32",)}
# The rotations that are the same at every length of the text.
_ROPE_TYPES = frozenset({"default", "linear", "llama3"})
_BLOCK_ELEMENTS = 1 << 22  # that are looked at, and cast, at once
_TRIM_BYTES = 1 << 20  # after a tensor of this size memory goes back to the system


@dataclass(frozen=True, slots=True)
class Convertible:
    """A checkpoint that llama.cpp can run.

    Attributes:
        checkpoint: opened.
        skeleton: of it; says which bytes are which parameter, in the dtype that `from_pretrained` gives it.
        architecture: llama.cpp's name.
        names: parameter -> GGUF's name, in the model's order.
        end_tokens: after which a text ends.
        frequency_factors: what each pair's frequency is divided by, float32; None where all are 1.
    """

    checkpoint: Checkpoint
    skeleton: Skeleton
    architecture: str
    names: dict[str, str]
    end_tokens: tuple[int, ...]
    frequency_factors: torch.Tensor | None


def convertible(checkpoint: Checkpoint, num_positions: int) -> Convertible:
    """Finds out how a checkpoint becomes a GGUF file. Reads headers only.

    Args:
        checkpoint: opened.
        num_positions: tokens of the longest text: a sliding window that is not shorter does nothing.

    Raises:
        InvalidArgumentError: llama.cpp would not compute what the model does, or the conversion is not written.
        CheckpointError: as `build_skeleton`.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    model_type = (checkpoint.config or {}).get("model_type")
    if model_type not in _ARCHITECTURES:
        raise InvalidArgumentError(
            f"{checkpoint.path} is of the model_type {model_type!r}, which is not converted for llama.cpp. What is: "
            f"{', '.join(sorted(_ARCHITECTURES))}."
        )
    architecture = _ARCHITECTURES[model_type]
    skeleton = build_skeleton(checkpoint)
    load_generation_config(skeleton.model, checkpoint)
    known: Any = skeleton.model
    _refuse_others(checkpoint, known.config, num_positions)

    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    renames = get_tensor_name_map(number, known.config.num_hidden_layers)
    names = {name: renames.get_name(name, try_suffixes=(".weight", ".bias")) for name in skeleton.sources}
    unplaced = [
        name
        for name, renamed in names.items()
        if renamed is None or (name.endswith(".bias") and ".".join(name.split(".")[-2:]) not in _BIASES[architecture])
    ]
    if unplaced:
        raise InvalidArgumentError(
            f"{checkpoint.path} has {len(unplaced)} weights that llama.cpp's {architecture} has no place for: "
            f"{join_some(unplaced)}. It can be run without this peer only."
        )
    return Convertible(
        checkpoint=checkpoint,
        skeleton=skeleton,
        architecture=architecture,
        names={name: renamed for name, renamed in names.items() if renamed is not None},
        end_tokens=_end_tokens(checkpoint, known.generation_config.eos_token_id),
        frequency_factors=_frequency_factors(checkpoint, known, architecture),
    )


def write_gguf(model: Convertible, target: Path, dtype: str) -> None:
    """Writes the file, whole or not at all; a few tensors at a time are in memory.

    Matrices are written in one dtype, vectors in float32, as llama.cpp's own converter does. The vocabulary is a stand-in of
    the right size: token ids mean what they did, their texts do not.

    Args:
        model: what `convertible` gave.
        target: the file.
        dtype: of DTYPES; bfloat16 weights may be written as f16, where the smallest numbers are rounded.

    Raises:
        InvalidArgumentError: a weight that would lose more than that, by name; a half-written file is removed.
        DoesNotFitError: the disk has no room for it.
        ReadError: the checkpoint's bytes are not there any more.
    """
    from gguf import GGUFWriter

    sources = {name: model.skeleton.sources[name] for name in model.names}
    lossy = [
        name for name, source in sources.items() if len(source.shape) > 1 and dtype not in _KEEPS.get(source.dtype, ())
    ]
    if lossy:
        stored = sources[lossy[0]].dtype
        raise InvalidArgumentError(
            f"{len(lossy)} weights would lose precision in {dtype}, such as {lossy[0]}, which the model has in "
            f"{str(stored).removeprefix('torch.')}. Use {' or '.join(_KEEPS.get(stored, ())) or 'another checkpoint'}."
        )
    total = sum(
        source.nbytes * (2 if source.dtype.itemsize < DTYPES[dtype].itemsize else 1) for source in sources.values()
    )
    DiskAllowance().take(total, target.parent, f"The {dtype} GGUF file of {model.checkpoint.path}")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    writer = GGUFWriter(None, model.architecture)
    try:
        _describe(writer, model, dtype)
        written = {name: DTYPES[dtype] if len(source.shape) > 1 else torch.float32 for name, source in sources.items()}
        for name, source in sources.items():
            _announce(writer, model.names[name], source.shape, written[name])
        if model.frequency_factors is not None:
            _announce(writer, "rope_freqs.weight", tuple(model.frequency_factors.shape), torch.float32)
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        reads = DirectReads(model.checkpoint.stamps)
        for name, source in sources.items():
            values = _cast(name, _paired(model, name, reads.parameter(source)), written[name])
            writer.write_tensor_data(_plain(values))
            del values
            if source.nbytes >= _TRIM_BYTES:
                trim_heap()
        if model.frequency_factors is not None:
            writer.write_tensor_data(_plain(model.frequency_factors))
        writer.flush()
        for file in writer.fout or ():
            os.fsync(file.fileno())
        writer.close()
        os.replace(partial, target)
    except BaseException:
        writer.close()
        partial.unlink(missing_ok=True)
        raise


def _refuse_others(checkpoint: Checkpoint, config: Any, num_positions: int) -> None:
    """Variants of a known architecture that llama.cpp would run as if they were the plain one."""
    rope = config.rope_parameters
    windowed = getattr(config, "layer_types", None) is None or "sliding_attention" in config.layer_types
    window = getattr(config, "sliding_window", None) if windowed else None
    wrong = ""
    if config.hidden_act != "silu":
        wrong = f"hidden_act is {config.hidden_act!r}, and llama.cpp computes 'silu'"
    elif rope.get("rope_type", "default") not in _ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        wrong = f"rope_parameters are {rope}, and those of the types {', '.join(sorted(_ROPE_TYPES))} are converted"
    elif window is not None and window < num_positions:
        wrong = (
            f"its attention sees {window} tokens of {num_positions}, and llama.cpp's would see all. Lower their number"
        )
    if wrong:
        raise InvalidArgumentError(f"{checkpoint.path} cannot be converted for llama.cpp: {wrong}.")


def _end_tokens(checkpoint: Checkpoint, stated: int | list[int] | None) -> tuple[int, ...]:
    tokens = () if stated is None else (stated,) if isinstance(stated, int) else tuple(stated)
    if len(tokens) > len(_END_KEYS):
        raise InvalidArgumentError(
            f"{checkpoint.path} ends a text at {len(tokens)} different tokens, and a GGUF file has places for {len(_END_KEYS)}. "
            "Lower the number of eos_token_id in generation_config.json."
        )
    return tokens


_END_KEYS = ("eos", "eot", "eom")  # end of sequence, of turn, of message: llama.cpp treats them alike


def _frequency_factors(checkpoint: Checkpoint, model: Any, architecture: str) -> torch.Tensor | None:
    """How the model's own frequencies differ from those of its base."""
    rotary = model.model.rotary_emb
    own: torch.Tensor = rotary.inv_freq
    dimension = 2 * own.numel()
    exponents = torch.arange(0, dimension, 2, dtype=torch.float32) / dimension
    plain: torch.Tensor = 1.0 / model.config.rope_parameters["rope_theta"] ** exponents
    if torch.equal(plain, own):
        return None
    if architecture not in _PAIRED or rotary.attention_scaling != 1.0:
        raise InvalidArgumentError(
            f"{checkpoint.path} scales its rotations (rope_parameters in config.json), which llama.cpp's {architecture} "
            "does not. It can be run without this peer only."
        )
    return (plain / own).to(torch.float32)


def _describe(writer: GGUFWriter, model: Convertible, dtype: str) -> None:
    from gguf import LlamaFileType

    known: Any = model.skeleton.model
    config = known.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = {"bf16": LlamaFileType.MOSTLY_BF16, "f16": LlamaFileType.MOSTLY_F16, "f32": LlamaFileType.ALL_F32}
    writer.add_file_type(kinds[dtype])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    # Of this kind no special token is there unless it is named; each text is whole UTF-8, so that none waits for the next.
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list([f"{token} " for token in range(config.vocab_size)])
    for key, token in zip(_END_KEYS, model.end_tokens, strict=False):
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", token)


def _announce(writer: GGUFWriter, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    import numpy
    from gguf import GGMLQuantizationType

    kinds = {
        torch.bfloat16: GGMLQuantizationType.BF16,
        torch.float16: GGMLQuantizationType.F16,
        torch.float32: GGMLQuantizationType.F32,
    }
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    writer.add_tensor_info(name, shape, numpy.dtype(numpy.float32), nbytes, raw_dtype=kinds[dtype])


def _paired(model: Convertible, name: str, values: torch.Tensor) -> torch.Tensor:
    """The rows of queries and keys as llama.cpp rotates them: each beside the one that it is paired with."""
    part = name.split(".")[-2]
    if model.architecture not in _PAIRED or part not in ("q_proj", "k_proj"):
        return values
    known: Any = model.skeleton.model
    heads = known.config.num_attention_heads if part == "q_proj" else known.config.num_key_value_heads
    return values.view(heads, 2, -1, *values.shape[1:]).transpose(1, 2).reshape(values.shape)


def _cast(name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if values.dtype == dtype:
        return values
    result = torch.empty(values.shape, dtype=dtype)
    flat, into = values.view(-1), result.view(-1)
    for start in range(0, flat.numel(), _BLOCK_ELEMENTS):
        block, written = flat[start : start + _BLOCK_ELEMENTS], into[start : start + _BLOCK_ELEMENTS]
        written.copy_(block)
        if not written.isfinite().all():
            raise InvalidArgumentError(
                f"{name} holds {block.abs().max():.3g}, which {str(dtype).removeprefix('torch.')} cannot. Use another dtype."
            )
    return result


def _plain(values: torch.Tensor) -> Any:
    """The bytes as numpy knows them: it has no bfloat16."""
    return values.view(torch.int16).numpy() if values.dtype == torch.bfloat16 else values.numpy()
