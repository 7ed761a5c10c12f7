"""Training loops that tests run, alone or in the processes of a pool."""

from __future__ import annotations

import contextlib
import math
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, IterableDataset

import bigmodel
from bigmodel.errors import TrainingError
from bigmodel.training import TrainingConfig, TrainingRun


class Sentences(Dataset):
    """Samples of 12 tokens, of which every sample predicts another number."""

    def __init__(self, length: int = 64, vocabulary: int = 96) -> None:
        generator = torch.Generator().manual_seed(7)
        self.ids = torch.randint(3, vocabulary, (length, 12), generator=generator)
        self.masked = torch.randint(0, 10, (length,), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        labels = self.ids[number].clone()
        labels[: self.masked[number]] = -100
        return {"input_ids": self.ids[number], "attention_mask": torch.ones(12, dtype=torch.long), "labels": labels}


def save_llama(folder: Path, *, stored: torch.dtype = torch.bfloat16, **changes: Any) -> None:
    """A checkpoint of a llama as one begins to train it: two layers, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 97,  # that two processes cannot halve
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**(sizes | changes))).to(stored).save_pretrained(folder, max_shard_size="100KB")


def masters(run: TrainingRun) -> dict[str, torch.Tensor]:
    """Name -> all of a parameter's values."""
    engine = run._prepared()
    engine.rest()
    return {name: engine.whole(name).clone() for name in engine.masters()}


def gradients_of(run: TrainingRun) -> dict[str, torch.Tensor]:
    """Name -> all of a parameter's gradient, between backward and step."""
    found = {}
    for name, parameter in run.unwrap().named_parameters():
        if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
            from deepspeed.utils import safe_get_full_grad

            found[name] = safe_get_full_grad(parameter).clone()
        else:
            data = parameter.grad.detach()
            found[name] = (data.full_tensor() if isinstance(data, DTensor) else data).clone()
    return found


class Numbers(Dataset):
    """Samples that say which they are, and what they drew."""

    def __len__(self) -> int:
        return 37

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"number": number, "drawn": torch.rand(()).item(), "labels": torch.tensor([number, number])}


class Shuffled(IterableDataset):
    """Numbers in an order that is drawn as it goes, first as a whole and then from a buffer."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order = torch.randperm(37).tolist()
        return self._drawn(order)

    def _drawn(self, order: list[int]) -> Iterator[dict[str, Any]]:
        held, rest = order[:5], order[5:]
        while held:
            place = random.randrange(len(held))
            yield {"number": held[place], "drawn": 0.0, "labels": torch.tensor([held[place]] * 2)}
            if rest:
                held[place] = rest.pop(0)
            else:
                held.pop(place)


class Flow(IterableDataset):
    """The same, one after the other; with a state of its own, or without."""

    def __init__(self, *, stateful: bool = False, read: list[int] | None = None) -> None:
        self._start, self._at = 0, 0
        self._read = [] if read is None else read
        if stateful:
            self.state_dict = lambda: {"at": self._at}
            self.load_state_dict = lambda state: setattr(self, "_start", state["at"])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start, self._start = self._start, 0
        for number in range(start, 37):
            self._at = number + 1
            self._read.append(number)
            yield Numbers()[number]


class Part(IterableDataset):
    """Every so many-th of them, in an order that is drawn first and is the same for all parts."""

    def __init__(self, read: list[int], begin: int, step: int) -> None:
        self._read, self._begin, self._step = read, begin, step

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in torch.randperm(37).tolist()[self._begin :: self._step]:
            self._read.append(number)
            yield Numbers()[number]


class Short(Part):
    """The first samples of a part, and then an error, or the end."""

    def __init__(self, read: list[int], begin: int, step: int, *, length: int, fails: bool) -> None:
        super().__init__(read, begin, step)
        self._length, self._fails = length, fails

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, sample in enumerate(super().__iter__()):
            if number == self._length:
                if self._fails:
                    raise ValueError("a file that cannot be read")
                return
            yield sample


def divided(
    folder: str, *, ends: int, resumes: bool = False, short: int | None = None, fails: bool = False, **options: Any
) -> dict[str, Any]:
    """Two epochs of parts, with a checkpoint after so many global batches; or from that checkpoint on.

    With `short`, the second part has only so many samples, or fails then.
    """
    read: list[int] = []

    def part(dataset: Any, rank: int, size: int) -> Part:
        is_short = short is not None and rank == 1
        return Short(read, rank, size, length=short, fails=fails) if is_short else Part(read, rank, size)

    asked = {"global_batch_size": 9, "micro_batch_size": 2, "precision": "fp32", "seed": 3} | options
    run = TrainingRun(TrainingConfig(**asked))
    _, _, loader = run.prepare(
        model=torch.nn.Linear(2, 2),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        data=Flow(),
        shard=part,
    )
    if resumes:
        run.load(folder)
    found: list[list[int]] = [[]]
    metrics: list[list[int]] = []
    while loader.cursor.epoch < 2:
        for batch in loader:
            counts = (batch["labels"] != -100).any(1)
            found[-1] += batch["number"][counts].tolist()
            metrics.append(run.gather_for_metrics(batch["number"]).tolist())
            run.step()
            if loader.is_last:
                found.append([])
                if not resumes and len(found) - 1 == ends:
                    run.save(folder)
    return {"found": found[:-1], "metrics": metrics, "read": read}


def hugging(
    folder: str | None = None, *, kind: str, skip: int = 0, shard: str | None = None, shuffles: bool = False
) -> list[list[int]]:
    """As `numbers`, of Hugging Face's datasets."""
    import datasets

    if kind == "listed":
        data = datasets.Dataset.from_dict({"number": list(range(37))}).with_format("torch")
    else:
        data = datasets.IterableDataset.from_generator(
            lambda shards: ({"number": each} for begin in shards for each in range(begin, 37, 4)),
            gen_kwargs={"shards": [0, 1, 2, 3]},
        )
        data = data.shuffle(seed=5, buffer_size=6) if shuffles else data
        if kind == "mixed":  # of two such, one after the other
            data = datasets.concatenate_datasets([data.take(20), data.skip(20)])
        if kind == "interleaved":  # of two such, one sample each in turn, to the end of both
            parts = [data.filter(lambda each, left=left: each["number"] % 3 == left) for left in (0, 1, 2)]
            data = datasets.interleave_datasets(parts, stopping_strategy="all_exhausted_without_replacement")
    run = TrainingRun(TrainingConfig(global_batch_size=8, micro_batch_size=2, precision="fp32", seed=3))

    def collated(samples: list[Any]) -> dict[str, torch.Tensor]:
        values = torch.tensor([int(each["number"]) for each in samples])
        return {"number": values, "labels": values[:, None]}

    _, _, loader = run.prepare(
        model=torch.nn.Linear(2, 2),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        data=data,
        collate_fn=collated,
        shard=shard,
    )
    if folder is not None and skip < 0:
        run.load(folder)
    found: list[list[int]] = [[]]
    while loader.cursor.epoch < 2:
        for batch in loader:
            found[-1] += [
                number
                for number, label in zip(*(batch[k].flatten().tolist() for k in batch), strict=True)
                if label != -100
            ]
            run.step()
            if loader.is_last:
                found.append([])
                if folder is not None and len(found) - 1 == skip:
                    run.save(folder)
                    return found[:-1]
    return found[:-1]


def generated(path: str, *, precision: str = "fp32", **options: Any) -> list[list[int]]:
    """What a model says before and after two steps; each process asks for another number of tokens."""
    run = TrainingRun(TrainingConfig(precision=precision, global_batch_size=8, micro_batch_size=2, **options))
    model, _, _ = run.prepare(
        model=path, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2), data=Sentences(), progress=False
    )
    prompt = torch.tensor([[5, 6, 7 + run.processes.rank]])
    found = []
    for _ in range(2):
        found.append(run.generate(prompt, max_new_tokens=4 + 3 * run.processes.rank, do_sample=False)[0].tolist())
        assert model.training
        if options["strategy"] == "fsdp":  # the whole, that was gathered, is gone again
            assert all(isinstance(each, DTensor) for each in model.parameters())
        for _ in range(2):
            run.train_step()
    return found


def numbers(
    skip: int = 0,
    epochs: int = 2,
    *,
    num_workers: int = 0,
    folder: str | None = None,
    size: int = 8,
    micro: int = 2,
    shuffled: bool = False,
    iterable: bool = False,
    stateful: bool = False,
    read: list[int] | None = None,
) -> list[list[tuple[int, float]]]:
    """The samples of each global batch that this process is given, those that do not count left out.

    With a folder: after `skip` global batches a checkpoint is made there, or read there where `skip` is negative.
    """
    torch.manual_seed(0)
    run = TrainingRun(TrainingConfig(global_batch_size=size, micro_batch_size=micro, precision="fp32", seed=3))
    _, _, loader = run.prepare(
        model=torch.nn.Linear(2, 2),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        data=Shuffled() if shuffled else Flow(stateful=stateful, read=read) if iterable else Numbers(),
        num_workers=num_workers,
        progress=False,
    )
    if folder is not None and skip < 0:
        run.load(folder)
    found: list[list[tuple[int, float]]] = [[]]
    for _ in range(epochs):
        for batch in loader:
            rows = zip(batch["number"].tolist(), batch["drawn"].tolist(), batch["labels"][:, 0].tolist(), strict=True)
            found[-1] += [(number, drawn) for number, drawn, label in rows if label != -100]
            run.step()  # nothing is trained
            if loader.is_last:
                found.append([])
                if folder is not None and len(found) - 1 == skip:
                    run.save(folder)
                    return found[:-1]
    return found[:-1]


def resumed(path: str, folder: str, first: int, then: int, **options: Any) -> dict[str, Any]:
    """Train, going on from a checkpoint where `first` is 0, and leave one after `first` steps otherwise."""
    return train(path, first if first else then, checkpoint=folder, resumes=not first, **options)


def interrupted(path: str, folder: str, **options: Any) -> dict[str, Any]:
    """Steps with an evaluation, generated text, and a checkpoint that is loaded again between them.

    Returns:
        ``losses`` of the steps and of the evaluations; ``ids`` that were generated; ``parameters`` at the end.
    """
    run = TrainingRun(TrainingConfig(**{"global_batch_size": 8, "micro_batch_size": 2, "grad_clip": 1.0, **options}))
    run.prepare(
        model=path, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3), data=Sentences(), progress=False
    )
    held_out = run.prepare_eval(Sentences())
    losses, ids = [], []
    for number in range(4):
        losses.append(run.train_step().loss)
        if number == 1:
            run.save(folder)
        losses.append(run.evaluate(held_out).loss)
        ids.append(run.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=4, do_sample=False).tolist())
        if number == 2:
            run.load(folder)
    return {"losses": losses, "ids": ids, "parameters": masters(run)}


def exported(path: str, folder: str, steps: int = 2, **options: Any) -> dict[str, torch.Tensor]:
    """Train a little and export; name -> values of the parameters that were."""
    return train(path, steps, export=folder, **options)["parameters"]


def train(
    path: str | Path,
    steps: int = 20,
    *,
    model: Any = None,
    lr: float = 1e-3,
    gradients: bool = False,
    checkpoint: str | None = None,
    resumes: bool = False,
    export: str | None = None,
    groups: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train for so many optimizer steps; go on from a checkpoint, or leave one, or an export, at the end.

    Returns:
        ``losses``, ``norms``, ``tokens`` of the steps; ``parameters``: name -> values; ``gradients`` of the first step.
    """
    run = TrainingRun(TrainingConfig(**{"global_batch_size": 8, "grad_clip": 1.0, **options}))
    model, _, loader, _ = run.prepare(
        model=str(path) if model is None else model,
        optimizer=lambda params: torch.optim.AdamW(_grouped(params) if groups else params, lr=lr),
        data=Sentences(),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 10),
        progress=False,
    )
    if checkpoint is not None and resumes:
        run.load(checkpoint)
    losses, norms, tokens, first = [], [], [], {}
    while len(losses) < steps:
        for batch in loader:
            with run.accumulate():
                run.backward(run.loss(model(**batch), batch))
                before, last = run.last_step, loader.is_last
                if gradients and last and not first:
                    first = gradients_of(run)
                run.step()
            assert (run.last_step is not before) == last
            if last:
                losses.append(run.last_step.loss)
                norms.append(run.last_step.grad_norm)
                tokens.append(run.last_step.num_tokens)
                if len(losses) == steps:
                    break
    if checkpoint is not None and not resumes:
        run.save(checkpoint)
    if export is not None:
        run.export(export, max_shard_size="50KB")
    return {
        "losses": losses,
        "norms": norms,
        "tokens": tokens,
        "parameters": masters(run),
        "gradients": first,
    }


def _grouped(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """Vectors do not decay."""
    return [
        {"params": [each for each in params if each.ndim > 1]},
        {"params": [each for each in params if each.ndim < 2], "weight_decay": 0.0},
    ]


def own_loader() -> float:
    """The gradient of a weight by whose process's rank and 1 it is multiplied."""
    run = TrainingRun(TrainingConfig(strategy="ddp", precision="fp32"))
    model = run.prepare(torch.nn.Linear(1, 1, bias=False))
    with run.accumulate():
        run.backward(model(torch.full((1, 1), run.processes.rank + 1.0)).sum())
    return float(run.unwrap().weight.grad)


def uneven() -> str:
    """What seven samples without labels come to."""
    run = TrainingRun(TrainingConfig(strategy="ddp", precision="fp32", global_batch_size=4, micro_batch_size=1))
    model, _, loader = run.prepare(
        model=torch.nn.Linear(2, 1),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        data=[torch.ones(2) for _ in range(7)],
    )
    try:
        for batch in loader:
            with run.accumulate():
                run.backward(model(batch).mean())
                run.step()
    except Exception as error:
        return type(error).__name__
    return "nothing"


def untrained(path: str, *, strategy: str, from_memory: bool) -> dict[str, torch.Tensor]:
    """Name -> master, before the first step."""
    run = TrainingRun(TrainingConfig(strategy=strategy))
    model: Any = path
    optimizer: Any = lambda params: torch.optim.AdamW(params)  # noqa: E731
    if from_memory:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters())
    run.prepare(model=model, optimizer=optimizer, progress=False)
    return masters(run)


def overflown(path: str, **options: Any) -> dict[str, Any]:
    """Three global batches, of which the second has gradients that are not finite."""
    run = TrainingRun(TrainingConfig(global_batch_size=4, micro_batch_size=1, **options))
    model, _, loader, _ = run.prepare(
        model=path,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
        data=Sentences(12),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 10),
        progress=False,
    )
    records, before, is_unchanged = [], {}, False
    for batch in loader:
        with run.accumulate():
            loss = run.loss(model(**batch), batch)
            run.backward(loss * math.inf if len(records) == 1 else loss)
            run.step()
        if loader.is_last:
            records.append(run.last_step)
            if len(records) == 2:
                is_unchanged = all(torch.equal(each, before[name]) for name, each in masters(run).items())
            before = masters(run)
    return {
        "skipped": [each.skipped for each in records],
        "steps": [each.step for each in records],
        "lrs": [each.lr for each in records],
        "is_unchanged": is_unchanged,
    }


def stepped_too_often(path: str, **options: Any) -> dict[str, Any]:
    """What a step before the first micro-batch, after the last and without a backward raise, and what is done between."""
    run = TrainingRun(TrainingConfig(global_batch_size=4, micro_batch_size=2, **options))
    model, _, loader = run.prepare(
        model=path, optimizer=lambda params: torch.optim.SGD(params, lr=0.1), data=Sentences(12), progress=False
    )
    raised, steps = [], []

    def step() -> None:
        try:
            run.step()
        except TrainingError as error:
            raised.append(str(error))

    step()
    for number, batch in enumerate(loader):
        with run.accumulate():
            if number == 1:
                step()
            run.backward(run.loss(model(**batch), batch))
            run.step()
        step()
        steps.append((run.last_step.step, loader.cursor.num_consumed))
    return {"raised": raised, "steps": steps}


def stepped(path: str, **options: Any) -> dict[str, torch.Tensor]:
    """Masters after one global batch of two micro-batches."""
    run = TrainingRun(TrainingConfig(global_batch_size=8, micro_batch_size=2, **options))
    run.prepare(model=path, optimizer=lambda params: torch.optim.SGD(params, lr=0.1), data=Sentences(8), progress=False)
    run.train_step()
    return masters(run)


def last_left_out(path: str, **options: Any) -> dict[str, Any]:
    """The last of two micro-batches has no backward: what is raised, and the global batch after it was given one."""
    run = TrainingRun(TrainingConfig(global_batch_size=8, micro_batch_size=2, **options))
    model, optimizer, loader = run.prepare(
        model=path, optimizer=lambda params: torch.optim.SGD(params, lr=0.1), data=Sentences(8), progress=False
    )
    raised, before, is_unchanged = [], masters(run), False
    for number, batch in enumerate(loader):
        with run.accumulate():
            loss = run.loss(model(**batch), batch)
            if number == 1:
                for step in (run.step, optimizer.step):
                    with pytest.raises(TrainingError) as error:
                        step()
                    raised.append(str(error.value))
                is_unchanged = all(torch.equal(each, before[name]) for name, each in masters(run).items())
                loss = run.loss(model(**batch), batch)
            run.backward(loss)
            run.step()
    return {"raised": raised, "is_unchanged": is_unchanged, "parameters": masters(run)}


def frozen(path: str, folder: str, *, strategy: str, loads: bool = False) -> dict[str, bool]:
    """Train all but the embeddings and a layer, and leave a checkpoint; or load one."""
    import bigmodel

    loaded = bigmodel.load_sharded(path, device_map="cpu")
    loaded.model.layers[1].requires_grad_(True)
    start = {name: each.detach().clone() for name, each in loaded.named_parameters()}
    run = TrainingRun(TrainingConfig(strategy=strategy, global_batch_size=4, micro_batch_size=1))
    model, _, loader = run.prepare(loaded, torch.optim.AdamW(loaded.parameters(), lr=1e-2), Sentences(12))
    if loads:
        run.load(folder)
        found = masters(run)
        expected = torch.load(f"{folder}.pt")
        return {"are_equal": all(torch.equal(found[name], each) for name, each in expected.items())}
    for batch in loader:
        with run.accumulate():
            run.backward(run.loss(model(**batch), batch))
            run.step()
    run.evaluate(run.prepare_eval(Sentences(5)))
    found = masters(run)
    run.save(folder)
    if run.is_main_process:
        torch.save(found, f"{folder}.pt")
    trained = {name for name in found if ".layers.1." in name}
    return {
        "are_kept": all(
            torch.equal(found[name], start[name]) and found[name].dtype == torch.bfloat16
            for name in found.keys() - trained
        ),
        "are_trained": all(not torch.equal(found[name], start[name].float()) for name in trained),
    }


def lora(**changes: Any) -> Any:
    """Adapters on some layers of a tiny llama."""
    from peft import LoraConfig

    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "lora_alpha": 16, "task_type": "CAUSAL_LM"}
    return LoraConfig(**(settings | changes))


def adapted(
    path: str,
    *,
    steps: int = 3,
    adapter: Any = None,
    from_memory: bool = False,
    loads: str | None = None,
    saves: str | None = None,
    exports: str | None = None,
    merges: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains adapters; from a checkpoint, or around a model in memory as their user puts them."""
    adapter = lora() if adapter is None else adapter
    given: dict[str, Any] = {"model": path, "adapter": adapter}
    if from_memory:
        from transformers import AutoModelForCausalLM

        given["model"] = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    run = TrainingRun(TrainingConfig(global_batch_size=8, grad_clip=0.05, **options))
    run.prepare(
        **given, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2), data=Sentences(64), progress=False
    )
    trained = set(run._prepared().trained())
    before = masters(run)
    if loads:
        run.load(loads)
    records = [run.train_step() for _ in range(steps)]
    after = masters(run)
    if saves:
        run.save(saves)
    if exports:
        run.export(exports)
    if merges:
        run.export(merges, merge=True)
    return {
        "losses": [each.loss for each in records],
        "norms": [each.grad_norm for each in records],
        "parameters": {name: each for name, each in after.items() if name in trained},
        "is_base_kept": all(torch.equal(each, before[name]) for name, each in after.items() if name not in trained),
        "dtypes": {str(each.dtype) for name, each in after.items() if name not in trained},
        "is_moved": all(not torch.equal(after[name], before[name]) for name in trained),
        "loss": run.evaluate(run.prepare_eval(Sentences(6))).loss,
    }


def adapted_text(path: str, **options: Any) -> dict[str, Any]:
    """Tokens that adapters make, by the run, and by PEFT with what it exports."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = TrainingRun(TrainingConfig(global_batch_size=8, **options))
    adapter = lora(init_lora_weights=False, lora_alpha=64)
    run.prepare(model=path, adapter=adapter, data=Sentences(8), progress=False,
                optimizer=lambda params: torch.optim.SGD(params, lr=0.1))  # fmt: skip
    asked = {"max_new_tokens": 6, "do_sample": False}
    ids = torch.arange(3, 11)[None] + run.processes.rank
    tokens = run.generate(ids, **asked)
    with tempfile.TemporaryDirectory() as folder:
        folder = run.processes.same(folder)
        run.export(folder + "-adapter")
        base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        around = PeftModel.from_pretrained(base, folder + "-adapter").eval()
    if options["precision"] == "bf16":
        around = around.bfloat16()
    return {"tokens": tokens.tolist(), "expected": around.generate(input_ids=ids, **asked).tolist()}


def streamed(path: str) -> str:
    """What is said of a model that streams, in several processes."""
    model = bigmodel.load_sharded(path, device_map={"": "disk"}, progress=False)
    try:
        TrainingRun(TrainingConfig(precision="fp32")).prepare(model=model, adapter=lora(), progress=False)
    except Exception as error:
        return str(error)
    return "nothing"


class OddShapes(torch.nn.Module):
    """A convolution, a vector of seven, one matrix that is used twice, and a scale."""

    def __init__(self, scale: torch.Tensor) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(scale)
        self.convolution = torch.nn.Conv2d(3, 5, 3, padding=1)
        self.first = torch.nn.Linear(7, 7)
        self.second = torch.nn.Linear(7, 7, bias=False)
        self.second.weight = self.first.weight

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.second(self.first(self.convolution(images))).mean((1, 2)) * self.scale
        return {"loss": torch.nn.functional.cross_entropy(hidden, labels[:, 0])}


class Images(Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(number)
        return {"images": torch.randn(3, 7, 7, generator=generator), "labels": torch.tensor([number % 7])}


def odd_shapes(
    folder: str, *, strategy: str, steps: int, scale: float | list[float], loads: bool = False
) -> dict[str, torch.Tensor]:
    """Train `OddShapes`, going on from a checkpoint or leaving one; name -> master."""
    torch.manual_seed(5)
    run = TrainingRun(TrainingConfig(strategy=strategy, precision="fp32", global_batch_size=4, micro_batch_size=1))
    model, _, loader = run.prepare(
        model=OddShapes(torch.tensor(scale)),
        optimizer=lambda params: torch.optim.AdamW(_grouped(params), lr=1e-2),
        data=Images(),
    )
    if loads:
        run.load(folder)
    for _ in range(2):
        for batch in loader:
            if steps == 0:
                break
            with run.accumulate():
                run.backward(run.loss(model(**batch), batch))
                run.step()
            steps -= loader.is_last
    if not loads:
        run.save(folder)
    return masters(run)


def said() -> dict[str, Any]:
    """What two processes tell each other."""
    run = TrainingRun(TrainingConfig(precision="fp32"))
    rank = run.processes.rank
    ones = torch.ones(2, dtype=torch.int64)

    def refused(call: Any, *args: Any) -> str:
        try:
            call(*args)
        except Exception as error:
            return type(error).__name__
        return "nothing"

    with run.split_between_processes(["a", "b", "c"]) as split:
        pass
    with run.split_between_processes(["a", "b", "c"], apply_padding=True) as padded_split:
        pass
    found: dict[str, Any] = {
        "gathered": run.gather({"rows": torch.full((1 + rank, 2), rank), "nested": (torch.tensor(0.5 + rank),)}),
        "halves": run.reduce(torch.tensor(60000.0, dtype=torch.float16), "mean"),
        "mean": run.reduce(torch.tensor(1.0 + rank), "mean"),
        "broadcast": run.broadcast(torch.full((3,), rank), source=1),
        "scattered": run.scatter(torch.arange(4)),
        "objects": run.gather_objects({"rank": rank}),
        "padded": run.pad_across_processes(torch.full((2, 2 + rank), 1 + 8 * rank), dim=1),
        "refused": [
            refused(run.gather, torch.ones(1, 2 + rank)),
            refused(run.reduce, ones, "mean"),
            refused(run.reduce, ones, "most"),
            refused(run.gather, ["text"]),
        ],
        "split": split,
        "padded_split": padded_split,
        "on_main": run.on_main_process(lambda: "done")(),
    }
    torch.manual_seed(rank)
    run.synchronize_rng()
    found["drawn"] = torch.rand(()).item()

    def fails() -> None:
        with run.main_process_first():
            if run.is_main_process:
                raise ValueError("no disk")

    found["failed"] = refused(fails)
    return found


def in_other_words(path: str, steps: int, *, accumulates: bool = True, **options: Any) -> dict[str, Any]:
    """`train` as a loop for Accelerate says it."""
    run = TrainingRun(TrainingConfig(global_batch_size=8, **options))
    model, optimizer, loader, scheduler = run.prepare(
        model=path,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
        data=Sentences(),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 10),
        progress=False,
    )
    losses, lrs = [], []
    for batch in loader:
        with run.accumulate(model) if accumulates else contextlib.nullcontext():
            lr = scheduler.get_last_lr()[0]
            run.backward(model(**batch).loss)
            if run.sync_gradients:
                norm = run.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if run.sync_gradients:
            losses.append(run.last_step.loss)
            lrs.append(lr)
            assert norm is None or abs(norm.item() - run.last_step.grad_norm) < 1e-5
            if len(losses) == steps:
                break
    return {"losses": losses, "lrs": lrs, "parameters": masters(run)}


def metrics() -> dict[str, Any]:
    """The numbers of the samples of a pass for evaluation and one for training."""

    class Seven(Numbers):
        def __len__(self) -> int:
            return 7

    run = TrainingRun(TrainingConfig(precision="fp32", global_batch_size=6, micro_batch_size=2))
    _, loader = run.prepare(model=torch.nn.Linear(2, 2), data=Seven())
    found: dict[str, Any] = {"evaluated": [], "trained": [], "named": [], "refused": ""}
    for batch in run.prepare_eval(Seven()):
        found["evaluated"] += run.gather_for_metrics({"number": batch["number"]})["number"].tolist()
        found["named"] += run.gather_for_metrics([str(each) for each in batch["number"].tolist()])
    for batch in loader:
        found["trained"] += run.gather_for_metrics(batch["number"]).tolist()
    try:
        run.gather_for_metrics(torch.ones(5))
    except Exception as error:
        found["refused"] = type(error).__name__
    return found


def stopped(path: str) -> int:
    """Steps until all processes stop, where the second one asks during the third step."""
    run = TrainingRun(TrainingConfig(precision="fp32", global_batch_size=2))
    run.prepare(model=path, optimizer=lambda params: torch.optim.SGD(params, lr=0.1), data=Sentences(), progress=False)
    steps = 0
    while not run.should_stop:
        if steps == 2 and not run.is_main_process:
            run.stop()
        run.train_step()
        steps += 1
    return steps


def prefetched() -> dict[str, Any]:
    """FSDP2 that gathers two units ahead, beside one that does as it likes."""
    found = []
    arguments: dict[str, Any] = {}
    for options in ({}, {"prefetch": 2}):
        torch.manual_seed(0)
        layers = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(4)])
        module = torch.nn.Sequential(*layers)
        run = TrainingRun(
            TrainingConfig(strategy="fsdp", precision="fp32", global_batch_size=2, engine_options=options)
        )
        model, _, loader = run.prepare(
            model=module, optimizer=lambda params: torch.optim.SGD(params, lr=0.1), data=[torch.ones(4)] * 8
        )
        for batch in loader:
            with run.accumulate():
                run.backward(model(batch).mean())
                run.step()
        found.append(masters(run))
        arguments = run.engine_arguments()
    return {"arguments": arguments, "same": all(torch.equal(found[0][name], each) for name, each in found[1].items())}


def gathers(path: str) -> dict[str, Any]:
    """How FSDP2 divides a model, and how often it gathers weights for one micro-batch."""
    run = TrainingRun(
        TrainingConfig(strategy="fsdp", precision="fp32", global_batch_size=2, engine_options={"prefetch": 0})
    )
    model, _, loader = run.prepare(
        model=path, optimizer=lambda params: torch.optim.SGD(params, lr=0.1), data=Sentences(), progress=False
    )
    recorder = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    for number, batch in enumerate(loader):  # the first also finds out how the model divides its loss
        with recorder if number == 1 else contextlib.nullcontext(), run.accumulate():
            run.backward(run.loss(model(**batch), batch))
            run.step()
        if number == 1:
            break
    count = sum(event.name == "gloo:all_gather" for event in recorder.events())
    return {"arguments": run.engine_arguments(), "count": count}


def saved_beside(path: str, folder: str, *, strategy: str) -> dict[str, Any]:
    """Save while the training goes on, then load: is it what there was at that moment?"""
    run = TrainingRun(TrainingConfig(strategy=strategy, precision="fp32", global_batch_size=4, micro_batch_size=2))
    run.prepare(
        model=path, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2), data=Sentences(), progress=False
    )
    run.train_step()
    run.save(f"{folder}/a", keep=1, wait=False)
    run.train_step()
    expected = masters(run)
    run.save(f"{folder}/b", keep=1, wait=False)
    losses = [run.train_step().loss for _ in range(3)]
    run.load(f"{folder}/b")
    found = masters(run)
    return {
        "equal": all(torch.equal(found[name], each) for name, each in expected.items()),
        "names": sorted(each.name for each in Path(folder).iterdir()),
        "losses": [run.train_step().loss for _ in range(3)] == losses,
    }


def in_float16(path: str, folder: str, *, strategy: str) -> dict[str, Any]:
    """ZeRO in float16 where DeepSpeed says that the processor does not compute in it, which torch does."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: [torch.float32, torch.bfloat16, torch.float16]
    assert deepspeed is not None
    try:
        trained = train(path, 20, strategy=strategy, precision="fp16", checkpoint=f"{folder}/20")
        found = overflown(path, strategy=strategy, precision="fp16")
        run = TrainingRun(TrainingConfig(strategy=strategy, precision="fp16", global_batch_size=8, micro_batch_size=1))
        run.prepare(
            model=path,
            optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
            data=Sentences(),
            scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 10),
            progress=False,
        )
        run.load(f"{folder}/20")
        after = masters(run)
        scale = run._prepared().loss_scale
        return {
            "losses": trained["losses"],
            **found,
            "are_read": all(torch.equal(after[name], each) for name, each in trained["parameters"].items()),
            "scale": (scale.value, scale.state_dict()["num_good"]),
        }
    finally:
        del accelerator.is_fp16_supported, accelerator.supported_dtypes


def tracked(path: str, folder: str, *trackers: Any, steps: int = 3, **options: Any) -> dict[str, Any]:
    """What a run tells, and where it is told."""
    asked = {"strategy": "single", "precision": "fp32", "global_batch_size": 4, "micro_batch_size": 1, "seed": 5}
    run = TrainingRun(TrainingConfig(**(asked | options)))
    model, loader = run.prepare(
        model=path, optimizer=lambda params: torch.optim.SGD(params, lr=0.1), data=Sentences(64), progress=False
    )[::2]
    calls = []

    @run.metric(every=2)
    def answers(record: Any) -> dict[str, float]:
        calls.append(record.step)
        return {"half": record.step / 2}

    @run.metric
    def rank(record: Any) -> float:
        return float(sum(run.processes.gathered(run.processes.rank)))

    records = []
    with run.track(*trackers, folder=folder, name="own", hyperparameters={"note": "tried"}) as track:
        for batch in loader:
            with run.accumulate():
                run.backward(run.loss(model(**batch), batch))
                run.step()
            if run.sync_gradients:
                records.append(run.last_step)
            if len(records) == steps:
                break
        track.log({"after": torch.tensor(7.0)})
        track.images("picture", [torch.zeros(3, 4, 5), torch.full((1, 4, 5), 255, dtype=torch.uint8)])
        track.table("answers", ["prompt", "text"], [["a | b", "c"], ["d", torch.tensor(3)]])
    run.train_step()  # told to nobody
    return {"records": [(each.step, each.loss, each.grad_norm) for each in records], "calls": calls}


def hooked(folder: str) -> list[str]:
    """The files that hooks of two processes find."""
    run = TrainingRun(TrainingConfig(strategy="ddp", precision="fp32"))
    run.prepare(model=torch.nn.Linear(2, 2), optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    found: list[str] = []
    run.register_checkpoint_hooks(
        on_save=lambda path: (path / f"rank-{run.processes.rank}.txt").write_text("mine"),
        on_load=lambda path: found.extend(sorted(each.name for each in path.glob("rank-*.txt"))),
    )
    run.save(folder)
    run.load(folder)
    return found


def chosen(path: str, folder: str) -> list[dict[str, Any]]:
    """What is chosen for a run, for one that goes on with it, and for one that goes on with another one."""
    found = []
    for stated, into, resumes in (
        ({}, "own", None),
        ({}, None, "own"),
        ({"strategy": "zero1", "micro_batch_size": 2}, "other", None),
        ({}, None, "other"),
    ):
        run = TrainingRun(TrainingConfig(precision="fp32", global_batch_size=8, **stated))
        model, _, loader = run.prepare(
            model=path,
            optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
            data=Sentences(),
            resumes=None if resumes is None else f"{folder}/{resumes}",
        )
        for batch in loader:
            with run.accumulate():
                run.backward(run.loss(model(**batch), batch))
                run.step()
            if loader.is_last:
                break
        if into is not None:
            run.save(f"{folder}/{into}/1")
        if not stated:
            config = run.config
            found.append(
                {
                    "strategy": config.strategy,
                    "micro_batch_size": config.micro_batch_size,
                    "reshard_after_forward": config.reshard_after_forward,
                    "activation_checkpointing": config.activation_checkpointing,
                }
            )
    return found


def risen(path: str, tiny: str, **options: Any) -> int:
    """By how many bytes this process grows, at the most, from before a run is prepared to its fourth step.

    Args:
        tiny: another checkpoint, on which what libraries take at first is taken before.
        options: of TrainingConfig, in float32.
    """
    import gc

    from bigmodel.footprint import PeakFootprint, footprint_bytes

    class Ids(Dataset):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
            ids = torch.randint(90, (256,), generator=torch.Generator().manual_seed(number))
            return {"input_ids": ids, "labels": ids}

    def trained(folder: str) -> int:
        gc.collect()
        run = TrainingRun(TrainingConfig(precision="fp32", **options))
        before = footprint_bytes()
        model, _, loader = run.prepare(model=folder, optimizer=torch.optim.AdamW, data=Ids())
        with contextlib.ExitStack() as stack:
            for number, batch in enumerate(loader):
                run.backward(run.loss(model(**batch), batch))
                run.step()
                if not number:
                    peak = stack.enter_context(PeakFootprint())
                if number == 3:
                    break
        return peak.peak_bytes - before

    trained(tiny)
    return trained(path)


def compiled(path: str, **options: Any) -> tuple[dict[str, Any], int]:
    """What `train` finds with compiled blocks, and how many graphs were made."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    found = train(path, 3, compile_blocks="aot_eager", **options)
    return found, counters["stats"]["unique_graphs"]
