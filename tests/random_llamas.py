"""Random models of the families that llama.cpp runs: small, decided in their choices, with every kind of tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = ["FAMILIES", "LLAMA3_ROPE", "save_random"]

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
FAMILIES = {
    "llama": ("llama", {"num_key_value_heads": 2}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama_scaled": ("llama", {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 1}),
    "mistral": ("mistral", {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": None}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True}),
}


def save_random(
    folder: Path, family: str, *, dtype: torch.dtype = torch.bfloat16, large: str | None = None, **changes: Any
) -> None:
    """Write a checkpoint of 2 layers.

    Args:
        folder: where to.
        family: of FAMILIES.
        dtype: of its weights.
        large: a parameter whose first value shall be beyond float16 (99840 in bfloat16).
        changes: of its config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, own = FAMILIES[family]
    sizes = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(model_type, **(sizes | own | changes))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        for name, parameter in model.named_parameters():
            # Vectors too: what is all ones or zeros may be left out unnoticed.
            parameter.normal_(mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.2)
        if large is not None:
            model.get_parameter(large).view(-1)[0] = 1e5
    model.save_pretrained(folder, max_shard_size="100KB")
