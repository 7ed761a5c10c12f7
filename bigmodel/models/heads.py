"""Output heads that are given the last tokens of prompts: in bfloat16 on the CPU, sequence by sequence, without copying weights.

``hidden[:, -1:]`` of a prompt has strides that `F.linear` does not take for a matrix where the weight requires no gradient: it
becomes a batched product with the weight expanded to a batch, and oneDNN copies it for each sequence. A head of 32000 x 2048
took 0.56 s and 125 MiB a sequence, one of 151936 x 896 3.1 s and 260 MiB; sequence by sequence 0.015 and 0.06 s (two cores
with AVX512-BF16, torch 2.13). The bits are the same: that product goes sequence by sequence too, where one product of all
would round otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = ["quicken_heads"]

# Below it a copy takes less than a tenth of a second, and a model is left without a hook.
_LEAST_BYTES = 8 << 20


def quicken_heads(model: nn.Module) -> None:
    """Hooks the large linear layers that stand outside lists of blocks, as output heads do. Output and its bits stay.

    Args:
        model: parameters on meta or real; hooks of its trial twins are the same.
    """
    for module in _outside_lists(model):
        is_linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        weight = module._parameters.get("weight")
        if is_linear and weight is not None and weight.dtype == torch.bfloat16 and weight.nbytes >= _LEAST_BYTES:
            module.register_forward_pre_hook(give_by_sequence)


def give_by_sequence(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A forward pre-hook: the layer sees the same tensor, whose product with a weight goes sequence by sequence."""
    if torch.compiler.is_compiling() or len(args) != 1 or not isinstance(args[0], torch.Tensor):
        return None
    hidden_BLD, weight = args[0], module.weight
    if hidden_BLD.ndim != 3 or hidden_BLD.device.type != "cpu" or hidden_BLD.dtype != weight.dtype:
        return None
    batch_stride, row_stride, _ = hidden_BLD.stride()
    is_matrix = batch_stride == row_stride * hidden_BLD.shape[1] or hidden_BLD.shape[0] == 0
    if is_matrix or weight.dtype != torch.bfloat16 or weight.requires_grad:
        return None
    if torch.is_grad_enabled() and hidden_BLD.requires_grad:
        return None
    if type(hidden_BLD) is torch.Tensor:
        return (hidden_BLD.as_subclass(_BySequence),)
    return (_HeldBySequence(hidden_BLD),)


give_by_sequence.is_arithmetic = True  # type: ignore[attr-defined]  # trials of a pass keep it


def _linear(hidden_BLD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None = None) -> torch.Tensor:
    return torch.stack([functional.linear(hidden_LD, weight_VD, bias_V) for hidden_LD in hidden_BLD])


class _BySequence(torch.Tensor):
    """What it gives is plain: only a product with a weight is another than a plain tensor's."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            plain = tuple(each.as_subclass(torch.Tensor) if isinstance(each, cls) else each for each in args)
            return (_linear if func is functional.linear else func)(*plain, **(kwargs or {}))


class _HeldBySequence:
    """The same around a tensor of another class, such as one that holds nothing, in a trial: good for `F.linear` alone."""

    def __init__(self, hidden_BLD: torch.Tensor) -> None:
        self._hidden_BLD = hidden_BLD

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        plain = tuple(each._hidden_BLD if isinstance(each, cls) else each for each in args)
        return (_linear if func is functional.linear else func)(*plain, **(kwargs or {}))


def _outside_lists(module: nn.Module) -> Iterator[nn.Module]:
    yield module
    for child in module.children():
        if not isinstance(child, nn.ModuleList):
            yield from _outside_lists(child)
