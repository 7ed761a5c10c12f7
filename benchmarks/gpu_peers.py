"""The peers of benchmarks.gpu, each at its best in the accelerator's memory that bigmodel has."""

from __future__ import annotations

import gc
import importlib.util
import os
from typing import Any

from benchmarks.gpu_runs import accelerator, memory_of, steady_steps

__all__ = ["PEERS", "is_installed", "run_accelerate", "run_deepspeed", "run_group_offload"]

GIB = 1 << 30
# Peer -> the package that it takes.
PEERS = {"accelerate": "accelerate", "deepspeed": "deepspeed", "group_offload": "diffusers"}
# Left of the budget beside the weights that Accelerate places, whose budget is of weights alone: the first that runs counts.
SPARE_BYTES = (GIB // 4, GIB, 2 * GIB)


def is_installed(peer: str) -> bool:
    return importlib.util.find_spec(PEERS[peer]) is not None


def run_accelerate(path: str, simulates: bool, budget: int, prompt_tokens: int, num_steps: int) -> dict[str, Any]:
    """transformers with the map that Accelerate makes for the same memory, as full as it runs."""
    import torch
    from transformers import AutoModelForCausalLM

    with accelerator(simulates) as device:
        room = _capped(budget, device)
        for spare in SPARE_BYTES:
            model = None
            try:
                limits = {0: max(1, room - min(spare, room // 4)), "cpu": 1 << 40}
                model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map="auto", max_memory=limits)
                away = sum(each.nbytes for each in model.parameters() if each.device.type == "meta")
                found = steady_steps(
                    model.eval(), device, batch_size=1, prompt_tokens=prompt_tokens, num_steps=num_steps
                )
                return _with_bytes(found, away) | memory_of(device) | {"spare_bytes": spare}
            except torch.OutOfMemoryError:
                if spare == SPARE_BYTES[-1]:
                    raise
            del model
            gc.collect()
            torch.accelerator.empty_cache()
        raise AssertionError("the last of them returns or raises")


def run_deepspeed(
    path: str,
    simulates: bool,
    budget: int,
    prompt_tokens: int,
    num_steps: int,
    live_layers: int = 2,
    nvme_path: str | None = None,
) -> dict[str, Any]:
    """ZeRO-3 with its parameters in page-locked host memory, or in files, and a prefetch bucket of two layers.

    Args:
        path, simulates, budget, prompt_tokens, num_steps: as everywhere.
        live_layers: parameters that may be on the accelerator, in layers.
        nvme_path: where its files are written; None for host memory.
    """
    import deepspeed
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    with accelerator(simulates) as device:
        _capped(budget, device)
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(config)
        layer = sum(each.numel() for each in whole.get_decoder().layers[0].parameters())
        largest = max(each.numel() for each in whole.parameters())
        del whole
        parameters: dict[str, Any] = {"device": "cpu", "pin_memory": True}
        if nvme_path is not None:
            parameters = {
                "device": "nvme",
                "nvme_path": nvme_path,
                "pin_memory": True,
                "buffer_count": 8,
                "buffer_size": largest,
            }
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_optimization": {
                "stage": 3,
                "overlap_comm": True,
                "offload_param": parameters,
                "stage3_prefetch_bucket_size": 2 * layer,
                "stage3_param_persistence_threshold": config.hidden_size,
                "stage3_max_live_parameters": live_layers * layer,
                "stage3_max_reuse_distance": live_layers * layer,
            },
            "aio": {"block_size": 1 << 20, "queue_depth": 32, "overlap_events": True, "single_submit": False},
        }
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
        kept = HfDeepSpeedConfig(settings)  # transformers looks for it while it loads
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        engine = deepspeed.initialize(model=model, config=settings)[0]
        engine.eval()
        del kept
        away = sum(2 * each.ds_numel for each in engine.module.parameters() if not getattr(each, "ds_persist", False))
        found = steady_steps(engine.module, device, batch_size=1, prompt_tokens=prompt_tokens, num_steps=num_steps)
        return _with_bytes(found, away) | memory_of(device)


def run_group_offload(path: str, simulates: bool, budget: int, prompt_tokens: int, num_steps: int) -> dict[str, Any]:
    """diffusers' group offloading with a stream, one layer to a group."""
    import torch
    from diffusers.hooks import apply_group_offloading
    from transformers import AutoModelForCausalLM

    with accelerator(simulates) as device:
        _capped(budget, device)
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        has_streams = device.type == "cuda"
        apply_group_offloading(
            model,
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            non_blocking=True,
            use_stream=has_streams,
            record_stream=has_streams,
            # Layers are looked for in what is named here, one level down.
            block_modules=[model.base_model_prefix],
        )
        away = sum(each.nbytes for each in model.parameters() if each.device.type == "cpu")
        found = steady_steps(model, device, batch_size=1, prompt_tokens=prompt_tokens, num_steps=num_steps)
        return _with_bytes(found, away) | memory_of(device)


def _capped(budget: int, device: Any) -> int:
    """What of the budget is left beside CUDA's context; torch's allocator gives no more from now on."""
    import torch

    if device.type != "cuda":
        return budget
    torch.empty(1, device=device)
    free, total = torch.cuda.mem_get_info(device)
    room = max(1, budget - (total - free - torch.cuda.memory_reserved(device)))
    torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), device)
    return room


def _with_bytes(found: dict[str, Any], away: int) -> dict[str, Any]:
    """Bytes moved in a step: as CUDA counted them, or the weights that were away."""
    counted = found.get("moved_bytes")
    return found | {"moved_bytes": counted or away, "bytes_from": "CUDA's copies" if counted else "weights away"}
