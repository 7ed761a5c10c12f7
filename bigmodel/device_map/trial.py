"""Passes tried on tensors that hold nothing: every storage that comes and goes is counted, and no number is computed."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import inspect
import math
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bigmodel.device_map.counter import KEPT_HOLES, Counter, NotTriedError, holes_factor, storages_in, tensors_in
from bigmodel.device_map.rates import Work
from bigmodel.device_map.tally import LARGE_BYTES, Experts, Tally
from bigmodel.device_map.twin import SMALL_BUFFER_BYTES, twin_of
from bigmodel.draws import draws_kept

__all__ = [
    "Call",
    "NotTriedError",
    "PassWork",
    "Trial",
    "Tried",
    "collector_off",
    "fake_mode",
    "like",
    "no_traces",
    "told_of",
]

Call = tuple[tuple[Any, ...], dict[str, Any]]
Then = Callable[[Any, Mapping[str, Any]], Call]


@dataclass(frozen=True, slots=True)
class PassWork:
    """What the modules of a model do in one pass.

    Attributes:
        work: name of a module -> what its own forward does, without what it calls.
        called: names of the modules that were called.
    """

    work: Mapping[str, Work] = field(default_factory=dict)
    called: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Tried:
    """Bytes and work of one pass, and of the one tried after it.

    Attributes:
        peak_bytes: the most that it holds beside the weights, its inputs and its cache.
        kv_bytes: of the cache that it returned.
        then_bytes: as `peak_bytes`, of the pass tried after it.
        device_bytes: the most that either of the two holds on an accelerator; a copy of the first one's inputs too.
        kv: name of a module -> bytes of the cache that its forward made.
        first, then: work of the two.
        is_cached: whether the first returned a cache.
        then_reason: why the pass after it could not be tried.
        experts: name of a module -> what its products of groups say of its experts, in the first pass.
    """

    peak_bytes: int
    kv_bytes: int
    then_bytes: int = 0
    device_bytes: int = 0
    kv: Mapping[str, int] = field(default_factory=dict)
    first: PassWork = field(default_factory=PassWork)
    then: PassWork = field(default_factory=PassWork)
    experts: Mapping[str, Experts] = field(default_factory=dict)
    is_cached: bool = False
    then_reason: str = ""


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
        self.twin = twin_of(model)
        self._names = {name: name for name, _ in self.twin.named_modules()}
        self._short: tuple[nn.Module, Mapping[str, str]] | None = None
        self._lock = threading.Lock()  # functional_call puts weights into the twin for a while

    def __call__(
        self,
        make_call: Callable[[], Call],
        *,
        entry: str = "",
        then: Then | None = None,
        num_tokens: int = 1,
    ) -> Tried:
        """Try a pass.

        Args:
            make_call: gives arguments and keyword arguments of forward, made in the modes that are set then.
            entry: name of the module that is called; the root if "".
            then: from what the first pass returned, and the cache in it (name of a parameter of forward -> what goes back under
                it), to the call of a second one; where it returned a cache. A second pass that cannot be tried raises nothing.
            num_tokens: of the first pass, in all its sequences: what the experts' routing width is told by.

        Raises:
            NotTriedError: the model, or fake tensors, cannot follow.
        """
        with self._lock:
            if self._short is None:
                stand_ins: dict[nn.Module, nn.Module] = {}
                short = twin_of(self.twin, stand_ins)
                self._short = short, _stand_in_names(self.twin, short, stand_ins) if stand_ins else self._names
            short, names = self._short
            if names is not self._names:
                with contextlib.suppress(NotTriedError):
                    tried = self._try(short, names, make_call, entry, then, num_tokens)
                    if not tried.then_reason:
                        return tried
            return self._try(self.twin, self._names, make_call, entry, then, num_tokens)

    def _try(
        self,
        twin: nn.Module,
        names: Mapping[str, str],
        make_call: Callable[[], Call],
        entry: str,
        then: Then | None,
        num_tokens: int,
    ) -> Tried:
        tally = Tally(num_tokens)
        counter = Counter(holes_factor(self.twin), tally)
        try:
            module = twin.get_submodule(entry)
            with no_traces(module), fake_mode(), torch.no_grad(), torch.inference_mode(False):
                weights = {name: _empty(parameter) for name, parameter in module.named_parameters()}
                buffers = {
                    name: buffer for name, buffer in module.named_buffers() if buffer.nbytes > SMALL_BUFFER_BYTES
                }
                weights |= {name: _empty(buffer) for name, buffer in buffers.items()}
                counter.leave_out(weights.values())
                args, kwargs = make_call()
                given = tensors_in((args, kwargs))
                given_bytes = sum(tensor.nbytes for tensor in given)
                counter.leave_out(given)
                with collector_off(), _owners_told(tally, module, entry), counter:
                    output = torch.func.functional_call(module, weights, args, kwargs)
                    cache = _cache_in(output, module)
                    held = storages_in(cache)
                    peak_bytes, device_bytes = counter.taken_bytes(held), given_bytes + counter.device_bytes(held)
                    made: dict[str, int] = {}
                    for key, nbytes in held.items():
                        made[counter.maker(key)] = made.get(counter.maker(key), 0) + nbytes
                    kv = {name: made[own] for name, own in names.items() if own in made}
                    in_heap = {counter.maker(key) for key, nbytes in held.items() if nbytes < LARGE_BYTES}
                    holes = sum(made[own] for own in names.values() if own in in_heap)
                    holes_bytes = math.ceil(KEPT_HOLES * holes)
                    first, experts = _pass_work(tally, names), dict(tally.experts)
                    then_bytes, then_work, then_reason = 0, PassWork(), ""
                    if then is not None and cache:
                        try:
                            args, kwargs = then(output, cache)
                            del output
                            counter.start_again()
                            torch.func.functional_call(module, weights, args, kwargs)
                            then_bytes = counter.taken_bytes(storages_in(cache))
                            device_bytes = max(device_bytes, counter.device_bytes(storages_in(cache)))
                            then_work = _pass_work(tally, names)
                            with _experts_as_on_accelerators(module) as differs:
                                if differs:
                                    counter.start_again()
                                    torch.func.functional_call(module, weights, args, kwargs)
                                    device_bytes = max(device_bytes, counter.device_bytes(storages_in(cache)))
                        except Exception as error:
                            then_reason = told_of(error)
        except NotTriedError:
            raise
        except Exception as error:  # a model's forward may do anything that fake tensors cannot follow
            raise NotTriedError(told_of(error)) from error
        return Tried(
            peak_bytes=peak_bytes + holes_bytes,
            kv_bytes=sum(kv.values()),
            then_bytes=then_bytes + (holes_bytes if then_bytes else 0),
            device_bytes=device_bytes,
            kv=kv,
            first=first,
            then=then_work,
            experts={name: experts[own] for name, own in names.items() if own in experts},
            is_cached=bool(cache),
            then_reason=then_reason,
        )


@contextlib.contextmanager
def _experts_as_on_accelerators(module: nn.Module) -> Iterator[bool]:
    """Experts as transformers' generate lets them run there in steps: on copies of those that are chosen. Yields whether so."""
    tell: Any = getattr(module, "get_experts_implementation", None)
    own = tell() if callable(tell) else {}
    if "grouped_mm" not in own.values():
        yield False
        return
    change: Any = module.set_experts_implementation
    change({name: "batched_mm" if kind == "grouped_mm" else kind for name, kind in own.items()})
    try:
        yield True
    finally:
        change(own)


def like(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """The arguments of a real call, with tensors that hold nothing in place of its own; made inside fake mode."""
    memo: dict[int, Any] = {}
    for tensor in tensors_in((args, kwargs)):
        memo[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return copy.deepcopy(tuple(args), memo), copy.deepcopy(dict(kwargs), memo)


def told_of(error: Exception) -> str:
    if isinstance(error, NotTriedError):
        return str(error)
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _cache_in(output: Any, module: nn.Module) -> dict[str, Any]:
    """The cache that a pass returned: fields of its output that hold tensors, and that forward takes back by the same name.

    A single tensor is a result, such as an image's features, which a next call may have again; a cache has parts.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    names = {each.name: None for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    if any(each.kind is each.VAR_KEYWORD for each in parameters):  # a wrapper hands on what it does not name
        names["past_key_values"] = None
    found = {}
    for name in names:
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if value is not None and not isinstance(value, torch.Tensor) and tensors_in(value):
            found[name] = value
    return found


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


@contextlib.contextmanager
def no_traces(module: nn.Module) -> Iterator[None]:
    """Puts back what a forward may leave outside its module: random generators, and results kept by cached functions."""
    cached = {function: function.cache_info().misses for function in _cached_functions(module)}
    try:
        with draws_kept():
            yield
    finally:
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
def fake_mode() -> Iterator[None]:
    """Fake tensors while it is on, and off whatever happens: an interrupt may fall into its own exit."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    before = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not before:
            torch._C._unset_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


@contextlib.contextmanager
def _owners_told(tally: Tally, entry: nn.Module, prefix: str) -> Iterator[None]:
    """Tell the tally whose forward is under way."""
    names = {module: ".".join(filter(None, (prefix, name))) for name, module in entry.named_modules()}
    stack: list[str] = [tally.owner]

    def enter(module: nn.Module, args: Any) -> None:
        stack.append(names[module])
        tally.owner = names[module]
        tally.called.add(names[module])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()
        tally.owner = stack[-1]

    handles = [module.register_forward_pre_hook(enter) for module in names]
    handles += [module.register_forward_hook(leave, always_call=True) for module in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pass_work(tally: Tally, names: Mapping[str, str]) -> PassWork:
    """What was counted since the last pass, for every module of the whole twin."""
    called = frozenset(tally.called)
    work = tally.take()
    return PassWork(
        {name: work[own] for name, own in names.items() if own in work},
        frozenset(name for name, own in names.items() if own in called),
    )


def _stand_in_names(whole: nn.Module, short: nn.Module, stand_ins: Mapping[nn.Module, nn.Module]) -> dict[str, str]:
    """Name of a module of the whole twin -> of the one in the short twin that does the same."""
    short_names = {module: name for name, module in short.named_modules()}
    names: dict[str, str] = {}
    pending: list[tuple[str, nn.Module, nn.Module]] = [("", whole, short)]
    seen: set[nn.Module] = set()
    while pending:
        name, module, own = pending.pop()
        if module in seen:
            continue
        seen.add(module)
        names[name] = short_names[own]
        for key, child in module._modules.items():
            if child is not None:
                stand_in = stand_ins[child] if child in stand_ins else own._modules.get(key)
                if stand_in is not None and stand_in in short_names:
                    pending.append((f"{name}.{key}" if name else key, child, stand_in))
    return names


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """The collector would stop at every object of the run; reference counts free what matters."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
