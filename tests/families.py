"""Tiny random models of many families, saved as checkpoints in several files: true architectures, small numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

VOCAB = 96


def _text(**changes: Any) -> dict[str, Any]:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return sizes | changes


def _configs() -> dict[str, Callable[[], Any]]:
    import transformers as t

    return {
        "llama": lambda: t.LlamaConfig(**_text(), architectures=["LlamaForCausalLM"]),
        "llama_tied": lambda: t.LlamaConfig(**_text(tie_word_embeddings=True), architectures=["LlamaForCausalLM"]),
        "qwen3": lambda: t.Qwen3Config(**_text(), architectures=["Qwen3ForCausalLM"]),
        "gemma3": lambda: t.Gemma3TextConfig(**_text(sliding_window=8), architectures=["Gemma3ForCausalLM"]),
        "gpt2": lambda: t.GPT2Config(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=4,
            n_head=4,
            n_positions=128,
            bos_token_id=1,
            eos_token_id=2,
            architectures=["GPT2LMHeadModel"],
        ),
        "opt": lambda: t.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            architectures=["OPTForCausalLM"],
        ),
        "bloom": lambda: t.BloomConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            n_layer=4,
            n_head=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            architectures=["BloomForCausalLM"],
        ),
        "mixtral": lambda: t.MixtralConfig(
            **_text(num_local_experts=4, num_experts_per_tok=2), architectures=["MixtralForCausalLM"]
        ),
        "qwen3_moe": lambda: t.Qwen3MoeConfig(
            **_text(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
            architectures=["Qwen3MoeForCausalLM"],
        ),
        "deepseek_v3": lambda: t.DeepseekV3Config(
            **_text(
                num_key_value_heads=4,
                n_routed_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
                first_k_dense_replace=1,
                n_group=2,
                topk_group=1,
                n_shared_experts=1,
                q_lora_rank=16,
                kv_lora_rank=16,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=8,
                head_dim=8,
            ),
            architectures=["DeepseekV3ForCausalLM"],
        ),
        "mamba": lambda: t.MambaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            state_size=8,
            num_hidden_layers=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            architectures=["MambaForCausalLM"],
        ),
        "t5": lambda: t.T5Config(
            vocab_size=VOCAB,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=3,
            num_heads=4,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
            architectures=["T5ForConditionalGeneration"],
        ),
        "bert": lambda: t.BertConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            architectures=["BertForMaskedLM"],
        ),
        "vit": lambda: t.ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
            num_labels=5,
            architectures=["ViTForImageClassification"],
        ),
        # Its experts are stored transposed: weights that no range of the file shows.
        "qwen3_vl_moe": lambda: t.Qwen3VLMoeConfig(
            text_config=_text(
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=24,
                rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            ),
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 1,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            architectures=["Qwen3VLMoeForConditionalGeneration"],
        ),
        "llava": lambda: t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                image_size=16,
                patch_size=8,
            ),
            text_config=t.LlamaConfig(**_text()),
            image_token_index=VOCAB - 1,
            architectures=["LlavaForConditionalGeneration"],
        ),
    }


FAMILIES = (
    "llama", "llama_tied", "qwen3", "gemma3", "gpt2", "opt", "bloom", "mixtral", "qwen3_moe", "deepseek_v3", "mamba", "t5",
    "bert", "vit", "qwen3_vl_moe", "llava",
)  # fmt: skip
QUICK = ("llama", "gemma3", "mixtral", "t5")


def each_family(families=FAMILIES, quick=QUICK):
    """Parameters of a test over families: what is tested of each, the fast suite tests of a few."""
    return [pytest.param(each, marks=[] if each in quick else pytest.mark.slow) for each in families]


def make_checkpoint(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A sharded checkpoint of a tiny random model of the family."""
    import transformers as t

    config = _configs()[family]()
    torch.manual_seed(7)
    model = getattr(t, config.architectures[0])(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and norms that are all zero or one would hide a weight that was read from a wrong place.
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder, max_shard_size="20KB")
    if family == "qwen3_vl_moe":
        _transpose_experts(folder)
    return folder


def large_experts(folder: Path) -> Path:
    """A mixture of experts of 80 MB in bfloat16, stored as the published checkpoints of its class are."""
    import transformers as t

    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 1024, "hidden_size": 512,
             "num_hidden_layers": 6, "head_dim": 128}  # fmt: skip
    config = _configs()["qwen3_vl_moe"]()
    config.text_config = t.Qwen3VLMoeTextConfig(**config.text_config.to_dict() | sizes)
    config.vision_config.out_hidden_size = 512
    config.text_config.rope_parameters["mrope_section"] = [24, 20, 20]
    torch.manual_seed(7)
    t.Qwen3VLMoeForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="40MB")
    _transpose_experts(folder)
    return folder


def _transpose_experts(folder: Path) -> None:
    """As the published checkpoints store them; save_pretrained does not."""
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        stored = {
            name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
            for name, tensor in load_file(file).items()
        }
        save_file(stored, file, {"format": "pt"})


def resident(folder: Path, **options: Any) -> Any:
    """The same checkpoint loaded whole by transformers."""
    import json

    import transformers as t

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    options.setdefault("dtype", "auto")
    return getattr(t, name).from_pretrained(folder, **options).eval().requires_grad_(False)


def inputs_for(family: str) -> dict[str, torch.Tensor]:
    """Inputs of one forward pass, two sequences."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB - 2, (2, 9), generator=generator)
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if family == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    if family == "llava":
        ids = torch.cat([ids[:, :2], torch.full((2, 4), VOCAB - 1), ids[:, 2:]], dim=1)
        return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    return {"input_ids": ids}
