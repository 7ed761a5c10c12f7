"""What is known of models that were put together: kept beside them, and gone with them."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bigmodel.checkpoint.spec import Source
from bigmodel.checkpoint.stamp import FileStamp
from bigmodel.device_map.plan import Plan
from bigmodel.device_map.unit import Unit
from bigmodel.errors import InvalidArgumentError
from bigmodel.hooks.attach import Attachment
from bigmodel.hooks.slots import Binding
from bigmodel.hooks.stats import StreamStats

__all__ = ["Assembled", "assembled", "forget", "own_generation_config", "remember"]


@dataclass(eq=False, kw_only=True)
class Assembled:
    """What is known of one model.

    Attributes:
        decide: gives what was carried out: the plan, and the units that it places.
        stamps: of every file that weights are read from.
        sizes: resident and mapped bytes.
        attachment: its hooks; None for a plain resident model.
        streamed: sources of the parameters that rest on disk, by first name.
        bindings: how each of those is shown.
        compile_before: (what the user had set,) of what marks a streamed model; None where nothing is marked.
    """

    decide: Callable[[], tuple[Plan, Sequence[Unit]]]
    stamps: Mapping[str, FileStamp]
    sizes: StreamStats
    attachment: Attachment | None = None
    streamed: Mapping[str, Source] = field(default_factory=dict)
    bindings: Mapping[str, Binding] = field(default_factory=dict)
    compile_before: tuple[bool | None] | None = None

    @functools.cached_property
    def decided(self) -> tuple[Plan, Sequence[Unit]]:
        """What was carried out, and the units that it places."""
        return self.decide()

    @property
    def plan(self) -> Plan:
        """What was carried out."""
        return self.decided[0]


_ASSEMBLED: weakref.WeakKeyDictionary[nn.Module, Assembled] = weakref.WeakKeyDictionary()


def remember(model: nn.Module, state: Assembled) -> None:
    """Keep what is known of a model as long as somebody holds it."""
    _ASSEMBLED[model] = state


def assembled(model: nn.Module) -> tuple[nn.Module, Assembled]:
    """The model, or the first module inside it, that bigmodel loaded, and what is known of it.

    Raises:
        InvalidArgumentError: bigmodel did not load it.
    """
    for module in model.modules():
        if module in _ASSEMBLED:
            return module, _ASSEMBLED[module]
    raise InvalidArgumentError(
        f"This {type(model).__name__} was not loaded by bigmodel (or was unloaded). Load it with bigmodel.load_sharded(path)."
    )


def forget(model: nn.Module) -> None:
    """Make a model a plain one again, as far as this module knows it."""
    _ASSEMBLED.pop(model, None)


def own_generation_config(model: nn.Module) -> Any:
    """The generation settings as the user has them, without what marks a streamed model; None where nothing does."""
    state = _ASSEMBLED.get(model)
    if state is None or state.compile_before is None:
        return None
    settings: Any = copy.deepcopy(model.generation_config)
    (settings.disable_compile,) = state.compile_before
    return settings
