"""A model larger than an accelerator's memory, on a real one: link, steps, first tokens, peaks, and the peers in the same memory.

``python -m benchmarks.gpu``; needs no network. benchmarks/README.md says what is held equal.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Bench, Trial
from benchmarks.report import Figure, Report, disk_of, ratios

__all__ = ["measure_link", "run_accelerate", "run_bigmodel", "run_deepspeed", "run_group_offload", "same_bits"]

GIB = 1 << 30
PROMPT_TOKENS, NUM_STEPS = 128, 6
LONG = (512, 2048, 8192)
BATCHES = (1, 8, 64)
# Layers of a dense model of 34 billion parameters, as many as the memory here takes; and of BLOOM.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 64000,
    "max_position_embeddings": 16384,
    "dtype": "bfloat16",
}
BLOOM = {
    "architectures": ["BloomForCausalLM"],
    "model_type": "bloom",
    "hidden_size": 14336,
    "n_head": 112,
    "vocab_size": 250880,
    "dtype": "bfloat16",
}
SMALL = LLAMA | {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 16000,
}
# With --quick, everything is as small as this.
TINY = SMALL | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "vocab_size": 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path(tempfile.gettempdir()) / "bm_gpu", help="folder for checkpoints"
    )
    parser.add_argument(
        "--gib", type=float, help="size of the model; by default what host memory and disk allow, up to 32"
    )
    parser.add_argument("--share", type=float, default=0.5, help="of the model that the accelerator's memory may hold")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round, nothing written: does it run?")
    parser.add_argument("--simulated", action="store_true", help="on a simulated accelerator: does it run?")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    if arguments.simulated:
        os.environ["BENCHMARK_SIMULATES"] = "1"
    arguments.out.mkdir(parents=True, exist_ok=True)
    free = min(shutil.disk_usage(arguments.out).free, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    size = 0.05 if arguments.quick else arguments.gib or min(32.0, 0.3 * free / GIB)
    llama = _checkpoint(arguments.out, "llama", TINY if arguments.quick else LLAMA, size)
    bloom = None if arguments.quick else _checkpoint(arguments.out, "bloom", BLOOM, min(size, 24.0))
    small = _checkpoint(arguments.out, "small", TINY if arguments.quick else SMALL, 0.05 if arguments.quick else 1.0)
    budget = int(arguments.share * _size_of(llama)) + 2 * GIB
    configuration = {
        "checkpoint": f"llama-shaped, {_size_of(llama) / 1e9:.1f} GB bf16",
        "accelerator's memory": f"{budget / 1e9:.1f} GB",
        "disk": disk_of(llama),
        "rounds": arguments.rounds,
    }
    report = Report("gpu-quick" if arguments.quick else "gpu", configuration)
    with Bench(balloon_bytes=0) as bench:
        _measure(bench, report, llama, bloom, small, budget, 1 if arguments.quick else arguments.rounds)
        print(report.markdown(bench))
        if not arguments.quick:
            print(f"written: {report.write(bench, arguments.results)}", file=sys.stderr)


def _measure(
    bench: Bench, report: Report, llama: Path, bloom: Path | None, small: Path, budget: int, num_rounds: int
) -> None:
    trials = {
        "link": Trial(name="link", call="benchmarks.gpu:measure_link", arguments={}),
        "bigmodel": _trial("bigmodel", llama, budget, long=LONG),
        "accelerate": _trial("accelerate", llama, budget),
        "deepspeed": _trial("deepspeed", llama, budget),
        "group_offload": _trial("group_offload", llama, budget),
    }
    outcomes = bench.interleaved(list(trials.values()), num_rounds)
    for batch_size in BATCHES[1:]:
        trial = _trial("bigmodel", llama, budget, batch_size=batch_size)
        trials[trial.name] = trial
        outcomes[trial.name] = [bench.run(trial)]
    disk = dataclasses.replace(
        _trial("bigmodel", llama, budget, device_map={"": "disk"}), name="bigmodel, everything on disk"
    )
    outcomes[disk.name] = [bench.run(disk)]
    if bloom is not None:
        trial = dataclasses.replace(_trial("bigmodel", bloom, budget), name="bigmodel, bloom-shaped")
        outcomes[trial.name] = [bench.run(trial)]
    report.keep(outcomes)
    link = [each for each in outcomes["link"] if each.error is None]
    peak = statistics.median(each.result["bytes_per_s"] for each in link) if link else 0.0
    for name, found in outcomes.items():
        if name.startswith("bigmodel"):
            _add(report, name, [each.result for each in found if each.error is None], peak)
    mine = outcomes[trials["bigmodel"].name]
    for other, least in (("accelerate", 4.0), ("deepspeed", 1.2), ("group_offload", 1.2)):
        report.add(
            Figure(
                name=f"step over that of {other}, in the same memory",
                values=ratios(mine, outcomes[trials[other].name]),
                limit=1 / least,
                unit="x",
            )
        )
    equal = bench.run(Trial(name="equal bits", call="benchmarks.gpu:same_bits", arguments={"path": str(small)}))
    values = [] if equal.error else [float(not equal.result["equal"])]
    report.add(Figure(name="bits that differ from the whole model's", values=values, limit=0.0, is_promise=True))


def _trial(
    runner: str, path: Path, budget: int, *, batch_size: int = 1, long: tuple[int, ...] = (), device_map: Any = "auto"
) -> Trial:
    arguments: dict[str, Any] = {"path": str(path), "budget": budget, "batch_size": batch_size}
    if runner == "bigmodel":
        arguments |= {"long": list(long), "device_map": device_map}
    name = runner if batch_size == 1 else f"{runner}, batch {batch_size}"
    return Trial(name=name, call=f"benchmarks.gpu:run_{runner}", arguments=arguments, is_cold=False)


def _add(report: Report, name: str, good: list[dict[str, Any]], peak: float) -> None:
    def figure(what: str, value: Callable[[dict[str, Any]], float], **options: Any) -> None:
        report.add(Figure(name=f"{name}: {what}", values=[value(each) for each in good], **options))

    def step(each: dict[str, Any]) -> float:
        return statistics.median(each["seconds"])

    note = ""
    if good:
        last = good[-1]
        note = f"{last['copied_bytes'] / 1e9:.2f} GB over the link, {last['read_bytes'] / 1e9:.2f} GB from disk, a step"
        note += f"; {last['stall_s']:.3f} s stalled"
    figure("step", step, unit=" s", note=note)
    if peak and name == "bigmodel":
        # A target is a most: the inverse of the efficiency.
        figure(
            "step over its bytes at the link's peak",
            lambda each: step(each) * peak / each["copied_bytes"],
            limit=1 / 0.95,
        )
    figure("step over predicted", lambda each: step(each) / each["predicted"]["time_per_token_s"], limit=1.1, unit="x")
    figure(
        "peak memory over the plan's",
        lambda each: each["peak"] / each["stated"],
        limit=1.0,
        is_promise=True,
    )
    for tokens in sorted({int(key) for each in good for key in each["ttft_s"]}):
        figure(f"first token after {tokens}", lambda each, tokens=tokens: each["ttft_s"][str(tokens)], unit=" s")  # type: ignore[misc]
    for what in ("synchronisations", "allocations"):
        if good and what in good[0]:
            figure(f"{what} in a step", lambda each, what=what: float(each[what]), limit=0.0)  # type: ignore[misc]


# --- What runs in a process of its own


def measure_link() -> dict[str, Any]:
    """Bytes/s of copies from page-locked memory, one at a time, 256 MiB each."""
    import torch

    from bigmodel.offload.arena import Arena
    from bigmodel.offload.link import DeviceMemory, Link, page_lock

    with _accelerator() as device:
        num_bytes = 256 << 20
        arena, link = Arena(num_bytes), Link(device)
        arena.tensor.fill_(1)
        page_lock(arena, device)
        memory = DeviceMemory(num_bytes, link)
        seconds = []
        for _ in range(9):
            start = time.perf_counter()
            link.copy(arena.tensor, memory.tensor, None)
            link.drain()
            seconds.append(time.perf_counter() - start)
        name = torch.get_device_module(device).get_device_name(0) if device.type == "cuda" else device.type
        return {"seconds": seconds[2:], "bytes_per_s": num_bytes / statistics.median(seconds[2:]), "device": name}


def run_bigmodel(path: str, budget: int, batch_size: int, long: list[int], device_map: Any) -> dict[str, Any]:
    """Decode steps, passes of long prompts, and what the model did meanwhile."""
    import torch

    import bigmodel

    with _accelerator() as device, torch.no_grad():
        workload = bigmodel.Workload(batch_size=batch_size, prompt_tokens=PROMPT_TOKENS, new_tokens=NUM_STEPS + 2)
        start = time.perf_counter()
        model = bigmodel.load_sharded(path, device_map, {0: budget, "cpu": "90GiB"}, workload=workload, progress=False)
        load_s = time.perf_counter() - start
        plan = bigmodel.plan_of(model)
        found = _steps(model, device, batch_size, bigmodel.stats_of)
        found["load_s"] = load_s
        found["predicted"] = dataclasses.asdict(plan.estimate)
        found["stated"] = plan.estimate.peak_bytes[str(device)]
        found["peak"] = torch.accelerator.max_memory_reserved(device)
        found |= _profiled(model, device, batch_size)
        found["ttft_s"] = {}
        del model
        for tokens in long:
            model = bigmodel.load_sharded(
                path,
                device_map,
                {0: budget, "cpu": "90GiB"},
                workload=bigmodel.Workload(prompt_tokens=tokens, new_tokens=1),
                progress=False,
            )
            found["ttft_s"][str(tokens)] = _first_token(model, device, tokens)
            del model
    return found


def run_accelerate(path: str, budget: int, batch_size: int) -> dict[str, Any]:
    """transformers with the map that Accelerate makes for the same memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with _accelerator() as device, torch.no_grad():
        room = {0: max(1, budget - GIB), "cpu": 90 * GIB}  # its budget is of weights alone
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map="auto", max_memory=room)
        return _steps(model.eval(), device, batch_size, None)


def run_deepspeed(path: str, budget: int, batch_size: int) -> dict[str, Any]:
    """ZeRO-3 with parameters offloaded to page-locked host memory, and a prefetch bucket of two layers."""
    import deepspeed
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    with _accelerator() as device, torch.no_grad():
        config = AutoConfig.from_pretrained(path)
        layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_optimization": {
                "stage": 3,
                "offload_param": {"device": "cpu", "pin_memory": True},
                "stage3_prefetch_bucket_size": 2 * layer,
                "stage3_param_persistence_threshold": config.hidden_size,
                "stage3_max_live_parameters": 4 * layer,
            },
        }
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29511",
        }
        kept = HfDeepSpeedConfig(settings)  # transformers looks for it while it loads
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        engine = deepspeed.initialize(model=model, config=settings)[0]
        engine.eval()
        del kept
        return _steps(engine.module, device, batch_size, None)


def run_group_offload(path: str, budget: int, batch_size: int) -> dict[str, Any]:
    """diffusers' group offloading with a stream, one layer to a group."""
    import torch
    from diffusers.hooks import apply_group_offloading
    from transformers import AutoModelForCausalLM

    with _accelerator() as device, torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        apply_group_offloading(
            model,
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=True,
        )
        return _steps(model, device, batch_size, None)


def same_bits(path: str) -> dict[str, Any]:
    """Whether every way of resting gives the logits of the model that is whole on the accelerator."""
    import torch

    import bigmodel

    with _accelerator() as device, torch.no_grad():
        digests = []
        for device_map in ("cuda", {"": "disk"}, {"": "cpu", "lm_head": 0}):
            model = bigmodel.load_sharded(path, device_map, {0: "16GiB", "cpu": "16GiB"}, progress=False)
            output = model(input_ids=_prompt(model, 1, 64).to(device), use_cache=True)
            after = model(
                input_ids=output.logits[:, -1:].argmax(-1), past_key_values=output.past_key_values, use_cache=True
            )
            digests.append((output.logits.cpu(), after.logits.cpu()))
            del model, output, after
        equal = all(torch.equal(a, b) for other in digests[1:] for a, b in zip(digests[0], other, strict=True))
        return {"equal": equal}


def _steps(model: Any, device: Any, batch_size: int, stats: Callable[[Any], Any] | None) -> dict[str, Any]:
    import torch

    output = model(input_ids=_prompt(model, batch_size, PROMPT_TOKENS).to(device), use_cache=True, logits_to_keep=1)
    seconds: list[float] = []
    before = stats(model) if stats is not None else None
    for step in range(NUM_STEPS + 2):
        token = output.logits[:, -1:].argmax(-1)
        torch.accelerator.synchronize(device)
        if step == 2 and stats is not None:
            before = stats(model)
        start = time.perf_counter()
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
        torch.accelerator.synchronize(device)
        if step > 1:
            seconds.append(time.perf_counter() - start)
    found: dict[str, Any] = {"seconds": seconds}
    if stats is not None:
        done = stats(model) - before
        found |= {
            "copied_bytes": done.copied_bytes / NUM_STEPS,
            "read_bytes": done.read_bytes / NUM_STEPS,
            "stall_s": done.stall_s / NUM_STEPS,
        }
    return found


def _profiled(model: Any, device: Any, batch_size: int) -> dict[str, int]:
    """Synchronisations and device allocations of a steady step, by CUDA's own calls."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if device.type != "cuda":
        return {}
    output = model(input_ids=_prompt(model, batch_size, 8).to(device), use_cache=True, logits_to_keep=1)
    for _ in range(3):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    torch.accelerator.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as events:
        model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
    calls = [event.name for event in events.events()]
    return {
        "synchronisations": sum("Synchronize" in name and "WaitEvent" not in name for name in calls)
        - 1,  # the profiler's own
        "allocations": sum(name.startswith(("cudaMalloc", "cudaFree")) for name in calls),
    }


def _first_token(model: Any, device: Any, tokens: int) -> float:
    import torch

    times = []
    for _ in range(2):
        torch.accelerator.synchronize(device)
        start = time.perf_counter()
        model(input_ids=_prompt(model, 1, tokens).to(device), use_cache=True, logits_to_keep=1)
        torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - start)
    return times[-1]


def _prompt(model: Any, batch_size: int, tokens: int) -> Any:
    import torch

    numbers = torch.arange(batch_size * tokens) * 7919 + 13
    return numbers.remainder(model.config.vocab_size).view(batch_size, tokens)


class _accelerator:  # used as a function
    """The first accelerator, or a simulated one where the command line asked for that."""

    def __enter__(self) -> Any:
        import contextlib

        import torch

        self._stack = contextlib.ExitStack()
        if os.environ.get("BENCHMARK_SIMULATES"):
            sys.path.insert(0, str(ROOT / "tests"))
            from simulated import simulated

            self._stack.enter_context(simulated(1, memory_bytes=64 * GIB))
        if not torch.accelerator.is_available():
            raise RuntimeError("there is no accelerator here")
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        return torch.device(kind.type, 0)

    def __exit__(self, *exception: object) -> None:
        self._stack.close()


# --- Checkpoints


def _checkpoint(out: Path, name: str, config: dict[str, Any], gib: float) -> Path:
    """Random weights in the shape, with as many layers as make the size; written once."""
    folder = out / f"{name}-{gib:.2f}GiB"
    if (folder / "config.json").exists():
        return folder
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    key = "n_layer" if config["model_type"] == "bloom" else "num_hidden_layers"

    def built(layers: int) -> Any:
        settings = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                AutoConfig.for_model(config["model_type"], **settings | {key: layers}), dtype=torch.bfloat16
            )

    one, two = (sum(p.nbytes for p in built(layers).parameters()) for layers in (1, 2))
    layers = max(2, round((gib * GIB - one) / (two - one)) + 1)
    model = built(layers)
    folder.mkdir(parents=True, exist_ok=True)
    pool = torch.empty(64 << 20, dtype=torch.bfloat16).normal_(std=0.02)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(_files(model), start=1):
        tensors = {}
        for offset, (tensor_name, parameter) in enumerate(group):
            if parameter.ndim == 1:
                tensors[tensor_name] = torch.ones(parameter.shape, dtype=torch.bfloat16)
            else:
                turned = pool.roll(7919 * (offset + number))
                repeats = -(-parameter.numel() // pool.numel())
                tensors[tensor_name] = turned.repeat(repeats)[: parameter.numel()].view(parameter.shape).clone()
            weight_map[tensor_name] = f"model-{number:05d}.safetensors"
        save_file(tensors, str(folder / f"model-{number:05d}.safetensors"), metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config | {key: layers}))
    return folder


def _files(model: Any) -> Iterator[list[tuple[str, Any]]]:
    """Parameters in files of up to two gigabytes; tied ones once."""
    group: list[tuple[str, Any]] = []
    for name, parameter in model.named_parameters():
        if group and sum(each.nbytes for _, each in group) + parameter.nbytes > 2 * GIB:
            yield group
            group = []
        group.append((name, parameter))
    yield group


def _size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
