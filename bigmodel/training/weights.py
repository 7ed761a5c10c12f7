"""Where a run's weights come from, and how each process gets the part that it holds: from a checkpoint it reads no more."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from bigmodel.checkpoint import Checkpoint, Conversion, Extent, Source, open_checkpoint
from bigmodel.checkpoint.stamp import FileStamp
from bigmodel.device_map.unit import find_units
from bigmodel.errors import InvalidArgumentError
from bigmodel.loading.assembled import assembled
from bigmodel.models import (
    adapt,
    build_skeleton,
    leave_heads,
    load_generation_config,
    owners_of,
    trains_adapters_alone,
)
from bigmodel.offload.resident import ResidentLoad
from bigmodel.progress import Report
from bigmodel.training.quantized import Quantized, keep_trained, quantize

__all__ = ["Origin", "part_of", "put", "with_masters"]

_BATCH_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A model to train, before any process holds its part.

    Attributes:
        module: parameters on meta where a checkpoint has them, else real; buffers real, on the CPU.
        sources: first name of a parameter or persistent buffer -> where its bytes are.
        stamps: of the checkpoint's files.
        stored_dtypes: first name -> dtype that `export` writes.
        no_split: class names of modules that are kept whole.
        path: of the checkpoint; None for a module of the user's.
        streams: whether it is a model that `load_sharded` gave, whose weights stay where its plan has them.
    """

    module: nn.Module
    sources: Mapping[str, Source] = field(default_factory=dict)
    stamps: Mapping[str, FileStamp] = field(default_factory=dict)
    stored_dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    no_split: frozenset[str] = frozenset()
    path: Path | None = None
    streams: bool = False

    @classmethod
    def of(
        cls,
        model: str | os.PathLike[str] | nn.Module,
        *,
        adapter: Any = None,
        quantize_base: str | None = None,
        trust_remote_code: bool = False,
    ) -> Origin:
        """Opens a checkpoint and builds its module, reading headers only; or takes the user's module as it is.

        Args:
            adapter: what is put around it, of which alone is trained, as in `adapt`; None for nothing.
            quantize_base: of a TrainingConfig.

        Raises:
            As `load_sharded`, for a checkpoint, and as `adapt` and `quantize`.
            InvalidArgumentError: neither a path nor a module whose weights are in memory; or there is nothing to be quantised
                under an adapter as it is read.
        """
        if quantize_base is not None and (adapter is None or isinstance(model, nn.Module)):
            raise InvalidArgumentError(
                f'quantize_base is "{quantize_base}", and '
                + (
                    "the model is in memory: weights are quantised as they are read. Give the folder of its checkpoint."
                    if isinstance(model, nn.Module)
                    else "there is no adapter: what is in 4 bits is not trained. Give adapter=peft.LoraConfig(...)."
                )
            )
        if isinstance(model, nn.Module):
            streams = _is_hooked(model)
            away = [name for name, parameter in model.named_parameters() if parameter.is_meta]
            if away:
                raise InvalidArgumentError(
                    f"{len(away)} parameters of the model are on meta, such as {away[0]}. Give the folder of its checkpoint, or "
                    "a module whose weights are in memory."
                )
            dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
            found = cls(
                module=model,
                stored_dtypes=dtypes,
                no_split=frozenset(getattr(model, "_no_split_modules", None) or ()),
                streams=streams,
            )
            found = found if adapter is None else found._adapted(adapter)
            if streams:
                _refuse_whole(found.module)
            return found
        if not isinstance(model, (str, os.PathLike)):
            raise InvalidArgumentError(
                f"model is a {type(model).__name__}. Give a folder, a Hub repo id or an nn.Module."
            )
        checkpoint: Checkpoint = open_checkpoint(model)
        skeleton = build_skeleton(checkpoint, trust_remote_code=trust_remote_code)
        load_generation_config(skeleton.model, checkpoint, trust_remote_code=trust_remote_code)
        leave_heads(skeleton.model)  # for weights that are not trained
        skeleton.model.requires_grad_(True).train()
        found = cls(
            module=skeleton.model,
            sources=skeleton.sources,
            stamps=checkpoint.stamps,
            stored_dtypes={name: parameter.dtype for name, parameter in skeleton.model.named_parameters()},
            no_split=skeleton.no_split,
            path=Path(checkpoint.path),
        )
        if quantize_base is not None:
            listed = {each for those in found.module.modules() if isinstance(those, nn.ModuleList) for each in those}
            blocks = [each for each in found.groups() if each in listed or type(each).__name__ in skeleton.no_split]
            quantize(found.module, blocks, quantize_base)
        return found if adapter is None else found._adapted(adapter)

    def _adapted(self, adapter: Any) -> Origin:
        """With an adapter around the module, and what was known of its weights by their new names."""
        module, names = adapt(self.module, adapter)
        keep_trained(module)
        in_4_bits = any(isinstance(each, Quantized) for each in module.modules())
        for each in getattr(module, "peft_config", {}).values() if in_4_bits else ():
            for asked in ("use_dora", "target_parameters"):
                if getattr(each, asked, None):
                    raise InvalidArgumentError(
                        f"The adapter has {asked}, which computes with the base's weights themselves, and they are kept in 4 "
                        "bits. Leave it out, or leave quantize_base out."
                    )
        dtypes = {name: each.dtype for name, each in module.named_parameters()}
        dtypes |= {new: self.stored_dtypes[old] for new, old in names.items() if old in self.stored_dtypes}
        return replace(self, module=module, sources=_renamed(self.sources, names), stored_dtypes=dtypes)

    def groups(self, policy: Sequence[str] | Callable[[str, nn.Module], bool] | None = None) -> list[nn.Module]:
        """The modules whose weights are gathered together, in the model's order; the rest goes with the root.

        Args:
            policy: names of classes, or what tells whether a module is one, of its name and itself. The cost model's units if
                None; of those, what encloses others, or is shared, goes with the root, and so does a single layer of less
                than a hundredth of the largest one's bytes, such as a norm: sending it alone costs a round trip.

        Raises:
            InvalidArgumentError: no module is one, one is inside another, or one shares a weight with what is outside.
        """
        owners, found = owners_of(self.module), []

        def is_closed(module: nn.Module) -> bool:
            inside = set(module.modules())
            return all(owner in inside for each in module.parameters() for owner, _ in owners[id(each)])

        if policy is None:
            for unit in find_units(self.module, no_split=self.no_split):
                if len(unit.sites) == 1 and unit.sites[0] and not unit.encloses:
                    module = self.module.get_submodule(unit.sites[0])
                    found += [module] if is_closed(module) else []
            sizes = [sum(each.nbytes for each in module.parameters()) for module in found]
            most = max(sizes, default=0)
            return [
                module
                for module, size in zip(found, sizes, strict=True)
                if any(True for _ in module.children()) or 100 * size >= most
            ]
        for name, module in self.module.named_modules():
            if name and (policy(name, module) if callable(policy) else type(module).__name__ in policy):
                if any(module in set(other.modules()) for other in found):
                    raise InvalidArgumentError(
                        f"units has {name}, which is inside another of them. Give the outer ones."
                    )
                if not is_closed(module):
                    raise InvalidArgumentError(
                        f"units has {name}, which shares a weight with a module outside of it. Leave it out: what is shared is "
                        "gathered with the root."
                    )
                found.append(module)
        if not found:
            wanted = "what the function tells" if callable(policy) else ", ".join(policy)
            raise InvalidArgumentError(
                f"units is {wanted}, and the {type(self.module).__name__} has no such module. Its repeated ones are: "
                f"{', '.join(sorted(self.no_split)) or 'not named'}."
            )
        return found

    def fill(self, device: torch.device, progress: Report | None = None, *, home: torch.device | None = None) -> None:
        """Give every parameter on meta what this process holds of it, in the dtype that it has, and buffers what is stored.

        Of a parameter that is a DTensor only this process's rows are read.

        Args:
            device: that computes.
            progress: of what is read.
            home: where DTensors lie between passes; `device` if None.

        Raises:
            ReadError: a file could not be read, or changed since its header was checked.
        """
        owners = owners_of(self.module)
        parameters = {name: each for name, each in self.module.named_parameters() if each.is_meta}
        wanted = {name: (*_range(each), each.dtype) for name, each in parameters.items()}
        for tensors in self.values(wanted, progress):
            places: set[int] = set()
            for name, values in tensors.items():
                if values.data_ptr() in places:  # a copy that is trained, and what it is a copy of
                    values = values.clone()
                places.add(values.data_ptr())
                layer, attribute = owners[id(parameters[name])][0]
                if isinstance(layer, Quantized) and attribute == "weight":
                    layer.take(values.to(device))
                    for other, _ in owners[id(parameters[name])][1:]:  # an adapter's copies of a layer
                        other.weight, other.state = layer.weight, layer.state
                    continue
                is_part = isinstance(parameters[name].data, DTensor)
                put(parameters[name], values.to(home if is_part and home is not None else device), owners)
        self.fill_buffers(device)

    def fill_buffers(self, device: torch.device) -> None:
        """Give buffers what is stored."""
        buffers = [source for name, source in self.sources.items() if name in dict(self.module.named_buffers())]
        load = ResidentLoad(buffers, stamps=self.stamps, may_map=False)
        with torch.no_grad():
            for name, tensor in load.finish().items():
                self.module.get_buffer(name).copy_(tensor)
        for owner in self.module.modules():
            for key, buffer in owner._buffers.items():
                if buffer is not None and buffer.device != device:
                    owner._buffers[key] = buffer.to(device)

    def values(
        self, wanted: Mapping[str, tuple[int, int, torch.dtype]], progress: Report | None = None
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Reads ranges of parameters' values in row-major order, some parameters after the others.

        Args:
            wanted: name -> first value, the one after the last, and the dtype that they are wanted in.

        Yields:
            Name -> values, ``[number of values]``, on the CPU. What is put together by arithmetic is made whole first, one
            unit at a time.
        """
        plain, converted = [], {}
        for name, (start, stop, dtype) in wanted.items():
            source = replace(self.sources[name], dtype=dtype)
            if start >= stop:
                yield {name: torch.empty(0, dtype=dtype)}
            elif source.conversion is not None:
                converted[name] = source
            else:
                plain.append(part_of(source, start, stop))
        total, done = sum(part.nbytes for part in plain), 0
        for parts in _batches(plain):

            def told(phase: str, now: int, of: int, before: int = done) -> None:
                if progress is not None:
                    progress(phase, before + now, max(total, before + of))

            yield ResidentLoad(parts, stamps=self.stamps, may_map=False, progress=told).finish()
            done += sum(part.nbytes for part in parts)
        while converted:
            first = next(iter(converted.values()))
            assert first.conversion is not None
            together = [converted.pop(name) for name in first.conversion.outputs if name in converted]
            made = ResidentLoad(together, stamps=self.stamps, may_map=False).finish()
            yield {name: tensor.reshape(-1)[slice(*wanted[name][:2])].clone() for name, tensor in made.items()}

    def whole(self, name: str) -> torch.Tensor:
        """A parameter as the checkpoint has it, in the dtype that it is stored in."""
        source = self.sources[name]
        (found,) = self.values({name: (0, math.prod(source.shape), self.stored_dtypes[name])})
        return found[name].view(source.shape)


def _renamed(sources: Mapping[str, Source], names: Mapping[str, str]) -> dict[str, Source]:
    """Sources by new names, of which several may mean one old name."""
    news: dict[str, list[str]] = {}
    for new, old in names.items():
        news.setdefault(old, []).append(new)
    made: dict[int, Conversion] = {}

    def renamed(conversion: Conversion) -> Conversion:
        pairs = [(new, old) for old in conversion.outputs for new in news.get(old, ())]

        def run(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            found = conversion.run(tensors)
            return {new: found[old] for new, old in pairs}

        return replace(conversion, outputs=tuple(new for new, _ in pairs), run=run)

    found = {}
    for new, old in names.items():
        source = sources.get(old)
        if source is None:
            continue
        if source.conversion is not None and id(source.conversion) not in made:
            made[id(source.conversion)] = renamed(source.conversion)
        conversion = None if source.conversion is None else made[id(source.conversion)]
        found[new] = replace(source, name=new, conversion=conversion)
    return found


def part_of(source: Source, start: int, stop: int) -> Source:
    """A range of a parameter's values in row-major order, as a source of one dimension under the same name."""
    begin, end = start * source.stored_dtype.itemsize, stop * source.stored_dtype.itemsize
    extents = []
    for extent in source.extents:
        low, high = max(begin, extent.into), min(end, extent.into + extent.nbytes)
        if low < high:
            extents.append(Extent(extent.file, extent.offset + low - extent.into, high - low, low - begin))
    return replace(source, shape=(stop - start,), extents=tuple(extents))


def _batches(parts: Sequence[Source]) -> Iterator[list[Source]]:
    """Of at least so many bytes each: enough for the disk to be busy."""
    batch: list[Source] = []
    for part in parts:
        batch.append(part)
        if sum(each.nbytes for each in batch) >= _BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def with_masters(module: nn.Module) -> None:
    """Makes every parameter that is trained float32; what is frozen keeps its dtype. In place, one parameter at a time."""
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.is_floating_point() and parameter.itemsize < 4:
            parameter.data = parameter.data.to(torch.float32)


def _is_hooked(model: nn.Module) -> bool:
    """Whether `load_sharded` gave it and still holds it: its weights stream, or lie on several devices, or it is budgeted."""
    try:
        return assembled(model)[1].attachment is not None
    except InvalidArgumentError:
        return False  # somebody else's


def _refuse_whole(model: nn.Module) -> None:
    """InvalidArgumentError where more is trained than what was put around a model that `load_sharded` holds."""
    if trains_adapters_alone(model):
        return
    state = assembled(model)[1]
    call = "materialize" if state.streamed or getattr(model, "hf_device_map", None) else "unload"
    what = (
        "streams its weights or spans devices" if call == "materialize" else "has its passes checked against a budget"
    )
    raise InvalidArgumentError(
        f"The model {what}: only adapters are trained on it. Give adapter=peft.LoraConfig(...), call bigmodel.{call}(model) "
        'first, or give the folder of its checkpoint, of which each process reads its part (strategy="fsdp").'
    )


def _range(parameter: nn.Parameter) -> tuple[int, int]:
    """The values that this process holds: the first, and the one after the last. DTensors are divided by rows."""
    data: Any = parameter.data
    if not isinstance(data, DTensor):
        return 0, parameter.numel()
    shape, offset = compute_local_shape_and_global_offset(data.shape, data.device_mesh, data.placements)
    row = math.prod(data.shape[1:])
    return (offset[0] * row, (offset[0] + shape[0]) * row) if math.prod(shape) else (0, 0)


def put(parameter: nn.Parameter, values: torch.Tensor, owners: Mapping[int, Sequence[tuple[nn.Module, str]]]) -> None:
    """Puts a parameter with these values, flattened, at every place that held the one on meta, with its attributes."""
    data: Any = parameter.data
    value: torch.Tensor
    if isinstance(data, DTensor):
        rest = data.shape[1:]
        rows = values.numel() // math.prod(rest) if math.prod(rest) else 0
        local = values.view(rows, *rest)
        value = DTensor.from_local(
            local, data.device_mesh, data.placements, run_check=False, shape=data.shape, stride=data.stride()
        )
    else:
        value = values.view(parameter.shape)
    # Views of one buffer would share a version, which autograd looks at.
    new = nn.Parameter(value if isinstance(value, DTensor) else value.data, requires_grad=parameter.requires_grad)
    new.__dict__.update(parameter.__dict__)
    for module, attribute in owners[id(parameter)]:
        module._parameters[attribute] = new
