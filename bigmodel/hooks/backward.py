"""Gradients through weights that stream: units are checkpointed, and their recomputation in backward fetches them again."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import Variable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from bigmodel.errors import GradientRefusedError, join_some
from bigmodel.hooks.pass_lock import PassLock
from bigmodel.hooks.streamer import Streamer

__all__ = ["Backward", "any_recorded", "records"]


_RESTING = -1
_CACHES = ("past_key_values", "cache_params")
_THREAD = threading.local()
# By which PEFT's layers compute, beside their parameters.
_OF_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")


class Backward:
    """Runs units so that backward finds their weights: between the passes it keeps their inputs alone.

    In backward a unit is entered where its recomputation begins, and left where that of the next one does, or backward ends:
    until then what was computed again refers to its slot. One backward visits the units of a pass in reverse order, because
    autograd takes what one thread recorded last first; what would come in another order is refused.

    Args:
        streamer: that moves the units; None where all stay.
        lock: of the model's passes, held while backward visits units.
        sites: per unit number, the modules whose forward uses it.
        resting: blocks of units that stay, which are checkpointed too, so that what a pass holds does not depend on the plan.
    """

    def __init__(
        self,
        streamer: Streamer | None,
        lock: PassLock,
        sites: Mapping[int, Sequence[nn.Module]],
        resting: Sequence[nn.Module] = (),
    ) -> None:
        self._streamer, self._lock = streamer, lock
        # Weak, because modules hold what holds this: a model that nobody holds is gone at once.
        self._sites = [
            (number, weakref.ref(module))
            for number, modules in {**sites, _RESTING: resting}.items()
            for module in modules
        ]
        self._inside = {
            number: {id(each) for site in modules for each in site.modules()} for number, modules in sites.items()
        }
        self._held: list[int] = []  # units that were entered, outer ones first
        self._under_way: int | None = None  # autograd's number of the backward that visits units
        self._recorded_by: object = None  # the thread whose passes it comes from
        self._wrapped: list[weakref.ref[nn.Module]] = []

    def put_on(self, root: nn.Module) -> None:
        """From the next call of each unit on; the root itself, whose call is under way, is left out."""
        for number, reference in self._sites:
            module = reference()
            if module is not None and module is not root and "forward" not in vars(module):
                module.forward = _Checkpointed(self, number, module)
                self._wrapped.append(reference)

    def without_cache(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a pass that is recorded: what is computed again would be put into a cache again.

        Raises:
            GradientRefusedError: a cache was given.
        """
        signature = inspect.signature(module.forward)
        given = signature.bind_partial(*args).arguments | kwargs
        cached = [name for name in _CACHES if given.get(name) is not None]
        if cached:
            raise GradientRefusedError(
                f"{cached[0]} was given to a pass that is recorded, whose units are computed again in backward and would go into "
                "it again. Leave it out, run under torch.no_grad(), or call bigmodel.materialize(model)."
            )
        if "use_cache" not in signature.parameters:
            return args, kwargs
        place = list(signature.parameters).index("use_cache")
        if place < len(args):
            return (*args[:place], False, *args[place + 1 :]), kwargs
        return args, {**kwargs, "use_cache": False}

    def take_off(self) -> None:
        """Units run as their classes say."""
        for reference in self._wrapped:
            module = reference()
            if module is not None:
                vars(module).pop("forward", None)
        self._wrapped.clear()

    def covers(self, module: nn.Module) -> bool:
        """Whether a module runs so."""
        return any(module is reference() for reference in self._wrapped)

    def is_here(self) -> bool:
        """Whether this code runs inside of the backward that visits units, such as in a hook of a gradient."""
        return self._under_way is not None and self._under_way == torch._C._current_graph_task_id()

    def forget(self) -> None:
        """After a backward that was interrupted: what it held is put to rest by who calls this."""
        self._held.clear()
        self._under_way = None

    def visits(self, number: int) -> bool:
        """Whether a unit that is called now is fetched, so that its recomputation must fetch it too."""
        return self._streamer is not None and number != _RESTING and self._streamer.is_entered(number)

    def visit(self, number: int, module: nn.Module, recorded_by: object) -> None:
        """Have a unit's weights be there until another's are needed.

        Args:
            number, module: of the unit.
            recorded_by: the thread of the pass that is gone back through.
        """
        assert self._streamer is not None
        task = torch._C._current_graph_task_id()
        if task < 0:
            raise GradientRefusedError(
                "What a pass kept for backward was read outside of a backward, and its weights stream. Call backward, or "
                "bigmodel.materialize(model)."
            )
        if self._under_way != task:
            if self._under_way is not None and self._lock.is_mine():
                raise GradientRefusedError(
                    "A backward through weights that stream was called inside of another one, or beside it. Call one after the "
                    "other, or bigmodel.materialize(model)."
                )
            self._lock.acquire(is_for_pass=False)  # after another thread's
            self._under_way, self._recorded_by = task, recorded_by
            Variable._execution_engine.queue_callback(_Ending(functools.partial(self._end, task)))
        if recorded_by is not self._recorded_by:
            raise GradientRefusedError(
                "One backward goes through passes of two threads, whose units it would take in any order, and their weights "
                "stream. Call backward for each, or bigmodel.materialize(model)."
            )
        while self._held and id(module) not in self._inside[self._held[-1]]:
            self._streamer.leave(self._held.pop())
        self._held.append(number)
        self._streamer.enter(number)

    def _end(self, task: int) -> None:
        if task != self._under_way or self._streamer is None:  # one that is over
            return
        while self._held:
            self._streamer.leave(self._held.pop())
        self._under_way = None
        self._lock.release()


class _Checkpointed:
    """A unit's forward under checkpointing; in a copy of the unit it is that one's own forward."""

    def __init__(self, backward: Backward, number: int, module: nn.Module) -> None:
        self._backward, self._number, self._module = backward, number, weakref.ref(module)
        self._forward: Any = type(module).forward
        self.__signature__ = inspect.signature(module.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module()
        assert module is not None  # it holds this
        forward = functools.partial(self._forward, module)
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        backward, number, calls = self._backward, self._number, itertools.count()
        is_fetched, recorded_by = backward.visits(number), _this_thread()
        before = _state_of(module, kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            if not next(calls):
                return forward(*args, **kwargs)
            _refuse_changed(module, before, _state_of(module, kwargs))
            if is_fetched:
                backward.visit(number, module, recorded_by)
            with _buffers_kept(module):
                return forward(*args, **kwargs)

        with saved_tensors_hooks(_as_it_is, _refuse_twice):  # of the inputs; what is inside has checkpoint's own
            return checkpoint(run, *args, use_reentrant=False, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo.get(id(self._module()))
        return self if twin is None else types.MethodType(self._forward, twin)


def _this_thread() -> object:
    """What tells this thread from all others, also from those that have ended."""
    if not hasattr(_THREAD, "mark"):
        _THREAD.mark = object()
    mark: object = _THREAD.mark
    return mark


_State = dict[str, object]


def _state_of(module: nn.Module, kwargs: Mapping[str, Any]) -> _State:
    """What a unit computes with beside its inputs by position, which checkpoint looks at, and the weights that were loaded."""
    found: _State = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            found[name] = id(parameter), parameter._version
    for name, each in module.named_modules():
        found[f"{name}.training"] = each.training
        found |= {f"{name}.{key}": repr(vars(each)[key]) for key in _OF_ADAPTERS if key in vars(each)}
    found |= {name: value._version for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
    return found


def _refuse_changed(module: nn.Module, before: _State, now: _State) -> None:
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        raise GradientRefusedError(
            f"{join_some(changed)} of a {type(module).__name__} changed between a pass and its backward, in which it is computed "
            "again, and the gradient would be of another pass. Call backward before anything is changed."
        )


@contextlib.contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """What a forward counts in training, such as running means, is counted once."""
    kept = [(each, each.clone()) for each in module.buffers()] if module.training else []
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _refuse_twice(tensor: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled():  # as backward was called, before what it computes again
        raise GradientRefusedError(
            "A backward that is itself recorded (create_graph=True) would keep weights that stream, and they are overwritten. "
            "Call bigmodel.materialize(model) for gradients of gradients."
        )
    return tensor


class _Ending:
    """What autograd calls when a backward has ended, and lets go when it has failed: either way it tells."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell

    def __call__(self) -> None:
        self._tell()

    def __del__(self) -> None:
        self._tell()


def records(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether a call of a module records what gradients are computed from."""
    return torch.is_grad_enabled() and (
        any(parameter.requires_grad for parameter in module.parameters()) or any_recorded((args, kwargs))
    )


def any_recorded(values: Any) -> bool:
    """Whether a tensor among values, in lists, tuples and mappings, requires grad."""
    if isinstance(values, torch.Tensor):
        return values.requires_grad
    if isinstance(values, Mapping):
        return any(map(any_recorded, values.values()))
    if isinstance(values, (tuple, list)):
        return any(map(any_recorded, values))
    return False
