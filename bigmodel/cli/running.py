"""A run: a model is loaded for what it is asked, generates, and what that took is told."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

import bigmodel
from bigmodel.checkpoint.resolve import locate
from bigmodel.cli.live import bottom_line
from bigmodel.cli.turns import Turns, num_launched
from bigmodel.errors import InvalidArgumentError
from bigmodel.footprint import PeakFootprint, footprint_bytes
from bigmodel.generation.drafts import MOST_GUESSES, Draft, lookup_options
from bigmodel.generation.text import TextStream, encode_prompt, load_tokenizer, padded
from bigmodel.loading.lifecycle import watch
from bigmodel.loading.planning import make_plan_and_timeline
from bigmodel.models import adapter_nbytes, load_adapter
from bigmodel.progress import GENERATING, progress_bar
from bigmodel.units import format_bytes

if TYPE_CHECKING:
    from bigmodel.device_map.plan import Plan
    from bigmodel.hooks.stats import StreamStats

__all__ = ["Settings", "answer", "answer_all"]

logger = logging.getLogger("bigmodel.cli")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is asked for, whatever its prompts are.

    Attributes:
        path, load: of the model, and how it is loaded; `load` is what `load_sharded` takes beside limits and workload.
        limits: as `max_memory`.
        chat: whether prompts go into the model's chat template.
        max_new_tokens: of each answer.
        adapter: folder of an adapter that is put around the model.
        lookup, draft: what guesses tokens: the text itself, or the model at a path.
        sampling: what generate is asked for where it samples; None where it does not.
        seed: of the draws.
        tell: called with what is said about a run: the plan, figures.
        is_quiet: no progress is shown.
    """

    path: str
    load: Mapping[str, Any]
    tell: Callable[[str], None]
    limits: Mapping[int | str, int] | None = None
    chat: bool = False
    max_new_tokens: int = 128
    lookup: bool = False
    draft: str | None = None
    adapter: str | None = None
    sampling: Mapping[str, float | None] | None = None
    seed: int | None = None
    is_quiet: bool = False

    @property
    def progress(self) -> bool | None:
        """As `load_sharded` takes it."""
        return False if self.is_quiet else None


def answer(settings: Settings, prompt: str, write: Callable[[str], None]) -> None:
    """Write the text that a model generates after a prompt, as it comes.

    Raises:
        InvalidArgumentError: several processes were launched, which would all answer it.
    """
    if num_launched() > 1:
        raise InvalidArgumentError(
            f"{num_launched()} processes were launched, and there is one prompt. Give --prompts, whose lines they divide, or "
            "launch one process."
        )
    tokenizer = _tokenizer_of(settings)
    inputs = encode_prompt(tokenizer, prompt, chat=settings.chat)
    # A first pass checks guesses already, and the last ones may go beyond the end.
    guesses = MOST_GUESSES if settings.lookup or settings.draft is not None else 0
    workload = bigmodel.Workload(
        prompt_tokens=inputs["input_ids"].shape[1] + guesses, new_tokens=settings.max_new_tokens + guesses
    )
    with _loaded(settings, workload, tokenizer) as run:
        stream = TextStream(tokenizer, write)
        if settings.seed is not None:
            torch.manual_seed(settings.seed)
        start_s = time.perf_counter()
        with bottom_line(run.bottom, enabled=not settings.is_quiet):
            run.generate(inputs, streamer=stream)
        end_s = time.perf_counter()
    write("\n")
    if stream.first_token_s is None or stream.last_token_s is None:
        settings.tell("no token was generated")
        return
    parts = [f"TTFT {stream.first_token_s - start_s:.2f} s"]
    decode_s = stream.last_token_s - stream.first_token_s
    if decode_s > 0:
        later = stream.num_tokens - stream.num_first
        parts.append(f"{later / decode_s:.2f} tokens/s over {stream.num_tokens} tokens")
    run.tell(settings, parts, stream.num_tokens, end_s - start_s)


def answer_all(settings: Settings, prompts: Sequence[Mapping[str, Any]], output: str | None) -> None:
    """Write an answer to every prompt that has none yet, in order, as many at once as the plan finds fastest.

    Processes that a launcher started divide them; the main one writes.

    Args:
        settings: without `lookup` and `draft`, which guess for one text at a time.
        prompts: of `read_prompts`.
        output: a file that is continued; stdout if None.
    """
    tokenizer = _tokenizer_of(settings)
    encoded = [encode_prompt(tokenizer, each["prompt"], chat=settings.chat)["input_ids"][0] for each in prompts]
    turns = Turns(output, prompts)
    if not turns.is_main:  # it would say the same once more
        settings = replace(settings, tell=_say_nothing, is_quiet=True)
    try:
        waiting = range(turns.num_done, len(prompts))
        if turns.num_done:
            settings.tell(f"{turns.num_done} of {len(prompts)} prompts were answered before")
        if not waiting:
            return
        longest = max(len(encoded[number]) for number in waiting)
        workload = _fastest_workload(settings, longest, math.ceil(len(waiting) / turns.size))
        own_tokens, start_s = 0, time.perf_counter()
        with (
            _loaded(settings, workload, tokenizer) as run,
            progress_bar(settings.progress, beside=run.headline) as report,
        ):
            report(GENERATING, 0, len(waiting))
            while batch := turns.take(workload.num_sequences):
                if settings.seed is not None:
                    torch.manual_seed(settings.seed + batch.start)
                inputs = padded([encoded[number] for number in batch], _padding_of(tokenizer, run.model))
                texts, counts = run.texts(inputs)
                turns.put(
                    batch.start,
                    [
                        {**prompts[number], "text": text, "num_tokens": count}
                        for number, text, count in zip(batch, texts, counts, strict=True)
                    ],
                )
                own_tokens += sum(counts)
                report(GENERATING, turns.num_written - turns.num_done, len(waiting))
            own_end_s = time.perf_counter()
            turns.finish(lambda number: report(GENERATING, number, len(waiting)))
            end_s = time.perf_counter()
        shared = f" in each of {turns.size} processes" if turns.size > 1 else ""
        parts = [f"{len(waiting)} prompts, {workload.num_sequences} at once{shared}"]
        parts.append(f"{turns.num_tokens / (end_s - start_s):.2f} tokens/s over {turns.num_tokens} tokens")
        run.tell(settings, parts, max(1, own_tokens), own_end_s - start_s)
    finally:
        turns.close()


@dataclass(eq=False)
class _Run:
    """A model that was loaded for a run."""

    model: Any
    plan: Plan
    tokenizer: Any
    options: Mapping[str, Any]
    draft: Plan | None
    before: StreamStats
    baseline_bytes: int
    peak_bytes: int = 0
    stats: StreamStats | None = field(default=None)

    def generate(self, inputs: Mapping[str, torch.Tensor], **options: Any) -> torch.Tensor:
        """Token ids, int64 [sequences, tokens]: what `generate` gives."""
        there = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        tokens: torch.Tensor = self.model.generate(**there, **self.options, **options)
        return tokens

    def texts(self, inputs: Mapping[str, torch.Tensor]) -> tuple[list[str], list[int]]:
        """What is generated for each sequence, and how many tokens that is."""
        is_encoder_decoder = getattr(self.model.config, "is_encoder_decoder", False)
        tokens = self.generate(inputs).cpu()[:, 1 if is_encoder_decoder else inputs["input_ids"].shape[1] :]
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        own = [_until(row.tolist(), ends) for row in tokens]
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in own], [len(row) for row in own]

    def headline(self) -> str:
        """What binds up to now, its rate and the fraction of the limit; "" where that is not known yet."""
        limit = (bigmodel.stats_of(self.model) - self.before).limit
        return "" if limit is None else limit.headline

    def bottom(self) -> str:
        """The same, and below 0.7 of the limit why."""
        limit = (bigmodel.stats_of(self.model) - self.before).limit
        return "" if limit is None else ": ".join([limit.headline, *limit.causes[:1]])

    def tell(self, settings: Settings, parts: Sequence[str], num_tokens: int, seconds: float) -> None:
        """Tell in one line what a run took, moved and held; and what kept it from its limit, a line for each cause."""
        assert self.stats is not None
        settings.tell(", ".join([*parts, *self._figures(num_tokens, seconds)]))
        limit = self.stats.limit
        for cause in () if limit is None else limit.causes:
            settings.tell(f"below the limit: {cause}")

    def _figures(self, num_tokens: int, seconds: float) -> list[str]:
        stats, plan = self.stats, self.plan
        assert stats is not None
        parts = []
        if 0 < stats.num_passes < num_tokens and self.options.keys() & {"assistant_model", "prompt_lookup_num_tokens"}:
            parts.append(f"{num_tokens / stats.num_passes:.2f} tokens per pass")
        if stats.copied_bytes:
            parts.append(f"{format_bytes(stats.copied_bytes / num_tokens)} copied per token")
        parts.append(f"{format_bytes(stats.read_bytes / num_tokens)} read per token")
        if plan.run_devices <= {"cpu"}:  # an accelerator waits by itself, and the host does not see it
            parts.append(f"{stats.stall_s / seconds:.0%} of the time waiting for weights")
        if stats.limit is not None:
            parts.append(stats.limit.headline)
        limit_bytes = (self.draft or plan).limits.get("cpu")  # a draft is loaded first
        budget = f" of {format_bytes(limit_bytes)} allowed" if limit_bytes is not None else ""
        parts.append(f"peak memory {format_bytes(self.peak_bytes + stats.mapped_bytes)}{budget}")
        for device in sorted(plan.run_devices - {"cpu"}):
            held = format_bytes(torch.accelerator.max_memory_reserved(torch.device(device)))
            parts.append(f"{device} {held} of {format_bytes(plan.limits[device])} allowed, context not counted")
        return parts


def _tokenizer_of(settings: Settings) -> Any:
    places = {name: settings.load[name] for name in ("revision", "subfolder", "variant")}
    folder = locate(settings.path, **places).folder
    trusts = settings.load["trust_remote_code"]
    return load_tokenizer(folder, subfolder=settings.load["subfolder"], trust_remote_code=trusts)


@contextmanager
def _loaded(settings: Settings, workload: bigmodel.Workload, tokenizer: Any) -> Iterator[_Run]:
    """The model for a workload; when the block is over, what it moved and held is known."""
    before_bytes = footprint_bytes()
    limits, draft = _limits_beside_adapter(settings), None
    with PeakFootprint() as memory:
        if settings.draft is not None:
            options = {name: settings.load[name] for name in ("dtype", "trust_remote_code")}
            own = load_tokenizer(locate(settings.draft).folder, trust_remote_code=options["trust_remote_code"])
            draft = Draft.load(settings.draft, tokenizer, own, limits, workload, progress=settings.progress, **options)
            limits = draft.limits_beside()
        model = bigmodel.load_sharded(
            settings.path, max_memory=limits, workload=workload, progress=settings.progress, **settings.load
        )
        if not hasattr(model, "generate") or not model.can_generate():
            raise InvalidArgumentError(
                f"{settings.path} is a {type(model).__name__}, which does not generate text. "
                "Load it with bigmodel.load_sharded and call it."
            )
        plan = bigmodel.plan_of(model)
        if settings.adapter is not None:
            streams = any(each.home != each.run_on for each in plan.placements)
            model, is_merged = load_adapter(model, settings.adapter, streams=streams)
            settings.tell(f"adapter {settings.adapter} {'added to' if is_merged else 'beside'} the weights")
        watch(model)
        settings.tell(plan.explain())
        options = _generation_options(model, settings)
        if settings.lookup:
            options |= lookup_options(plan)
        if draft is not None:
            options |= draft.options(plan, tokenizer)
        baseline_bytes = max(before_bytes, plan.estimate.baseline_bytes)
        draft_plan = None if draft is None else draft.plan
        run = _Run(model, plan, tokenizer, options, draft_plan, bigmodel.stats_of(model), baseline_bytes)
        yield run
        run.stats = bigmodel.stats_of(model) - run.before
        logger.info("generated, %s", run.stats)
    run.peak_bytes = max(0, memory.peak_bytes - run.baseline_bytes)


def _limits_beside_adapter(settings: Settings) -> Mapping[int | str, int] | None:
    """What stated limits leave for the model: its adapter lies in the memory of whatever computes it."""
    if settings.adapter is None:
        return settings.limits
    nbytes = adapter_nbytes(settings.adapter)
    if settings.limits is None:
        return None
    return {tier: limit if tier == "disk" else max(0, limit - nbytes) for tier, limit in settings.limits.items()}


def _generation_options(model: Any, settings: Settings) -> dict[str, Any]:
    """What generate is asked for. The model's own sampling defaults count when it samples, and only then."""
    # A stream cannot take back what a beam drops.
    options: dict[str, Any] = {"do_sample": settings.sampling is not None, "num_beams": 1}
    options["max_new_tokens"] = settings.max_new_tokens
    options |= {name: value for name, value in (settings.sampling or {}).items() if value is not None}
    if model.generation_config.pad_token_id is None:
        end = model.generation_config.eos_token_id
        options["pad_token_id"] = end[0] if isinstance(end, list) else end  # what generate does too, without saying so
    return options


def _fastest_workload(settings: Settings, prompt_tokens: int, num_prompts: int) -> bigmodel.Workload:
    """As many sequences at once as give the most tokens per second, and no more than there are."""
    workload = bigmodel.Workload(batch_size="auto", prompt_tokens=prompt_tokens, new_tokens=settings.max_new_tokens)
    device_map = settings.load["device_map"]
    if isinstance(device_map, bigmodel.Plan):
        return replace(workload, batch_size=min(device_map.workload.num_sequences, num_prompts))
    plan, _ = make_plan_and_timeline(
        settings.path, None, workload, settings.limits, most_sequences=num_prompts, **settings.load
    )
    return plan.workload


def _say_nothing(text: str) -> None:
    pass


def _padding_of(tokenizer: Any, model: Any) -> int:
    """The token before shorter prompts; attention does not see it."""
    ends = model.generation_config.eos_token_id
    candidates = (tokenizer.pad_token_id, ends[0] if isinstance(ends, list) else ends, 0)
    return next(int(token) for token in candidates if token is not None)


def _until(tokens: list[int], ends: set[int | None]) -> list[int]:
    """A sequence's own tokens: up to its end, which counts."""
    end = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:end]
