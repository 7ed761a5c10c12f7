"""GGUF files: every tensor against the model's own, what is refused, and that a file is there whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from random_llamas import FAMILIES, LLAMA3_ROPE, save_random

from bigmodel.bench.peers.gguf_file import convertible, write_gguf
from bigmodel.checkpoint import open_checkpoint
from bigmodel.errors import InvalidArgumentError

gguf = pytest.importorskip("gguf")

LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Prints by how much the process's memory rose above what it held.
RISE = """
import sys
from pathlib import Path
from bigmodel.bench.peers.gguf_file import convertible, write_gguf
from bigmodel.checkpoint import open_checkpoint
from gguf import GGUFWriter
def held(field):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) << 10
model = convertible(open_checkpoint(sys.argv[1]), 64)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins again from here
before = held("VmRSS")
write_gguf(model, Path(sys.argv[2]), "f16")
print(held("VmHWM") - before)
"""
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def write(folder: Path, dtype: str, num_positions: int = 64) -> Path:
    target = folder / f"{dtype}.gguf"
    write_gguf(convertible(open_checkpoint(folder), num_positions), target, dtype)
    return target


def read(file: Path) -> dict[str, torch.Tensor]:
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    tensors = {}
    for tensor in gguf.GGUFReader(file).tensors:
        raw = torch.from_numpy(np.array(tensor.data)).contiguous().view(torch.uint8).view(-1)
        tensors[tensor.name] = raw.view(kinds[tensor.tensor_type.name]).view(*reversed(tensor.shape.tolist()))
    return tensors


def own_name(name: str) -> str:
    """The name in transformers of a tensor in a GGUF file."""
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith("blk."):
        return f"{WHOLE[stem]}.{kind}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{LAYER[part]}.{kind}"


def as_llama_rotates(values: torch.Tensor, num_heads: int) -> torch.Tensor:
    half = values.shape[0] // num_heads // 2
    return torch.stack(
        [values[(2 * head + side) * half + i] for head in range(num_heads) for i in range(half) for side in (0, 1)]
    )


def expected(folder: Path, matrices: torch.dtype) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    config = model.config
    values = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        part = name.split(".")[-2]
        if config.model_type in ("llama", "mistral") and part in ("q_proj", "k_proj"):
            value = as_llama_rotates(
                value, config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
            )
        values[name] = value.to(matrices if value.ndim > 1 else torch.float32)
    return values


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_the_models_own(tmp_path: Path, family: str, dtype: str) -> None:
    save_random(tmp_path, family)
    tensors = read(write(tmp_path, dtype))
    assert ("rope_freqs.weight" in tensors) == (family == "llama_scaled")
    found = {own_name(name): values for name, values in tensors.items() if name != "rope_freqs.weight"}
    wanted = expected(tmp_path, {"bf16": torch.bfloat16, "f16": torch.float16}[dtype])
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name].dtype == values.dtype, name
        assert torch.equal(found[name], values), name


def test_the_real_model_has_equal_bits(smollm2: Path, tmp_path: Path) -> None:
    target = tmp_path / "real.gguf"
    write_gguf(convertible(open_checkpoint(smollm2), 64), target, "bf16")
    found = {own_name(name): values for name, values in read(target).items()}
    wanted = expected(smollm2, torch.bfloat16)
    assert found.keys() == wanted.keys()
    assert [name for name, values in wanted.items() if not torch.equal(found[name], values)] == []


def test_the_vocabulary_has_a_text_for_each_id_that_is_the_id(tmp_path: Path) -> None:
    save_random(tmp_path, "llama", vocab_size=259)
    fields = gguf.GGUFReader(write(tmp_path, "bf16")).fields
    assert fields["tokenizer.ggml.tokens"].contents() == [f"{token} " for token in range(259)]


def test_end_tokens_are_those_of_the_generation_config(tmp_path: Path) -> None:
    save_random(tmp_path, "llama")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    fields = gguf.GGUFReader(write(tmp_path, "bf16")).fields
    ends = {name: field.contents() for name, field in fields.items() if name.endswith("_token_id")}
    assert ends == {"tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.eot_token_id": 9}


def test_scaled_rotations_are_written_as_factors(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    save_random(tmp_path, "llama", head_dim=64, rope_parameters=LLAMA3_ROPE)
    factors = read(write(tmp_path, "bf16"))["rope_freqs.weight"]
    config = LlamaConfig.from_pretrained(tmp_path)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = LLAMA3_ROPE["rope_theta"] ** (-torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(plain / factors, scaled)
    assert factors[0] == 1.0
    assert factors[-1] == LLAMA3_ROPE["factor"]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_parameters"),
        ("mistral", {"sliding_window": 63}, "sees 63 tokens of 64"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 63, "max_window_layers": 0}, "sees 63 tokens of 64"),
        ("qwen3", {"rope_parameters": LLAMA3_ROPE}, "scales its rotations"),
        ("qwen3", {"attention_bias": True}, "8 weights that llama.cpp's qwen3 has no place for"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, family: str, changes: dict, message: str
) -> None:
    save_random(tmp_path, family, **changes)
    with pytest.raises(InvalidArgumentError, match=message):
        convertible(open_checkpoint(tmp_path), 64)


def test_a_window_that_is_not_shorter_than_the_text_is_none(tmp_path: Path) -> None:
    save_random(tmp_path, "mistral", sliding_window=64)
    assert convertible(open_checkpoint(tmp_path), 64).architecture == "llama"


def test_other_architectures_are_refused_by_their_type(tiny_t5: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"model_type 't5', .* What is: llama, mistral, qwen2, qwen3"):
        convertible(open_checkpoint(tiny_t5), 64)


def test_a_weight_beyond_float16_is_refused_by_name_and_nothing_is_left(tmp_path: Path) -> None:
    save_random(tmp_path, "llama", large="model.layers.1.mlp.up_proj.weight")
    before = set(tmp_path.iterdir())
    with pytest.raises(
        InvalidArgumentError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 9\.98e\+04, .*float16"
    ):
        write(tmp_path, "f16")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("stored", "dtype", "instead"),
    [(torch.float32, "bf16", "f32"), (torch.float32, "f16", "f32"), (torch.float16, "bf16", "f16 or f32")],
)
def test_rounding_is_refused(tmp_path: Path, stored: torch.dtype, dtype: str, instead: str) -> None:
    save_random(tmp_path, "llama", dtype=stored)
    with pytest.raises(InvalidArgumentError, match=rf"would lose precision in {dtype}, .* Use {instead}\."):
        write(tmp_path, dtype)


@pytest.mark.slow
def test_memory_is_that_of_a_few_tensors(tmp_path: Path) -> None:
    save_random(tmp_path, "llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=24, vocab_size=8192)
    target = tmp_path / "f16.gguf"
    done = subprocess.run([sys.executable, "-c", RISE, tmp_path, target], stdout=subprocess.PIPE, text=True, check=True)
    largest = 8192 * 256 * 2
    assert target.stat().st_size > 12 * largest
    # The tensor as it is stored and as it is written, and what the writer imports and casts with.
    assert largest < int(done.stdout) < 2 * largest + (24 << 20)
