"""Counts the work of a pass: FLOPs and bytes of every operator, by the module whose forward asked for it."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bigmodel.device_map.rates import ATTENTION, COPIED, NOTHING, Work

__all__ = ["LARGE_BYTES", "Experts", "Tally", "is_copied", "tallied"]

# glibc maps blocks of this size one by one, and gives them back when they are freed.
LARGE_BYTES = 32 << 20

aten = torch.ops.aten
Shape = tuple[int, ...]


class Experts:
    """What one product of groups says of a mixture of experts.

    Attributes:
        num_experts: groups of weights.
        num_routed: how many of them each row is given to.
        expert_bytes: of one group's weight in this product.
    """

    __slots__ = ("expert_bytes", "num_experts", "num_routed")

    def __init__(self, num_experts: int, num_routed: float, expert_bytes: float) -> None:
        self.num_experts, self.num_routed, self.expert_bytes = num_experts, num_routed, expert_bytes


class Tally:
    """Adds up work while operators run on tensors that hold nothing.

    Attributes:
        owner: the module whose forward is under way, by its name; innermost.
        called: modules that were called.
    """

    def __init__(self, num_tokens: int = 1) -> None:
        self.owner = ""
        self.called: set[str] = set()
        self._work: dict[str, _Sums] = {}
        self._num_tokens = num_tokens
        self.experts: dict[str, Experts] = {}

    def take(self) -> dict[str, Work]:
        """Work by module, and begin again."""
        work = {owner: sums.work() for owner, sums in self._work.items()}
        self._work, self.called = {}, set()
        return work

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None, result: Any) -> None:
        """Count one operator that ran."""
        results = list(_tensors(result))
        if not results:
            return
        inputs = list(_tensors((args, kwargs or {})))
        packet = func.overloadpacket
        if packet in _FREE:
            return
        formula = _FLOPS.get(packet)
        if formula is None and not func._schema.is_mutable:
            storages = {tensor.untyped_storage()._cdata for tensor in inputs}
            if all(tensor.untyped_storage()._cdata in storages for tensor in results):
                return  # a view
        sums = self._work.setdefault(self.owner, _Sums())
        sums.fresh_bytes += sum(tensor.nbytes for tensor in results if tensor.nbytes >= LARGE_BYTES)
        written = sum(_nbytes(tensor) for tensor in results)
        if packet in _LOOKUPS:  # rows of the first, and not all of it
            others = sum(_nbytes(tensor) for tensor in inputs if tensor.dtype in (torch.int64, torch.int32))
            sums.add_other(2 * written + others)
            return
        if formula is None:
            sums.add_other(written + sum(map(_nbytes, inputs)))
            return
        shapes = [tuple(tensor.shape) for tensor in inputs]
        flops = formula(shapes, [tuple(tensor.shape) for tensor in results], args)
        read = float(sum(map(_nbytes, inputs)))
        if packet is aten._grouped_mm:
            read = self._routed_bytes(inputs)
        dtype = str(inputs[-1].dtype if packet in (aten.addmm, aten.baddbmm) else inputs[0].dtype)[6:]
        if formula in (_attention, _attention_backward):
            dtype += ATTENTION
        elif packet in (aten.bmm, aten.baddbmm) and any(map(is_copied, inputs)) and not _is_packed(inputs[-2]):
            dtype += COPIED
        sums.add_product(dtype, flops, float(read + written))

    def _routed_bytes(self, inputs: list[torch.Tensor]) -> float:
        """Of a product of groups only the weights of groups that rows are routed to are read.

        Rows spread over E groups at random leave (1 - 1/E) ** rows of them out.
        """
        left, right = inputs[:2]
        rest = sum(map(_nbytes, (left, *inputs[2:])))
        if right.ndim != 3 or left.ndim != 2:
            return float(_nbytes(right) + rest)
        num_groups, rows = right.shape[0], left.shape[0]
        each = _nbytes(right) / max(1, num_groups)
        known = self.experts.get(self.owner)
        total = each if known is None else each + known.expert_bytes
        self.experts[self.owner] = Experts(num_groups, max(1.0, rows / self._num_tokens), total)
        return each * num_groups * (1.0 - (1.0 - 1.0 / num_groups) ** rows) + rest


class _Sums:
    __slots__ = ("fresh_bytes", "num_ops", "other_bytes", "products")

    def __init__(self) -> None:
        self.products: dict[tuple[str, int], tuple[float, float]] = {}
        self.other_bytes = self.num_ops = self.fresh_bytes = 0.0

    def add_other(self, num_bytes: float) -> None:
        self.other_bytes += num_bytes
        self.num_ops += 1

    def add_product(self, dtype: str, flops: float, num_bytes: float) -> None:
        (key,) = Work.of_product(dtype, flops, num_bytes).products
        before = self.products.get(key, (0.0, 0.0))
        self.products[key] = (before[0] + flops, before[1] + num_bytes)
        self.num_ops += 1

    def work(self) -> Work:
        return Work(self.products, self.other_bytes, self.num_ops, self.fresh_bytes)


def tallied(run: Callable[[], object]) -> Work:
    """The work of all operators that a function asks for."""

    class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            tally.note(func, args, kwargs, result)
            return result

    tally = Tally()
    with torch.no_grad(), Count():  # type: ignore[no-untyped-call]
        run()
    return tally.take().get("", NOTHING)


def is_copied(tensor: torch.Tensor) -> bool:
    """Whether a batched product on the CPU copies this operand first.

    A linear layer that is given a slice, such as the last token's hidden state, becomes a batched product with its whole
    weight as one operand, at a batch stride that oneDNN does not take: 125 MiB for a head of 32000 x 2048 (measured).
    """
    if tensor.ndim != 3 or tensor.dtype not in (torch.bfloat16, torch.float16):
        return False  # fp32 products are MKL's, which takes any stride (measured: nothing)
    _, rows, columns = tensor.shape
    return tensor.stride() not in ((rows * columns, columns, 1), (rows * columns, 1, rows))


def _is_packed(tensor: torch.Tensor) -> bool:
    """Whether dimensions of one element have strides that no slice has.

    A reshape of a tensor that holds nothing gives such strides, where a real one gives those of a plain tensor, whose product
    with a weight is no batched one (one token's attention, on its way to the output layer).
    """
    sizes = itertools.accumulate(reversed(tensor.shape), operator.mul, initial=1)
    return any(
        length == 1 and stride < size
        for length, stride, size in zip(reversed(tensor.shape), reversed(tensor.stride()), sizes, strict=False)
    )


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _nbytes(tensor: torch.Tensor) -> int:
    """Of what is there: a dimension that is expanded is read once."""
    size = tensor.itemsize
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride or not length else 1
    return size


def _mm(shapes: list[Shape], results: list[Shape], args: Any) -> float:
    return 2.0 * math.prod(results[0]) * shapes[0][-1]


def _grouped(shapes: list[Shape], results: list[Shape], args: Any) -> float:
    """Of groups of the inner dimension each is a product of its own rows alone."""
    num_groups = results[0][0] if len(shapes[0]) == len(shapes[1]) == 2 and len(results[0]) == 3 else 1
    return _mm(shapes, results, args) / max(1, num_groups)


def _addmm(shapes: list[Shape], results: list[Shape], args: Any) -> float:
    return 2.0 * math.prod(results[0]) * shapes[1][-1]


def _attention(shapes: list[Shape], results: list[Shape], args: Any) -> float:
    """Scores and their product with the values; all pairs, as kernels of a causal mask save half at most."""
    query, key, value = shapes[:3]
    pairs = math.prod(query[:-1]) * key[-2]
    return 2.0 * pairs * (query[-1] + value[-1])


def _attention_backward(shapes: list[Shape], results: list[Shape], args: Any) -> float:
    """Scores again, and four products of them: gradients of values, of scores, of queries and of keys."""
    query, key, value = shapes[1:4]
    pairs = math.prod(query[:-1]) * key[-2]
    return 2.0 * pairs * (3 * query[-1] + 2 * value[-1])


def _convolution(shapes: list[Shape], results: list[Shape], args: Any) -> float:
    """Every element of the result is a product of one filter: in channels per group times its extent."""
    is_transposed = bool(args[6])
    elements = math.prod(shapes[0] if is_transposed else results[0])
    return 2.0 * elements * math.prod(shapes[1][1:])


def _convolution_backward(shapes: list[Shape], results: list[Shape], args: Any) -> float:
    """Gradients of inputs and of filters, where they are asked for: each as many products as forward."""
    given, taken, filters = shapes[:3]
    is_transposed, wanted = bool(args[7]), args[10]
    elements = math.prod(taken if is_transposed else given)
    return 2.0 * elements * math.prod(filters[1:]) * sum(map(bool, wanted[:2]))


_FLOPS: dict[Any, Callable[[list[Shape], list[Shape], Any], float]] = {
    aten.mm: _mm,
    aten.bmm: _mm,
    aten.addmm: _addmm,
    aten.baddbmm: _addmm,
    aten._grouped_mm: _grouped,
    aten._scaled_mm: _mm,
    aten.convolution: _convolution,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_cudnn_attention: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
    aten.convolution_backward: _convolution_backward,
}
_LOOKUPS = {
    aten.embedding,
    aten._embedding_bag,
    aten._embedding_bag_forward_only,
    aten.index_select,
    aten.gather,
    aten.index,
}
_FREE = {aten.empty, aten.empty_like, aten.empty_strided, aten.detach, aten.new_empty, aten.lift_fresh}
