"""Gradients through weights that stream: units are checkpointed, and their recomputation in backward fetches them again."""

from __future__ import annotations

import functools
import inspect
import itertools
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import Variable
from torch.utils.checkpoint import checkpoint

from bigmodel.hooks.pass_lock import PassLock
from bigmodel.hooks.streamer import Streamer

__all__ = ["Backward", "records"]


class Backward:
    """Runs units so that backward finds their weights: between the passes it keeps their inputs alone.

    In backward a unit is entered where its recomputation begins, and left where that of the next one does, or backward ends:
    until then what was computed again refers to its slot. Backward visits units in reverse order, whose gradients need those
    of all that came after them.

    Args:
        streamer: that moves the units.
        lock: of the model's passes, held while backward visits units.
        sites: per unit number, the modules whose forward uses it.
    """

    def __init__(self, streamer: Streamer, lock: PassLock, sites: Mapping[int, Sequence[nn.Module]]) -> None:
        self._streamer, self._lock, self._sites = streamer, lock, sites
        self._inside = {
            number: {id(each) for site in modules for each in site.modules()} for number, modules in sites.items()
        }
        self._held: list[int] = []  # units that were entered, outer ones first
        self._numbers = itertools.count()
        self._under_way: int | None = None  # number of the backward under way
        self._wrapped: list[nn.Module] = []

    @property
    def is_on(self) -> bool:
        """Whether units run so."""
        return bool(self._wrapped)

    def put_on(self, root: nn.Module) -> None:
        """From the next call of each unit on; the root itself, whose call is under way, is left out."""
        for number, modules in self._sites.items():
            for module in modules:
                if module is not root and "forward" not in vars(module):
                    module.forward = _Checkpointed(self, number, module)
                    self._wrapped.append(module)

    def without_cache(self, module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a pass that is recorded: what is computed again would be put into a cache again."""
        if "use_cache" not in inspect.signature(module.forward).parameters:
            return kwargs
        return {**kwargs, "use_cache": False}

    def take_off(self) -> None:
        """Units run as their classes say."""
        for module in self._wrapped:
            vars(module).pop("forward", None)
        self._wrapped.clear()

    def covers(self, module: nn.Module) -> bool:
        """Whether a module runs so."""
        return any(module is each for each in self._wrapped)

    def forget(self) -> None:
        """After a backward that was interrupted: what it held is put to rest by who calls this."""
        self._held.clear()
        self._under_way = None

    def visits(self, number: int) -> bool:
        """Whether a unit that is called now is fetched, so that its recomputation must fetch it too."""
        return self._streamer.is_entered(number)

    def visit(self, number: int, module: nn.Module) -> None:
        """Have a unit's weights be there until another's are needed."""
        if self._under_way is None:
            self._lock.acquire(is_for_pass=False)
            self._under_way = next(self._numbers)
            ending = _Ending(functools.partial(self._end, self._under_way))
            Variable._execution_engine.queue_callback(ending)
        while self._held and id(module) not in self._inside[self._held[-1]]:
            self._streamer.leave(self._held.pop())
        self._held.append(number)
        self._streamer.enter(number)

    def _end(self, visit: int) -> None:
        if visit != self._under_way:  # one that is over
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
        if not records(module, args, kwargs):
            return forward(*args, **kwargs)
        backward, number, calls = self._backward, self._number, itertools.count()
        is_fetched = backward.visits(number)

        def run(*args: Any, **kwargs: Any) -> Any:
            if next(calls) and is_fetched:
                backward.visit(number, module)
            return forward(*args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo.get(id(self._module()))
        return self if twin is None else types.MethodType(self._forward, twin)


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
        any(parameter.requires_grad for parameter in module.parameters()) or _any_requires_grad((args, kwargs))
    )


def _any_requires_grad(values: Any) -> bool:
    if isinstance(values, torch.Tensor):
        return values.requires_grad
    if isinstance(values, Mapping):
        return any(map(_any_requires_grad, values.values()))
    if isinstance(values, (tuple, list)):
        return any(map(_any_requires_grad, values))
    return False
