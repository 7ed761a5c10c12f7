"""What benchmarks.gpu runs in processes of their own: the link, and bigmodel's steps, prompts, profile and bits."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT

__all__ = [
    "accelerator",
    "calibrate",
    "look",
    "measure_link",
    "memory_of",
    "moved_bytes",
    "profile_step",
    "run_bigmodel",
    "run_prompts",
    "run_resident",
    "same_bits",
    "steady_steps",
]

NUM_WARM_STEPS = 2
LINK_BYTES, NUM_COPIES = 256 << 20, 9
STEP = "steady step"
# CUDA's calls that make the host wait for the device, and that take memory from it or give it back.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize")
WAITS += ("cuCtxSynchronize", "cuEventSynchronize")
TAKES = ("cudaMalloc", "cudaFree", "cuMemCreate", "cuMemRelease")


@contextlib.contextmanager
def accelerator(simulates: bool) -> Iterator[Any]:
    """The first accelerator, or a simulated one."""
    import torch

    with contextlib.ExitStack() as stack:
        if simulates:
            sys.path.insert(0, str(ROOT / "tests"))
            from simulated import simulated

            stack.enter_context(simulated(1, memory_bytes=64 << 30))
        if not torch.accelerator.is_available():
            raise RuntimeError("there is no accelerator here")
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        stack.enter_context(torch.no_grad())
        yield torch.device(kind.type, 0)


def look(simulates: bool) -> dict[str, Any]:
    """The accelerator's name, its memory and what of it is free."""
    import torch

    with accelerator(simulates) as device:
        free, total = torch.accelerator.get_memory_info(device)
        name = torch.cuda.get_device_name(0) if device.type == "cuda" else f"{device.type} (simulated)"
        return {"device": name, "free_bytes": min(free, total), "total_bytes": total}


def calibrate(folder: str, simulates: bool) -> dict[str, Any]:
    """Measure the machine's rates, and keep them where the plans of later processes find them."""
    import bigmodel

    with accelerator(simulates):
        begun = time.perf_counter()
        machine = bigmodel.Machine.calibrate(folder, progress=False)
        return {"seconds": time.perf_counter() - begun, "machine": json.loads(machine.to_json())}


def measure_link(simulates: bool) -> dict[str, Any]:
    """Bytes/s of copies from page-locked memory, one at a time.

    Raises:
        RuntimeError: the system does not page-lock: there is no peak to hold anything against.
    """
    from bigmodel.offload.arena import Arena
    from bigmodel.offload.link import DeviceMemory, Link, page_lock

    with accelerator(simulates) as device:
        num_bytes = LINK_BYTES if device.type == "cuda" else LINK_BYTES // 16
        arena, link = Arena(num_bytes), Link(device)
        arena.tensor.fill_(1)
        error = page_lock(arena, device)
        if error or (device.type == "cuda" and not arena.tensor.is_pinned()):
            raise RuntimeError(f"{num_bytes} bytes of host memory could not be page-locked: CUDA error {error}")
        memory = DeviceMemory(num_bytes, link)
        seconds = []
        for _ in range(NUM_COPIES):
            start = time.perf_counter()
            link.copy(arena.tensor, memory.tensor, None)
            link.drain()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds[2:], "num_bytes": num_bytes, "bytes_per_s": num_bytes / min(seconds[2:])}


def run_bigmodel(
    path: str,
    simulates: bool,
    budget: int,
    prompt_tokens: int,
    num_steps: int,
    batch_size: int | str = 1,
    device_map: Any = "auto",
) -> dict[str, Any]:
    """Decode steps within a budget of the accelerator's memory; a batch of "auto" is the planner's choice."""
    import bigmodel

    workload = bigmodel.Workload(
        batch_size=batch_size, prompt_tokens=prompt_tokens, new_tokens=num_steps + NUM_WARM_STEPS + 4
    )
    with accelerator(simulates) as device:
        model, found = _loaded(path, device, budget, device_map, workload)
        found["batch_size"] = bigmodel.plan_of(model).workload.num_sequences
        found |= steady_steps(
            model,
            device,
            batch_size=found["batch_size"],
            prompt_tokens=prompt_tokens,
            num_steps=num_steps,
            stats=bigmodel.stats_of,
        )
        found |= memory_of(device)
        return found


def run_prompts(path: str, simulates: bool, budget: int, lengths: list[int]) -> dict[str, Any]:
    """The pass of a prompt, each length from a load of its own; ``lengths`` -> what was found, or ``error``."""
    import torch

    import bigmodel

    found: dict[str, Any] = {}
    with accelerator(simulates) as device:
        for tokens in lengths:
            model = None
            try:
                model, each = _loaded(
                    path, device, budget, "auto", bigmodel.Workload(prompt_tokens=tokens, new_tokens=1)
                )
                each["seconds"] = []
                for _ in range(2):
                    ids = _prompt(model, 1, tokens).to(device)
                    torch.accelerator.synchronize(device)
                    start = time.perf_counter()
                    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
                    output.logits[:, -1:].argmax(-1).tolist()
                    each["seconds"].append(time.perf_counter() - start)
                    del output
                found[str(tokens)] = each | memory_of(device)
            except Exception as error:  # the other lengths are measured all the same
                found[str(tokens)] = {"error": f"{type(error).__name__}: {error}"[:300]}
            del model
    return {"lengths": found, "seconds": [each["seconds"][-1] for each in found.values() if "seconds" in each]}


def run_resident(
    path: str, simulates: bool, batch_sizes: list[int], prompt_tokens: int, num_steps: int
) -> dict[str, Any]:
    """Steps of the model that is whole on the accelerator: what computation alone takes."""
    import torch

    import bigmodel

    with accelerator(simulates) as device:
        room = torch.accelerator.get_memory_info(device)[0]
        workload = bigmodel.Workload(
            batch_size=max(batch_sizes),
            prompt_tokens=prompt_tokens,
            new_tokens=num_steps + NUM_WARM_STEPS + 4,
        )
        model, _ = _loaded(path, device, room, {"": str(device)}, workload)
        steps = {}
        for batch_size in batch_sizes:
            found = steady_steps(
                model,
                device,
                batch_size=batch_size,
                prompt_tokens=prompt_tokens,
                num_steps=num_steps,
                stats=bigmodel.stats_of,
            )
            steps[str(batch_size)] = statistics.median(found["seconds"])
        return {"step_s": steps, "seconds": list(steps.values())} | memory_of(device)


def profile_step(path: str, simulates: bool, budget: int) -> dict[str, Any]:
    """What a steady step asks of CUDA; with the embedding table on the accelerator, and with it in host memory.

    There its rows are looked up by the processor, which waits once for the tokens.
    """
    import bigmodel

    workload = bigmodel.Workload(prompt_tokens=16, new_tokens=16)
    found: dict[str, Any] = {}
    with accelerator(simulates) as device:
        limits: dict[int | str, int | str] = {0: budget}
        plan = bigmodel.make_plan(path, workload=workload, max_memory=limits)
        table = next(place for place in plan.placements if place.unit.endswith(("embed_tokens", "word_embeddings")))
        homes = {place.unit: place.home for place in plan.placements}
        for home in (str(device), "cpu"):
            try:
                room = budget + table.weight_bytes  # wherever the plan has put it
                model, each = _loaded(path, device, room, homes | {table.unit: home}, workload)
                found["table on the device" if home != "cpu" else "table in host memory"] = each | _calls_of_a_step(
                    model, device
                )
            except Exception as error:
                found[f"table on {home}"] = {"error": f"{type(error).__name__}: {error}"[:300]}
            model = None
    return {"rows": found}


def same_bits(path: str, simulates: bool, budget: int, prompt_tokens: int) -> dict[str, Any]:
    """Whether every way of resting gives the logits and the tokens of transformers' model, whole on the accelerator."""
    import torch
    from transformers import AutoModelForCausalLM

    import bigmodel

    def answers(model: Any) -> tuple[list[Any], list[int]]:
        output = model(input_ids=_prompt(model, 1, prompt_tokens).to(device), use_cache=True)
        logits, tokens = [output.logits.cpu()], []
        for _ in range(4):
            token = output.logits[:, -1:].argmax(-1)
            tokens.append(int(token))
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits.cpu())
        return logits, tokens

    with accelerator(simulates) as device:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto").to(device).eval()
        expected, expected_tokens = answers(model)
        del model
        differing, streams = [], {}
        ways: dict[str, Any] = {"auto": "auto", "disk": {"": "disk"}, "host": {"": "cpu", "lm_head": str(device)}}
        for name, device_map in ways.items():
            workload = bigmodel.Workload(prompt_tokens=prompt_tokens, new_tokens=8)
            model, _ = _loaded(path, device, budget, device_map, workload)
            streams[name] = sum(len(group.units) for group in bigmodel.plan_of(model).slots)
            logits, tokens = answers(model)
            if tokens != expected_tokens or not all(map(torch.equal, logits, expected)):
                differing.append(name)
            del model
        return {"differing": differing, "streamed_units": streams, "num_logits": len(expected)}


# --- What the runs are made of


def steady_steps(
    model: Any,
    device: Any,
    *,
    batch_size: int,
    prompt_tokens: int,
    num_steps: int,
    stats: Callable[[Any], Any] | None = None,
) -> dict[str, Any]:
    """Decode steps, each from one token to the next one in the host's hands, as a sampler has it."""
    output = model(input_ids=_prompt(model, batch_size, prompt_tokens).to(device), use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    token.tolist()
    cache, seconds, before = output.past_key_values, [], None
    for step in range(NUM_WARM_STEPS + num_steps):
        if step == NUM_WARM_STEPS and stats is not None:
            before = stats(model)
        start = time.perf_counter()
        output = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        token.tolist()
        if step >= NUM_WARM_STEPS:
            seconds.append(time.perf_counter() - start)
    found: dict[str, Any] = {"seconds": seconds, "tokens_per_s": batch_size / statistics.median(seconds)}
    if stats is not None:
        done = stats(model) - before
        found |= {
            "copied_bytes": done.copied_bytes / num_steps,
            "read_bytes": done.read_bytes / num_steps,
            "stall_s": done.stall_s / num_steps,
        }
    else:
        found["moved_bytes"] = moved_bytes(
            device, lambda: model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        )
    return found


def moved_bytes(device: Any, step: Callable[[], Any]) -> int | None:
    """Bytes that a step copies to the accelerator, by CUDA's own account; None where there is none."""
    if device.type != "cuda":
        return None
    try:
        copies = [each for each in _trace(device, step) if each.get("cat") == "gpu_memcpy" and "HtoD" in each["name"]]
        return sum(int(each["args"]["bytes"]) for each in copies) or None
    except Exception:  # the times that were measured are not lost for this
        return None


def memory_of(device: Any) -> dict[str, int]:
    """``reserved``: the most that the allocator held since `_loaded`; ``peak``: with the context and all else beside it."""
    import torch

    reserved = torch.accelerator.max_memory_reserved(device)
    free, total = torch.accelerator.get_memory_info(device)
    beside = max(0, total - free - torch.accelerator.memory_reserved(device)) if device.type == "cuda" else 0
    return {"reserved": reserved, "peak": reserved + beside}


def _loaded(path: str, device: Any, budget: int, device_map: Any, workload: Any) -> tuple[Any, dict[str, Any]]:
    """A model from an accelerator that holds nothing, and what its plan says."""
    import torch

    import bigmodel

    gc.collect()
    torch.accelerator.empty_cache()
    torch.accelerator.reset_peak_memory_stats(device)
    begun = time.perf_counter()
    model = bigmodel.load_sharded(path, device_map, {0: budget}, workload=workload, progress=False)
    load_s = time.perf_counter() - begun
    plan = bigmodel.plan_of(model)
    return model, {
        "load_s": load_s,
        "predicted": dataclasses.asdict(plan.estimate),
        "stated": plan.estimate.peak_bytes[str(device)],
        "rates_from": plan.rates_from,
        "page_locked": _page_locked(model, plan, device),
        "homes": {home: sum(place.home == home for place in plan.placements) for home in ("cpu", "disk", str(device))},
    }


def _page_locked(model: Any, plan: Any, device: Any) -> str:
    """Whether what is copied from host memory lies in page-locked memory."""
    if device.type != "cuda":
        return "simulated"
    moving = tuple(f"{place.unit}." for place in plan.placements if place.home == "cpu" != place.run_on)
    resting = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.device.type == "cpu" and f"{name}.".startswith(moving)
    ]
    if not (moving and resting):
        return "nothing is copied from host memory"
    return "yes" if all(parameter.data.is_pinned() for parameter in resting) else "no"


def _prompt(model: Any, batch_size: int, tokens: int) -> Any:
    import torch

    numbers = torch.arange(batch_size * tokens) * 7919 + 13
    return numbers.remainder(model.config.vocab_size).view(batch_size, tokens)


def _calls_of_a_step(model: Any, device: Any) -> dict[str, Any]:
    """Waits, copies that make the host wait, allocations and flushes of one step after others."""
    output = model(input_ids=_prompt(model, 1, 8).to(device), use_cache=True, logits_to_keep=1)

    def step() -> None:
        nonlocal output, token
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)

    for _ in range(3):
        token = output.logits[:, -1:].argmax(-1)
        step()
    token = output.logits[:, -1:].argmax(-1)
    token.tolist()
    if device.type != "cuda":
        from simulated import counts

        before = counts(0)
        step()
        after = counts(0)
        return {
            "synchronisations": after.synchronizations - before.synchronizations,
            "flushes": after.flushes - before.flushes,
        }
    _trace(device, step)  # the profiler's own first time
    token = output.logits[:, -1:].argmax(-1)
    token.tolist()
    before_stats = _allocator()
    events = _trace(device, step)
    after_stats = _allocator()
    return _calls_in(events) | {
        "segments taken": after_stats["segments"] - before_stats["segments"],
        "flushes": after_stats["retries"] - before_stats["retries"],
    }


def _allocator() -> dict[str, int]:
    import torch

    stats = torch.cuda.memory_stats()
    return {"segments": stats["segment.all.allocated"], "retries": stats["num_alloc_retries"]}


def _trace(device: Any, step: Callable[[], Any]) -> list[dict[str, Any]]:
    """The profiler's events of a step, which runs under the name STEP."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    torch.accelerator.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            with record_function(STEP):
                step()
            torch.accelerator.synchronize(device)
        profiler.export_chrome_trace(str(file))
        events: list[dict[str, Any]] = json.loads(file.read_text())["traceEvents"]
        return events


def _calls_in(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What the thread that ran the step called of CUDA's runtime inside it."""
    (span,) = (each for each in events if each.get("cat") == "user_annotation" and each["name"] == STEP)
    calls = [
        each
        for each in events
        if each.get("cat") in ("cuda_runtime", "cuda_driver")
        and (each["pid"], each["tid"]) == (span["pid"], span["tid"])
        and span["ts"] <= each["ts"] < span["ts"] + span["dur"]
    ]
    if not calls:
        raise RuntimeError("the profiler saw no call of CUDA's runtime in the step")
    begun = {each.get("args", {}).get("correlation") for each in calls}
    copies = [
        each
        for each in events
        if each.get("cat") == "gpu_memcpy" and each.get("args", {}).get("correlation", -1) in begun
    ]
    names = [each["name"] for each in calls]
    return {
        "synchronisations": sum(name in WAITS for name in names),
        "pageable copies": sum("Pageable" in each["name"] for each in copies),
        "allocations": sum(name.startswith(TAKES) for name in names),
        "calls": len(names),
        "waits": sorted({name for name in names if name in WAITS or name.startswith(TAKES)}),
    }
