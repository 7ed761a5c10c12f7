"""Counts the memory of a pass on tensors that hold nothing: what operators return, and what allocator and kernels add to it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bigmodel.device_map.tally import LARGE_BYTES, Tally, is_copied
from bigmodel.footprint import PRODUCTS_KEPT

__all__ = ["KEPT_HOLES", "Counter", "NotTriedError", "holes_factor", "storages_in", "tensors_in"]

# Above what operators return they hold buffers of their own. Measured with bf16, fp16 and fp32 products of 1 to 512 tokens with
# 2048 x 32000 weights: 0 to 16% of the result; oneDNN made no copy of the weight.
_WORKSPACE_FACTOR = 1.15
# glibc serves blocks below 32 MiB from its heap (its mmap threshold rises to the largest one freed, up to that), where the KV
# cache's tensors come to lie between short-lived ones, so that holes stay. What they take, as a share of the live blocks of
# that size, beyond the planner's reserve: peaks of RssAnon of llamas of 2 to 12 layers, 512 to 4096 wide, 1 to 4 sequences of
# 512 to 1500 tokens on 1 and 2 threads gave up to 1.7 in fp32 (it varies by a third from run to run), and 0.8 in bf16.
# A fixed mmap threshold of 1 MiB leaves no holes, and slows a decode step by 30 to 50% (fresh pages for the cache).
# In half precision oneDNN keeps a compiled product for each shape, as many as footprint.bound_product_cache lets it.
_PRODUCT_BYTES, _SMALL_ROWS = 840 << 10, 64
_HOLES_FACTOR = {"wide": 1.75, "narrow": 0.9}
# From the second sequence on holes lie between the cache's own blocks too, as a share of them: the first passes of a second and
# third sequence of 512 tokens through 24 layers in bf16 took 80 to 112 MiB more than that of the first, whose cache is 97 MiB;
# of 25 second sequences through 26 layers (cache 156 MiB), two needed 0.52 and 0.64 of it.
KEPT_HOLES = 0.75


class NotTriedError(Exception):
    """A pass cannot be tried; says why."""


def holes_factor(model: nn.Module) -> float:
    sizes = [(parameter.element_size() > 2, parameter.numel()) for parameter in model.parameters()]
    num_wide = sum(count for is_wide, count in sizes if is_wide)
    return _HOLES_FACTOR["wide" if 2 * num_wide > sum(count for _, count in sizes) else "narrow"]


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that are alive among those that were made while it is on.

    Args:
        holes_factor: what its holes add to a heap.
        tally: of the operators' work.
        mapped_bytes: of the smallest storage that the allocator maps by itself.

    Attributes:
        tally: as given.
    """

    def __init__(self, holes_factor: float, tally: Tally, mapped_bytes: int = LARGE_BYTES) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tally = tally
        self._mapped_bytes = mapped_bytes
        self._holes_factor = holes_factor
        self._large_bytes = 0  # alive, each mapped by itself
        self._heap_bytes = 0  # alive, served from the allocator's heap
        self._heap_peak_bytes = 0  # the heap does not shrink: what was taken once stays beside what is mapped later
        self._peak_bytes = 0.0
        self._device_peak_bytes = 0  # where the allocator keeps no heap, and kernels make no copies
        self._marked = (0, 0, 0)
        self._products: set[object] = set()
        self._seen: dict[int, object] = {}
        self._makers: dict[int, str] = {}

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Do not count these tensors' storages, nor views of them."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._seen[storage._cdata] = storage

    def start_again(self) -> None:
        """Forget the peaks so far."""
        self._peak_bytes, self._device_peak_bytes, self._heap_peak_bytes = 0.0, 0, self._heap_bytes
        self._look()

    @property
    def live_bytes(self) -> int:
        """Alive now."""
        return self._heap_bytes + self._large_bytes

    @property
    def mapped_bytes(self) -> int:
        """Of those, what is mapped by itself."""
        return self._large_bytes

    def mark(self) -> tuple[int, int, int]:
        """The most that was alive since the last mark: of all, of what is mapped by itself, of what lies in the heap."""
        highest, self._marked = self._marked, (self.live_bytes, self._large_bytes, self._heap_bytes)
        return highest

    def taken_bytes(self, held: Mapping[int, int]) -> int:
        """What the process takes at the peak beside the storages that are `held`: workspaces and holes included."""
        held_bytes = sum(nbytes * self._factor(nbytes) for nbytes in held.values())
        product_bytes = min(len(self._products), PRODUCTS_KEPT) * _PRODUCT_BYTES
        return max(0, math.ceil(self._peak_bytes - held_bytes)) + product_bytes

    def device_bytes(self, held: Mapping[int, int]) -> int:
        """The same on an accelerator: what is alive, and a share of it for workspaces and the allocator's rounding."""
        return max(0, math.ceil(_WORKSPACE_FACTOR * (self._device_peak_bytes - sum(held.values()))))

    def _factor(self, nbytes: int) -> float:
        return _WORKSPACE_FACTOR + (self._holes_factor if nbytes < self._mapped_bytes else 0.0)

    def _look(self, copied_bytes: int = 0) -> None:
        self._heap_peak_bytes = max(self._heap_peak_bytes, self._heap_bytes)
        self._device_peak_bytes = max(self._device_peak_bytes, self.live_bytes)
        now = self.live_bytes, self._large_bytes, self._heap_bytes
        self._marked = (max(self._marked[0], now[0]), max(self._marked[1], now[1]), max(self._marked[2], now[2]))
        heap = (_WORKSPACE_FACTOR + self._holes_factor) * self._heap_peak_bytes
        self._peak_bytes = max(self._peak_bytes, heap + _WORKSPACE_FACTOR * self._large_bytes + copied_bytes)

    def maker(self, key: int) -> str:
        """Name of the module whose forward made a storage."""
        return self._makers.get(key, "")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _GROUPED_PRODUCT:
            # Its shape function refuses dtypes that its CPU kernel takes.
            result: Any = _grouped_product(
                args[0], args[1], (kwargs or {}).get("offs", args[2] if len(args) > 2 else None)
            )
        else:
            result = func(*args, **(kwargs or {}))
        self.tally.note(func, args, kwargs, result)
        for value in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(value, torch.Tensor):
                self._note(value.untyped_storage())
        if func in _PRODUCTS and result.dtype in (torch.bfloat16, torch.float16):
            self._note_product(func, [tuple(each.shape) for each in args if isinstance(each, torch.Tensor)])
        if func in _BATCHED_PRODUCTS:
            copied = sum(tensor.nbytes for tensor in args if isinstance(tensor, torch.Tensor) and is_copied(tensor))
            self._look(copied)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        nbytes = storage.nbytes()

        def gone(_: Any) -> None:
            self._seen.pop(key, None)
            self._count(-nbytes)

        self._seen[key] = weakref.ref(storage, gone)
        self._makers[key] = self.tally.owner
        self._count(nbytes)
        self._look()

    def _note_product(self, func: Any, shapes: list[tuple[int, ...]]) -> None:
        if next((shape[-2] for shape in shapes if len(shape) > 1), 0) < _SMALL_ROWS:
            return
        # Each group has rows of its own number.
        num_groups = shapes[1][0] if func is _GROUPED_PRODUCT and len(shapes[1]) == 3 else 1
        self._products.update((func, *shapes, number) for number in range(num_groups))

    def _count(self, nbytes: int) -> None:
        if abs(nbytes) < self._mapped_bytes:
            self._heap_bytes += nbytes
        else:
            self._large_bytes += nbytes


_GROUPED_PRODUCT = torch.ops.aten._grouped_mm.default
_PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    _GROUPED_PRODUCT,
)
_BATCHED_PRODUCTS = (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default)


def _grouped_product(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor | None) -> torch.Tensor:
    """The empty result of a product of groups of rows: [rows, k] with [groups, k, n], or batched on either side; or of groups
    of the inner dimension, which backward makes: [m, rows] with [rows, n], whose groups end at `ends`."""
    if left.ndim == 2 and right.ndim == 3:
        shape: tuple[int, ...] = (left.shape[0], right.shape[2])
    elif left.ndim == 3 and right.ndim == 3:
        shape = (left.shape[0], left.shape[1], right.shape[2])
    elif ends is not None and left.ndim == right.ndim == 2:
        shape = (ends.shape[0], left.shape[0], right.shape[1])
    else:
        raise NotTriedError("a product of groups along the inner dimension needs its group sizes")
    return left.new_empty(shape)


def storages_in(root: Any) -> dict[int, int]:
    """Storage -> bytes, for the tensors that a cache object holds."""
    storages = (tensor.untyped_storage() for tensor in tensors_in(root))
    return {storage._cdata: storage.nbytes() for storage in storages}


def tensors_in(root: Any) -> list[torch.Tensor]:
    """The tensors that an object reaches through containers and attributes."""
    found: list[torch.Tensor] = []
    seen: set[int] = set()
    pending = [root]
    while pending:
        value = pending.pop()
        if value is None or isinstance(value, (str, bytes, int, float, bool, type)) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            pending.extend(value)
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module):
            pending.extend(vars(value).values())
    return found
