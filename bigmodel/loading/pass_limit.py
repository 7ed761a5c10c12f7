"""Passes beyond the planned workload: they run while they fit, and are refused before they allocate."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bigmodel.device_map.cost import ModelCosts
from bigmodel.device_map.counter import NotTriedError, tensors_in
from bigmodel.device_map.demand import Costs
from bigmodel.device_map.plan import Plan
from bigmodel.device_map.trial import Trial, like
from bigmodel.errors import DoesNotFitError
from bigmodel.hooks.backward import records
from bigmodel.hooks.hops import Phase
from bigmodel.hooks.pace import PassKind
from bigmodel.loading.recorded import Recorded
from bigmodel.offload.spill import trim_heap
from bigmodel.units import format_bytes

__all__ = ["PassLimit", "Share", "kind_of", "shares_of"]

logger = logging.getLogger("bigmodel.loading")

_TOKEN_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
# As large as the tokens are many, and counted with them.
_BESIDE_TOKENS = ("mask", "position_ids", "token_type_ids", "labels", "cache_position")
# They hold what was counted when it was made.
_CACHES = ("past_key_values", "cache_params")
# Beside tokens, inputs of this size in all decide nothing.
_SMALL_BYTES = 64 << 10
_REMEMBERED = 256


@dataclass(frozen=True, slots=True)
class Share:
    """One device's part in passes.

    Attributes:
        of_kv: of the KV cache, which a pass leaves or brings there.
        phases: in which it runs units.
    """

    of_kv: float
    phases: frozenset[Phase]


@dataclass(frozen=True, slots=True)
class PassLimit:
    """Refuses a pass beyond the planned workload that would not fit; called before anything is allocated.

    What tokens take follows from what was measured. A pass with other inputs (images, sound, states), or of a part of the
    model, is tried on tensors that hold nothing when its shapes are first seen.

    Attributes:
        costs: what a pass of any number of tokens takes.
        plan: what there is.
        trial: of the model.
        planned: name -> shape of the inputs that the workload's passes were tried with.
        shares: of the devices that run units.
        recorded: what passes take with their backward.
    """

    costs: ModelCosts
    plan: Plan
    trial: Trial
    planned: Mapping[str, tuple[int, ...]]
    shares: Mapping[str, Share]
    recorded: Recorded
    _seen: dict[object, int] = field(default_factory=dict)
    _recorded: list[tuple[int, int, int]] = field(default_factory=list)  # what was found to fit

    def __call__(self, entry: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> PassKind:
        """Look at a call, and say what kind of pass it is.

        Args:
            entry: the module's name in the model; "" for the root.
            module: what is called.
            args, kwargs: with what.

        Raises:
            DoesNotFitError: it would not fit; with both numbers and the workload to state.
        """
        given = _named(module, args, kwargs)
        shape = _token_shape(given)
        phase = self._phase_of(given, shape)
        if shape is not None and records(module, args, kwargs):
            self._check_recorded(shape, phase)
        self._check(entry, args, kwargs, given, shape, phase)
        return _kind(shape, phase)

    def _check(
        self,
        entry: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        given: Mapping[str, Any],
        shape: _Shape | None,
        phase: Phase,
    ) -> None:
        """Refuse a call that would not fit."""
        others = self._unplanned(given, shape)
        workload = self.plan.workload
        if shape is None and not others and any(self._is_tried(name, value) for name, value in given.items()):
            return  # what the plan was made for
        if shape is None or others:
            needed = self._try(entry, args, kwargs, given)
            said = ", ".join(f"{name} {_told(given[name])}" for name in given if name not in _CACHES)
            self._refuse_beyond(
                phase, 0, needed, f"A pass with {said} needs {format_bytes(needed)}", "Make its inputs smaller"
            )
            return
        batch_size, num_tokens, past_tokens, total = shape
        if not past_tokens:
            trim_heap()  # a new sequence: what the last one's cache left in the heap is given back before this one's comes
        if (
            batch_size <= workload.num_sequences
            and total <= workload.total_tokens
            and num_tokens <= workload.prompt_tokens
        ):
            return
        kv_bytes = self.costs.kv_bytes(batch_size, total)
        activation_bytes = self.costs.activation_bytes(batch_size, num_tokens, past_tokens)
        self._refuse_beyond(
            phase,
            kv_bytes,
            activation_bytes,
            f"A pass of {batch_size} x {num_tokens} tokens after {past_tokens} needs {format_bytes(kv_bytes)} of KV cache "
            f"and {format_bytes(activation_bytes)} of activations",
            f"Load with workload=Workload(batch_size={batch_size}, prompt_tokens={max(1, total)})",
        )

    def _check_recorded(self, shape: _Shape, phase: Phase) -> None:
        """Refuse a pass whose backward would not fit."""
        batch_size, num_tokens, _, _ = shape
        workload = self.plan.workload
        num_trained = self.recorded.num_trained
        fitting = [each[1:] for each in self._recorded if each[0] == num_trained]
        fitting += [(workload.num_sequences, workload.prompt_tokens)] if workload.trains else []
        if any(batch_size <= sequences and num_tokens <= tokens for sequences, tokens in fitting):
            return
        needed, _ = self.recorded.tried(batch_size, num_tokens)
        self._refuse_beyond(
            phase,
            0,
            needed,
            f"A pass of {batch_size} x {num_tokens} tokens that is recorded needs {format_bytes(needed)} with its backward",
            f"Load with workload=Workload(batch_size={batch_size}, prompt_tokens={num_tokens}, trains=True)",
        )
        self._recorded.append((num_trained, batch_size, num_tokens))

    def _phase_of(self, given: Mapping[str, Any], shape: _Shape | None) -> Phase:
        """A pass of as many tokens as the plan says is a prefill; so is one of other inputs."""
        if not self.plan.prefill_from_tokens:
            return Phase.STEP
        if shape is None:
            return Phase.PREFILL
        batch_size, num_tokens, past_tokens, _ = shape
        if not past_tokens:  # states of an encoder go into the cache in the decoder's first pass
            encoded = [each.shape[1] for each in tensors_in(given.get("encoder_outputs")) if each.ndim == 3]
            num_tokens = max([num_tokens, *encoded])
        return Phase.PREFILL if batch_size * num_tokens >= self.plan.prefill_from_tokens else Phase.STEP

    def _unplanned(self, given: Mapping[str, Any], shape: _Shape | None) -> list[str]:
        """Names of inputs that are no tokens, go with none, and are larger than what was tried."""
        found = []
        small = 0
        for name, value in given.items():
            if name in _CACHES or name in _TOKEN_INPUTS or name.endswith(_BESIDE_TOKENS):
                continue
            if self._is_tried(name, value):
                continue
            tensors = tensors_in(value)
            if name == "encoder_outputs" and shape is not None and all(map(self._is_encoded, tensors)):
                continue
            if name.startswith("output_") and value:
                found.append(name)  # every layer's states are kept
            elif tensors:
                found.append(name)
                small += sum(tensor.nbytes for tensor in tensors)
        return found if shape is None or small > _SMALL_BYTES or any(map(_asks_for_more, found)) else []

    def _is_tried(self, name: str, value: Any) -> bool:
        known = self.planned.get(name)
        if known is None or not isinstance(value, torch.Tensor):
            return False
        return len(known) == value.ndim and all(map(int.__le__, value.shape, known))

    def _is_encoded(self, tensor: torch.Tensor) -> bool:
        """Whether it is what an encoder gives for the planned tokens."""
        workload = self.plan.workload
        return (
            tensor.ndim == 3 and tensor.shape[0] <= workload.num_sequences and tensor.shape[1] <= workload.prompt_tokens
        )

    def _try(self, entry: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], given: Mapping[str, Any]) -> int:
        """What a call takes, in bytes; 0 where it cannot be tried."""
        key = (entry, *((name, _signature(value)) for name, value in given.items()))
        if key not in self._seen:
            try:
                tried = self.trial(lambda: like(args, kwargs), entry=entry)
                needed = tried.peak_bytes + tried.kv_bytes
            except NotTriedError as error:
                logger.debug("a pass could not be tried, and runs unchecked: %s", error)
                needed = 0
            if len(self._seen) >= _REMEMBERED:
                self._seen.clear()
            self._seen[key] = needed
        return self._seen[key]

    def _refuse_beyond(self, phase: Phase, kv_bytes: int, other_bytes: int, what: str, advice: str) -> None:
        """Refuse what some device that runs units has not left, beside what always rests there."""
        for device, share in self.shares.items():
            needed = math.ceil(share.of_kv * kv_bytes) + (other_bytes if phase in share.phases else 0)
            available = self._available_bytes(device)
            if needed > available:
                where = "" if device == "cpu" and len(self.shares) == 1 else f" of {device}"
                raise DoesNotFitError(
                    f"{what}, and {format_bytes(max(0, available))}{where} is left beside the weights. {advice}, or give a "
                    f"larger max_memory[{device!r}].",
                    tier=device,
                    needed_bytes=needed,
                    available_bytes=max(0, available),
                )

    def _available_bytes(self, device: str) -> int:
        """For cache and activations of a pass."""
        plan = self.plan
        if device == "cpu":
            planned = plan.kv_bytes + plan.activation_bytes if len(self.shares) == 1 else 0
            if planned:
                return plan.limits["cpu"] - plan.estimate.peak_bytes["cpu"] + planned
        return plan.limits.get(device, 0) - plan.estimate.phase_peak_bytes["load"].get(device, 0)


def shares_of(plan: Plan, costs: Costs) -> dict[str, Share]:
    """By device; what of the cache no unit makes is made where a pass begins."""
    held: dict[str, int] = {}
    visiting: dict[str, int] = {}
    phases: dict[str, set[Phase]] = {}
    for place, cost in zip(plan.placements, costs.units, strict=True):
        if cost.can_gather and place.run_on == "cpu":
            continue  # rows are looked up for nothing
        held[place.run_on] = held.get(place.run_on, 0) + cost.kv_bytes
        phases.setdefault(place.run_on, set()).add(Phase.STEP)
        phases.setdefault(place.prefill_on, set()).add(Phase.PREFILL)
        if place.prefill_on != place.run_on:  # one unit's part at a time, and what it grows to
            visiting[place.prefill_on] = max(visiting.get(place.prefill_on, 0), 2 * cost.kv_bytes)
    phases = phases or {"cpu": set(Phase)}
    first = next((device for device in phases if device != "cpu"), "cpu")
    held[first] = held.get(first, 0) + max(0, costs.demand.kv_bytes - sum(held.values()))
    total = sum(held.values())
    return {
        device: Share(
            (held.get(device, 0) + visiting.get(device, 0)) / total if total else 1.0 / len(phases), frozenset(own)
        )
        for device, own in phases.items()
    }


_Shape = tuple[int, int, int, int]


def kind_of(entry: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> PassKind:
    """What kind of pass a call is of a model that runs where it rests, and that nobody limits; the arguments of `PassLimit`."""
    return _kind(_token_shape(_named(module, args, kwargs)), Phase.STEP)


def _kind(shape: _Shape | None, phase: Phase) -> PassKind:
    if shape is None:
        return PassKind(phase)
    batch_size, num_tokens, past_tokens, _ = shape
    return PassKind(phase, is_step=past_tokens > 0 or num_tokens == 1, num_tokens=batch_size * num_tokens)


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a module is called with, by the names of its forward's parameters."""
    names: list[str] = []
    if args:
        names = [
            parameter.name
            for parameter in inspect.signature(module.forward).parameters.values()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
    given = {names[number] if number < len(names) else f"argument {number}": value for number, value in enumerate(args)}
    return given | {name: value for name, value in kwargs.items() if value is not None}


def _token_shape(given: Mapping[str, Any]) -> _Shape | None:
    """(sequences, tokens of this pass, tokens before it, tokens that the cache is made for); None where there are none."""
    tokens = [given[name] for name in _TOKEN_INPUTS if isinstance(given.get(name), torch.Tensor)]
    shapes = [tuple(tensor.shape[:2]) for tensor in tokens if tensor.ndim >= 2]
    if not shapes:
        return None
    batch_size, num_tokens = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
    cache: Any = given.get("past_key_values")
    past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
    return batch_size, num_tokens, past, max(past + num_tokens, _capacity(cache))


def _capacity(cache: Any) -> int:
    """Tokens that a static cache takes memory for at its first pass; 0 for one that grows."""
    cache = getattr(cache, "self_attention_cache", cache)
    if not getattr(cache, "is_compileable", False):
        return 0
    return max((int(getattr(layer, "max_cache_len", 0)) for layer in getattr(cache, "layers", ())), default=0)


def _asks_for_more(name: str) -> bool:
    return name.startswith("output_")


def _told(value: Any) -> str:
    """Shapes of tensors, or the value itself, as far as it is short."""
    return ", ".join(str(list(tensor.shape)) for tensor in tensors_in(value)[:4]) or repr(value)[:40]


def _signature(value: Any) -> object:
    """What the cost of a call depends on: shapes and dtypes of tensors, and plain values, however deep."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype)
    if isinstance(value, Mapping):
        return tuple((str(key), _signature(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_signature, value))
    if isinstance(value, (int, float, str, bool)):
        return value
    return (type(value).__qualname__, *((tuple(each.shape), each.dtype) for each in tensors_in(value)))
