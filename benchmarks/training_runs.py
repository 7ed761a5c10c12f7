"""What `benchmarks.training` runs in the processes of torch's launcher: each writes what it saw as ``RANK.json``."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

import bigmodel
import bigmodel.models
from bigmodel.footprint import PeakFootprint, footprint_bytes
from bigmodel.training import TrainingConfig, TrainingRun

__all__ = [
    "calibrated",
    "collectives",
    "exact",
    "forecasts",
    "load",
    "loops",
    "overhead",
    "reference",
    "resume",
    "speed",
    "taken",
]

# Of a sample; the fewer where many engines take their turns.
NUM_TOKENS, SHORT = 256, 64
_REFERENCE: list[torch.Tensor] = []


class _Tokens(Dataset[Any]):
    def __init__(self, vocabulary: int, num_tokens: int = NUM_TOKENS) -> None:
        self._vocabulary, self._num_tokens = vocabulary, num_tokens

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(self._vocabulary, (self._num_tokens,), generator=torch.Generator().manual_seed(number))
        return {"input_ids": ids, "labels": ids}


def _warm(tiny: str, **options: Any) -> None:
    """What a run imports and what its process group takes is there before the clock starts."""
    _steps(tiny, 2, **options)


def _prepared(path: str, num_tokens: int = NUM_TOKENS, **options: Any) -> tuple[TrainingRun, Any, Any]:
    run = TrainingRun(TrainingConfig(**options))
    config = json.loads((Path(path) / "config.json").read_text())
    model, _, loader = run.prepare(
        model=path,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-5),
        data=_Tokens(config["vocab_size"], num_tokens),
        progress=False,
    )
    return run, model, loader


def _steps(path: str, count: int, **options: Any) -> tuple[TrainingRun, list[float]]:
    run, model, loader = _prepared(path, global_batch_size=4, micro_batch_size=2, **options)
    times: list[float] = []
    started_s = time.perf_counter()
    for batch in loader:
        with run.accumulate():
            run.backward(run.loss(model(**batch), batch))
            run.step()
        if loader.is_last:
            times.append(time.perf_counter() - started_s)
            started_s = time.perf_counter()
            if len(times) == count:
                break
    return run, times


def load(path: str, tiny: str, **options: Any) -> dict[str, Any]:
    """Peak anonymous memory while weights are put in place, up to DeepSpeed's own allocations where it is the engine.

    Returns:
        ``rise_bytes``, ``own_bytes`` of this process's parameters, ``unit_bytes`` of the largest unit, both in the dtype that
        they are held in: float32, or bfloat16 with ZeRO, whose masters are made afterwards.
    """
    bigmodel.models.import_libraries()
    _warm(tiny, **options)
    run = TrainingRun(TrainingConfig(**options))
    is_zero = options["strategy"].startswith("zero")
    before = footprint_bytes()
    with PeakFootprint() as memory:
        model: Any = None
        try:
            with _until_deepspeed() if is_zero else contextlib.nullcontext():
                model = run.prepare(
                    model=path, optimizer=lambda params: torch.optim.SGD(params, lr=0.1), progress=False
                )[0]
        except _Begins as begins:
            model = begins.args[0]
    own = sum(_held(each) for each in model.parameters())
    layers = max((each for each in model.modules() if isinstance(each, nn.ModuleList)), key=len)
    units = [*layers, *(each for each in model.modules() if isinstance(each, (nn.Embedding, nn.Linear)))]
    itemsize = 2 if is_zero else 4
    largest = max(sum(getattr(each, "ds_numel", each.numel()) for each in unit.parameters()) for unit in units)
    return {"rise_bytes": memory.peak_bytes - before, "own_bytes": own, "unit_bytes": largest * itemsize}


class _Begins(Exception):  # not an error
    """DeepSpeed is about to make its optimizer of this module."""


@contextlib.contextmanager
def _until_deepspeed() -> Iterator[None]:
    import deepspeed

    def stopped(*, model: nn.Module, **_: Any) -> None:
        raise _Begins(model)

    initialize = deepspeed.initialize
    deepspeed.initialize = stopped
    try:
        yield
    finally:
        deepspeed.initialize = initialize


def _held(parameter: Any) -> int:
    data = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data
    return int((data._local_tensor if isinstance(data, DTensor) else data).nbytes)


def collectives(path: str, tiny: str, *, accumulation: int, **options: Any) -> dict[str, Any]:
    """What torch.distributed was asked to send for the fifth optimizer step, as its own profiler records it.

    Returns:
        ``calls``: kind -> ``count``, ``bytes`` of this process's tensors; ``by_hand``: the same of a loop by hand of the same
        engine with the same groups, which also weighs by tokens and knows the loss of all; ``model_bytes`` in float32.
    """
    calls = _sent(_our_steps(tiny, accumulation=accumulation, **options))
    hand = _hand_steps(
        tiny,
        options["strategy"],
        options["precision"],
        accumulation=accumulation,
        reshard=options.get("reshard_after_forward", True),
        weighs=True,
        blocks_only=False,
    )
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny))
    return {
        "calls": calls,
        "by_hand": _sent(hand),
        "model_bytes": 4 * sum(each.numel() for each in empty.parameters()),
    }


def _sent(loop: Iterator[None]) -> dict[str, dict[str, float]]:
    from torch.profiler import ProfilerActivity, profile

    for _ in range(5):  # made ready, and four steps: DeepSpeed compares what it gathers in the first
        next(loop)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorder:
        next(loop)
    loop.close()
    calls: dict[str, dict[str, float]] = {}
    for event in recorder.events() or ():
        if event.name.startswith("gloo:"):
            found = calls.setdefault(event.name.removeprefix("gloo:"), {"count": 0, "bytes": 0})
            found["count"] += 1
            found["bytes"] += sum(4 * math.prod(shape) for shape in event.input_shapes if shape)
    return calls


def speed(path: str, tiny: str, **options: Any) -> dict[str, Any]:
    """Optimizer steps of 4 samples of 64 tokens.

    Returns:
        ``tokens_per_s`` of all processes, ``rise_bytes`` at the peak of load and steps.
    """
    _warm(tiny, **options)
    before = footprint_bytes()
    with PeakFootprint() as memory:
        _, times = _steps(path, 3, num_tokens=SHORT, **options)
    return {
        "tokens_per_s": 4 * SHORT / statistics.median(times[1:]),
        "rise_bytes": memory.peak_bytes - before,
    }


def taken(path: str, tiny: str, *, micro_batch_size: int, num_tokens: int, **options: Any) -> dict[str, Any]:
    """Optimizer steps of one pass of each process.

    Returns:
        ``rise_bytes``: the peak of steps 2 to 5 over what there was before `prepare`; ``seconds`` of steps 2 to 5, each;
        ``reference_s``, as `reference` has it, between them.
    """
    _warm(tiny, **options)
    _reference_s()
    gc.collect()
    before = footprint_bytes()
    run, model, loader = _prepared(path, num_tokens, micro_batch_size=micro_batch_size, **options)
    times: list[float] = []
    references: list[float] = []
    memory: PeakFootprint | None = None
    with contextlib.ExitStack() as stack:
        started_s = time.perf_counter()
        for batch in loader:
            run.backward(run.loss(model(**batch), batch))
            run.step()
            if memory is None:
                memory = stack.enter_context(PeakFootprint())
            else:
                times.append(time.perf_counter() - started_s)
            references.append(_reference_s())
            started_s = time.perf_counter()
            if len(times) == 4:
                break
    assert memory is not None
    return {
        "rise_bytes": memory.peak_bytes - before,
        "seconds": times,
        "reference_s": statistics.median(references),
    }


def reference() -> dict[str, Any]:
    """How fast the machine is now, with as many processes as there are, at once.

    Returns:
        ``reference_s``: of products and sums over memory, such as steps are made of.
    """
    TrainingRun(TrainingConfig(precision="fp32", strategy="auto"))  # joins the others
    return {"reference_s": statistics.median(_reference_s() for _ in range(9))}


def _reference_s() -> float:
    """It takes 0.1 to 0.3 s, and 32 MiB, which were there before."""
    if not _REFERENCE:
        _REFERENCE.extend([torch.ones(1024, 576), torch.ones(576, 1536), torch.ones(6 << 20)])
    rows, columns, values = _REFERENCE
    if dist.is_initialized():
        dist.barrier()
    started_s = time.perf_counter()
    for _ in range(4):
        rows @ columns
        values.add_(1.0)
    return time.perf_counter() - started_s


def forecasts(
    path: str, *, size: int, num_tokens: int, machine: str, cases: list[dict[str, Any]], limits: Sequence[float] = ()
) -> dict[str, Any]:
    """What is predicted of `taken` with so many processes on this machine, whose rates were measured with all its threads.

    Args:
        cases: fields of a TrainingConfig, each of one run.
        limits: bytes that a process may use, of each of which "auto" chooses, with the last case's micro-batch.

    Returns:
        ``ways`` of the cases, and ``chosen`` for the limits, as `Outlook.to_json` has them.
    """
    from bigmodel.training.cluster import Cluster
    from bigmodel.training.job import job_of
    from bigmodel.training.outlook import look_out
    from bigmodel.training.weights import Origin

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "machine.json"
        file.write_text(machine)
        cluster = dataclasses.replace(Cluster.of(bigmodel.Machine.load(file), num_per_node=size), disk_limit_bytes=0)
    job = job_of(Origin.of(path), precision="fp32", global_batch_size=size, num_tokens=num_tokens)
    ways, chosen = [], []
    for case in cases:
        config = TrainingConfig(**case)
        of_case = dataclasses.replace(job, global_batch_size=size * case["micro_batch_size"])
        ways.append(json.loads(look_out(of_case, cluster, config).to_json())["ways"][0])
    for limit in limits:
        config = TrainingConfig(precision="fp32", micro_batch_size=cases[-1]["micro_batch_size"])
        of_case = dataclasses.replace(job, global_batch_size=size * cases[-1]["micro_batch_size"])
        limited = dataclasses.replace(cluster, limit_bytes=int(limit))
        chosen.append(json.loads(look_out(of_case, limited, config, deepspeed=False).to_json())["chosen"])
    return {"ways": ways, "chosen": chosen}


def calibrated(size: int) -> dict[str, Any]:
    """This machine's rates now, with the threads that so many processes have together."""
    torch.set_num_threads(size)
    with tempfile.TemporaryDirectory() as folder:  # what the user's own plans go by stays as it is
        os.environ["XDG_CACHE_HOME"] = folder
        measured = bigmodel.Machine.calibrate(progress=False)
    return {"machine": dataclasses.replace(measured, accelerators=()).to_json()}


def loops(path: str, other: str, strategy: str, precision: str, num_pairs: int, block_s: float) -> dict[str, Any]:
    """Blocks of optimizer steps of our loop (A) and another (B), in the order A B B A, in the same processes.

    Args:
        other: "hand", the same engine's calls without us; "accelerate"; "ours", the loop itself, as a control.
        num_pairs: of A B B A.
        block_s: a block takes at least so long.

    Returns:
        ``ratios`` of tokens/s, ours over the other's, of each A B B A; ``steps`` of a block.
    """
    first = _our_steps(path, strategy, precision)
    second = {"hand": _hand_steps, "accelerate": _accelerate_steps, "ours": _our_steps}[other](
        path, strategy, precision
    )
    for each in (first, second):
        next(each)
    times = [_block(first, 2), _block(second, 2)]
    steps = max(1, math.ceil(block_s / (min(times) / 2)))
    agreed = [steps]
    dist.broadcast_object_list(agreed)  # blocks are the same steps in all processes
    steps = agreed[0]
    ratios = []
    for _ in range(num_pairs):
        before, other_s, other_too_s, after = (_block(each, steps) for each in (first, second, second, first))
        ratios.append((other_s + other_too_s) / (before + after))
    return {"ratios": ratios, "steps": steps}


def _block(loop: Iterator[None], steps: int) -> float:
    dist.barrier()
    started_s = time.perf_counter()
    for _ in range(steps):
        next(loop)
    dist.barrier()
    return time.perf_counter() - started_s


def _our_steps(path: str, strategy: str, precision: str, *, accumulation: int = 2, **options: Any) -> Iterator[None]:
    options |= {
        "strategy": strategy,
        "precision": precision,
        "global_batch_size": accumulation * int(os.environ["WORLD_SIZE"]),
    }
    run, model, loader = _prepared(path, SHORT, micro_batch_size=1, grad_clip=1.0, **options)
    yield
    while True:
        for batch in loader:
            with run.accumulate():
                run.backward(run.loss(model(**batch), batch))
                run.step()
            if loader.is_last:
                yield


def _hand_steps(
    path: str,
    strategy: str,
    precision: str,
    *,
    accumulation: int = 2,
    reshard: bool = True,
    blocks_only: bool = True,
    weighs: bool = False,
) -> Iterator[None]:
    """As the libraries' own documentation has it.

    Args:
        blocks_only: FSDP2's embedding and head go with the root, as in torch's tutorial; else they are groups of their own,
            the head's left gathered, as in torchtitan.
        weighs: by tokens, whose count is summed over the processes, as the loss is, to be told; otherwise one mean of a
            micro-batch is as good as the other, and the loss is each process's own.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from transformers import AutoModelForCausalLM

    module: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    batches, size = _hand_batches(module.config.vocab_size), int(os.environ["WORLD_SIZE"])
    engine: Any = None
    if strategy == "ddp":
        model: Any = DistributedDataParallel(module)
    elif strategy == "fsdp":
        dtype = torch.bfloat16 if precision == "bf16" else None
        options: dict[str, Any] = {"mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)}
        ends = [] if blocks_only else [module.model.embed_tokens, module.lm_head]
        for part in [*ends[:1], *module.model.layers, *ends[1:]]:
            fully_shard(part, reshard_after_forward=reshard and part is not module.lm_head, **options)
        fully_shard(module, reshard_after_forward=False, **options)
        model = module
    else:
        import deepspeed

        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "communication_data_type": "fp32",
            "zero_optimization": {"stage": int(strategy[-1])},
        }
        if precision == "bf16":
            settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5)
        engine = model = deepspeed.initialize(
            model=module, optimizer=optimizer, config=settings, dist_init_required=False
        )[0]
    if engine is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    yield
    while True:
        taken: list[Any] = [next(batches) for _ in range(accumulation)]
        given: dict[str, Any] = {}
        if weighs:
            count = torch.tensor([(each["labels"][..., 1:] != -100).sum() for each in taken]).sum()
            dist.all_reduce(count)
            given = {"num_items_in_batch": count / (size * (1 if engine is None else accumulation))}
        lost = torch.zeros(())
        for number, batch in enumerate(taken):
            if engine is not None:
                loss = model(**batch, **given).loss
                engine.backward(loss)
                engine.step()
                lost += loss.detach() if weighs else 0
                continue
            is_last = number == accumulation - 1
            if strategy == "fsdp":
                module.set_requires_gradient_sync(is_last)
            with contextlib.nullcontext() if is_last or strategy == "fsdp" else model.no_sync():
                loss = model(**batch, **given).loss
                (loss if weighs else loss / accumulation).backward()
                lost += loss.detach() if weighs else 0
        if engine is None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if weighs:
            dist.all_reduce(lost)
        yield


def _accelerate_steps(path: str, strategy: str, precision: str) -> Iterator[None]:
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    module: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    data = torch.utils.data.DataLoader(_Tokens(module.config.vocab_size, SHORT), batch_size=1, shuffle=True)
    model, optimizer, loader = accelerator.prepare(module, torch.optim.AdamW(module.parameters(), lr=1e-5), data)
    yield
    while True:
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                yield


def _hand_batches(vocabulary: int) -> Iterator[dict[str, torch.Tensor]]:
    dataset = _Tokens(vocabulary, SHORT)
    while True:
        sampler: Any = torch.utils.data.distributed.DistributedSampler(dataset)
        yield from torch.utils.data.DataLoader(dataset, batch_size=1, sampler=sampler)


class _Text(Dataset[Any]):
    """Samples of a text, of each of which another number of tokens is predicted."""

    LENGTH = 48

    def __init__(self, path: str) -> None:
        from transformers import AutoTokenizer

        text = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
        self._ids = torch.tensor(AutoTokenizer.from_pretrained(path)(text)["input_ids"])

    def __len__(self) -> int:
        return len(self._ids) // self.LENGTH

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        ids = self._ids[number * self.LENGTH : (number + 1) * self.LENGTH]
        labels = ids.clone()
        labels[: 7 * number % 40] = -100
        return {"input_ids": ids, "labels": labels}


def exact(path: str, out: str, num_steps: int = 20, nudged: bool = False, **options: Any) -> dict[str, Any]:
    """Optimizer steps on real text, 4 samples each.

    Args:
        out: file for the float32 parameters that come of it.
        nudged: begin with every parameter at the next larger float32: what any other order of sums may change as well.

    Returns:
        ``losses`` of the steps.
    """
    run = TrainingRun(TrainingConfig(global_batch_size=4, grad_clip=1.0, **options))
    run.prepare(
        model=path, optimizer=lambda params: torch.optim.AdamW(params, lr=2e-5), data=_Text(path), progress=False
    )
    engine = run._prepared()
    if nudged:
        with torch.no_grad():
            for each in engine.masters().values():
                each.copy_(each.nextafter(torch.tensor(math.inf)))
    losses = [run.train_step().loss for _ in range(num_steps)]
    engine.rest()
    parameters = {name: engine.whole(name).float() for name in engine.masters()}
    if run.is_main_process:
        torch.save(parameters, out)
    return {"losses": losses}


def resume(num_consumed: int) -> dict[str, Any]:
    """The time to the first batch of 8 after so many samples of a shuffled map-style dataset, here and with Accelerate.

    Returns:
        ``ours_s`` and ``accelerates_s``.
    """
    from accelerate import Accelerator

    class Numbers(Dataset[Any]):
        def __len__(self) -> int:
            return 1_000_080

        def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
            return {"number": torch.tensor(number), "labels": torch.ones(2)}

    def prepared() -> tuple[TrainingRun, Any]:
        run = TrainingRun(TrainingConfig(global_batch_size=8, micro_batch_size=8, precision="fp32"))
        return run, run.prepare(model=nn.Linear(2, 2), data=Numbers())[1]

    with tempfile.TemporaryDirectory() as folder:
        run, loader = prepared()
        loader.cursor = dataclasses.replace(loader.cursor, num_consumed=num_consumed)
        run.save(f"{folder}/1")
        run, loader = prepared()
        run.load(f"{folder}/1")
    started_s = time.perf_counter()
    next(iter(loader))
    ours_s = time.perf_counter() - started_s
    accelerator = Accelerator(cpu=True)
    theirs = accelerator.prepare(torch.utils.data.DataLoader(Numbers(), batch_size=8, shuffle=True))
    started_s = time.perf_counter()
    next(iter(accelerator.skip_first_batches(theirs, num_consumed // 8)))
    return {"ours_s": ours_s, "accelerates_s": time.perf_counter() - started_s}


def overhead(**options: Any) -> dict[str, Any]:
    """Our own time for each micro-batch: a loop around a model that does nothing, less the same loop by hand.

    Returns:
        ``seconds`` of a micro-batch, and ``by_hand_s`` of the loop that is taken off.
    """

    class Nothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, number: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.weight * number).sum()}

    class Numbers(Dataset[Any]):
        def __len__(self) -> int:
            return 8000

        def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
            return {"number": torch.ones(()), "labels": torch.ones(2)}

    run = TrainingRun(TrainingConfig(global_batch_size=4, micro_batch_size=1, precision="fp32", **options))
    model, _, loader = run.prepare(
        model=Nothing(), optimizer=lambda params: torch.optim.SGD(params, lr=0.0), data=Numbers()
    )
    plain_model = Nothing()
    optimizer = torch.optim.SGD(plain_model.parameters(), lr=0.0)
    ours, by_hand = [], []
    iterator = iter(loader)
    for _ in range(20):
        started_s = time.perf_counter()
        for _ in range(200):
            batch = next(iterator)
            with run.accumulate():
                run.backward(run.loss(model(**batch), batch))
                run.step()
        ours.append(time.perf_counter() - started_s)
        started_s = time.perf_counter()
        plain = torch.utils.data.DataLoader(Numbers(), batch_size=1)
        for number, batch in enumerate(plain, start=1):
            (plain_model(**batch)["loss"] / 4).backward()
            if number % 4 == 0:
                optimizer.step()
                optimizer.zero_grad()
            if number == 200:
                break
        by_hand.append(time.perf_counter() - started_s)
    return {
        "seconds": (statistics.median(ours) - statistics.median(by_hand)) / 200,
        "by_hand_s": statistics.median(by_hand) / 200,
    }


def _main() -> None:
    name, arguments, folder = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    found = globals()[name](**arguments)
    rank = int(os.environ.get("RANK", "0"))
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    _main()
