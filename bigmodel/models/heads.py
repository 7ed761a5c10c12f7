"""Products of what is no matrix with a large weight: in bfloat16 on the CPU, as one matrix, without copying the weight.

Output heads are given such tensors, ``hidden[:, -1:]`` of prompts, and so are layers that transpose before they project, as
Mamba's do in each pass. `F.linear` takes them for a matrix where the weight requires a gradient, as a model's does that
transformers loaded. Where it requires none, it becomes a batched product with the weight expanded to a batch, and oneDNN copies
it for each sequence: a head of 32000 x 2048 took 0.56 s and 125 MiB a sequence, one of 151936 x 896 3.1 s and 260 MiB; as a
matrix 0.015 and 0.06 s. A step of a Mamba of 16 layers of 2048, all on disk, took 0.95 s, and takes 0.34 (two cores, torch
2.13). The bits are those of the model whose weights require gradients; the batched product's are others on some processors.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = ["leave_heads", "quicken_heads"]

# Below it a copy takes less than a tenth of a second, and a model is left without a hook.
_LEAST_BYTES = 8 << 20


def quicken_heads(model: nn.Module) -> None:
    """Hooks the large linear layers. Their output has the bits of weights that require gradients.

    Args:
        model: parameters on meta or real; hooks of its trial twins are the same.
    """
    for module in model.modules():
        is_linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        weight = module._parameters.get("weight")
        if is_linear and weight is not None and weight.dtype == torch.bfloat16 and weight.nbytes >= _LEAST_BYTES:
            module.register_forward_pre_hook(give_as_matrix)


def leave_heads(model: nn.Module) -> None:
    """Takes the hooks off again: the model is torch's and transformers' own."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is give_as_matrix]:
            del module._forward_pre_hooks[key]


def give_as_matrix(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A forward pre-hook: the layer sees the same tensor, whose product with a weight is that of one matrix."""
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
        return (hidden_BLD.as_subclass(_Matrix),)
    return (_HeldMatrix(hidden_BLD),)


give_as_matrix.is_arithmetic = True  # type: ignore[attr-defined]  # trials of a pass keep it


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor without ways of its own: torch's, or one that holds nothing, in a trial."""
    if type(value) in (torch.Tensor, nn.Parameter):
        return True
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return fake is not None and type(value) is fake.FakeTensor


def _linear(hidden_BLD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None = None) -> torch.Tensor:
    rows_ND = hidden_BLD.reshape(-1, hidden_BLD.shape[-1])
    logits_BLV = functional.linear(rows_ND, weight_VD).view(*hidden_BLD.shape[:2], weight_VD.shape[0])
    # As torch does: the product is rounded before the bias is added.
    return logits_BLV if bias_V is None else logits_BLV.add_(bias_V)


class _Matrix(torch.Tensor):
    """What it gives is plain: only a product with a weight is another than a plain tensor's."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            plain = tuple(each.as_subclass(torch.Tensor) if isinstance(each, cls) else each for each in args)
            return (_linear if func is functional.linear else func)(*plain, **(kwargs or {}))


class _HeldMatrix:
    """The same around a tensor that holds nothing, in a trial: good for `F.linear` alone."""

    def __init__(self, hidden_BLD: torch.Tensor) -> None:
        self._hidden_BLD = hidden_BLD

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        plain = tuple(each._hidden_BLD if isinstance(each, cls) else each for each in args)
        return (_linear if func is functional.linear else func)(*plain, **(kwargs or {}))
