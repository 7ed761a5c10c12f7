"""Measures processors: what the products and the other operators of a model take on them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bigmodel.device_map.rates import ATTENTION, COPIED, Curve, Rates
from bigmodel.device_map.tally import LARGE_BYTES, tallied

__all__ = ["DTYPES", "MAIN_DTYPE", "accelerator_rates", "averaged", "host_rates", "seconds_of", "synchronize"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Models are in this one: what is no product is measured in it.
MAIN_DTYPE = torch.bfloat16
# Of a block: a model of a billion parameters has such. Two of them are larger than the processor's caches.
_WIDTH, _INNER, _HEADS, _NUM_BLOCKS = 2048, 5504, 16, 2
# Rows of a pass, and tokens before it; and those whose attention is told.
_PASSES = ((1, 1024), (4, 0), (16, 0), (64, 0), (128, 0), (256, 0), (512, 0))
_ATTENTION_ROWS = (1, 128, 512)
# One weight is larger than the processor's caches, and there are several: a model's weights are never there when they are used.
_WEIGHT_SHAPE, _NUM_WEIGHTS = (5504, 2048), 12
_ROWS = (1, 4, 16, 64, 256, 512)
# A head, which has many more rows than any other weight.
_HEAD_SHAPE = (32_000, 2048)
_REPEATS, _LONG_S = 5, 0.5


def host_rates(dtypes: Sequence[torch.dtype]) -> Rates:
    """Of this machine's processors, from passes of a small model's blocks, each part of them under a clock of its own.

    In their places: what one operator leaves in caches for the next, what the allocator gives back and takes again, and how long
    threads that slept take to wake, are part of it. Loops of one operator are up to a fifth faster.
    """
    host = torch.device("cpu")
    products: dict[str, Curve] = {}
    memory_bytes_per_s, op_s = math.inf, 0.0
    for dtype in dtypes:
        name = str(dtype)[6:]
        try:
            blocks = [_Block(dtype) for _ in range(_NUM_BLOCKS)]
            found = {rows: _block_pass(blocks, rows, past) for rows, past in _PASSES}
        except RuntimeError:  # a dtype that this processor has no products of
            continue
        products[name] = _rising(each.linear for each in found.values())
        products[name + ATTENTION] = _rising(found[rows].attention for rows in _ATTENTION_ROWS)
        copied = _copied_curve(host, dtype)
        if copied is not None:
            products[name + COPIED] = copied
        if dtype is MAIN_DTYPE:
            one, many = _block_pass(blocks, 1, 0), found[_PASSES[-1][0]]
            op_s = max(1e-8, one.rest_s / one.num_ops)
            # Most of what small operators take is not their bytes; of these here it is no more than nine tenths.
            memory_bytes_per_s = many.rest_bytes / max(many.rest_s - many.num_ops * op_s, many.rest_s / 10)
    return Rates(memory_bytes_per_s=memory_bytes_per_s, products=products, op_s=op_s, fresh_bytes_per_s=_fresh_rate())


def accelerator_rates(device: torch.device) -> Rates:
    products = {}
    for dtype in DTYPES:
        name = str(dtype)[6:]
        for key, curve in ((name, _product_curve(device, dtype)), (name + ATTENTION, _attention_curve(device, dtype))):
            if curve is not None:
                products[key] = curve
    return Rates(memory_bytes_per_s=_memory_rate(device), products=products, op_s=_operator_seconds(device))


def averaged(measured: Sequence[Rates]) -> Rates:
    """The rates of work that takes, in sum, what it took in all of these."""
    products = {
        dtype: tuple(
            (
                point[0],
                statistics.harmonic_mean(
                    [each.products[dtype][number][1] for each in measured if dtype in each.products]
                ),
            )
            for number, point in enumerate(curve)
        )
        for dtype, curve in measured[0].products.items()
    }
    return Rates(
        memory_bytes_per_s=statistics.harmonic_mean([each.memory_bytes_per_s for each in measured]),
        products=products,
        op_s=statistics.mean([each.op_s for each in measured]),
        fresh_bytes_per_s=statistics.harmonic_mean([each.fresh_bytes_per_s for each in measured]),
    )


def _product_curve(device: torch.device, dtype: torch.dtype) -> tuple[tuple[float, float], ...] | None:
    """(FLOPs per byte, FLOP/s) of products of a few to many rows with weights that are in no cache."""
    outs, ins = _WEIGHT_SHAPE
    try:
        weights = [torch.full(_WEIGHT_SHAPE, 0.01, dtype=dtype, device=device) for _ in range(_NUM_WEIGHTS)]
        points: list[tuple[float, float]] = []
        for rows in _ROWS:
            values = torch.full((rows, ins), 0.01, dtype=dtype, device=device)
            flops = 2.0 * rows * ins * outs
            num_bytes = float(dtype.itemsize * (rows * ins + ins * outs + rows * outs))
            turns = iter(range(1 << 30))

            def product(values: torch.Tensor = values, turns: Any = turns) -> None:
                functional.linear(values, weights[next(turns) % _NUM_WEIGHTS])

            points.append((flops / num_bytes, flops / seconds_of(product, device)))
    except RuntimeError:  # a dtype that this processor has no products of
        return None
    return tuple(points)


def _attention_curve(device: torch.device, dtype: torch.dtype) -> tuple[tuple[float, float], ...] | None:
    """The same for attention: of one token over a cache of 1024, and of prompts of 128 and 512."""
    points: list[tuple[float, float]] = []
    for rows, length in ((1, 1024), (128, 128), (512, 512)):
        try:
            query = torch.full((1, 16, rows, 128), 0.1, dtype=dtype, device=device)
            keys = [torch.full((1, 16, length, 128), 0.1, dtype=dtype, device=device) for _ in range(2 * _NUM_WEIGHTS)]
            turns = iter(range(1 << 30))

            def attend(query: torch.Tensor = query, keys: Any = keys, turns: Any = turns) -> None:
                key = keys[next(turns) % len(keys)]
                functional.scaled_dot_product_attention(query, key, key, is_causal=query.shape[2] > 1)

            flops = 4.0 * 16 * rows * length * 128
            num_bytes = float(dtype.itemsize * 16 * 128 * (2 * rows + 2 * length))
            points.append((flops / num_bytes, flops / seconds_of(attend, device)))
        except RuntimeError:  # a dtype that this processor has no kernel for
            return None
    return tuple(sorted(points))


def _copied_curve(device: torch.device, dtype: torch.dtype) -> tuple[tuple[float, float], ...] | None:
    """The same, of one point, for a head that is given the last of many tokens: its weight is copied before the product."""
    outs, ins = _HEAD_SHAPE
    try:
        weight = torch.full(_HEAD_SHAPE, 0.01, dtype=dtype, device=device)
        last = torch.full((1, 2, ins), 0.01, dtype=dtype, device=device)[:, -1:]
        flops, num_bytes = 2.0 * ins * outs, float(dtype.itemsize * (ins + ins * outs + outs))
        return ((flops / num_bytes, flops / seconds_of(lambda: functional.linear(last, weight), device)),)
    except RuntimeError:
        return None


def _fresh_rate() -> float:
    """Bytes/s of writing to memory that was just mapped, in pages of the usual size."""
    num_bytes = 4 * LARGE_BYTES
    return num_bytes / seconds_of(lambda: torch.empty(num_bytes, dtype=torch.uint8).fill_(1), torch.device("cpu"))


class _Norm(nn.Module):
    """As transformers writes it: in float32, with its weight in the model's dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        result: torch.Tensor = self.weight * wide.to(hidden.dtype)
        return result


class _Block(nn.Module):
    """A transformer block whose products stand under clocks: what is left of a pass is what its other operators take."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.norms = nn.ModuleList(_Norm(_WIDTH) for _ in range(2))
        sides = [(_WIDTH, _WIDTH)] * 4 + [(_WIDTH, _INNER)] * 2 + [(_INNER, _WIDTH)]
        self.query, self.key, self.value, self.out, self.up, self.gate, self.down = (
            nn.Linear(*each, bias=False, device="meta") for each in sides
        )
        self.to(dtype).to_empty(device="cpu").requires_grad_(False)
        for parameter in self.parameters():
            parameter.fill_(0.01)
        self.linear_s = self.attention_s = 0.0

    def forward(self, hidden: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        """hidden [1, rows, width], past [1, heads, tokens, head width]."""
        rows = hidden.shape[1]
        normed = self.norms[0](hidden)
        split = [
            self._timed(layer, normed).view(1, rows, _HEADS, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        query, key = (self._rotated(each, each[:, :1]) for each in split[:2])
        keys, values = torch.cat((past, key), dim=2), torch.cat((past, split[2]), dim=2)
        begin = time.perf_counter()
        mixed = functional.scaled_dot_product_attention(query, keys, values, is_causal=rows > 1)
        self.attention_s += time.perf_counter() - begin
        hidden = hidden + self._timed(self.out, mixed.transpose(1, 2).reshape(1, rows, -1))
        normed = self.norms[1](hidden)
        gated = functional.silu(self._timed(self.gate, normed)) * self._timed(self.up, normed)
        return hidden + self._timed(self.down, gated)

    def _rotated(self, heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        halves = heads.chunk(2, dim=-1)
        return heads * angles + torch.cat((-halves[1], halves[0]), dim=-1) * angles

    def _timed(self, layer: nn.Module, operand: torch.Tensor) -> torch.Tensor:
        begin = time.perf_counter()
        result: torch.Tensor = layer(operand)
        self.linear_s += time.perf_counter() - begin
        return result


@dataclass(frozen=True, slots=True)
class _BlockPass:
    """Of one pass of one block: (FLOPs per byte, FLOP/s) of its products, and what the rest takes."""

    linear: tuple[float, float]
    attention: tuple[float, float]
    rest_s: float
    rest_bytes: float
    num_ops: float


def _block_pass(blocks: Sequence[_Block], rows: int, past_tokens: int) -> _BlockPass:
    """Medians of passes of one block after another, after one that is only counted; fewer where they take long."""
    dtype = blocks[0].query.weight.dtype
    hidden = torch.full((1, rows, _WIDTH), 0.1, dtype=dtype)
    past = torch.zeros(1, _HEADS, past_tokens, _WIDTH // _HEADS, dtype=dtype)
    started = time.perf_counter()
    work = tallied(lambda: blocks[0](hidden, past))  # and the first pass takes longer
    times: list[tuple[float, float, float]] = []
    for number in range(1, 1 + len(blocks) * _REPEATS):
        block = blocks[number % len(blocks)]
        block.linear_s = block.attention_s = 0.0
        begin = time.perf_counter()
        block(hidden, past)
        total = time.perf_counter() - begin
        times.append((block.linear_s, block.attention_s, total - block.linear_s - block.attention_s))
        if time.perf_counter() - started > _LONG_S:
            break
    linear_s, attention_s, rest_s = (max(1e-9, statistics.median(each)) for each in zip(*times, strict=True))
    flops, num_bytes = {False: 0.0, True: 0.0}, {False: 0.0, True: 0.0}
    for (kind, _), (each_flops, each_bytes) in work.products.items():
        flops[kind.endswith(ATTENTION)] += each_flops
        num_bytes[kind.endswith(ATTENTION)] += each_bytes
    linear = flops[False] / num_bytes[False], flops[False] / linear_s
    attention = flops[True] / num_bytes[True], flops[True] / attention_s
    return _BlockPass(linear, attention, rest_s, work.other_bytes, work.num_ops)


def _rising(points: Iterable[tuple[float, float]]) -> Curve:
    """By intensity, each once."""
    return tuple(sorted(dict(points).items()))


def _memory_rate(device: torch.device) -> float:
    """Bytes/s of an elementwise operation on tensors as large as the activations of a long pass."""
    left, right, result = (torch.ones(1 << 21, device=device, dtype=torch.float32) for _ in range(3))
    return 3.0 * left.nbytes / seconds_of(lambda: torch.mul(left, right, out=result), device)


def _operator_seconds(device: torch.device) -> float:
    """Of one of many small operators."""
    small = torch.ones(16, device=device)

    def run() -> None:
        result = small
        for _ in range(256):
            result = result * small

    return seconds_of(run, device) / 256


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """The median of a few runs, the first ones left out; fewer where one takes long."""
    times: list[float] = []
    for number in range(2 + _REPEATS):
        synchronize(device)
        begin = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - begin)
        if number >= 1 and sum(times) > _LONG_S:
            break
    return max(1e-9, statistics.median(times[min(2, len(times) - 1) :]))


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
