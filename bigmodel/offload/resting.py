"""Weights at rest: outside its unit's forward a streamed parameter shows its true bytes where they live.

Two ways, and one rule that chooses: a parameter whose bytes stand in one range of a file, in its own dtype, is a view
of a map of that file (`FileMap`); any other is a `RestingTensor`, which knows how to read itself and holds nothing.
During a pass the streamer puts a plain parameter in place of either, so neither needs to be fast.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.utils import _pytree

from bigmodel.checkpoint.spec import Source
from bigmodel.errors import ReadError, WeightNotResidentError
from bigmodel.offload.file_map import FileMap, mapped_files
from bigmodel.offload.spill import Spill, trim_heap

__all__ = ["FileMap", "RestingTensor", "files_in_use", "resting_parameter"]

_TRIM_BYTES = 1 << 20


def resting_parameter(
    source: Source,
    read: Callable[[Source], torch.Tensor],
    name: str,
    device: torch.device | str,
    *,
    spill: Spill | None = None,
) -> nn.Parameter:
    """A parameter that no single view can show: it costs no memory, and any use of it reads its true bytes.

    Args:
        source: where the bytes are.
        read: gives them as a fresh CPU tensor of the source's dtype and shape; it may raise WeightNotResidentError
            where that would exceed the budget.
        name: the parameter's name, for errors.
        device: the device that it reports: the one its unit runs on.
        spill: where bytes go whose address is asked for; None for the system's temporary folder.

    Returns:
        A parameter (`isinstance(p, nn.Parameter)`) without gradient. Values come in fresh CPU memory that lives as
        long as its user holds it. Writing to it raises WeightNotResidentError. `detach()`, `.data`, views and
        `state_dict()` stay unread until they are used.
    """
    with torch.inference_mode(False):
        if source.nbytes == 0:
            return nn.Parameter(torch.empty(source.shape, dtype=source.dtype, device=device), requires_grad=False)
        origin = _Origin(name, source.dtype, source.shape, lambda: read(source), spill or _default_spill)
        origin.files = frozenset(
            [extent.file for extent in source.extents]
            + [spec.file for spec in (source.conversion.inputs if source.conversion else ())]
        )
        _origins.add(origin)
        resting = _wrap(origin, torch.empty(source.shape, dtype=source.dtype, device="meta"), torch.device(device))
        resting._is_param = True  # torch's own mark of a parameter whose class is not Parameter
        return cast(nn.Parameter, resting)


def files_in_use() -> frozenset[str]:
    """Absolute paths of the files from which weights at rest are read in this process."""
    return mapped_files().union(*(origin.files for origin in list(_origins)))


class _Origin:
    """How the bytes of one resting parameter are read; shared by everything that was derived from it by a view."""

    def __init__(
        self, name: str, dtype: torch.dtype, shape: Sequence[int], read: Callable[[], torch.Tensor], spill: Spill
    ) -> None:
        self.name, self.dtype, self.shape = name, dtype, torch.Size(shape)
        self.files: frozenset[str] = frozenset()
        self.spill = spill
        self._read = read
        self._lock = threading.Lock()
        self._spilled: weakref.ref[torch.Tensor] | None = None

    def fresh(self) -> torch.Tensor:
        """All bytes, uint8 and flat, in memory of their own."""
        # The caller may be inside autocast or a device context; the bytes are the same everywhere.
        with torch.device("cpu"), torch.autocast("cpu", enabled=False):
            value = self._read()
        if value.shape != self.shape or value.dtype != self.dtype or value.device.type != "cpu":
            raise ReadError(
                f"{self.name} was read as {value.dtype} {tuple(value.shape)} on {value.device} and is {self.dtype} "
                f"{tuple(self.shape)}: its files do not give what they gave at load. Load the model again."
            )
        return value.detach().contiguous().view(-1).view(torch.uint8)

    def spilled(self) -> torch.Tensor:
        """All bytes, uint8 and flat, at one address: the same for all who hold it at the same time."""
        with self._lock:
            flat = self.held()
            if flat is None:
                with torch.inference_mode(False), torch.no_grad():
                    flat = self.spill.hold(self.fresh(), self.name)
                self._spilled = weakref.ref(flat)
                if flat.nbytes >= _TRIM_BYTES:
                    trim_heap()
            return flat

    def held(self) -> torch.Tensor | None:
        """What `spilled` gave, while somebody holds it."""
        flat = self._spilled() if self._spilled is not None else None
        # Somebody may have freed the storage by hand.
        return flat if flat is not None and flat.untyped_storage().nbytes() >= flat.nbytes else None


class RestingTensor(torch.Tensor):
    """A resting parameter, or what `detach` or a view made of it: dtype, shape, strides, and an origin to read from.

    Two layers see every use. `__torch_dispatch__` sees each operator: it reads the bytes, runs the operator on them
    and gives a plain result; it is below autograd, so that gradients of other tensors stay right. `__torch_function__`
    sees what never becomes an operator: pointers, numpy, `.data`.
    """

    _origin: _Origin
    _held: torch.Tensor | None  # its origin's bytes at one address, from when an address was asked for
    _is_param: bool = False

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        self = args[0] if args and isinstance(args[0], RestingTensor) else None
        if self is not None:
            if func in _POINTERS:
                return func(_held(self), *args[1:], **kwargs)
            if func in _VALUES:
                return func(_value(self), *args[1:], **kwargs)
            if func in _WRITES:
                raise _write_refused(self, getattr(func, "__name__", str(func)))
            if func == _GET_DATA:
                return self.detach()
            if func is torch.Tensor.contiguous and not args[1:] and not kwargs and not self.is_contiguous():
                return _packed(self)
            if func in _MOVES and self.device.type != "cpu":
                # What a resting tensor reads is on the CPU, whatever device it reports: a move starts there.
                return func(_elsewhere(self, torch.device("cpu")), *args[1:], **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own annotation leaves out the operator
        cls,
        func: Any,
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        resting: dict[int, RestingTensor] = {}
        _pytree.tree_map_only(RestingTensor, lambda t: resting.setdefault(id(t), t), (args, kwargs))
        _refuse_writes(func, args, kwargs)
        # Under inference_mode operators such as `to` come here whole: they may view, copy or cast, and are run on values.
        is_view = func.is_view and not func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
        if is_view and len(resting) == 1 and args and isinstance(args[0], RestingTensor):
            derived = _view(args[0], func, args[1:], kwargs)
            if derived is not None:
                return derived
        if func is torch.ops.aten.clone.default and not kwargs:
            return _value(args[0])  # fresh as it is: a second copy would double the memory
        values = {key: _value(tensor) for key, tensor in resting.items()}
        args, kwargs = _pytree.tree_map_only(RestingTensor, lambda t: values[id(t)], (args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(_plain(self, _value(self)))

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            memo[id(self)] = _plain(self, _value(self))
        return cast(torch.Tensor, memo[id(self)])

    def __reduce_ex__(self, protocol: Any) -> Any:
        data = _held(self)
        if not self._is_param:
            return data.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]
        return torch._utils._rebuild_parameter, (data, self.requires_grad, OrderedDict())


_origins: weakref.WeakSet[_Origin] = weakref.WeakSet()
_default_spill = Spill()

_GET_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_POINTERS = frozenset(
    {torch.Tensor.data_ptr, torch.Tensor.untyped_storage, torch.Tensor.storage, torch.Tensor._typed_storage}
)
_VALUES = frozenset(
    {
        torch.Tensor.numpy,
        torch.Tensor.tolist,
        torch.Tensor.__array__,
        torch.Tensor.__repr__,
        torch.Tensor.__format__,
        torch.Tensor.__dlpack__,
        torch.Tensor.is_shared,
    }
)
_MOVES = frozenset({torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda})
_WRITES = frozenset(
    {
        torch.Tensor.data.__set__,  # type: ignore[attr-defined]
        torch.Tensor.apply_,
        torch.Tensor.map_,
        torch.Tensor.map2_,
        torch.Tensor.share_memory_,
    }
)


def _wrap(origin: _Origin, geometry: torch.Tensor, device: torch.device) -> RestingTensor:
    """A resting tensor of the dtype, shape, strides and offset of a (meta) tensor."""
    with torch.inference_mode(False):  # also a view made inside it: autograd wants both of a kind
        wrapped: RestingTensor = torch.Tensor._make_wrapper_subclass(
            RestingTensor,
            geometry.shape,
            strides=geometry.stride(),
            storage_offset=geometry.storage_offset(),
            dtype=geometry.dtype,
            device=device,
            requires_grad=False,
        )
    # What asks for the address below both layers (DLPack's oldest entry) gets an error, not a null pointer.
    torch._C._set_throw_on_mutable_data_ptr(wrapped)
    wrapped._origin, wrapped._held = origin, None
    return wrapped


def _shaped(tensor: RestingTensor, flat: torch.Tensor) -> torch.Tensor:
    """What `tensor` is of the flat bytes of its origin."""
    return flat.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _value(tensor: RestingTensor) -> torch.Tensor:
    """The true values in fresh CPU memory, no more of it than they need."""
    with torch.no_grad():
        held = tensor._origin.held()
        if held is not None:
            return _shaped(tensor, held).clone()
        flat = tensor._origin.fresh()
        value = _shaped(tensor, flat)
        return value if 2 * value.nbytes > flat.nbytes else value.clone()


def _held(tensor: RestingTensor) -> torch.Tensor:
    """The true values at an address that stays as long as `tensor` does, for those who take the address only."""
    tensor._held = tensor._origin.spilled()
    with torch.inference_mode(False), torch.no_grad():
        return _shaped(tensor, tensor._held)


def _plain(tensor: RestingTensor, value: torch.Tensor) -> torch.Tensor:
    """`value` as what `tensor` is: a parameter or not."""
    return nn.Parameter(value, requires_grad=tensor.requires_grad) if tensor._is_param else value


def _elsewhere(tensor: RestingTensor, device: torch.device) -> RestingTensor:
    return _wrap(tensor._origin, _geometry(tensor), device)


def _packed(tensor: RestingTensor) -> RestingTensor:
    """`tensor.contiguous()`, unread: a writer asks it of every tensor before it writes the first."""
    origin = _Origin(
        tensor._origin.name, tensor.dtype, tensor.shape, lambda: _value(tensor).contiguous(), tensor._origin.spill
    )
    return _wrap(origin, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), tensor.device)


def _geometry(tensor: RestingTensor) -> torch.Tensor:
    """A meta tensor that lies in its storage as `tensor` lies in its origin's bytes."""
    origin = tensor._origin
    num_elements = origin.shape.numel() * origin.dtype.itemsize // tensor.dtype.itemsize
    return torch.empty(num_elements, dtype=tensor.dtype, device="meta").as_strided(
        tensor.shape, tensor.stride(), tensor.storage_offset()
    )


def _view(tensor: RestingTensor, func: Any, rest: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of a view operator, unread; None where strides alone cannot say what it is."""
    geometry = _geometry(tensor)
    results = func(geometry, *rest, **kwargs)
    many = isinstance(results, (list, tuple))
    storage = geometry.untyped_storage()._cdata
    if any(result.untyped_storage()._cdata != storage for result in (results if many else [results])):
        return None
    if any(result.is_conj() or result.is_neg() for result in (results if many else [results])):
        return None
    if not many:
        return _wrap(tensor._origin, results, tensor.device)
    return type(results)(_wrap(tensor._origin, result, tensor.device) for result in results)


def _refuse_writes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    if not func._schema.is_mutable:
        return
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        written = args[index] if index < len(args) else kwargs.get(argument.name)
        for value in written if isinstance(written, (list, tuple)) else [written]:
            if isinstance(value, RestingTensor):
                raise _write_refused(value, str(func))


def _write_refused(tensor: RestingTensor, operation: str) -> WeightNotResidentError:
    return WeightNotResidentError(
        f"{tensor._origin.name} cannot be written to ({operation}): its bytes rest in the checkpoint's files and are "
        f"only read. Call bigmodel.materialize to have the weights in memory, or write to a clone."
    )
