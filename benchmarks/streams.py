"""Runs: each loads a model in its own way and times the same passes. Called in a child process, usually in a cgroup.

A decode step is one new token after the prompt, greedy, with the model's own cache; what comes before the first step
(the load, the prompt) is not in it. The tokens and the last logits are given back, so that a fast wrong answer shows.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.loaders import mapped_bytes, plan_figures

__all__ = ["MODELS", "run_model", "run_planned"]


def run_model(
    model: str,
    path: str,
    options: dict[str, Any],
    prompt_tokens: int,
    num_steps: int,
    long_tokens: int = 0,
    num_long: int = 0,
) -> dict[str, Any]:
    """Load a model and time its passes.

    Args:
        model: a key of MODELS.
        path: the checkpoint's folder.
        options: what that entry takes beside it.
        prompt_tokens: of the prompt, batch 1.
        num_steps: decode steps that are timed, after one that is not.
        long_tokens, num_long: passes of so many tokens that are timed, after one that is not; 0 for none.

    Returns:
        ``seconds`` (a decode step each), ``cpu_seconds`` and ``disk_bytes`` likewise, ``long_seconds``, ``tokens``,
        ``digest`` of the last logits of the steps, ``long_digest``, ``mapped_bytes`` (weights that the plan calls
        resident and that are pages of the files), ``plan``, ``stats`` (ours only).
    """
    import torch

    with torch.no_grad():
        runner = MODELS[model](path, **options)
        steps = _decode(runner, prompt_tokens, num_steps)
        long = _long_passes(runner, long_tokens, num_long) if num_long else {}
    plan = plan_figures(runner)
    resident = tuple(plan["resident_units"]) if plan else ()
    names = [
        (name, weight)
        for name, weight in runner.named_parameters()
        if any(name == unit or name.startswith(f"{unit}.") for unit in resident)
    ]
    return {**steps, **long, "mapped_bytes": mapped_bytes(names, path), "plan": plan, "stats": _stats(runner)}


def run_planned(
    path: str, options: dict[str, Any], prompt_tokens: int, new_tokens: int, num_steps: int
) -> dict[str, Any]:
    """Load a model by a plan and time the workload that the plan was made for; then one more first pass, for its memory alone.

    Args:
        path: the checkpoint's folder.
        options: of load_sharded.
        prompt_tokens, new_tokens: the workload, batch 1.
        num_steps: decode steps that are timed, after one that is not.

    Returns:
        ``ttft_s`` of the first pass of the loaded model, as generate calls it; ``seconds`` of the steps; ``load_s``;
        ``predicted`` (the plan's estimate), ``resident_bytes``, ``slots``, ``mapped_bytes``.
    """
    import dataclasses

    import torch

    import bigmodel

    workload = bigmodel.Workload(prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    start = time.perf_counter()
    model = bigmodel.load_sharded(path, workload=workload, **options)
    load_s = time.perf_counter() - start
    plan = bigmodel.plan_of(model)
    with torch.no_grad():
        start = time.perf_counter()
        output = model(input_ids=_prompt(model, prompt_tokens), use_cache=True, logits_to_keep=1)
        ttft_s = time.perf_counter() - start
        seconds = []
        for step in range(num_steps + 1):
            token = output.logits[:, -1:].argmax(-1)
            start = time.perf_counter()
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
            if step:
                seconds.append(time.perf_counter() - start)
        # The next request: now every slot has held its largest unit, and the stated peak is what a used model takes.
        output = token = None
        model(input_ids=_prompt(model, prompt_tokens), use_cache=True, logits_to_keep=1)
    return {
        "seconds": seconds,
        "ttft_s": ttft_s,
        "load_s": load_s,
        "predicted": dataclasses.asdict(plan.estimate),
        "resident_bytes": plan.resident_bytes,
        "slots": [group.num_slots for group in plan.slots],
        "mapped_bytes": bigmodel.stats_of(model).mapped_bytes,
    }


def _decode(model: Any, prompt_tokens: int, num_steps: int) -> dict[str, Any]:
    import torch

    output = model(input_ids=_prompt(model, prompt_tokens), use_cache=True)
    tokens, seconds, cpu_seconds, disk_bytes = [], [], [], []
    for step in range(num_steps + 1):
        token = output.logits[:, -1:].argmax(-1)
        tokens.append(int(token))
        start, start_cpu, start_disk = time.perf_counter(), time.process_time(), _bytes_from_disk()
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        taken, taken_cpu = time.perf_counter() - start, time.process_time() - start_cpu
        if step:  # the first one still learns: an order, a cache, kernels for this shape
            seconds.append(taken)
            cpu_seconds.append(taken_cpu)
            disk_bytes.append(_bytes_from_disk() - start_disk)
    logits = output.logits[0, -1]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "disk_bytes": disk_bytes,
        "tokens": tokens,
        "digest": _digest(logits),
        "is_finite": bool(torch.isfinite(logits).all()),
    }


def _long_passes(model: Any, num_tokens: int, num_passes: int) -> dict[str, Any]:
    ids = _prompt(model, num_tokens)
    seconds, digest = [], ""
    for number in range(num_passes + 1):
        start = time.perf_counter()
        output = model(input_ids=ids, use_cache=True)
        if number:
            seconds.append(time.perf_counter() - start)
        digest = _digest(output.logits[0, -1])
        del output
    return {"long_seconds": seconds, "long_digest": digest}


def _prompt(model: Any, num_tokens: int) -> Any:
    """The same ids for every candidate: shape (1, num_tokens), int64."""
    import torch

    return (torch.arange(num_tokens) * 7919 + 13).remainder(model.config.vocab_size).unsqueeze(0)


def _digest(logits: Any) -> str:
    import torch

    return hashlib.sha256(logits.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _bytes_from_disk() -> int:
    """What this process has made the disk read so far; 0 where the kernel does not count it."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)


def _stats(model: Any) -> dict[str, float] | None:
    """The numbers among what our library measured; None for a model that is not ours."""
    if plan_figures(model) is None:
        return None
    import bigmodel

    stats = bigmodel.stats_of(model)
    values = {name: getattr(stats, name) for name in dir(stats) if not name.startswith("_")}
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}


def _bigmodel(path: str, device_map: Any, max_memory: dict[str, int] | None = None) -> Any:
    import bigmodel

    return bigmodel.load_sharded(path, device_map=device_map, max_memory=max_memory)


def _transformers(path: str) -> Any:
    """Resident: mapped from the files and touched by the prompt."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


def _transformers_copied(path: str) -> Any:
    """Resident in private memory."""
    model = _transformers(path)
    for weight in model.parameters():
        weight.data = weight.data.clone()
    return model


def _transformers_disk(path: str, offload_folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", device_map={"": "disk"}, offload_folder=offload_folder
    )
    return model.eval()


def _accelerate_disk(path: str, offload_folder: str) -> Any:
    """``disk_offload`` of a model whose weights its folder already holds; the first call writes them."""
    from accelerate import disk_offload, init_empty_weights
    from accelerate.utils import offload_state_dict
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (Path(offload_folder) / "index.json").exists():
        whole = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        offload_state_dict(offload_folder, whole.state_dict())
        del whole
    config = AutoConfig.from_pretrained(path)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype).eval()
    import torch

    return disk_offload(model, offload_folder, execution_device=torch.device("cpu"))


MODELS: dict[str, Callable[..., Any]] = {
    "bigmodel": _bigmodel,
    "transformers": _transformers,
    "transformers, copied": _transformers_copied,
    "transformers, disk": _transformers_disk,
    "accelerate, disk_offload": _accelerate_disk,
}
