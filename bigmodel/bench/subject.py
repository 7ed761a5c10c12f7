"""What is run in a process of its own: a model is loaded, answers a prompt, and tells when each token came.

Everything here takes and gives what JSON can say. A decode step is one new token for each sequence, greedy, through the model's
own ``generate``; the first step of a run is not among those that are timed, because slots and caches are still new to it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import bigmodel
from bigmodel.bench.child import tell
from bigmodel.bench.clock import Clock, criteria, first_difference, greedy_options, stated
from bigmodel.bench.raw_read import Range, widened
from bigmodel.checkpoint.resolve import locate
from bigmodel.device_map.simulation import Step
from bigmodel.errors import BigModelError, CheckpointError, InvalidArgumentError
from bigmodel.footprint import footprint_bytes
from bigmodel.generation.drafts import MOST_GUESSES, Draft, lookup_options
from bigmodel.generation.text import load_tokenizer
from bigmodel.loading.assembled import assembled
from bigmodel.loading.lifecycle import record
from bigmodel.loading.planning import make_plan_and_timeline

__all__ = [
    "import_libraries",
    "look",
    "measure_rates",
    "prompt_ids",
    "run_guesses",
    "run_model",
    "run_recorded",
    "stall_s",
]

OUTSIDE_BYTES = 128 << 20
"""Of a control group, for what the kernel keeps for a process: page tables, pages of libraries, page cache on its way."""

Load = Mapping[str, Any]
_TOLD_EVERY_S = 10.0
_PLACE = ("revision", "subfolder", "variant")


def measure_rates(folder: str) -> dict[str, Any]:
    """Measure this machine as ``bigmodel calibrate`` does; the rates are kept for the plans that follow.

    Returns:
        The machine, as a machine file has it.
    """
    due_s = time.monotonic() + _TOLD_EVERY_S

    def report(phase: str, done: int, total: int, /) -> None:
        nonlocal due_s
        if time.monotonic() >= due_s and done < total:
            due_s = time.monotonic() + _TOLD_EVERY_S
            tell(f"{phase}: {done / total:.0%}")

    described: dict[str, Any] = json.loads(bigmodel.Machine.calibrate(folder, progress=report).to_json())
    return described


def import_libraries() -> int:
    """What every run imports; bytes that this process holds then."""
    import torch  # noqa: F401
    import transformers  # noqa: F401

    return footprint_bytes()


def look(path: str, load: Load, cases: Sequence[Mapping[str, Any]], ram_bytes: int | None) -> dict[str, Any]:
    """What is planned for each case, before anything is loaded.

    Args:
        path: the checkpoint.
        load: of `load_sharded`: device_map, max_memory and how the checkpoint is read.
        cases: keyword arguments of a Workload each.
        ram_bytes: of the control group around the runs, of which what is left for a model is the host's limit where none is
            stated; None where there is no group.

    Returns:
        ``cases``: for each its ``plan`` (as `Plan.to_json` has it, parsed) or the ``error``
            that refuses it, and the sizes of one that does not fit; ``planning_s`` that it took, of which a load is made too;
            ``stall_s``, in which a step is predicted to wait; ``limits`` that hold.
    """
    if ram_bytes is not None and "cpu" not in (load["max_memory"] or {}):
        with suppress(BigModelError):  # then it is told below, for each case
            options = {**load, "max_memory": stated(load["max_memory"])}
            first = bigmodel.make_plan(path, workload=bigmodel.Workload(**cases[0]), **options)
            if not load["max_memory"]:  # a limit of the host alone would take the accelerators away
                others = {tier: size for tier, size in first.limits.items() if tier not in ("cpu", "disk")}
                load = {**load, "max_memory": others}
        # What its libraries hold is known now that all of them are imported.
        left = max(0, ram_bytes - footprint_bytes() - OUTSIDE_BYTES)
        load = {**load, "max_memory": {**(load["max_memory"] or {}), "cpu": left}}
    options = {**load, "max_memory": stated(load["max_memory"])}
    planned: list[dict[str, Any]] = []
    with suppress(BigModelError):  # told below; what the first of a process imports is not of planning
        bigmodel.make_plan(path, workload=bigmodel.Workload(**cases[0]), **options)
    for case in cases:
        started_s = time.perf_counter()
        try:
            plan, timeline = make_plan_and_timeline(path, None, bigmodel.Workload(**case), **options)
        except BigModelError as error:
            sizes = {name: getattr(error, name, None) for name in ("tier", "needed_bytes", "available_bytes")}
            planned.append({"error": str(error), **sizes})
        else:
            planning_s = time.perf_counter() - started_s
            described = json.loads(plan.to_json())
            planned.append({"plan": described, "planning_s": planning_s, "stall_s": stall_s(plan, timeline())})
    return {"cases": planned, "limits": dict(load["max_memory"] or {})}


def stall_s(plan: bigmodel.Plan, timeline: Sequence[Step]) -> float | None:
    """Of a predicted step, how long units that are fetched keep it waiting; None where an accelerator waits by itself."""
    if plan.run_devices != {"cpu"}:
        return None
    number, waited_s, free_s = max((step.number for step in timeline), default=0), 0.0, 0.0
    for step in timeline:
        if step.number == number and (step.read or step.copy):
            waited_s += max(0.0, step.run[0] - free_s)
        free_s = step.run[1]
    return waited_s


def run_model(
    path: str, load: Load, workload: Mapping[str, Any], num_tokens: int, prompt: Sequence[int] | None
) -> dict[str, Any]:
    """Load a model with bigmodel and generate.

    Args:
        path, load: as in `look`.
        workload: keyword arguments of the Workload that is planned for.
        num_tokens: that are generated for each sequence, at most the workload's.
        prompt: of each sequence; made up where None.

    Returns:
        ``load_s``; ``ttft_s`` of the first pass; ``seconds`` of each step but the first; ``tokens`` of the first sequence;
        ``prompt`` before them; ``plan``: its workload, limits, estimate, resident bytes and the bytes that passes stream, by
        phase and tier; of the steps that are timed, each per step: ``read_bytes``, ``copied_bytes``, ``stall_s``;
        ``causes``, why they are far from their limit, where they are;
        ``mapped_bytes`` of resident weights; ``device_peaks``, device -> bytes; ``ranges`` (file, offset, bytes) of a step.
    """
    import torch

    planned_for = bigmodel.Workload(**workload)
    started_s = time.perf_counter()
    options = {**load, "max_memory": stated(load["max_memory"])}
    model = bigmodel.load_sharded(path, workload=planned_for, progress=False, **options)
    load_s = time.perf_counter() - started_s
    _refuse_silent(path, model)
    plan = bigmodel.plan_of(model)
    ids = prompt_ids(model, planned_for, prompt)
    clock = Clock(lambda: bigmodel.stats_of(model))
    with torch.no_grad():
        clock.start()
        model.generate(**ids, **_greedy(model, num_tokens), stopping_criteria=criteria(clock.tick))
    steps = clock.steps()
    counts: dict[str, Any] = {}
    if steps:
        moved = clock.notes[-1] - clock.notes[1]
        counts = {name: getattr(moved, name) / len(steps) for name in ("read_bytes", "copied_bytes", "stall_s")}
        counts["causes"] = [] if moved.limit is None else list(moved.limit.causes)
    devices = sorted(plan.run_devices - {"cpu"})
    return {
        "load_s": load_s,
        "ttft_s": clock.times[0] - clock.started_s,
        "seconds": steps,
        "tokens": clock.tokens,
        "plan": _described(plan),
        **counts,
        "mapped_bytes": bigmodel.stats_of(model).mapped_bytes,
        "device_peaks": {name: torch.accelerator.max_memory_reserved(torch.device(name)) for name in devices},
        "ranges": _streamed_ranges(model, plan),
        "prompt": ids["input_ids"][0].tolist(),
    }


def run_recorded(path: str, load: Load, workload: Mapping[str, Any], prompt: Sequence[int] | None) -> dict[str, Any]:
    """Load a model, and note what happens in the first pass and two steps.

    Args:
        path, load, workload, prompt: as in `run_model`.

    Returns:
        ``plan``, as `Plan.to_json` has it; ``measured`` and ``predicted``: steps of `bigmodel.device_map.simulation`, as dicts.
    """
    import torch

    options = {**load, "max_memory": stated(load["max_memory"])}
    planned_for = bigmodel.Workload(**workload)
    # Before the model takes memory that is free now.
    plan, timeline = make_plan_and_timeline(path, None, planned_for, **options)
    predicted = [asdict(step) for step in timeline()]
    options["device_map"] = plan
    model = bigmodel.load_sharded(path, workload=planned_for, progress=False, **options)
    _refuse_silent(path, model)
    ids = prompt_ids(model, planned_for, prompt)
    with torch.no_grad(), record(model) as measured:
        model.generate(**ids, **_greedy(model, 3))
    return {
        "plan": json.loads(bigmodel.plan_of(model).to_json()),
        "measured": [asdict(step) for step in measured],
        "predicted": predicted,
    }


def run_guesses(
    path: str, load: Load, draft: str | None, prompt: Sequence[int] | None, prompt_tokens: int, new_tokens: int
) -> dict[str, Any]:
    """Load a model, and generate the same text plainly and with guessed tokens.

    Args:
        path, load: as in `look`.
        draft: the checkpoint of the model that guesses; the text itself does where None.
        prompt: token ids; where None a made-up passage, repeated.
        prompt_tokens: of the latter.
        new_tokens: that are generated, each way.

    Returns:
        ``plain_s`` and ``guessed_s``, seconds of a token after the first; ``tokens_per_pass``, of guesses; ``num_guesses`` of a
        pass; ``differs_at``, the first token (from 0) that is not that of the plain run, or None, and the ``gap`` there, by which
        the plain run's logit of its own token is above that of the other one.
    """
    import torch

    options = {**load, "max_memory": stated(load["max_memory"])}
    workload = bigmodel.Workload(prompt_tokens=prompt_tokens + MOST_GUESSES, new_tokens=new_tokens + MOST_GUESSES)
    guesser, tokenizer = None, None
    if draft is not None:
        reading = {name: load[name] for name in ("dtype", "trust_remote_code")}
        tokenizer, own = _tokenizer(path, load), _tokenizer(draft, {**load, **dict.fromkeys(_PLACE)})
        guesser = Draft.load(draft, tokenizer, own, stated(load["max_memory"]), workload, progress=False, **reading)
        options["max_memory"] = guesser.limits_beside()
    model = bigmodel.load_sharded(path, workload=workload, progress=False, **options)
    _refuse_silent(path, model)
    plan = bigmodel.plan_of(model)
    guesses = lookup_options(plan) if guesser is None else guesser.options(plan, tokenizer)
    ids = prompt_ids(model, replace(workload, prompt_tokens=prompt_tokens), prompt, period=max(1, prompt_tokens // 4))
    with torch.no_grad():
        model.generate(**ids, **_greedy(model, 2))
        plain = _streamed(model, ids, new_tokens, {})
        num_passes = bigmodel.stats_of(model).num_passes
        guessed = _streamed(model, ids, new_tokens, guesses)
        num_passes = bigmodel.stats_of(model).num_passes - num_passes
        at, gap = first_difference(plain.tokens, guessed.tokens), None
        if at is not None:
            scores = model.generate(**ids, **_greedy(model, at + 1), output_logits=True, return_dict_in_generate=True)
            last = scores.logits[at][0].float()
            gap = float(last[plain.tokens[at]] - last[guessed.tokens[at]])
    settings = guesses if guesser is None else vars(guesser.model.generation_config)
    return {
        "plain_s": plain.seconds_per_token,
        "guessed_s": guessed.seconds_per_token,
        "tokens_per_pass": len(guessed.tokens) / num_passes,
        "num_guesses": settings.get("prompt_lookup_num_tokens") or settings["num_assistant_tokens"],
        "differs_at": at,
        "gap": gap,
    }


class Stream:
    """Takes tokens of one sequence from ``generate(streamer=)``, several at a time where guesses were right."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._has_prompt = False
        self._started_s = time.perf_counter()
        self._times: list[tuple[float, int]] = []

    def put(self, value: Any) -> None:
        if self._has_prompt:
            self.tokens += value.flatten().tolist()
            self._times.append((time.perf_counter(), len(self.tokens)))
        self._has_prompt = True

    def end(self) -> None:
        """Nothing more comes."""

    @property
    def seconds_per_token(self) -> float:
        """From the first that came to the last; from the start, where all came at once."""
        (first_s, first), (last_s, last) = self._times[0], self._times[-1]
        return (last_s - first_s) / (last - first) if last > first else (last_s - self._started_s) / last


def _streamed(model: Any, ids: Mapping[str, Any], new_tokens: int, options: Mapping[str, Any]) -> Stream:
    stream = Stream()
    model.generate(**ids, **_greedy(model, new_tokens), **options, streamer=stream)
    return stream


def _tokenizer(path: str, load: Load) -> Any:
    """Of a checkpoint; None where it has none."""
    place = locate(path, **{name: load.get(name) for name in _PLACE})
    with suppress(CheckpointError):
        return load_tokenizer(
            place.folder, subfolder=load.get("subfolder"), trust_remote_code=load["trust_remote_code"]
        )
    return None


def prompt_ids(
    model: Any, workload: bigmodel.Workload, prompt: Sequence[int] | None, period: int | None = None
) -> dict[str, Any]:
    """``input_ids`` and ``attention_mask``, int64 [sequences, tokens]: a prompt, or tokens that follow no rule but their period.

    Tokens with a meaning of their own (of padding, of images) are not among these.
    """
    import torch

    shape = (workload.num_sequences, workload.prompt_tokens)
    if prompt is not None:
        ids = torch.tensor([list(prompt)] * shape[0], dtype=torch.long)
    else:
        config = model.config.get_text_config()
        special = _special_tokens(model.config.to_dict()) | _special_tokens(model.generation_config.to_dict())
        plain = torch.tensor([token for token in range(config.vocab_size) if token not in special])
        ids = plain[torch.randint(len(plain), shape, generator=torch.Generator().manual_seed(0))]
        if period is not None:
            ids = ids[:, torch.arange(shape[1]) % period]
    there = ids.to(model.device)
    return {"input_ids": there, "attention_mask": torch.ones_like(there)}


def _described(plan: bigmodel.Plan) -> dict[str, Any]:
    """What a result says of a plan."""
    fields = json.loads(plan.to_json())
    described = {name: fields[name] for name in ("workload", "limits", "estimate", "resident_bytes")}
    described["streamed_bytes"] = {
        phase: {tier: plan.streamed_bytes_from(tier, in_prefill=phase == "prefill") for tier in ("disk", "cpu")}
        for phase in ("prefill", "decode")
    }
    described["run_devices"] = sorted(plan.run_devices)
    return described


def _streamed_ranges(model: Any, plan: bigmodel.Plan) -> list[Range]:
    """Where the bytes are that every step reads."""
    units = {place.unit for place in plan.placements}
    in_slots = {unit for group in plan.slots for unit in group.units}
    ranges = []
    for name, source in assembled(model)[1].streamed.items():
        inside = [unit for unit in units if name == unit or name.startswith(f"{unit}.")]
        if max(inside, key=len, default="") in in_slots:
            ranges += [(extent.file, extent.offset, extent.nbytes) for extent in source.extents]
    return widened(ranges)


def _special_tokens(described: Any) -> set[int]:
    """What a configuration calls the id or index of a token, at any depth."""
    found: set[int] = set()
    for key, value in described.items() if isinstance(described, dict) else ():
        if isinstance(value, dict):
            found |= _special_tokens(value)
        elif str(key).endswith(("token_id", "token_index", "token_ids")):
            found |= {each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)}
    return found


def _greedy(model: Any, num_tokens: int) -> dict[str, Any]:
    """Exactly so many tokens, the likeliest ones."""
    options = greedy_options(num_tokens)
    if model.generation_config.pad_token_id is None:
        options["pad_token_id"] = 0  # no sequence ends early, so none is filled up
    return options


def _refuse_silent(path: str, model: Any) -> None:
    if not hasattr(model, "generate") or not model.can_generate():
        raise InvalidArgumentError(
            f"{path} is a {type(model).__name__}, which does not generate text, and that is what is measured. "
            "Load it with bigmodel.load_sharded and time what it does."
        )
