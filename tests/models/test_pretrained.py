"""Skeletons filled by hand, against what from_pretrained gives: every parameter, every buffer, and the output."""

from __future__ import annotations

import functools
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from by_hand import fill
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bigmodel.checkpoint import open_checkpoint
from bigmodel.errors import InvalidArgumentError, KeyMismatchError, UnsupportedCheckpointError
from bigmodel.models import Skeleton, build_skeleton, example_inputs, load_generation_config

TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**TEXT, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama tied": ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {**LLAMA, "head_dim": 8}),
    "gemma3": ("Gemma3ForCausalLM", {**LLAMA, "head_dim": 8, "sliding_window": 8}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": ("OPTForCausalLM", {**TEXT, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32}),
    "bloom": ("BloomForCausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mixtral": ("MixtralForCausalLM", {**LLAMA, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**LLAMA, **EXPERTS, "head_dim": 8}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {**TEXT, **LATENT, "num_key_value_heads": 4, "intermediate_size": 48, "moe_intermediate_size": 32}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "gpt_oss": ("GptOssForCausalLM", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "mamba": ("MambaForCausalLM", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "t5": ("T5ForConditionalGeneration", {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}),
    "bart": (
        "BartForConditionalGeneration",
        {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48}
        | {"decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    ),
    "bert": ("BertForMaskedLM", {**TEXT, "intermediate_size": 48, "max_position_embeddings": 64}),
    "vit": ("ViTForImageClassification", {**VISION, "image_size": 16, "patch_size": 8}),
    "swin": (
        "SwinModel",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    ),
    "clip": (
        "CLIPModel",
        {
            "text_config": {**VISION, "vocab_size": 64, "max_position_embeddings": 64},
            "vision_config": {**VISION, "image_size": 16, "patch_size": 8},
        },
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {**LLAMA, "model_type": "llama"},
            "vision_config": {**VISION, "image_size": 16, "patch_size": 8, "model_type": "clip_vision_model"},
            "image_token_index": 60,
        },
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48}
        | {"decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0}
        | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64, "decoder_start_token_id": 1},
    ),
}


def make(folder: Path, family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    """A checkpoint of random weights in several files, as save_pretrained writes it."""
    name, settings = FAMILIES[family]
    model_class = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(model_class.config_class(**{**settings, **changes}))
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                if tensor.is_floating_point():  # also what is born as ones or zeros: a mix-up would not show
                    tensor.add_(torch.randn_like(tensor) / 8)
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a family, made once: for tests that leave it as it is."""
    return functools.cache(lambda family: make(tmp_path_factory.mktemp("made"), family))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """The checkpoint with other tensors, in one file."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in change(tensors).items()}, folder / "model.safetensors")
    return folder


def reference_of(folder: Path, **options: Any) -> nn.Module:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, **options).requires_grad_(False)


def inputs_of(model: nn.Module, num_tokens: int = 7) -> dict[str, torch.Tensor]:
    inputs = example_inputs(model, 2, num_tokens)
    assert inputs is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return {
            name: torch.randn_like(tensor) if tensor.is_floating_point() else torch.randint_like(tensor, 2, 60)
            for name, tensor in inputs.items()
        }


def aliases(model: nn.Module) -> set[tuple[str, ...]]:
    """The groups of names that stand for one parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {tuple(names) for names in groups.values()}


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def check_same(skeleton: Skeleton, reference: nn.Module, *, forward: bool = True) -> None:
    """Fills the skeleton and compares everything that it holds, and what it computes."""
    model = skeleton.model
    assert not model.training
    for name, parameter in model.named_parameters():
        assert (parameter.device.type == "meta") == (name in skeleton.sources), name
        assert not parameter.requires_grad
    assert type(model) is type(reference)
    fill(model, dict(skeleton.sources))
    for mine, theirs in (
        (model.named_parameters(remove_duplicate=False), reference.named_parameters(remove_duplicate=False)),
        (model.named_buffers(remove_duplicate=False), reference.named_buffers(remove_duplicate=False)),
    ):
        expected = dict(theirs)
        found = dict(mine)
        assert list(found) == list(expected)
        for name, tensor in found.items():
            assert tensor.device.type == "cpu"
            assert tensor.dtype == expected[name].dtype, name
            assert torch.equal(tensor, expected[name]), name
    assert aliases(model) == aliases(reference)
    assert list(model.state_dict()) == list(reference.state_dict())
    if forward:
        inputs = inputs_of(reference)
        with torch.no_grad():
            outputs, expected_outputs = (list(tensors_in(m(**inputs).to_tuple())) for m in (model, reference))
        assert expected_outputs
        for output, expected_output in zip(outputs, expected_outputs, strict=True):
            assert torch.equal(output, expected_output)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_filled_skeleton_is_what_from_pretrained_gives(made: Callable[[str], Path], family: str) -> None:
    folder = made(family)
    skeleton = build_skeleton(open_checkpoint(folder))
    assert skeleton.initialised == skeleton.unexpected == ()
    assert skeleton.no_split == frozenset(skeleton.model._no_split_modules)
    assert all(source.conversion is None for source in skeleton.sources.values())
    check_same(skeleton, reference_of(folder))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_stored_one_by_one_are_ranges_of_the_stack(made: Callable[[str], Path], family: str) -> None:
    folder = made(family)
    checkpoint = open_checkpoint(folder)
    per_expert = [name for name in checkpoint.tensors if ".experts.3." in name]
    assert per_expert  # as save_pretrained writes them
    sources = build_skeleton(checkpoint).sources
    stacked = {name: source for name, source in sources.items() if name.endswith(("gate_up_proj", "down_proj"))}
    fused = [source for source in stacked.values() if len(source.shape) == 3]
    assert len(fused) >= 2
    for source in fused:
        assert source.conversion is None
        assert sum(extent.nbytes for extent in source.extents) == source.nbytes
    # gates and ups alternate in the stack, not in the file; downs are neighbours in both, and one range
    assert all(len(s.extents) == 8 for name, s in stacked.items() if name.endswith("experts.gate_up_proj"))
    assert all(len(s.extents) == 1 for name, s in stacked.items() if name.endswith("experts.down_proj"))
    assert len(sources) < len(checkpoint.tensors)


def test_experts_stored_fused_are_one_range(tmp_path: Path) -> None:
    folder = make(tmp_path, "mixtral")
    model = reference_of(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    skeleton = build_skeleton(open_checkpoint(folder))
    assert all(source.is_view for source in skeleton.sources.values())
    check_same(skeleton, reference_of(folder))


def test_arithmetic_on_the_way_is_a_conversion(made: Callable[[str], Path]) -> None:
    """Rotary weights of another layout are permuted, row by row, while they are loaded."""
    from transformers.conversion_mapping import (
        get_model_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.core_model_loading import PermuteForRope, WeightConverter

    folder = made("llama")

    class Permuted(transformers.LlamaForCausalLM):
        pass

    rule = WeightConverter(
        "self_attn.q_proj.weight",
        "self_attn.q_proj.weight",
        operations=[PermuteForRope(permute_layer_names=["q_proj"])],
    )
    register_checkpoint_conversion_mapping("Permuted", [rule], overwrite=True)
    config = transformers.LlamaConfig.from_pretrained(folder)
    with torch.device("meta"):
        given = Permuted(config)
    assert any(isinstance(entry, WeightConverter) for entry in get_model_conversion_mapping(given))
    skeleton = build_skeleton(open_checkpoint(folder), model=given)
    converted = {name for name, source in skeleton.sources.items() if source.conversion is not None}
    assert converted == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)}
    check_same(skeleton, Permuted.from_pretrained(folder))


# --- dtypes


@pytest.mark.parametrize("family", ["llama", "mixtral", "t5", "deepseek_v3", "gpt_oss", "mamba", "llava", "bert"])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "torch.float32"], ids=str)
def test_a_stated_dtype_is_that_of_from_pretrained(
    made: Callable[[str], Path], family: str, dtype: str | torch.dtype
) -> None:
    folder = made(family)
    skeleton = build_skeleton(open_checkpoint(folder), dtype=dtype)
    plain = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    check_same(skeleton, reference_of(folder, dtype=plain), forward=False)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stated", ["float32", "bfloat16", None])
def test_auto_dtype_is_that_of_from_pretrained(tmp_path: Path, stored: torch.dtype, stated: str | None) -> None:
    folder = make(tmp_path, "llava", dtype=stored)
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config if stated is None else {**config, "dtype": stated}))
    skeleton = build_skeleton(open_checkpoint(folder))
    reference = reference_of(folder, dtype="auto")
    assert reference.dtype == (stored if stated is None else getattr(torch, stated))
    check_same(skeleton, reference, forward=False)


def test_modules_that_the_class_keeps_in_float32_stay_there(tmp_path: Path) -> None:
    folder = make(tmp_path, "t5", dtype=torch.float16)
    sources = build_skeleton(open_checkpoint(folder)).sources
    kept = {name for name, source in sources.items() if source.dtype == torch.float32}
    assert kept == {name for name in sources if ".wo." in name}
    assert kept
    assert all(sources[name].stored_dtype == torch.float16 for name in kept)


@pytest.mark.parametrize("dtype", ["bf17", "int8", "float8_e4m3fn", "nn", "", torch.int64, 3, None])
def test_a_dtype_that_no_model_runs_in_is_refused(made: Callable[[str], Path], dtype: Any) -> None:
    checkpoint = open_checkpoint(made("llama"))
    with pytest.raises(InvalidArgumentError, match="dtype is"):
        build_skeleton(checkpoint, dtype=dtype)


# --- ties


def test_only_the_head_is_stored(tmp_path: Path) -> None:
    folder = rewrite(
        make(tmp_path, "llama tied"),
        lambda tensors: {name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in tensors.items()},
    )
    skeleton = build_skeleton(open_checkpoint(folder))
    assert skeleton.model.lm_head.weight is skeleton.model.model.embed_tokens.weight
    assert skeleton.initialised == ()
    assert "model.embed_tokens.weight" in skeleton.sources
    check_same(skeleton, reference_of(folder))


@pytest.mark.parametrize("same", [True, False])
def test_both_tied_weights_are_stored(tmp_path: Path, same: bool) -> None:
    def add_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone() + (0 if same else 1)}

    folder = rewrite(make(tmp_path, "llama tied"), add_head)
    skeleton = build_skeleton(open_checkpoint(folder))
    assert (skeleton.model.lm_head.weight is skeleton.model.model.embed_tokens.weight) == same
    check_same(skeleton, reference_of(folder))


def test_a_pickle_that_holds_a_tied_weight_twice(tmp_path: Path) -> None:
    folder = make(tmp_path, "llama tied")
    state = reference_of(folder).state_dict()
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    assert "lm_head.weight" in state
    torch.save(state, folder / "pytorch_model.bin")
    skeleton = build_skeleton(open_checkpoint(folder))
    assert skeleton.model.lm_head.weight is skeleton.model.model.embed_tokens.weight
    check_same(skeleton, reference_of(folder))


# --- keys


def test_all_that_does_not_match_is_told_at_once(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(3, 4)
        tensors["visual.extra"] = torch.zeros(2, 5)
        return tensors

    checkpoint = open_checkpoint(rewrite(make(tmp_path, "llama"), spoil))
    with pytest.raises(KeyMismatchError) as raised:
        build_skeleton(checkpoint)
    text = str(raised.value)
    assert "does not match LlamaForCausalLM: 2 missing, 1 unexpected, 1 mis-shaped" in text
    assert "model.norm.weight (32,)" in text
    assert "model.layers.1.mlp.up_proj.weight (48, 32)" in text
    assert "visual.extra (2, 5)" in text
    assert "model.layers.0.mlp.down_proj.weight: checkpoint (3, 4), model (32, 48)" in text
    assert "strict=False" in text
    with pytest.raises(KeyMismatchError, match="1 mis-shaped") as raised:
        build_skeleton(checkpoint, strict=False)
    assert "missing" not in str(raised.value)


def test_a_long_list_is_cut_and_counted(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(
        rewrite(make(tmp_path, "llama"), lambda tensors: {"model.norm.weight": tensors["model.norm.weight"]})
    )
    with pytest.raises(KeyMismatchError, match=r"20 missing(.|\n)*and 10 more"):
        build_skeleton(checkpoint)


def test_a_missing_expert_is_told(tmp_path: Path) -> None:
    def lose(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: tensor for name, tensor in tensors.items() if ".layers.1" not in name or ".experts.2." not in name
        }

    with pytest.raises(KeyMismatchError, match=r"layers.1.mlp.experts.down_proj: checkpoint \(3, 32, 32\), model"):
        build_skeleton(open_checkpoint(rewrite(make(tmp_path, "qwen3_moe"), lose)))


def test_an_expert_of_another_shape_is_told(tmp_path: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        (name,) = [name for name in tensors if ".layers.1" in name and ".experts.2.down_proj" in name]
        return {**tensors, name: tensors[name][:5].clone()}

    with pytest.raises(KeyMismatchError, match=r"1 not convertible(.|\n)*layers.1.mlp.experts.down_proj: .*equal size"):
        build_skeleton(open_checkpoint(rewrite(make(tmp_path, "qwen3_moe"), cut)))


def test_without_strict_missing_weights_are_initialised_and_listed(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        return {**tensors, "visual.extra": torch.zeros(2)}

    folder = rewrite(make(tmp_path, "llama"), spoil)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        skeleton = build_skeleton(open_checkpoint(folder), strict=False)
        torch.manual_seed(7)
        reference = reference_of(folder)
    assert skeleton.initialised == ("model.layers.1.mlp.up_proj.weight", "model.norm.weight")
    assert skeleton.unexpected == ("visual.extra",)
    check_same(skeleton, reference)


def test_without_strict_a_tied_pair_that_is_missing_is_initialised_once(tmp_path: Path) -> None:
    folder = rewrite(
        make(tmp_path, "llama tied"),
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "embed_tokens" not in name},
    )
    skeleton = build_skeleton(open_checkpoint(folder), strict=False)
    assert skeleton.model.lm_head.weight is skeleton.model.model.embed_tokens.weight
    assert skeleton.model.lm_head.weight.device.type == "cpu"
    assert "model.embed_tokens.weight" in skeleton.initialised
    with pytest.raises(KeyMismatchError, match="missing"):
        build_skeleton(open_checkpoint(folder))


def test_what_the_class_declares_ignorable_is_accepted(tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        extra = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
        return {**tensors, **extra}

    folder = rewrite(make(tmp_path, "llama"), add)  # as llama checkpoints once had it
    skeleton = build_skeleton(open_checkpoint(folder))
    assert len(skeleton.unexpected) == 2
    check_same(skeleton, reference_of(folder))


def test_buffers_that_are_no_longer_stored_are_accepted(tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        return {**tensors, "h.0.attn.bias": torch.zeros(1, 1, 64, 64), "h.1.attn.bias": torch.zeros(1, 1, 64, 64)}

    folder = rewrite(make(tmp_path, "gpt2"), add)  # as gpt2 itself has it
    skeleton = build_skeleton(open_checkpoint(folder))
    check_same(skeleton, reference_of(folder))


def test_old_names_are_renamed(tmp_path: Path) -> None:
    def age(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in tensors.items()
        }

    folder = rewrite(make(tmp_path, "bert"), age)
    assert any(name.endswith("gamma") for name in open_checkpoint(folder).tensors)
    check_same(build_skeleton(open_checkpoint(folder)), reference_of(folder))


def test_a_base_model_prefix_is_added(tmp_path: Path) -> None:
    folder = make(tmp_path, "gpt2")
    rewrite(folder, lambda tensors: {name.removeprefix("transformer."): t for name, t in tensors.items()})
    check_same(build_skeleton(open_checkpoint(folder)), reference_of(folder))


def test_key_mapping_renames_first(tmp_path: Path) -> None:
    folder = rewrite(
        make(tmp_path, "mixtral"),
        lambda tensors: {name.replace("model.", "trunk.", 1): t for name, t in tensors.items()},
    )
    mapping = {"^trunk": "model"}
    skeleton = build_skeleton(open_checkpoint(folder), key_mapping=mapping)
    check_same(skeleton, reference_of(folder, key_mapping=mapping))


@pytest.mark.parametrize("mapping", [{"(": "x"}, {"x": 3}, {7: "x"}])
def test_a_key_mapping_that_means_nothing_is_refused(made: Callable[[str], Path], mapping: Any) -> None:
    checkpoint = open_checkpoint(made("llama"))
    with pytest.raises(InvalidArgumentError, match="key_mapping"):
        build_skeleton(checkpoint, key_mapping=mapping)


# --- model=


@pytest.mark.parametrize("family", ["llama tied", "gemma3", "bert", "swin", "whisper", "mixtral"])
@pytest.mark.parametrize("how", ["on meta", "callable"])
def test_a_given_transformers_model_is_filled_by_its_rules(tmp_path: Path, family: str, how: str) -> None:
    folder = make(tmp_path, family, dtype=torch.bfloat16)
    reference = reference_of(folder)
    model_class, config = type(reference), type(reference).config_class.from_pretrained(folder)
    calls = []

    def build() -> nn.Module:
        calls.append(None)
        return model_class(config)

    if how == "on meta":
        with torch.device("meta"):
            given = build()
        skeleton = build_skeleton(open_checkpoint(folder), model=given)
    else:
        skeleton = build_skeleton(open_checkpoint(folder), model=build)
    assert len(calls) == 1
    check_same(skeleton, reference)


def test_a_given_model_takes_the_stated_dtype(made: Callable[[str], Path]) -> None:
    folder = made("llama")
    config = transformers.LlamaConfig.from_pretrained(folder)
    with torch.device("meta"):
        given = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    skeleton = build_skeleton(open_checkpoint(folder), model=given, dtype="float16")
    check_same(skeleton, reference_of(folder, dtype=torch.float16), forward=False)


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(size)
        self.lin = nn.Linear(size, size)
        self.scale = nn.Parameter(torch.randn(size))
        self.register_buffer("table", torch.arange(size, dtype=torch.float32) / 3, persistent=False)
        self.register_buffer("shift", torch.randn(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(self.norm(x)) * self.scale + self.table + self.shift


class Plain(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(size) for _ in range(2))
        self.head = nn.Linear(size, size)
        self.tail = nn.Linear(size, size, bias=False)
        self.tail.weight = self.head.weight
        self.again = self.blocks[0]
        self.extra = nn.ParameterList([torch.randn(3), torch.randn(0)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in [*self.blocks, self.again]:
            x = block(x)
        return self.tail(self.head(x)) + self.extra[0].sum()


def save_plain(folder: Path, dtype: torch.dtype = torch.float32, **changes: torch.Tensor) -> tuple[Path, Plain]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Plain().to(dtype).eval().requires_grad_(False)
    once = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(("again.", "tail."))}
    save_file({**once, **changes}, folder / "weights.safetensors")
    return folder / "weights.safetensors", model


def check_plain(skeleton: Skeleton, reference: nn.Module) -> None:
    fill(skeleton.model, dict(skeleton.sources))
    for mine, theirs in (
        (skeleton.model.state_dict(), reference.state_dict()),
        (dict(skeleton.model.named_buffers()), dict(reference.named_buffers())),
    ):
        assert list(mine) == list(theirs)
        for name, tensor in mine.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert torch.equal(tensor, theirs[name]), name
    assert aliases(skeleton.model) == aliases(reference)
    x = torch.randn(3, 8, dtype=next(reference.parameters()).dtype)
    assert torch.equal(skeleton.model(x), reference(x))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_plain_module_is_matched_by_name(tmp_path: Path, dtype: str) -> None:
    file, reference = save_plain(tmp_path)
    skeleton = build_skeleton(open_checkpoint(file), model=Plain, dtype=dtype)
    assert skeleton.model.tail.weight is skeleton.model.head.weight
    assert skeleton.model.again is skeleton.model.blocks[0]
    assert "head.weight" in skeleton.sources
    assert "tail.weight" not in skeleton.sources
    assert "blocks.0.shift" in skeleton.sources  # a persistent buffer
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    check_plain(skeleton, reference if dtype == "auto" else reference.to(torch.bfloat16))


def test_a_plain_module_has_the_dtypes_that_are_stored(tmp_path: Path) -> None:
    file, _ = save_plain(tmp_path, torch.bfloat16, **{"blocks.1.lin.weight": torch.randn(8, 8)})
    sources = build_skeleton(open_checkpoint(file), model=Plain).sources
    assert sources["blocks.1.lin.weight"].dtype == torch.float32
    assert sources["blocks.0.lin.weight"].dtype == torch.bfloat16
    assert sources["blocks.0.norm.num_batches_tracked"].dtype == torch.int64


def test_a_plain_module_without_what_it_needs_is_told(tmp_path: Path) -> None:
    file, _ = save_plain(tmp_path, **{"blocks.1.lin.weight": torch.randn(8, 4), "other": torch.zeros(1)})
    tensors = load_file(file)
    del tensors["head.weight"], tensors["blocks.1.shift"]
    save_file(tensors, file)
    with pytest.raises(KeyMismatchError, match="does not match Plain: 2 missing, 1 unexpected, 1 mis-shaped") as raised:
        build_skeleton(open_checkpoint(file), model=Plain)
    for part in ("head.weight (8, 8)", "blocks.1.shift (8,)", "other (1,)", "checkpoint (8, 4), model (8, 8)"):
        assert part in str(raised.value)


def test_a_plain_module_without_strict(tmp_path: Path) -> None:
    file, _ = save_plain(tmp_path, other=torch.zeros(1))
    tensors = load_file(file)
    del tensors["head.weight"]
    save_file(tensors, file)
    skeleton = build_skeleton(open_checkpoint(file), model=Plain, strict=False, dtype="bfloat16")
    assert skeleton.initialised == ("head.weight",)
    assert skeleton.unexpected == ("other",)
    head = skeleton.model.head.weight
    assert skeleton.model.tail.weight is head
    assert head.dtype == torch.bfloat16
    assert 0 < head.abs().max() <= 8**-0.5  # the rule of nn.Linear
    assert "head.bias" in skeleton.sources

    del tensors["blocks.0.scale"]
    save_file(tensors, file)
    with pytest.raises(KeyMismatchError, match=r"blocks.0.scale: missing, and Block has no reset_parameters"):
        build_skeleton(open_checkpoint(file), model=Plain, strict=False)


def test_a_plain_tie_that_the_checkpoint_contradicts_is_told(tmp_path: Path) -> None:
    file, reference = save_plain(tmp_path, **{"tail.weight": torch.zeros(8, 8)})
    with pytest.raises(KeyMismatchError, match=r"tail.weight: the model ties it to 'head.weight'"):
        build_skeleton(open_checkpoint(file), model=Plain)
    save_file({**load_file(file), "tail.weight": load_file(file)["head.weight"].clone()}, file)
    check_plain(build_skeleton(open_checkpoint(file), model=Plain), reference)


def test_key_mapping_of_a_plain_module(tmp_path: Path) -> None:
    file, reference = save_plain(tmp_path)
    renamed = {f"net.{name.replace('lin', 'linear')}": tensor for name, tensor in load_file(file).items()}
    save_file(renamed, file)
    mapping = {r"^net\.": "", r"linear\.(\w+)": r"lin.\1"}
    check_plain(build_skeleton(open_checkpoint(file), model=Plain, key_mapping=mapping), reference)
    with pytest.raises(KeyMismatchError, match="both become this name"):
        build_skeleton(open_checkpoint(file), model=Plain, key_mapping={**mapping, r"head\.\w+": "head.bias"})


def test_a_plain_modules_other_buffers_may_be_stored(tmp_path: Path) -> None:
    file, reference = save_plain(tmp_path, **{"blocks.0.table": torch.zeros(8)})
    skeleton = build_skeleton(open_checkpoint(file), model=Plain)
    assert skeleton.unexpected == ("blocks.0.table",)
    check_plain(skeleton, reference)


def test_what_a_pickle_shares_becomes_one_parameter(tmp_path: Path) -> None:
    shared = torch.randn(4, 4)
    torch.save({"0.weight": shared, "1.weight": shared, "2.weight": shared.clone()}, tmp_path / "weights.pt")
    model = build_skeleton(
        open_checkpoint(tmp_path / "weights.pt"),
        model=lambda: nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3))),
    ).model
    assert model[0].weight is model[1].weight
    assert model[0].weight is not model[2].weight


def test_a_module_with_memory_of_its_own_is_refused(tmp_path: Path) -> None:
    file, reference = save_plain(tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"model= holds \d+ parameters with memory of their own"):
        build_skeleton(open_checkpoint(file), model=reference)


@pytest.mark.parametrize("given", [lambda: 3, 3, "Plain"])
def test_what_is_no_module_is_refused(tmp_path: Path, given: Any) -> None:
    file, _ = save_plain(tmp_path)
    with pytest.raises(InvalidArgumentError, match="model="):
        build_skeleton(open_checkpoint(file), model=given)


def test_a_plain_module_whose_buffers_are_lost_is_refused(tmp_path: Path) -> None:
    file, _ = save_plain(tmp_path)
    with torch.device("meta"):
        model = Plain()
    with pytest.raises(InvalidArgumentError, match=r"2 buffers on meta .*'blocks.0.table'"):
        build_skeleton(open_checkpoint(file), model=model)


def test_a_lazy_module_is_refused(tmp_path: Path) -> None:
    file, _ = save_plain(tmp_path)
    with pytest.raises(InvalidArgumentError, match="LazyLinear"):
        build_skeleton(open_checkpoint(file), model=lambda: nn.LazyLinear(3))


def test_other_threads_build_their_modules_as_ever(tmp_path: Path) -> None:
    import threading

    file, _ = save_plain(tmp_path)
    elsewhere: list[nn.Module] = []

    def build() -> nn.Module:
        thread = threading.Thread(target=lambda: elsewhere.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        return Plain()

    build_skeleton(open_checkpoint(file), model=build)
    assert elsewhere[0].weight.device.type == "cpu"
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_a_diffusion_transformer(tmp_path: Path) -> None:
    from diffusers import SD3Transformer2DModel

    settings = {"sample_size": 8, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
    settings |= {"joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16}
    settings |= {"out_channels": 4, "in_channels": 4, "patch_size": 2, "pos_embed_max_size": 8}
    SD3Transformer2DModel(**settings).save_pretrained(tmp_path)
    skeleton = build_skeleton(open_checkpoint(tmp_path), model=lambda: SD3Transformer2DModel(**settings))
    reference = SD3Transformer2DModel.from_pretrained(tmp_path)
    fill(skeleton.model, dict(skeleton.sources))
    for name, tensor in reference.state_dict().items():
        assert torch.equal(skeleton.model.state_dict()[name], tensor)
    for name, tensor in reference.named_buffers():
        assert torch.equal(skeleton.model.get_buffer(name), tensor)


# --- classes


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    file, _ = save_plain(tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"has no config.json.* Give model="):
        build_skeleton(open_checkpoint(file))


def test_a_class_that_transformers_does_not_have(tmp_path: Path) -> None:
    folder = make(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises(
        UnsupportedCheckpointError, match=r"names the class 'NoSuchModel', which transformers [\d.]+ does"
    ):
        build_skeleton(open_checkpoint(folder))
    (folder / "config.json").write_text(json.dumps({"hello": "world"}))
    with pytest.raises(UnsupportedCheckpointError, match="names the model type None and no class"):
        build_skeleton(open_checkpoint(folder))


def test_a_config_that_no_model_can_be_built_from(tmp_path: Path) -> None:
    folder = make(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "no_such_thing"}))
    with pytest.raises(UnsupportedCheckpointError, match=r"LlamaForCausalLM could not be built .*no_such_thing"):
        build_skeleton(open_checkpoint(folder))


def test_without_architectures_the_model_type_names_the_class(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    make(folder, "swin")
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    reference = reference_of(folder)
    (folder / "config.json").write_text(json.dumps(config))
    check_same(build_skeleton(open_checkpoint(folder)), reference)


OWN_CODE = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

class OwnConfig(PreTrainedConfig):
    model_type = "own"
    def __init__(self, width=4, **kwargs):
        self.width = width
        super().__init__(**kwargs)

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.lin = nn.Linear(config.width, config.width)
        self.register_buffer("table", torch.arange(config.width) / 3, persistent=False)
        self.post_init()
    def forward(self, x):
        return self.lin(x) + self.table
"""


def test_code_of_the_checkpoint_runs_only_when_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "modeling_own.py").write_text(OWN_CODE)
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    config = {"architectures": ["OwnModel"], "model_type": "own", "auto_map": auto_map, "width": 6}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"lin.weight": torch.randn(6, 6), "lin.bias": torch.randn(6)}, folder / "model.safetensors")
    with pytest.raises(UnsupportedCheckpointError, match=r"'OwnModel'.*trust_remote_code=True lets it run"):
        build_skeleton(open_checkpoint(folder))
    assert not (tmp_path / "modules").exists()
    skeleton = build_skeleton(open_checkpoint(folder), trust_remote_code=True)
    assert type(skeleton.model).__name__ == "OwnModel"
    assert {name: source.shape for name, source in skeleton.sources.items()} == {
        "lin.weight": (6, 6),
        "lin.bias": (6,),
    }
    # Its class does not make the buffer again, as transformers' own do; the constructor's values must stand.
    assert torch.equal(skeleton.model.table, torch.arange(6) / 3)
    with torch.device("meta"):
        given = type(skeleton.model)(skeleton.model.config)
    assert torch.equal(build_skeleton(open_checkpoint(folder), model=given).model.table, torch.arange(6) / 3)
    (folder / "modeling_own.py").write_text("raise RuntimeError('broken')")
    with pytest.raises(UnsupportedCheckpointError, match="broken"):
        build_skeleton(open_checkpoint(folder), trust_remote_code=True)


def test_a_class_of_the_users_own_whose_buffers_are_lost_is_refused(tmp_path: Path) -> None:
    class Own(transformers.LlamaForCausalLM):
        def __init__(self, config: transformers.LlamaConfig, width: int) -> None:
            super().__init__(config)
            self.register_buffer("table", torch.arange(width) / 3, persistent=False)

    folder = make(tmp_path, "llama")
    config = transformers.LlamaConfig.from_pretrained(folder)
    model = build_skeleton(open_checkpoint(folder), model=lambda: Own(config, 5)).model
    assert torch.equal(model.table, torch.arange(5) / 3)
    assert torch.equal(model.model.rotary_emb.inv_freq, reference_of(folder).model.rotary_emb.inv_freq)
    with torch.device("meta"):
        given = Own(config, 5)
    with pytest.raises(InvalidArgumentError, match="buffers on meta"):
        build_skeleton(open_checkpoint(folder), model=given)


def test_a_quantised_checkpoint_is_refused_first(tmp_path: Path) -> None:
    folder = make(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    quantised = {**config, "architectures": ["NoSuchModel"], "quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(UnsupportedCheckpointError, match="gptq"):
        build_skeleton(open_checkpoint(folder))


# --- what it must not do


def test_no_weight_is_read_and_no_network_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path, "mixtral")
    checkpoint = open_checkpoint(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a local checkpoint asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    skeleton = build_skeleton(checkpoint, dtype="bfloat16")
    load_generation_config(skeleton.model, checkpoint)
    assert skeleton.sources


def test_nothing_is_said_and_nothing_stays_changed(
    made: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = open_checkpoint(made("mixtral"))
    capfd.readouterr()
    before = torch.get_default_dtype(), torch.get_default_device()
    with torch.inference_mode(), torch.device("meta"):
        skeleton = build_skeleton(checkpoint, dtype="bfloat16")
    assert (torch.get_default_dtype(), torch.get_default_device()) == before
    assert not any(tensor.is_inference() for tensor in skeleton.model.state_dict(keep_vars=True).values())
    assert capfd.readouterr() == ("", "")


# --- what goes with the model


def test_generation_settings_are_those_of_from_pretrained(tmp_path: Path) -> None:
    folder = make(tmp_path, "llama")
    checkpoint = open_checkpoint(folder)
    settings = transformers.GenerationConfig(max_new_tokens=7, do_sample=True, temperature=0.5, eos_token_id=[3, 5])
    settings.save_pretrained(folder)
    for step in ("file", "no file"):
        if step == "no file":
            (folder / "generation_config.json").unlink()
        model = build_skeleton(checkpoint).model
        load_generation_config(model, checkpoint)
        assert model.generation_config.to_dict() == reference_of(folder).generation_config.to_dict()
        assert model.config.name_or_path == model.name_or_path == str(folder)
    load_generation_config(nn.Linear(2, 2), checkpoint)  # nothing to do, and no error


def test_a_skeleton_can_be_saved_again_in_the_checkpoint_format(tmp_path: Path) -> None:
    folder = make(tmp_path / "first", "mixtral")
    skeleton = build_skeleton(open_checkpoint(folder))
    fill(skeleton.model, dict(skeleton.sources))
    skeleton.model.save_pretrained(tmp_path / "second", max_shard_size="20KB")
    first, second = (open_checkpoint(tmp_path / part) for part in ("first", "second"))
    assert set(first.tensors) == set(second.tensors)
    shutil.rmtree(folder)
    reference_of(tmp_path / "second")


@pytest.mark.parametrize("family", FAMILIES)
def test_example_inputs_run_the_model_under_fake_tensors(family: str) -> None:
    name, settings = FAMILIES[family]
    model_class = getattr(transformers, name)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**settings)).to(torch.bfloat16).eval()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = example_inputs(model, 2, 5)
        assert inputs is not None
        state = {
            name: mode.from_tensor(torch.empty_like(tensor, device="cpu"))
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        }
        with torch.no_grad():
            output = torch.func.functional_call(model, state, (), inputs)
    assert all(len(tensor) == 2 for tensor in inputs.values())
    assert next(tensors_in(output.to_tuple())) is not None


def test_no_inputs_are_guessed_for_a_plain_module() -> None:
    assert example_inputs(nn.Linear(2, 2), 1, 1) is None


def test_what_transformers_imports_tells_nothing_of_other_machines(tiny_llama: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels that do not load are of use here")
    code = f"import bigmodel; bigmodel.load_sharded({str(tiny_llama)!r}, progress=False); import transformers.modeling_utils"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
