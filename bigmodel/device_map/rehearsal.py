"""A pass that is recorded and its backward, tried on tensors that hold nothing: what training takes beside the weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bigmodel.device_map.counter import Counter, NotTriedError, holes_factor, tensors_in
from bigmodel.device_map.tally import Tally
from bigmodel.device_map.trial import Call, collector_off, fake_mode, no_traces, told_of
from bigmodel.device_map.twin import SMALL_BUFFER_BYTES, twin_of

__all__ = ["rehearsed_bytes"]

# Of adapters that are not there yet; their rank hardly counts beside tokens.
_RANK, _DROPOUT = 16, 0.1


def rehearsed_bytes(
    model: nn.Module, make_call: Callable[[], Call], units: Collection[str], *, adapts: bool = False
) -> int:
    """The most bytes that a pass with labels and its backward hold beside the model's weights: gradients of what is trained too.

    Args:
        model: adapters inside it are what is trained. It is not changed.
        make_call: gives arguments and keyword arguments of forward, labels among them, made in the modes that are set then.
        units: names of modules that run under checkpointing.
        adapts: whether it has no adapters yet, and is tried with one on every matrix that its input is multiplied with.

    Raises:
        NotTriedError: the model, or fake tensors, cannot follow.
    """
    twin = twin_of(model)
    counter = Counter(holes_factor(twin), Tally(1))
    if adapts:
        twin.requires_grad_(False)
        for module in twin.modules():
            matrices = [each for each in module.parameters(recurse=False) if each.ndim == 2]
            if len(matrices) == 1:
                module.register_forward_hook(_Adapter(counter))
    checkpointed = [twin.get_submodule(name) for name in units]
    for unit in checkpointed:
        unit.forward = functools.partial(_checkpointed, unit.forward)
    try:
        with no_traces(twin), fake_mode(), torch.enable_grad(), torch.inference_mode(False):
            weights = {
                name: torch.empty(each.shape, dtype=each.dtype, device="cpu", requires_grad=each.requires_grad)
                for name, each in twin.named_parameters()
            }
            large = {name: each for name, each in twin.named_buffers() if each.nbytes > SMALL_BUFFER_BYTES}
            weights |= {name: torch.empty(each.shape, dtype=each.dtype, device="cpu") for name, each in large.items()}
            counter.leave_out(weights.values())
            args, kwargs = make_call()
            counter.leave_out(tensors_in((args, kwargs)))
            with collector_off(), counter:
                torch.func.functional_call(
                    _Step(twin), {f"model.{name}": each for name, each in weights.items()}, (args, kwargs)
                )
                return counter.taken_bytes({})
    except NotTriedError:
        raise
    except Exception as error:
        raise NotTriedError(told_of(error)) from error
    finally:
        for unit in checkpointed:  # which would hold itself, and the model's tensors with it
            vars(unit).pop("forward", None)


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
