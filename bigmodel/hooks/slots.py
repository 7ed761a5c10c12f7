"""Slots: fixed buffers, allocated once, into which units are fetched in turn; and how a parameter is bound to one."""

from __future__ import annotations

import enum
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from bigmodel.offload.arena import Arena
from bigmodel.offload.file_map import is_written
from bigmodel.offload.link import DeviceMemory
from bigmodel.offload.reader import Ticket

__all__ = ["Binding", "DataBinding", "EntryBinding", "Slot", "SlotState", "view_in", "views_of"]


class SlotState(enum.Enum):
    EMPTY = enum.auto()
    FILLING = enum.auto()  # a ticket is under way, or done and not yet waited for
    READY = enum.auto()  # holds a unit's weights; may be given to another unit
    IN_USE = enum.auto()  # parameters are bound to it


@dataclass(eq=False, slots=True)
class Slot:
    """One buffer of a lane. What is in flight travels with it: the ticket that fills it, the event after which it is filled.

    Attributes:
        memory: of the host, or of an accelerator; that one knows after which event nothing reads it any more.
        unit: number of the unit whose weights it holds or is getting.
        ticket: the filling under way.
        filled: on an accelerator, the end of the copies; work that reads the slot waits for it there.
        views: unit number -> its parameters' views of this slot.
    """

    memory: Arena | DeviceMemory
    state: SlotState = SlotState.EMPTY
    unit: int | None = None
    ticket: Ticket | None = None
    filled: torch.Event | None = None
    views: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def wait_until_filled(self) -> None:
        """Let the device's work from now on come after the copies. The host does not wait."""
        if self.filled is not None and isinstance(self.memory, DeviceMemory):
            self.memory.link.wait(self.filled)

    def mark_free(self) -> None:
        """Let the next copy come after the device's work up to now. On the host, work is done when its call returns."""
        if isinstance(self.memory, DeviceMemory):
            self.memory.mark_free()


class DataBinding:
    """A parameter that can be shown at rest by one tensor: only its storage changes, never its identity.

    Ties, adapters and optimizers that hold the Parameter keep seeing it.
    """

    __slots__ = ("_is_mapped", "_parameter", "_rest", "_rest_address", "_version", "name", "shape_dtype")

    def __init__(self, name: str, parameter: nn.Parameter, rest: torch.Tensor, *, is_mapped: bool = False) -> None:
        self.name = name
        self._is_mapped = is_mapped
        self.shape_dtype = (tuple(rest.shape), rest.dtype)
        self._parameter = parameter
        self._rest = rest
        self._rest_address = rest.data_ptr()
        self.release()

    def is_unchanged(self) -> bool:
        """Whether the parameter still shows the bytes that it was put to rest with.

        A write through `.data` counts for no version of torch's; in a map of a file it makes pages the process's own.
        """
        parameter = self._parameter
        if parameter.data_ptr() != self._rest_address or parameter._version != self._version:
            return False
        return not (self._is_mapped and is_written(self._rest))

    def bind(self, view: torch.Tensor) -> None:
        """Show `view`, a tensor of the parameter's shape and dtype in a slot."""
        self._parameter.data = view

    def settle(self, tensor: torch.Tensor) -> None:
        """Show `tensor` for good, unless the parameter was changed at rest: then it keeps what it was given."""
        if self.is_unchanged():
            self._parameter.data = tensor

    def release(self) -> None:
        """Show the bytes where they rest."""
        self._parameter.data = self._rest
        self._version = self._parameter._version


class EntryBinding:
    """A parameter that no single tensor shows at rest: during a pass a plain Parameter takes its place in its modules.

    Args:
        name: fully qualified name.
        resting: the parameter that stands there at rest and reads its bytes when it is used.
        owners: (module, attribute) for every place that holds it.
    """

    __slots__ = ("_nothing", "_owners", "_plain", "_resting", "name", "shape_dtype")

    def __init__(self, name: str, resting: nn.Parameter, owners: Sequence[tuple[nn.Module, str]]) -> None:
        self.name = name
        self.shape_dtype = (tuple(resting.shape), resting.dtype)
        self._resting = resting
        with torch.inference_mode(False):
            self._nothing = torch.empty(0, dtype=resting.dtype, device="cpu")
            self._plain = nn.Parameter(self._nothing, requires_grad=False)
        # Weak: the modules hold the hooks, the hooks hold this, and a model that nobody holds must go at once.
        self._owners = [(weakref.ref(module), attribute) for module, attribute in owners]
        self.release()

    def is_unchanged(self) -> bool:
        """Whether the resting parameter still stands at its places."""
        return all(
            module is None or module._parameters.get(attribute) is self._resting
            for module, attribute in ((reference(), attribute) for reference, attribute in self._owners)
        )

    def bind(self, view: torch.Tensor) -> None:
        self._plain.data = view
        self._put(self._plain)

    def settle(self, tensor: torch.Tensor) -> None:
        """Put a plain Parameter with `tensor` at the places for good, unless somebody else did."""
        if self.is_unchanged():
            self.bind(tensor)

    def release(self) -> None:
        self._put(self._resting)
        self._plain.data = self._nothing

    def _put(self, parameter: nn.Parameter) -> None:
        for reference, attribute in self._owners:
            module = reference()
            if module is not None:
                module._parameters[attribute] = parameter


Binding = DataBinding | EntryBinding


def views_of(
    bindings: Sequence[Binding], places: Mapping[str, int], memory: Arena | DeviceMemory
) -> list[torch.Tensor]:
    """A tensor per binding that shows its parameter in `memory`; made once, outside inference mode (see design of slots)."""
    views = []
    with torch.inference_mode(False), torch.no_grad():
        for binding in bindings:
            shape, dtype = binding.shape_dtype
            views.append(view_in(memory.tensor, places[binding.name], shape, dtype))
    return views


def view_in(memory: torch.Tensor, at_byte: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of `shape` and `dtype` over bytes of `memory` (uint8) from `at_byte` on."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    return memory[at_byte : at_byte + nbytes].view(dtype).view(shape)
