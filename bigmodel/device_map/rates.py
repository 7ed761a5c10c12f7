"""Work, and what it takes: the operations and bytes of a pass, and the rates of the processor that does them."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bigmodel.checks import Check, listed, mapped, number, satisfying
from bigmodel.errors import InvalidArgumentError

__all__ = ["ATTENTION", "COPIED", "NOTHING", "PER_S", "RATE_FIELDS", "Curve", "Rates", "Work"]

ATTENTION = " attention"
"""Ends the dtype of products that are attention's: its kernels reach other rates than products of two matrices."""

COPIED = " copied"
"""Ends the dtype of products an operand of which is copied first, which takes far longer than they do (see `tally.is_copied`)."""

Curve = tuple[tuple[float, float], ...]

PER_S = number(1e3, 1e18)
"""Bytes or FLOPs in a second, from what a floppy disk gives to what a data centre does."""

_POINT = satisfying(
    "a pair of numbers: FLOPs per byte, FLOP/s", lambda value: isinstance(value, list) and len(value) == 2
)


def _check_point(value: Any, name: str) -> None:
    _POINT(value, name)
    number(1e-12, 1e12)(value[0], f"{name}[0]")
    PER_S(value[1], f"{name}[1]")


RATE_FIELDS: Mapping[str, Check] = {
    "memory_bytes_per_s": PER_S,
    "flops_per_s": mapped(PER_S, least=1),
    "products": mapped(listed(_check_point, least=1), least=1),
    "op_s": number(0, 1),
    "fresh_bytes_per_s": PER_S,
}
"""What a file may say about a processor; `Rates.from_json` reads it."""

# Products of about one intensity are counted together: a factor of two apart.
_PER_OCTAVE = 1.0


@dataclass(frozen=True, slots=True)
class Work:
    """What operators do, on whatever processor.

    Attributes:
        products: (dtype, intensity class) -> (FLOPs, bytes of operands and results) of matrix products and attention. The
            class is the rounded logarithm to base 2 of their FLOPs per byte.
        other_bytes: that all other operators read and write.
        num_ops: operators that are not views.
        fresh_bytes: of large results, whose memory the host maps anew each time and page by page.
    """

    products: Mapping[tuple[str, int], tuple[float, float]] = field(default_factory=dict)
    other_bytes: float = 0.0
    num_ops: float = 0.0
    fresh_bytes: float = 0.0

    @classmethod
    def of_product(cls, dtype: str, flops: float, num_bytes: float) -> Work:
        """One matrix product, or attention."""
        octave = round(_PER_OCTAVE * math.log2(max(flops, 1.0) / max(num_bytes, 1.0)))
        return cls({(dtype, octave): (flops, num_bytes)}, 0.0, 1.0)

    @property
    def flops(self) -> float:
        """Of all products."""
        return sum(flops for flops, _ in self.products.values())

    @property
    def touched_bytes(self) -> float:
        """Read and written by all operators; what one writes and the next reads counts twice."""
        return self.other_bytes + sum(num_bytes for _, num_bytes in self.products.values())

    def plus(self, other: Work, times: float = 1.0) -> Work:
        """Both, the other one so many times (a negative number takes away, down to nothing)."""
        products = dict(self.products)
        for key, (flops, num_bytes) in other.products.items():
            before = products.get(key, (0.0, 0.0))
            products[key] = (max(0.0, before[0] + times * flops), max(0.0, before[1] + times * num_bytes))
        return Work(
            products,
            max(0.0, self.other_bytes + times * other.other_bytes),
            max(0.0, self.num_ops + times * other.num_ops),
            max(0.0, self.fresh_bytes + times * other.fresh_bytes),
        )


NOTHING = Work()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How fast a processor is.

    Attributes:
        memory_bytes_per_s: that operators read and write.
        products: dtype -> points (FLOPs per byte, FLOP/s), by rising intensity. Below the first point the rate falls in
            proportion, as bytes bind; above the last it stays; between two it is a power law. One point is a roofline.
        op_s: that an operator takes beside its bytes and FLOPs, Python included.
        fresh_bytes_per_s: of first touches of large allocations; infinite where an allocator keeps memory.
    """

    memory_bytes_per_s: float
    products: Mapping[str, Curve]
    op_s: float
    fresh_bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        numbers = [self.memory_bytes_per_s, self.op_s]
        numbers += [number for curve in self.products.values() for point in curve for number in point]
        are_numbers = all(math.isfinite(number) and number >= 0 for number in numbers)
        if not are_numbers or self.memory_bytes_per_s <= 0 or not self.fresh_bytes_per_s > 0:
            raise InvalidArgumentError(f"Rates must be positive numbers; given were {self!r}.")
        for dtype, curve in self.products.items():
            if not curve or any(min(point) <= 0 for point in curve) or _is_falling(curve):
                raise InvalidArgumentError(f"The rates of {dtype} products are {curve!r}. Give rising intensities.")

    @classmethod
    def roofline(cls, memory_bytes_per_s: float, flops_per_s: Mapping[str, float], op_s: float) -> Rates:
        """Products bound by `flops_per_s` (by dtype) or by memory, whichever takes longer.

        Source: Williams, Waterman and Patterson, Roofline, CACM 2009.
        """
        products = {dtype: ((rate / (memory_bytes_per_s or math.nan), rate),) for dtype, rate in flops_per_s.items()}
        return cls(memory_bytes_per_s=memory_bytes_per_s, products=products, op_s=op_s)

    def seconds(self, work: Work) -> float:
        """What the work takes when nothing else runs."""
        total = work.other_bytes / self.memory_bytes_per_s + work.num_ops * self.op_s
        total += work.fresh_bytes / self.fresh_bytes_per_s
        for (dtype, _), (flops, num_bytes) in work.products.items():
            if flops > 0:
                total += flops / self._flops_per_s(dtype, flops / max(num_bytes, 1.0))
        return total

    def shares(self, work: Work) -> dict[str, float]:
        """The same seconds by what they go to: "memory", "operators", "arithmetic" (products at half the best rate or more)."""
        found = {
            "memory": work.other_bytes / self.memory_bytes_per_s + work.fresh_bytes / self.fresh_bytes_per_s,
            "arithmetic": 0.0,
            "operators": work.num_ops * self.op_s,
        }
        for (dtype, _), (flops, num_bytes) in work.products.items():
            if flops > 0:
                rate = self._flops_per_s(dtype, flops / max(num_bytes, 1.0))
                is_fast = 2 * rate >= max(best for _, best in self._curve(dtype.removesuffix(COPIED)))
                found["arithmetic" if is_fast else "memory"] += flops / rate
        return found

    @property
    def best_bytes_per_s(self) -> float:
        """The most that the memory was measured, or is stated, to give: products read it faster than other operators do."""
        rates = [rate / intensity for curve in self.products.values() for intensity, rate in curve]
        return max([self.memory_bytes_per_s, *rates])

    def least_shares(self, work: Work, most_bytes: float) -> dict[str, float]:
        """Seconds that no order of the work can fall below: "memory" and "arithmetic", which may go on at the same time.

        Args:
            work: its products count; what passes between operators may stay in caches.
            most_bytes: of weights and cache: what products read beyond them is counted as activations.
        """
        product_bytes = sum(num_bytes for _, num_bytes in work.products.values())
        arithmetic = 0.0
        for (dtype, _), (flops, _) in work.products.items():
            plain = dtype.removesuffix(COPIED).removesuffix(ATTENTION)
            arithmetic += flops / max(rate for name in (dtype, plain) for _, rate in self._curve(name))
        return {"memory": min(product_bytes, most_bytes) / self.best_bytes_per_s, "arithmetic": arithmetic}

    def to_json(self) -> dict[str, Any]:
        """As a machine file has it."""
        curves = {dtype: [list(point) for point in curve] for dtype, curve in self.products.items()}
        described = {"memory_bytes_per_s": self.memory_bytes_per_s, "products": curves, "op_s": self.op_s}
        if math.isfinite(self.fresh_bytes_per_s):  # JSON has no infinity
            described["fresh_bytes_per_s"] = self.fresh_bytes_per_s
        return described

    @classmethod
    def from_json(cls, described: Mapping[str, Any], default: Rates) -> Rates:
        """What a machine file says, and the default for what it leaves out.

        Args:
            described: ``memory_bytes_per_s``; ``products`` (dtype -> points) or ``flops_per_s`` (dtype -> FLOP/s at the best);
                ``op_s``.
            default: whose rates stand where none are given.

        Raises:
            InvalidArgumentError, TypeError, ValueError: what is there is no rate.
        """
        memory = float(described.get("memory_bytes_per_s", default.memory_bytes_per_s))
        op_s = float(described.get("op_s", default.op_s))
        fresh = float(described.get("fresh_bytes_per_s", math.inf))
        if "products" in described:
            products = {
                str(dtype): tuple((float(intensity), float(rate)) for intensity, rate in points)
                for dtype, points in described["products"].items()
            }
            return cls(memory_bytes_per_s=memory, products=products, op_s=op_s, fresh_bytes_per_s=fresh)
        peaks = {dtype: max(rate for _, rate in curve) for dtype, curve in default.products.items()}
        stated = {str(dtype): float(rate) for dtype, rate in described.get("flops_per_s", peaks).items()}
        return replace(cls.roofline(memory, stated, op_s), fresh_bytes_per_s=fresh)

    def _flops_per_s(self, dtype: str, intensity: float) -> float:
        curve = self._curve(dtype)
        if intensity <= curve[0][0]:
            return curve[0][1] * intensity / max(curve[0][0], 1e-30)
        if intensity >= curve[-1][0]:
            return curve[-1][1]
        number = bisect.bisect_right(curve, (intensity, math.inf))
        (low, low_rate), (high, high_rate) = curve[number - 1], curve[number]
        share = math.log(intensity / low) / math.log(high / low)
        return float(low_rate * (high_rate / low_rate) ** share)

    def _curve(self, dtype: str) -> Curve:
        """Of the dtype, and of its kind where that was measured; of float32; of whichever there is."""
        for name in (dtype, dtype.removesuffix(ATTENTION).removesuffix(COPIED), "float32"):
            if name in self.products:
                return self.products[name]
        return _slowest(self.products.values())


def _is_falling(curve: Curve) -> bool:
    return any(before[0] >= after[0] for before, after in itertools.pairwise(curve))


def _slowest(curves: Iterable[Curve]) -> Curve:
    return min(curves, key=lambda curve: curve[-1][1], default=((1.0, 1e9),))
