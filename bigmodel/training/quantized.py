"""A frozen base in 4 bits, on which adapters are trained (QLoRA), by bitsandbytes; the only file that knows it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bigmodel.errors import InvalidArgumentError, TrainingError
from bigmodel.models import owners_of

__all__ = ["QUANTIZATIONS", "Quantized", "keep_trained", "quantize", "refuse_quantized"]

QUANTIZATIONS = ("nf4", "fp4")
# As in the paper: values that share a scale, and scales, in 8 bits then, that share another one.
_BLOCK, _NESTED = 64, 256
_RANGE = 16 << 20  # values that are quantised at once, whole blocks of scales


class Quantized(nn.Linear):
    """A frozen linear layer that keeps its weight in 4 bits, with a scale of 64 values each; made in place by `quantize`.

    A pass multiplies with the values that the weight has in the dtype that it was stored in, put together for the product and
    let go. Before `take` the weight is a parameter of its shape and dtype on meta, with which what a pass needs can be tried.

    Source: Dettmers et al., QLoRA (2023): NormalFloat4, double quantisation.
    """

    kind: str
    state: Any = None

    @property
    def held_bytes(self) -> int:
        """Of the weight in 4 bits, with its scales."""
        number = self.in_features * self.out_features
        scales = math.ceil(number / _BLOCK)
        return math.ceil(number / 2) + scales + 4 * math.ceil(scales / _NESTED)

    def take(self, values: torch.Tensor) -> None:
        """The weight's values, flattened, ``[out_features * in_features]``, in the dtype that products are to have them in."""
        from bitsandbytes.functional import QuantState, get_4bit_type, quantize_4bit, quantize_blockwise

        # In ranges: on a host it makes several copies of what it is given.
        parts = [quantize_4bit(each, blocksize=_BLOCK, quant_type=self.kind) for each in torch.split(values, _RANGE)]
        packed, scales = (torch.cat(each) for each in ([part for part, _ in parts], [each.absmax for _, each in parts]))
        offset = scales.mean()
        scales, nested = quantize_blockwise(scales - offset, blocksize=_NESTED)
        self.state = QuantState(
            absmax=scales,
            shape=torch.Size((self.out_features, self.in_features)),
            code=get_4bit_type(self.kind, device=values.device),  # type: ignore[no-untyped-call]
            blocksize=_BLOCK,
            quant_type=self.kind,
            dtype=values.dtype,
            offset=offset,
            state2=nested,
        )
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        if self.state is None:
            if self.weight.is_meta:
                raise TrainingError("A linear layer that is kept in 4 bits was called before it had its weight.")
            tried: torch.Tensor = _Tried.apply(input, self.weight)  # type: ignore[no-untyped-call]
            return tried if bias is None else tried + bias
        from bitsandbytes import matmul_4bit  # type: ignore[attr-defined]

        is_beside = bias is not None and bias.requires_grad  # whose gradient it sums over the first dimension alone
        product: torch.Tensor = matmul_4bit(input, self.weight, self.state, bias=None if is_beside else bias)
        return product + bias if bias is not None and is_beside else product


class _Tried(torch.autograd.Function):
    """A product that takes what bitsandbytes' takes: the weight is put together for forward, and again for backward."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return nn.functional.linear(input, weight.clone().to(input.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grads[0] @ weight.clone().to(grads[0].dtype), None


def quantize(module: nn.Module, blocks: Iterable[nn.Module], kind: str) -> list[Quantized]:
    """Let linear layers keep their weights in 4 bits, once they get them; in place.

    What is not in a block (embeddings, projectors, the head) stays as it is, as do biases, norms, experts in one tensor, weights
    that several layers share, and those that the model's own code reads beside the layer's call, such as their dtype.

    Args:
        module: the model, on meta.
        blocks: of it.
        kind: of QUANTIZATIONS.

    Returns:
        The layers.

    Raises:
        InvalidArgumentError: there is none.
    """
    owners = owners_of(module)
    found: list[Quantized] = []
    layer: Any
    for parent in (parent for block in blocks for parent in block.modules()):
        for name, layer in parent.named_children():
            is_own = type(layer) is nn.Linear and len(owners[id(layer.weight)]) == 1
            kind_of_parent: Any = type(parent)
            if is_own and layer.weight.is_floating_point() and not _is_read(kind_of_parent, name):
                layer.requires_grad_(False)
                layer.__class__ = Quantized
                layer.kind = kind
                found.append(layer)
    if not found:
        raise InvalidArgumentError(
            f'quantize_base is "{kind}", and the {type(module).__name__} has no block with a linear layer of its own. Leave it '
            "out."
        )
    return found


def keep_trained(module: nn.Module) -> None:
    """Layers whose weights are trained, such as copies that an adapter makes of them, are what they were; in place."""
    for layer in module.modules():
        if isinstance(layer, Quantized) and layer.weight.requires_grad:
            vars(layer).pop("kind")
            known: Any = layer
            known.__class__ = nn.Linear


@functools.cache
def _is_read(kind: type[nn.Module], name: str) -> bool:
    """Whether a module's class reads the weight of its layer of this name."""
    text = ""
    for each in kind.__mro__:
        if not each.__module__.startswith(("torch.", "builtins")):
            with contextlib.suppress(OSError, TypeError):  # nobody has its source
                text += inspect.getsource(each)
    return re.search(rf"\b{re.escape(name)}\.weight\b", text) is not None


def refuse_quantized(kind: str, device: torch.device) -> None:
    """InvalidArgumentError where bitsandbytes is not there, or does not compute on a device, or wrong gradients."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise InvalidArgumentError(
            f'quantize_base is "{kind}", which is bitsandbytes\', and it is not installed. Run pip install '
            '"bigmodel[quantization]", or leave it out.'
        ) from error
    block = nn.Sequential(nn.Linear(2 * _BLOCK, _BLOCK, bias=False, device="meta"))
    (tried,) = quantize(block, [block], kind)
    weight = torch.linspace(0.1, 1, 2 * _BLOCK * _BLOCK, device=device)
    given = torch.linspace(0, 1, 3 * 2 * _BLOCK, device=device).view(1, 3, 2 * _BLOCK).requires_grad_()
    try:
        tried.take(weight)
        with torch.enable_grad():
            tried(given).sum().backward()
    except Exception as error:
        raise InvalidArgumentError(
            f'quantize_base is "{kind}", and bitsandbytes {bitsandbytes.__version__} does not compute with it on {device}: '
            f"{type(error).__name__}: {error}. Leave it out."
        ) from error
    expected = weight.view(_BLOCK, 2 * _BLOCK).sum(0)
    assert given.grad is not None
    if not torch.allclose(given.grad, expected.expand_as(given), rtol=0.1):
        raise InvalidArgumentError(
            f'quantize_base is "{kind}", and gradients of bitsandbytes {bitsandbytes.__version__} on {device} are wrong. '
            "Leave it out."
        )
