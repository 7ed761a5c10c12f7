"""Passes tried on tensors that hold nothing: every storage that comes and goes is counted, and no number is computed."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import math
import random
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bigmodel.footprint import PRODUCTS_KEPT

__all__ = ["Call", "NotTriedError", "Trial", "Tried", "like", "tensors_in"]

Call = tuple[tuple[Any, ...], dict[str, Any]]

# Above what operators return they hold buffers of their own. Measured with bf16, fp16 and fp32 products of 1 to 512 tokens with
# 2048 x 32000 weights: 0 to 16% of the result; oneDNN made no copy of the weight.
_WORKSPACE_FACTOR = 1.15
# glibc serves blocks below 32 MiB from its heap (its mmap threshold rises to the largest one freed, up to that), where the KV
# cache's tensors come to lie between short-lived ones, so that holes stay. What they take, as a share of the live blocks of
# that size, beyond the planner's reserve: peaks of RssAnon of llamas of 2 to 12 layers, 512 to 4096 wide, 1 to 4 sequences of
# 512 to 1500 tokens on 1 and 2 threads gave up to 1.7 in fp32 (it varies by a third from run to run), and 0.8 in bf16.
# A fixed mmap threshold of 1 MiB leaves no holes, and slows a decode step by 30 to 50% (fresh pages for the cache).
_HEAP_BLOCK_BYTES = 32 << 20
# In half precision oneDNN keeps a compiled product for each shape, as many as footprint.bound_product_cache lets it.
_PRODUCT_BYTES, _SMALL_ROWS = 840 << 10, 64
_HOLES_FACTOR = {"wide": 1.75, "narrow": 0.9}


class NotTriedError(Exception):
    """A pass cannot be tried; says why."""


@dataclass(frozen=True, slots=True)
class Tried:
    """Bytes of one pass.

    Attributes:
        peak_bytes: the most that it holds beside the weights, its inputs and its cache.
        kv_bytes: of the cache that it returned.
        then_bytes: as `peak_bytes`, of the pass tried after it.
    """

    peak_bytes: int
    kv_bytes: int
    then_bytes: int = 0


class Trial:
    """A twin of a model, without weights and without hooks, on which passes are tried.

    A pass runs the model's own code, which may keep what it made: in attributes and buffers (the twin's are its own), in
    caches of functions (those that a trial filled are emptied), in random generators (put back). What it keeps anywhere else,
    such as a list of its Python module, it keeps.

    Of alike blocks in a list the twin keeps two, because in the second what the first one left is still held; their caches
    count for all. A model that does not run so (it counts its blocks, or asks for one by its number) is tried whole.

    Args:
        model: parameters on meta or real. It is not changed, and what is done to it later does not reach the twin.

    Attributes:
        twin: the same classes, attributes and buffers, and the parameters of that time.
    """

    def __init__(self, model: nn.Module) -> None:
        self.twin = _twin(model)
        self._short: tuple[nn.Module, dict[nn.Module, int]] | None = None
        self._lock = threading.Lock()  # functional_call puts weights into the twin for a while

    def __call__(
        self,
        make_call: Callable[[], Call],
        *,
        entry: str = "",
        then: Callable[[Any], Call] | None = None,
    ) -> Tried:
        """Try a pass.

        Args:
            make_call: gives arguments and keyword arguments of forward, made in the modes that are set then.
            entry: name of the module that is called; the root if "".
            then: from the first pass's cache to the call of a second one.

        Raises:
            NotTriedError: the model, or fake tensors, cannot follow.
        """
        with self._lock:
            if self._short is None:
                copies: dict[nn.Module, int] = {}
                self._short = _twin(self.twin, copies), copies
            short, copies = self._short
            if copies:
                with contextlib.suppress(NotTriedError):
                    return self._try(short, copies, make_call, entry, then)
            return self._try(self.twin, {}, make_call, entry, then)

    def _try(
        self,
        twin: nn.Module,
        copies: Mapping[nn.Module, int],
        make_call: Callable[[], Call],
        entry: str,
        then: Callable[[Any], Call] | None,
    ) -> Tried:
        counter = _Counter(_holes_factor(self.twin))
        try:
            module = twin.get_submodule(entry)
            with _no_traces(module), _fake_mode(), torch.no_grad(), torch.inference_mode(False):
                weights = {name: _empty(parameter) for name, parameter in module.named_parameters()}
                buffers = {
                    name: buffer for name, buffer in module.named_buffers() if buffer.nbytes > _SMALL_BUFFER_BYTES
                }
                weights |= {name: _empty(buffer) for name, buffer in buffers.items()}
                counter.leave_out(weights.values())
                args, kwargs = make_call()
                counter.leave_out(tensors_in((args, kwargs)))
                with _collector_off(), _blocks_told(counter, copies), counter:
                    output = torch.func.functional_call(module, weights, args, kwargs)
                    cache = getattr(output, "past_key_values", None)
                    held = _storages(cache)
                    peak_bytes = counter.taken_bytes(held)
                    makers = {key: counter.maker(key) for key in held}
                    kv_bytes = sum(
                        nbytes * (1 if (maker := makers[key]) is None else copies.get(maker, 1))
                        for key, nbytes in held.items()
                    )
                    then_bytes = 0
                    if then is not None and cache is not None:
                        del output
                        args, kwargs = then(cache)
                        counter.start_again()
                        torch.func.functional_call(module, weights, args, kwargs)
                        then_bytes = counter.taken_bytes(_storages(cache))
        except NotTriedError:
            raise
        except Exception as error:  # a model's forward may do anything that fake tensors cannot follow
            raise NotTriedError(
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            ) from error
        return Tried(peak_bytes, kv_bytes, then_bytes)


def like(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """The arguments of a real call, with tensors that hold nothing in place of its own; made inside fake mode."""
    memo: dict[int, Any] = {}
    for tensor in tensors_in((args, kwargs)):
        memo[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return copy.deepcopy(tuple(args), memo), copy.deepcopy(dict(kwargs), memo)


# Larger buffers hold nothing in a trial; smaller ones may be what a forward decides by.
_SMALL_BUFFER_BYTES = 64 << 10
_PLAIN = (int, float, complex, str, bytes, bool, type(None), type, torch.dtype, torch.device, torch.Size)


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _twin(model: nn.Module, copies: dict[nn.Module, int] | None = None) -> nn.Module:
    """A module tree of the same classes and parameters, with attributes and small buffers of its own, and no hooks.

    With `copies`, lists are shortened to two blocks of a kind, and it is told for how many each of them stands.
    """
    modules = list(model.modules())
    twins: dict[nn.Module, nn.Module] = {module: object.__new__(type(module)) for module in modules}
    memo: dict[int, Any] = {id(module): twin for module, twin in twins.items()}
    for module in modules:
        memo |= {id(each): each for each in module._parameters.values() if each is not None}
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in memo:
                is_small = buffer.nbytes <= _SMALL_BUFFER_BYTES
                memo[id(buffer)] = buffer.detach().clone() if is_small else buffer
    shortened: set[nn.Module] = (
        set()
    )  # what is inside a kept block is not shortened again: who made a cache would not show
    for module, twin in twins.items():
        for key, value in vars(module).items():
            twin.__dict__[key] = _own_hooks(value) if key.endswith(("_hooks", "_pre_hooks")) else _copied(value, memo)
        if copies is None or not isinstance(module, nn.ModuleList) or module in shortened:
            continue
        shortened.update(each for child in module for each in child.modules())
        kinds = _kinds([child for child in module._modules.values() if child is not None])
        if any(len(alike) > 2 for alike in kinds):
            few = {first: 1 for first, *_ in kinds} | {others[0]: len(others) for _, *others in kinds if others}
            kept = [child for child in module._modules.values() if child in few]
            twin.__dict__["_modules"] = {str(number): twins[child] for number, child in enumerate(kept)}
            copies.update({twins[child]: count for child, count in few.items()})
    return twins[model]


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """An attribute's value, to be changed without the original's changing; itself where it cannot be copied."""
    if isinstance(value, _PLAIN):
        return value
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # locks, modules of Python, and whatever refuses
        return value


def _own_hooks(hooks: Any) -> Any:
    """Of a module's hooks those that are part of its arithmetic: torch's own, such as weight_norm's."""
    if not isinstance(hooks, dict):
        return hooks
    return type(hooks)((key, hook) for key, hook in hooks.items() if type(hook).__module__.startswith("torch.nn.utils"))


@contextlib.contextmanager
def _no_traces(module: nn.Module) -> Iterator[None]:
    """Puts back what a forward may leave outside its module: random generators, and results kept by cached functions."""
    cached = {function: function.cache_info().misses for function in _cached_functions(module)}
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        for function, misses in cached.items():
            if function.cache_info().misses != misses:
                function.cache_clear()


def _cached_functions(module: nn.Module) -> set[Any]:
    """The functools caches that the code of a model's classes can reach: as methods, and as names in its Python modules."""
    classes = {kind for each in module.modules() for kind in type(each).__mro__}
    namespaces: list[Mapping[str, Any]] = [vars(kind) for kind in classes]
    namespaces += [vars(sys.modules[name]) for name in {kind.__module__ for kind in classes} if name in sys.modules]
    found: set[Any] = set()
    seen: set[int] = set()
    pending = [value for namespace in namespaces for value in list(namespace.values())]
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, functools._lru_cache_wrapper):
            found.add(value)
        elif isinstance(value, (staticmethod, classmethod)):
            pending.append(value.__func__)
        elif isinstance(value, property):
            pending += [each for each in (value.fget, value.fset) if each is not None]
        elif isinstance(value, types.FunctionType):  # a decorator keeps what it wraps in its closure
            pending += [_content(cell) for cell in value.__closure__ or ()]
    return found


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


@contextlib.contextmanager
def _fake_mode() -> Iterator[None]:
    """Fake tensors while it is on, and off whatever happens: an interrupt may fall into its own exit."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    before = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not before:
            torch._C._unset_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


def _kinds(blocks: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Blocks that cost the same, together."""
    described = [_settings(block) for block in blocks]
    if not described:
        return []
    # A block knows its own number; what equals it in every block says nothing about what the block costs.
    numbers = {
        key
        for key in described[0]
        if all(type(own.get(key)) is int and own[key] == number for number, own in enumerate(described))
    }
    kinds: dict[object, list[nn.Module]] = {}
    for block, own in zip(blocks, described, strict=True):
        kinds.setdefault(tuple((key, own[key]) for key in own if key not in numbers), []).append(block)
    return list(kinds.values())


def _holes_factor(model: nn.Module) -> float:
    sizes = [(parameter.element_size() > 2, parameter.numel()) for parameter in model.parameters()]
    num_wide = sum(count for is_wide, count in sizes if is_wide)
    return _HOLES_FACTOR["wide" if 2 * num_wide > sum(count for _, count in sizes) else "narrow"]


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that are alive among those that were made while it is on."""

    def __init__(self, holes_factor: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._holes_factor = holes_factor
        self._large_bytes = 0  # alive, each mapped by itself
        self._heap_bytes = 0  # alive, served from the allocator's heap
        self._heap_peak_bytes = 0  # the heap does not shrink: what was taken once stays beside what is mapped later
        self._peak_bytes = 0.0
        self._products: set[object] = set()
        self.block: nn.Module | None = None
        self._seen: dict[int, object] = {}
        self._makers: dict[int, nn.Module | None] = {}

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Do not count these tensors' storages, nor views of them."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._seen[storage._cdata] = storage

    def start_again(self) -> None:
        """Forget the peaks so far."""
        self._peak_bytes, self._heap_peak_bytes = 0.0, self._heap_bytes
        self._look()

    def taken_bytes(self, held: Mapping[int, int]) -> int:
        """What the process takes at the peak beside the storages that are `held`: workspaces and holes included."""
        held_bytes = sum(nbytes * self._factor(nbytes) for nbytes in held.values())
        product_bytes = min(len(self._products), PRODUCTS_KEPT) * _PRODUCT_BYTES
        return max(0, math.ceil(self._peak_bytes - held_bytes)) + product_bytes

    def _factor(self, nbytes: int) -> float:
        return _WORKSPACE_FACTOR + (self._holes_factor if nbytes < _HEAP_BLOCK_BYTES else 0.0)

    def _look(self, copied_bytes: int = 0) -> None:
        self._heap_peak_bytes = max(self._heap_peak_bytes, self._heap_bytes)
        heap = (_WORKSPACE_FACTOR + self._holes_factor) * self._heap_peak_bytes
        self._peak_bytes = max(self._peak_bytes, heap + _WORKSPACE_FACTOR * self._large_bytes + copied_bytes)

    def maker(self, key: int) -> nn.Module | None:
        """The block that ran when a storage was made."""
        return self._makers.get(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _GROUPED_PRODUCT:
            # Its shape function refuses dtypes that its CPU kernel takes.
            result: Any = _grouped_product(*args[:2])
        else:
            result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(value, torch.Tensor):
                self._note(value.untyped_storage())
        if func in _PRODUCTS and result.dtype in (torch.bfloat16, torch.float16):
            self._note_product(func, [tuple(each.shape) for each in args if isinstance(each, torch.Tensor)])
        if func in _BATCHED_PRODUCTS:
            copied = sum(tensor.nbytes for tensor in args if isinstance(tensor, torch.Tensor) and _is_copied(tensor))
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
        self._makers[key] = self.block
        self._count(nbytes)
        self._look()

    def _note_product(self, func: Any, shapes: list[tuple[int, ...]]) -> None:
        if next((shape[-2] for shape in shapes if len(shape) > 1), 0) < _SMALL_ROWS:
            return
        # Each group has rows of its own number.
        num_groups = shapes[1][0] if func is _GROUPED_PRODUCT and len(shapes[1]) == 3 else 1
        self._products.update((func, *shapes, number) for number in range(num_groups))

    def _count(self, nbytes: int) -> None:
        if abs(nbytes) < _HEAP_BLOCK_BYTES:
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


def _is_copied(tensor: torch.Tensor) -> bool:
    """Whether a batched product on the CPU copies this operand first.

    A linear layer that is given a slice, such as the last token's hidden state, becomes a batched product with its whole
    weight as one operand, at a batch stride that oneDNN does not take: 125 MiB for a head of 32000 x 2048 (measured).
    """
    if tensor.ndim != 3 or tensor.dtype not in (torch.bfloat16, torch.float16):
        return False  # fp32 products are MKL's, which takes any stride (measured: nothing)
    _, rows, columns = tensor.shape
    return tensor.stride() not in ((rows * columns, columns, 1), (rows * columns, 1, rows))


def _grouped_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The empty result of a product of groups of rows: [rows, k] with [groups, k, n], or batched on either side."""
    if left.ndim == 2 and right.ndim == 3:
        shape: tuple[int, ...] = (left.shape[0], right.shape[2])
    elif left.ndim == 3 and right.ndim == 3:
        shape = (left.shape[0], left.shape[1], right.shape[2])
    else:
        raise NotTriedError("a product of groups along the inner dimension needs its group sizes")
    return left.new_empty(shape)


def _settings(block: nn.Module) -> dict[tuple[str, str], object]:
    """What a block's cost may depend on: classes, parameters, and plain attributes, of all modules in it."""
    found: dict[tuple[str, str], object] = {}
    for name, module in block.named_modules():
        found[name, ""] = type(module)
        for key, value in vars(module).items():
            if isinstance(value, (int, float, str, bool, type(None))):
                found[name, key] = value
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found[name, key] = (tuple(parameter.shape), parameter.dtype)
    return found


@contextlib.contextmanager
def _blocks_told(counter: _Counter, blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Tell the counter which block runs."""

    def enter(module: nn.Module, args: Any) -> None:
        counter.block = module

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        counter.block = None

    handles = [block.register_forward_pre_hook(enter) for block in blocks]
    handles += [block.register_forward_hook(leave, always_call=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    """The collector would stop at every object of the run; reference counts free what matters."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _storages(root: Any) -> dict[int, int]:
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
