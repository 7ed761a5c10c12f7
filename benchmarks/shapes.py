"""Plans for models that nobody has here, from their config.json alone. Called in a child process."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

__all__ = ["MODELS_FOR_MACHINES", "SHAPES", "accelerate_map", "compare_maps", "plan_shape"]

MODELS_FOR_MACHINES = ("Llama-3.1-8B", "Llama-3.1-70B", "Llama-3.1-405B", "DeepSeek-V3")
NEW_TOKENS = 64
# Their budgets do not count cache, activations and contexts: the largest share of ours that leaves room for those.
_SHARES = (1.0, 0.97, 0.94, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)

# True shapes, as their config.json states them; what is left out is transformers' default for the class.
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "dtype": "bfloat16",
    },
    "Llama-3.1-70B": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "dtype": "bfloat16",
    },
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


def compare_maps(shape: str, machine: str) -> dict[str, Any]:
    """Predicted seconds of `auto`, of "sequential" and of the map that Accelerate gives, on a machine file.

    Returns:
        What -> {``step_s``, ``ttft_s``}; None where it does not fit.
    """
    import bigmodel
    from bigmodel.errors import DoesNotFitError

    found = bigmodel.Machine.load(machine)
    workload = bigmodel.Workload(new_tokens=NEW_TOKENS)
    limits: dict[int | str, int] = {n: each.memory_bytes for n, each in enumerate(found.accelerators)}
    limits["cpu"] = found.host_bytes
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))

        def predicted(device_map: Any) -> dict[str, float | None] | None:
            try:
                plan = bigmodel.make_plan(folder, found, workload, device_map=device_map)
            except DoesNotFitError:
                return None
            return {"step_s": plan.estimate.time_per_token_s, "ttft_s": plan.estimate.ttft_s}

        results["auto"] = predicted("auto")
        results["sequential"] = predicted("sequential")
        for share in _SHARES:
            theirs = accelerate_map(Path(folder), {tier: int(share * size) for tier, size in limits.items()})
            results["Accelerate's map"] = predicted(theirs)
            if results["Accelerate's map"] is not None:
                break
    return results


def accelerate_map(path: Path, room: dict[int | str, int]) -> dict[str, Any]:
    """What infer_auto_device_map puts where in so many bytes of each tier; the rest rests on disk."""
    from accelerate import infer_auto_device_map, init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    device_map: dict[str, Any] = infer_auto_device_map(
        model, max_memory=dict(room), no_split_module_classes=model._no_split_modules
    )
    return device_map
