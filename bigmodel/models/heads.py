"""Output heads that are given the last tokens of prompts: in bfloat16 on the CPU, sequence by sequence, without copying weights.

``hidden[:, -1:]`` of a prompt has strides that `F.linear` does not take for a matrix where the weight requires no gradient: it
becomes a batched product with the weight expanded to a batch, and oneDNN copies it for each sequence. A head of 32000 x 2048
took 0.56 s and 125 MiB a sequence, one of 151936 x 896 3.1 s and 260 MiB; sequence by sequence 0.015 and 0.06 s (two cores
with AVX512-BF16, torch 2.13). The bits are the same: that product goes sequence by sequence too, where one product of all
would round otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = ["leave_heads", "quicken_heads"]

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


def leave_heads(model: nn.Module) -> None:
    """Takes the hooks off again: the model is torch's and transformers' own."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is give_by_sequence]:
            del module._forward_pre_hooks[key]


def give_by_sequence(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A forward pre-hook: the layer sees the same tensor, whose product with a weight goes sequence by sequence."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or len(args) != 1:
        return None
    hidden_BLD, weight = args[0], module.weight
    if not (_is_plain(hidden_BLD) and _is_plain(weight)) or hidden_BLD.ndim != 3 or hidden_BLD.device.type != "cpu":
        return None
    if hidden_BLD.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16 or weight.requires_grad:
        return None
    batch_stride, row_stride, _ = hidden_BLD.stride()
    is_matrix = batch_stride == row_stride * hidden_BLD.shape[1] or hidden_BLD.shape[0] == 0
    # With a bias torch takes what is contiguous for a matrix, whatever the strides of dimensions of one element.
    if is_matrix or (module.bias is not None and hidden_BLD.is_contiguous()):
        return None
    if torch.is_grad_enabled() and hidden_BLD.requires_grad:
        return None
    if hidden_BLD.shape[0] == 1:
        return (hidden_BLD[0].unsqueeze(0),)  # the strides of a matrix
    if type(hidden_BLD) is torch.Tensor:
        return (hidden_BLD.as_subclass(_BySequence),)
    return (_HeldBySequence(hidden_BLD),)


give_by_sequence.is_arithmetic = True  # type: ignore[attr-defined]  # trials of a pass keep it


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor without ways of its own: torch's, or one that holds nothing, in a trial."""
    if type(value) in (torch.Tensor, nn.Parameter):
        return True
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return fake is not None and type(value) is fake.FakeTensor


def _linear(hidden_BLD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None = None) -> torch.Tensor:
    logits_BLV = hidden_BLD.new_empty((*hidden_BLD.shape[:2], weight_VD.shape[0]))
    for number, hidden_LD in enumerate(hidden_BLD):
        logits_BLV[number] = functional.linear(hidden_LD, weight_VD)
    # As torch does: the product is rounded before the bias is added.
    return logits_BLV if bias_V is None else logits_BLV.add_(bias_V)


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
    """The same around a tensor that holds nothing, in a trial: good for `F.linear` alone."""

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
