"""A pass that is recorded and its backward, tried on tensors that hold nothing: what training takes beside the weights."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bigmodel.device_map.counter import Counter, NotTriedError, holes_factor, tensors_in
from bigmodel.device_map.rates import NOTHING, Work
from bigmodel.device_map.tally import LARGE_BYTES, Tally
from bigmodel.device_map.trial import Call, collector_off, fake_mode, no_traces, told_of
from bigmodel.device_map.twin import SMALL_BUFFER_BYTES, twin_of

__all__ = ["Moment", "OptimizerStep", "Rehearsal", "rehearse", "rehearse_optimizer"]

# Of adapters that are not there yet; their rank hardly counts beside tokens.
_RANK, _DROPOUT = 16, 0.1


@dataclass(frozen=True, slots=True)
class Moment:
    """Of a backward: when a parameter's gradient is made.

    Attributes:
        name: of the parameter.
        highest_bytes: the most that was alive since the moment before (the first: since the pass began), beside weights and
            gradients that were made before.
        mapped_bytes: of large storages alone, the same.
        heap_bytes: of all others, the same.
        held_bytes: alive then, beside weights and all gradients.
        held_mapped_bytes: of large storages alone, the same.
    """

    name: str
    highest_bytes: int
    mapped_bytes: int
    heap_bytes: int
    held_bytes: int
    held_mapped_bytes: int


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a pass that is recorded and its backward take.

    Attributes:
        host_bytes: the most that they hold on a host beside the weights, with gradients, and with what its allocator and kernels
            add.
        moments: in the order of backward.
        work: of both.
    """

    host_bytes: int
    moments: tuple[Moment, ...]
    work: Work


def rehearse(
    model: nn.Module,
    make_call: Callable[[], Call],
    units: Collection[str],
    *,
    adapts: bool = False,
    dtype: torch.dtype | None = None,
    mapped_bytes: int = LARGE_BYTES,
) -> Rehearsal:
    """Try a pass with labels and its backward.

    Args:
        model: its parameters that require grad are what is trained. It is not changed.
        make_call: gives arguments and keyword arguments of forward, labels among them, made in the modes that are set then.
        units: names of modules that run under checkpointing.
        adapts: whether it has no adapters yet, and is tried with one on every matrix that its input is multiplied with.
        dtype: that its floating point parameters compute in, or what is frozen in a narrower one of its own; each its own if
            None.
        mapped_bytes: of the smallest storage that the host's allocator maps by itself.

    Raises:
        NotTriedError: the model, or fake tensors, cannot follow.
    """
    twin = twin_of(model)
    tally = Tally(1)
    counter = Counter(holes_factor(twin), tally, mapped_bytes)
    if adapts:
        twin.requires_grad_(False)
        for module in twin.modules():
            matrices = [each for each in module.parameters(recurse=False) if each.ndim == 2]
            if len(matrices) == 1:
                module.register_forward_hook(_Adapter(counter))
    gradients = [(each, each.grad) for each in model.parameters()]
    checkpointed = [twin.get_submodule(name) for name in units]
    for unit in checkpointed:
        unit.forward = functools.partial(_checkpointed, unit.forward)
    try:
        with no_traces(twin), fake_mode(), torch.enable_grad(), torch.inference_mode(False):
            weights = {name: _weight(each, dtype) for name, each in twin.named_parameters()}
            large = {name: each for name, each in twin.named_buffers() if each.nbytes > SMALL_BUFFER_BYTES}
            counter.leave_out(weights.values())
            moments = _Moments(counter, weights, mapped_bytes)
            weights |= {name: torch.empty(each.shape, dtype=each.dtype, device="cpu") for name, each in large.items()}
            counter.leave_out(weights.values())
            args, kwargs = make_call()
            if checkpointed and "use_cache" in inspect.signature(twin.forward).parameters:
                kwargs = {**kwargs, "use_cache": False}  # a second forward would fill it again
            counter.leave_out(tensors_in((args, kwargs)))
            with collector_off(), counter:
                torch.func.functional_call(
                    _Step(twin), {f"model.{name}": each for name, each in weights.items()}, (args, kwargs)
                )
                found = Rehearsal(counter.taken_bytes({}), tuple(moments.found), _sum_of(tally.take().values()))
            moments.forget()
            if any(each.grad is not before for each, before in gradients):
                raise NotTriedError("its forward reaches the model itself, past what a copy of it can be given")
            return found
    except NotTriedError:
        raise
    except Exception as error:
        raise NotTriedError(told_of(error)) from error
    finally:
        for each, before in gradients:
            if each.grad is not before:
                each.grad = before
        for unit in checkpointed:  # which would hold itself, and the model's tensors with it
            vars(unit).pop("forward", None)


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """What a step of an optimizer takes.

    Attributes:
        state_bytes: that it keeps.
        most_bytes: that it holds beside them, parameters and gradients while it steps.
        work: of a step that is not the first.
    """

    state_bytes: int
    most_bytes: int
    work: Work


def rehearse_optimizer(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], shapes: Sequence[torch.Size | tuple[int, ...]]
) -> OptimizerStep:
    """Try an optimizer's step on float32 parameters.

    Args:
        make: of parameters, their optimizer.
        shapes: of the parameters.

    Raises:
        NotTriedError: it cannot be made of fake tensors, or cannot step with them.
    """
    tally = Tally(1)
    counter = Counter(0.0, tally)
    try:
        with fake_mode(), torch.inference_mode(False):
            parameters = [nn.Parameter(torch.empty(shape, device="cpu")) for shape in shapes]
            for each in parameters:
                each.grad = torch.empty_like(each)
            given = [*parameters, *(each.grad for each in parameters)]
            counter.leave_out(each for each in given if each is not None)
            with collector_off(), counter:
                optimizer = make(parameters)
                optimizer.step()
                kept = counter.live_bytes
                tally.take()
                counter.mark()
                optimizer.step()
                most = counter.mark()[0] - kept
            return OptimizerStep(kept, most, _sum_of(tally.take().values()))
    except Exception as error:
        raise NotTriedError(told_of(error)) from error


class _Moments:
    """Told by autograd when a gradient is there."""

    def __init__(self, counter: Counter, weights: dict[str, torch.Tensor], mapped_bytes: int) -> None:
        self.found: list[Moment] = []
        self._counter, self._least, self._done = counter, mapped_bytes, [0, 0]  # mapped, in the heap
        self._handles = [
            each.register_post_accumulate_grad_hook(functools.partial(self._made, name))  # type: ignore[no-untyped-call]
            for name, each in weights.items()
            if each.requires_grad
        ]

    def _made(self, name: str, weight: torch.Tensor) -> None:
        highest, mapped, heap = self._counter.mark()
        before = sum(self._done)
        mapped, heap = mapped - self._done[0], heap - self._done[1]
        assert weight.grad is not None
        self._done[weight.grad.nbytes < self._least] += weight.grad.nbytes
        held = self._counter.live_bytes - sum(self._done)
        held_mapped = self._counter.mapped_bytes - self._done[0]
        self.found.append(Moment(name, highest - before, mapped, heap, held, held_mapped))

    def forget(self) -> None:
        for handle in self._handles:
            handle.remove()


def _sum_of(works: Collection[Work]) -> Work:
    total = NOTHING
    for each in works:
        total = total.plus(each)
    return total


def _weight(parameter: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    computes_in = parameter.dtype
    if dtype is not None and parameter.is_floating_point():
        is_cast = parameter.requires_grad or dtype.itemsize < parameter.itemsize  # what is frozen is not made wider
        computes_in = dtype if is_cast else computes_in
    return torch.empty(parameter.shape, dtype=computes_in, device="cpu", requires_grad=parameter.requires_grad)


class _Step(nn.Module):
    """A pass and its backward as one forward: the weights that it is called with are there for both."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        output: Any = self.model(*args, **kwargs)
        loss: Any = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if loss is None:  # any will do: what is held is what its gradient needs
            loss = torch.stack([each.float().sum() for each in tensors_in(output) if each.requires_grad]).sum()
        del output
        loss.backward()


class _Adapter:
    """What a LoRA layer adds to a product: the input in float32, dropped out, through a narrow matrix and a wide one."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._matrices: list[torch.Tensor] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        given = args[0] if args else None
        if not (isinstance(given, torch.Tensor) and isinstance(output, torch.Tensor) and given.is_floating_point()):
            return None
        if not self._matrices:
            sizes = (given.shape[-1], _RANK), (_RANK, output.shape[-1])
            self._matrices = [torch.empty(size, device="cpu", requires_grad=True) for size in sizes]
            self._counter.leave_out(self._matrices)
        narrow, wide = self._matrices
        dropped = nn.functional.dropout(given.to(torch.float32), _DROPOUT)
        return (output + (dropped @ narrow) @ wide).to(output.dtype)


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
