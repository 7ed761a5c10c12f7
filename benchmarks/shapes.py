"""Plans for models that nobody has here, from their config.json alone. Called in a child process."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

__all__ = ["SHAPES", "plan_shape"]

# True shapes, as their config.json states them; what is left out is transformers' default for the class.
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.1-405B": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "dtype": "bfloat16",
    },
    "DeepSeek-V3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "vocab_size": 129280,
        "dtype": "bfloat16",
    },
    "BLOOM-176B": {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "hidden_size": 14336,
        "n_layer": 70,
        "n_head": 112,
        "vocab_size": 250880,
        "dtype": "bfloat16",
    },
}


def plan_shape(shape: str, machine: str) -> dict[str, Any]:
    """How long `make_plan` takes for a key of `SHAPES` on a machine file, building the model on meta included.

    Returns:
        ``seconds``; ``num_units``, ``weight_bytes``; what was predicted: ``time_per_token_s``, ``ttft_s``, ``binds``.
    """
    import bigmodel

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
        found = bigmodel.Machine.load(machine)
        start = time.perf_counter()
        plan = bigmodel.make_plan(folder, found)
        seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "num_units": len(plan.placements),
        "weight_bytes": plan.weight_bytes,
        "time_per_token_s": plan.estimate.time_per_token_s,
        "ttft_s": plan.estimate.ttft_s,
        "binds": dict(plan.estimate.binds),
        "streamed_bytes": plan.streamed_bytes,
    }
