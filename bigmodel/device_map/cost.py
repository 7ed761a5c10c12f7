"""What a pass needs in memory beside the weights: measured by running the model on tensors that hold nothing.

The module on meta is run under fake tensors with the workload's shapes, and every storage that comes and goes is counted.
What the model's own cache object reaches at the end is the KV cache (or a state of any other kind); the rest is activations.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bigmodel.device_map.counter import NotTriedError
from bigmodel.device_map.plan import Workload
from bigmodel.device_map.rates import NOTHING, Work
from bigmodel.device_map.tally import Experts
from bigmodel.device_map.trial import Call, PassWork, Then, Trial, Tried
from bigmodel.device_map.unit import Unit

__all__ = ["ModelCosts", "UnitWork", "measure", "work_of_units"]

MakeInputs = Callable[[int, int], dict[str, torch.Tensor] | None]

# A token's activations are followed along a line this many times beyond the prompt; further on they are tried.
_FAR = 4
# A line needs a second point: of so many tokens, where the workload's first pass has one.
_SECOND_TOKENS = 16
# Where no pass can be tried: tensors as wide as the widest weight that a layer holds at once.
_WIDE_TENSORS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCosts:
    """Memory of passes of any size, from a few that were tried.

    Attributes:
        workload: what was tried.
        prefill_bytes: activations of the first pass.
        tried_bytes: of passes of half as many tokens, and of as many, which give the logits of all of them.
        kept_bytes: the same, of passes that give the last token's logits alone.
        decode_bytes: of a pass of one token at the workload's last token.
        kv_fixed_bytes: per sequence, whatever its length (states, sliding windows).
        kv_bytes_per_token: per sequence and token.
        is_measured: whether passes were tried; otherwise these are estimates from the widest weights.
        reason: why no pass could be tried, or none after the first one.
        device_bytes: activations of the workload's largest pass on an accelerator.
        prefill, decode: work of the first pass, and of one in the middle of what is generated after it.
        repeats: each call is a whole pass, because nothing is kept between two: decode is prefill again.
        kv: name of a module -> (bytes per sequence, bytes per sequence and token) of the cache that its forward makes.
        experts: name of a module -> its experts and their routing width.
        recorded: of a workload that trains: work of a pass that is recorded and its backward.
    """

    workload: Workload
    prefill_bytes: int
    tried_bytes: tuple[int, int]
    kept_bytes: tuple[int, int]
    decode_bytes: int
    kv_fixed_bytes: int
    kv_bytes_per_token: int
    is_measured: bool = True
    reason: str = ""
    device_bytes: int = 0
    prefill: PassWork = field(default_factory=PassWork)
    decode: PassWork = field(default_factory=PassWork)
    repeats: bool = False
    kv: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    experts: Mapping[str, Experts] = field(default_factory=dict)
    recorded: Work | None = None

    @property
    def workload_activation_bytes(self) -> int:
        """The largest activations of the workload's passes."""
        return max(self.prefill_bytes, self.decode_bytes)

    def kv_bytes(self, batch_size: int, total_tokens: int) -> int:
        """Bytes of the cache of `batch_size` sequences of `total_tokens` each."""
        return batch_size * (self.kv_fixed_bytes + self.kv_bytes_per_token * total_tokens)

    def activation_bytes(self, batch_size: int, num_tokens: int, past_tokens: int) -> int:
        """Bytes of activations of a pass of `num_tokens` a sequence after `past_tokens`; an upper estimate.

        Between what was tried it follows a parabola in the tokens (attention may hold scores of every pair), and where the
        last token's logits alone are kept a line, because a head that is copied for that takes the same for any number; what a
        token needs grows with what it looks back on.
        """
        share = batch_size / self.workload.num_sequences
        tried = self.workload.prompt_tokens
        half = max(1, tried // 2)
        square = 0.0
        if tried > half:
            square = (self.tried_bytes[1] / tried - self.tried_bytes[0] / half) / (tried - half)
        square = max(0.0, square)
        linear = max(self.tried_bytes[1] / tried - square * tried, self.tried_bytes[0] / half - square * half, 0.0)
        fitted = linear * num_tokens + square * num_tokens * (num_tokens + past_tokens)
        if num_tokens > 1:  # of one token, all logits are the last one's
            fixed, per_token = _line(half, self.kept_bytes[0], tried, self.kept_bytes[1])
            fitted = max(fitted, fixed + per_token * num_tokens)
        if self.repeats:
            return math.ceil(share * fitted)
        looking_back = self.decode_bytes * max(1.0, (past_tokens + num_tokens) / self.workload.total_tokens)
        return math.ceil(share * max(fitted, looking_back))


def measure(trial: Trial, model: nn.Module, make_inputs: MakeInputs, workload: Workload) -> ModelCosts:
    """Try the workload's passes on tensors that hold nothing.

    Args:
        trial: of the model.
        model: parameters on meta or real; it is not changed.
        make_inputs: (sequences, tokens) -> keyword arguments of forward, made in the mode that is set; or None.
        workload: the passes to try.
    """
    ways = [make_inputs]
    if workload.num_sequences > 1 and _accepts(model, "attention_mask"):
        ways.insert(0, _with_mask(make_inputs))
    reason = ""
    # As generate asks, whatever the config says; a model that cannot do so is tried without.
    asked: list[dict[str, Any]] = [{"use_cache": True}] if _takes_use_cache(model) else []
    for options in [*asked, {}]:
        first_alone: ModelCosts | None = None
        for make in ways:
            try:
                costs = _tried(trial, model, make, workload, options)
            except NotTriedError as error:
                reason = str(error)
                continue
            if not costs.reason:
                return costs
            first_alone = first_alone or costs
        if first_alone is not None:
            return first_alone
    return _guessed(model, workload, reason)


def _accepts(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _generates(model: nn.Module) -> bool:
    can_generate = getattr(model, "can_generate", None)
    return bool(callable(can_generate) and can_generate())


def _takes_use_cache(model: nn.Module) -> bool:
    """Whether generate would ask it for a cache, by a parameter of forward or through what it hands on."""
    hands_on = any(each.kind is each.VAR_KEYWORD for each in inspect.signature(model.forward).parameters.values())
    is_asked = _accepts(model, "use_cache") or (hands_on and _accepts(model, "past_key_values"))
    return is_asked and _generates(model)


def _with_mask(make_inputs: MakeInputs) -> MakeInputs:
    """Inputs of sequences of unlike length: their mask is laid out for every pair of tokens, which one alone is spared."""

    def make(batch_size: int, num_tokens: int) -> dict[str, torch.Tensor] | None:
        inputs = make_inputs(batch_size, num_tokens)
        if inputs is not None and "input_ids" in inputs:
            inputs.setdefault("attention_mask", _mask(batch_size, num_tokens))
        return inputs

    return make


def _mask(batch_size: int, num_tokens: int) -> torch.Tensor:
    return torch.ones(batch_size, num_tokens, dtype=torch.int64, device="cpu")


def _tried(
    trial: Trial, model: nn.Module, make_inputs: MakeInputs, workload: Workload, options: dict[str, Any]
) -> ModelCosts:
    batch_size, prompt = workload.num_sequences, workload.prompt_tokens
    last = workload.total_tokens - 1

    def call(num_tokens: int, **more: Any) -> Callable[[], Call]:
        def make() -> Call:
            inputs = make_inputs(batch_size, num_tokens)
            if inputs is None:
                raise NotTriedError("nothing is known that the model's forward could be called with")
            return (), inputs | options | more

        return make

    def one_more(past_tokens: int) -> Then:
        def make(output: Any, cache: Mapping[str, Any]) -> Call:
            inputs: dict[str, Any] = dict(make_inputs(batch_size, 1) or {})
            encoded = getattr(output, "encoder_last_hidden_state", None)
            if encoded is not None:  # as generate goes on: the encoder has run
                inputs = {name: value for name, value in inputs.items() if name.startswith("decoder_")}
                inputs["encoder_outputs"] = (encoded,)
            elif "attention_mask" in inputs and "decoder_input_ids" not in inputs and "past_key_values" in cache:
                # of all tokens that keys and values are kept of; a state keeps none
                inputs["attention_mask"] = _mask(batch_size, past_tokens + 1)
            return (), inputs | options | dict(cache)

        return make

    def try_pass(num_tokens: int) -> Tried:
        return trial(call(num_tokens), then=one_more(num_tokens), num_tokens=batch_size * num_tokens)

    whole = try_pass(prompt)
    tried = {prompt: whole}
    if prompt > 1:
        tried[prompt // 2] = try_pass(prompt // 2)
    elif whole.is_cached:
        second = max(2, min(last, _SECOND_TOKENS))
        tried[second] = try_pass(second)
    prefill_bytes = whole.peak_bytes
    kept, kept_half_bytes = None, 0
    if _accepts(model, "logits_to_keep"):
        # As generate calls it: smaller logits, and at times a larger workspace.
        kept = trial(call(prompt, logits_to_keep=1))
        prefill_bytes = max(prefill_bytes, kept.peak_bytes)
        if prompt > 1:
            kept_half_bytes = trial(call(prompt // 2, logits_to_keep=1)).peak_bytes
    grows = len({each.kv_bytes for each in tried.values()}) > 1
    if grows and last > max(_FAR * prompt, *tried):
        tried[last] = try_pass(last)
    (early, first), (late, second_pass) = _line_ends(tried)
    then_reason = next((each.then_reason for each in tried.values() if each.then_reason), "")
    first_work = (kept or whole).first
    decode_bytes, decode = prefill_bytes, first_work  # without a cache, each call is a whole pass
    if then_reason:
        # Nothing is known of a pass of one token but that it takes less than one of many.
        decode = _work_by_weights(model, batch_size, first_work.called)
    elif whole.is_cached:
        decode_bytes = whole.then_bytes
        if last > prompt:
            at_zero, per_past = _line(early, first.then_bytes, late, second_pass.then_bytes)
            decode_bytes = max(decode_bytes, math.ceil(at_zero + per_past * last))
        decode = _later(first.then, early, second_pass.then, late, prompt + workload.new_tokens / 2)
    fixed, per_token = _line(early, first.kv_bytes / batch_size, late, second_pass.kv_bytes / batch_size)
    kv = {
        name: _line(early, first.kv.get(name, 0) / batch_size, late, nbytes / batch_size)
        for name, nbytes in second_pass.kv.items()
    }
    half = tried.get(prompt // 2, whole)
    return ModelCosts(
        workload=workload,
        prefill_bytes=prefill_bytes,
        tried_bytes=(half.peak_bytes, whole.peak_bytes),
        kept_bytes=(kept_half_bytes, kept.peak_bytes) if kept is not None else (0, 0),
        decode_bytes=decode_bytes,
        kv_fixed_bytes=math.ceil(fixed),
        kv_bytes_per_token=math.ceil(per_token),
        reason=then_reason,
        # generate keeps the last token's logits alone
        device_bytes=max(each.device_bytes for each in (whole, half, *([kept] if kept is not None else []))),
        prefill=first_work,
        decode=decode,
        repeats=not whole.is_cached,
        kv=kv,
        experts=whole.experts,
    )


def _line_ends(tried: Mapping[int, Tried]) -> list[tuple[int, Tried]]:
    """The two largest passes that were tried; twice the one, where there is one."""
    ends = sorted(tried.items(), key=lambda item: item[0])[-2:]
    return ends if len(ends) > 1 else ends * 2


@dataclass(frozen=True, slots=True)
class UnitWork:
    """What a unit does in a pass, and the part of the cache that it makes.

    Attributes:
        prefill, decode: its work in either; None where it does not run, such as an encoder in a decode step.
        kv_bytes: at the workload's last token, in all its sequences.
    """

    prefill: Work | None
    decode: Work | None
    kv_bytes: int


def work_of_units(costs: ModelCosts, units: Sequence[Unit], names: Sequence[str]) -> tuple[list[UnitWork], UnitWork]:
    """The work of every unit, and what is done outside of all of them.

    Args:
        costs: of the model.
        units: a division of it.
        names: of all its modules.
    """
    site_of = {site: number for number, unit in enumerate(units) for site in unit.sites}
    own: dict[str, int] = {}
    for name in names:  # a module belongs to the innermost unit that it is in
        above = name
        while above not in site_of and above:
            above = above.rpartition(".")[0]
        own[name] = site_of.get(above, -1)
    workload = costs.workload
    passes: list[list[Work | None]] = []
    for done in (costs.prefill, costs.decode):
        sums: list[Work] = [NOTHING] * (len(units) + 1)
        for name, work in done.work.items():
            sums[own.get(name, -1)] = sums[own.get(name, -1)].plus(work)
        runs = [any(site in done.called for site in unit.sites) or not done.called for unit in units]
        passes.append([work if is_run else None for work, is_run in zip(sums, [*runs, True], strict=True)])
    kv = [0.0] * (len(units) + 1)
    for name, (fixed, per_token) in costs.kv.items():
        kv[own.get(name, -1)] += workload.num_sequences * (fixed + per_token * workload.total_tokens)
    every = [
        UnitWork(first, later, math.ceil(size)) for first, later, size in zip(passes[0], passes[1], kv, strict=True)
    ]
    return every[:-1], every[-1]


def _later(early: PassWork, early_tokens: int, late: PassWork, late_tokens: int, tokens: float) -> PassWork:
    """A pass after so many tokens, on the line through two that were tried."""
    if early_tokens == late_tokens or tokens == late_tokens:
        return late
    times = (tokens - late_tokens) / (late_tokens - early_tokens)
    work = {
        name: (each.plus(each, times).plus(early.work[name], -times) if name in early.work else each)
        for name, each in late.work.items()
    }
    return PassWork(work, late.called)


def _line(first_tokens: int, first_bytes: float, tokens: int, num_bytes: float) -> tuple[float, float]:
    """(fixed, per token) of a line through two points; all per token where there is one point."""
    if tokens == first_tokens:
        return 0.0, num_bytes / tokens
    per_token = max(0.0, (num_bytes - first_bytes) / (tokens - first_tokens))
    return max(0.0, num_bytes - per_token * tokens), per_token


def _guessed(model: nn.Module, workload: Workload, reason: str) -> ModelCosts:
    """Upper estimates from the widest weights, where no pass can be tried."""
    widths = [max(p.shape[0], p.shape[-1]) * p.element_size() for p in model.parameters() if p.ndim >= 2]
    widest, typical = max(widths, default=0), sorted(widths)[len(widths) // 2] if widths else 0
    tokens = workload.num_sequences * workload.prompt_tokens
    activations = tokens * (2 * widest + _WIDE_TENSORS * typical)
    prefill = _work_by_weights(model, tokens)
    repeats = not _generates(model)  # what does not is called with all its inputs each time
    num_blocks = max((len(each) for each in model.modules() if isinstance(each, nn.ModuleList)), default=1)
    return ModelCosts(
        workload=workload,
        prefill_bytes=activations,
        tried_bytes=(activations // 2, activations),
        kept_bytes=(0, 0),
        decode_bytes=activations if repeats else activations // workload.prompt_tokens,
        kv_fixed_bytes=0,
        kv_bytes_per_token=2 * typical * num_blocks,
        is_measured=False,
        reason=reason,
        device_bytes=activations,
        prefill=prefill,
        decode=prefill if repeats else _work_by_weights(model, workload.num_sequences),
        repeats=repeats,
    )


def _work_by_weights(model: nn.Module, num_tokens: int, called: frozenset[str] = frozenset()) -> PassWork:
    """An estimate of a pass: each token is multiplied by each weight once, and tables are looked up for nothing."""
    work: dict[str, Work] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        for weight in module._parameters.values():
            if weight is not None and weight.ndim >= 2:
                dtype = str(weight.dtype).removeprefix("torch.")
                product = Work.of_product(dtype, 2.0 * num_tokens * weight.numel(), float(weight.nbytes))
                work[name] = work.get(name, NOTHING).plus(product)
    return PassWork(work, called)
