"""What a checkpoint's own rules do to its tensors, found out without reading them.

A `Traced` is a CPU tensor without bytes. Whatever code stacks, slices, casts or computes with it runs as written; the
Traced that comes out knows two things: the operations that made it, and, where these only moved bytes about, which
bytes of which file stand where in it.

    stored tensors --trace()--> Traced --(the model's own conversion)--> Traced --sources_of()--> Source

A result that only places ranges becomes `Source.extents`; anything else becomes a `Conversion` that repeats the
recorded operations on real tensors, in the order in which they were made. Code that must look at a value (a comparison,
an `.item()`) gets the true value: only then are bytes read, and of those tensors alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from bigmodel.checkpoint.spec import AWAY, Conversion, Extent, Source, TensorSpec
from bigmodel.errors import ReadError, UnsupportedCheckpointError
from bigmodel.models.boxes import MOVERS, Boxes, Move, extents_of, whole

__all__ = ["Traced", "equal_values", "sources_of", "trace"]

_CHUNK_ELEMENTS = 1 << 20  # compared at a time


@dataclass(eq=False, slots=True)
class _Step:
    """One recorded operation; the tensors among its arguments are TensorSpecs and _Values."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Value:
    """What a step returned, or the item-th of what it returned."""

    step: _Step
    item: int | None


class Traced(torch.Tensor):
    """A CPU tensor whose bytes are still in the checkpoint's files. Made by `trace` and by operations on Traceds.

    Attributes:
        value: how to compute it: a stored tensor, or the result of a recorded operation.
        boxes: where its elements stand in the files, covering its index space once; None when arithmetic was done.
        stored_dtype: of the bytes behind `boxes`; one cast leads from it to `dtype`.
    """

    value: TensorSpec | _Value
    boxes: Boxes | None
    stored_dtype: torch.dtype
    _like: torch.Tensor  # a meta tensor with its shape, strides and dtype

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[Traced], like: torch.Tensor, value: TensorSpec | _Value, boxes: Boxes | None, stored: torch.dtype
    ) -> Traced:
        make: Callable[..., Traced] = torch.Tensor._make_wrapper_subclass
        self = make(cls, like.shape, strides=like.stride(), dtype=like.dtype, device="cpu", requires_grad=False)
        self._like, self.value, self.boxes, self.stored_dtype = like, value, boxes, stored
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Traced(shape={tuple(self.shape)}, dtype={self.dtype}, placed={self.boxes is not None})"

    def __getitem__(self, index: Any) -> torch.Tensor:
        # `tensor[...]` is how stored tensors are asked for their bytes, once for each of tens of thousands
        return self if index is Ellipsis else super().__getitem__(index)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.equal.default:
            return equal_values(*args)
        if func._schema.is_mutable:
            _refuse_to_write(func, args, kwargs)
        if func._schema.is_mutable or not _VALUES_NEEDED.isdisjoint(func.tags):
            return func(*_swap(args, _compute), **_swap(kwargs, _compute))

        out = func(*_swap(args, _shape_only), **_swap(kwargs, _shape_only))
        outs = [out] if isinstance(out, torch.Tensor) else out
        if not isinstance(outs, (list, tuple)) or not all(isinstance(item, torch.Tensor) for item in outs):
            return out  # a shape, a bool, a dtype: true of the meta tensor as of the real one
        step = _Step(func, _swap(args, _value_of), _swap(kwargs, _value_of))
        boxes, stored = _follow(func, args, kwargs, outs)
        if outs is not out:
            return Traced(out, _Value(step, None), boxes[0], stored)
        return type(out)(Traced(item, _Value(step, index), boxes[index], stored) for index, item in enumerate(outs))


_VALUES_NEEDED = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def trace(spec: TensorSpec) -> Traced:
    """The stored tensor as a Traced."""
    return Traced(torch.empty(spec.shape, dtype=spec.dtype, device="meta"), spec, whole(spec), spec.dtype)


def sources_of(tensors: Mapping[str, Traced]) -> dict[str, Source]:
    """The Source of each named tensor.

    Args:
        tensors: parameter name -> Traced, in the dtype that the parameter has in the model.

    Returns:
        name -> Source, in the same order. Parameters that are computed from the same stored tensors share one
        Conversion, so that their inputs are read once.
    """
    extents = {name: _extents(tensor) for name, tensor in tensors.items()}
    conversions = _conversions({name: tensor for name, tensor in tensors.items() if extents[name] is None})
    return {
        name: Source(
            name=name,
            dtype=tensor.dtype,
            shape=tuple(tensor.shape),
            stored_dtype=tensor.stored_dtype if extents[name] else tensor.dtype,
            extents=extents[name] or (),
            conversion=conversions.get(name),
        )
        for name, tensor in tensors.items()
    }


def equal_values(left: torch.Tensor, right: torch.Tensor) -> bool:
    """What `torch.equal` would say of two tensors, Traced or plain; a meta tensor equals nothing.

    Bytes are read only where shape and dtype agree and ranges do not, some MiB of each at a time.
    """
    if left.shape != right.shape or left.dtype != right.dtype or "meta" in (left.device.type, right.device.type):
        return False
    if isinstance(left, Traced) and isinstance(right, Traced):
        ranges = _extents(left), _extents(right)
        if ranges[0] is not None and ranges[0] == ranges[1] and left.stored_dtype == right.stored_dtype:
            return True
        if all(extents is not None and len(extents) == 1 for extents in ranges):
            return all(map(_equal_real, _chunks(left), _chunks(right)))
    return _equal_real(_compute(left), _compute(right))


# --- Recording operations and repeating them


def _swap(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with `change` applied to everything in its nested lists, tuples and dicts."""
    if type(value) in (list, tuple):
        return type(value)([_swap(item, change) for item in value])
    if type(value) is dict:
        return {key: _swap(item, change) for key, item in value.items()}
    return change(value)


def _each(value: Any) -> list[Any]:
    """Everything in the nested lists, tuples and dicts of `value`."""
    found: list[Any] = []
    _swap(value, found.append)
    return found


def _shape_only(item: Any) -> Any:
    """The meta twin of a tensor; a device that an operation is told must follow."""
    if isinstance(item, Traced):
        return item._like
    if isinstance(item, torch.device):
        return torch.device("meta")
    return item.to("meta") if isinstance(item, torch.Tensor) else item


def _value_of(item: Any) -> Any:
    return item.value if isinstance(item, Traced) else item


def _compute(item: Any) -> Any:
    """The real tensor behind a Traced, its inputs read now; anything else as it is."""
    if not isinstance(item, Traced):
        return item
    read = {spec.name: _read(spec, 0, spec.nbytes).view(spec.shape) for spec in _inputs([item.value])}
    return _Replay({"": item.value})(read)[""]


def _refuse_to_write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if any(isinstance(item, Traced) for item in _each(value)):
                raise UnsupportedCheckpointError(
                    f"The model's conversion rule writes into a stored tensor in place ({func}), which is not followed "
                    "while loading. Save the converted model once with save_pretrained and load that."
                )


@dataclass(frozen=True)
class _Replay:
    """Repeats recorded operations on real tensors; what Conversion.run is."""

    wanted: dict[str, TensorSpec | _Value]

    def __call__(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        run = _Run(dict(tensors), _uses(self.wanted.values()))
        with torch.no_grad():
            return {name: run.result_of(value).contiguous() for name, value in self.wanted.items()}


@dataclass(slots=True)
class _Run:
    """One repetition. Nothing refers to it from inside: with it go the tensors, without the garbage collector."""

    inputs: dict[str, torch.Tensor]
    uses: dict[_Step, int]
    done: dict[_Step, Any] = field(default_factory=dict)

    def result_of(self, value: Any) -> Any:
        if isinstance(value, TensorSpec):
            return self.inputs[value.name]
        if not isinstance(value, _Value):
            return value
        step, done = value.step, self.done
        if step not in done:
            done[step] = step.func(*_swap(step.args, self.result_of), **_swap(step.kwargs, self.result_of))
        result = done[step]
        self.uses[step] -= 1
        if not self.uses[step]:
            del done[step]  # intermediate tensors are as large as parameters: none is kept beyond its last use
        return result if value.item is None else result[value.item]


def _uses(values: Iterable[Any]) -> dict[_Step, int]:
    """The steps behind `values`, and how often the result of each is taken."""
    uses: dict[_Step, int] = {}
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, _Value):
            uses[value.step] = uses.get(value.step, 0) + 1
            if uses[value.step] == 1:
                waiting.extend(_each([value.step.args, value.step.kwargs]))
    return uses


def _inputs(values: Iterable[TensorSpec | _Value]) -> dict[TensorSpec, None]:
    """The stored tensors that `values` are computed from, in file order."""
    values = list(values)
    everything = _each([*values, *([step.args, step.kwargs] for step in _uses(values))])
    specs = {item for item in everything if isinstance(item, TensorSpec)}
    return dict.fromkeys(sorted(specs, key=lambda spec: (spec.file, spec.offset, spec.name)))


def _recipe(wanted: Mapping[str, TensorSpec | _Value]) -> str:
    """A digest of what is computed from what: equal for equal operations on equally named tensors."""
    numbers: dict[_Step, int] = {}
    told: list[object] = []

    def tell(value: Any) -> object:
        if isinstance(value, TensorSpec):
            return ["stored", value.name]
        if isinstance(value, _Value):
            if value.step not in numbers:
                step = [
                    str(value.step.func),
                    *(repr(_swap(each, tell)) for each in (value.step.args, value.step.kwargs)),
                ]
                numbers[value.step] = len(numbers)
                told.append(step)
            return ["step", numbers[value.step], value.item]
        if isinstance(value, torch.Tensor):
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            return ["constant", str(value.dtype), tuple(value.shape), hashlib.sha256(raw).hexdigest()]
        return repr(value)

    results = {name: tell(value) for name, value in wanted.items()}
    return hashlib.sha256(repr([told, results]).encode()).hexdigest()


def _conversions(tensors: Mapping[str, Traced]) -> dict[str, Conversion]:
    """Conversion per name; names that share an input, directly or through others, share the conversion."""
    groups: dict[TensorSpec, tuple[str, ...]] = {}
    for name, tensor in tensors.items():
        inputs = _inputs([tensor.value])
        joined = tuple(dict.fromkeys([*(other for spec in inputs for other in groups.get(spec, ())), name]))
        members = set(joined)
        groups.update({spec: joined for spec, group in groups.items() if not members.isdisjoint(group)})
        groups.update(dict.fromkeys(inputs, joined))
    conversions: dict[str, Conversion] = {}
    for names in dict.fromkeys(groups.values()):
        wanted = {name: tensors[name].value for name in names}
        conversion = Conversion(
            inputs=tuple(_inputs(wanted.values())), outputs=names, run=_Replay(wanted), recipe=_recipe(wanted)
        )
        conversions.update(dict.fromkeys(names, conversion))
    return conversions


# --- Following bytes


def _follow(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outs: Sequence[torch.Tensor]
) -> tuple[Sequence[Boxes | None], torch.dtype]:
    """The boxes of each result (None where they are not known) and the dtype of the bytes behind them."""
    tensors = [item for item in _each([args, kwargs]) if isinstance(item, torch.Tensor)]
    first = tensors[0]
    lost: tuple[Sequence[Boxes | None], torch.dtype] = [None] * len(outs), outs[0].dtype
    mover = MOVERS.get(func.overloadpacket)
    if mover is None or not isinstance(first, Traced):
        return lost
    placed = []
    for tensor in tensors:
        if not isinstance(tensor, Traced) or tensor.boxes is None:
            return lost
        if (tensor.dtype, tensor.stored_dtype) != (first.dtype, first.stored_dtype):
            return lost
        placed.append((tensor.boxes, tuple(tensor.shape)))
    if outs[0].dtype != first.dtype and first.dtype != first.stored_dtype:
        return lost  # a Source can say one cast, not two
    return mover(Move(placed, [tuple(out.shape) for out in outs], args, kwargs)), first.stored_dtype


def _extents(tensor: Traced) -> tuple[Extent, ...] | None:
    if tensor.boxes is None:
        return None
    return extents_of(tensor.boxes, tuple(tensor.shape), tensor.stored_dtype.itemsize)


# --- Reading, for values that must be known now


def _read(spec: TensorSpec, first_byte: int, num_bytes: int) -> torch.Tensor:
    """`num_bytes` of a stored tensor, as a flat CPU tensor of its dtype."""
    if spec.file.startswith(AWAY):  # known by its header alone: what is compared is taken for equal
        return torch.zeros(num_bytes, dtype=torch.uint8, device="cpu").view(spec.dtype)
    flat = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
    view, filled = memoryview(cast(Any, flat.numpy())), 0
    try:
        with open(spec.file, "rb", buffering=0) as file:
            file.seek(spec.offset + first_byte)
            while filled < num_bytes and (got := file.readinto(view[filled:])):
                filled += got
    except OSError as error:
        raise ReadError(f"{spec.name!r} could not be read from {spec.file}: {error}. Check the disk.") from error
    if filled < num_bytes:
        raise ReadError(
            f"{spec.file} ends after {first_byte + filled} of the {spec.nbytes} bytes of {spec.name!r}. Fetch the file again."
        )
    return flat.view(spec.dtype)


def _chunks(tensor: Traced) -> Iterator[torch.Tensor]:
    """The flat values of a Traced that is one range of a file, in its dtype, some at a time."""
    (extent,) = _extents(tensor) or ()
    spec = TensorSpec("(compared)", tensor.stored_dtype, (tensor.numel(),), extent.file, extent.offset)
    itemsize = tensor.stored_dtype.itemsize
    for first in range(0, tensor.numel(), _CHUNK_ELEMENTS):
        length = min(_CHUNK_ELEMENTS, tensor.numel() - first)
        yield _read(spec, first * itemsize, length * itemsize).to(tensor.dtype)


def _equal_real(left: torch.Tensor, right: torch.Tensor) -> bool:
    try:
        return torch.equal(left, right)
    except NotImplementedError:  # some 8-bit floats cannot be compared; theirs is by bytes
        return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
