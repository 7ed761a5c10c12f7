"""Sources applied by hand: the plainest reading of what they say, to compare everything else with."""

from __future__ import annotations

import math

import torch
from torch import nn

from bigmodel.checkpoint import Source, TensorSpec


def read(spec: TensorSpec) -> torch.Tensor:
    """The stored tensor, read whole."""
    with open(spec.file, "rb") as file:
        file.seek(spec.offset)
        data = bytearray(file.read(spec.nbytes))
    assert len(data) == spec.nbytes
    return (
        torch.frombuffer(data, dtype=spec.dtype).view(spec.shape) if data else torch.empty(spec.shape, dtype=spec.dtype)
    )


def assemble(source: Source) -> torch.Tensor:
    """The tensor that a Source describes; every byte of it must be written exactly once."""
    if source.conversion is not None:
        assert not source.extents
        made = source.conversion.run({spec.name: read(spec) for spec in source.conversion.inputs})
        assert set(made) == set(source.conversion.outputs)
        return made[source.name].to(source.dtype)
    flat = torch.zeros(math.prod(source.shape) * source.stored_dtype.itemsize, dtype=torch.uint8)
    end = 0
    for extent in source.extents:
        assert extent.into == end
        assert extent.nbytes > 0
        end = extent.into + extent.nbytes
        flat[extent.into : end] = read(TensorSpec("", torch.uint8, (extent.nbytes,), extent.file, extent.offset))
    assert end == flat.numel()
    return flat.view(source.stored_dtype).view(source.shape).to(source.dtype)


def fill(model: nn.Module, sources: dict[str, Source]) -> nn.Module:
    """Puts what `sources` describe into a model, at every name that a parameter has."""
    for name, source in sources.items():
        tensor = assemble(source)
        assert (tensor.shape, tensor.dtype) == (source.shape, source.dtype)
        if name in dict(model.named_buffers()):
            model.get_buffer(name).copy_(tensor)
            continue
        old, new = model.get_parameter(name), nn.Parameter(tensor, requires_grad=False)
        assert old.device.type == "meta"
        for module in model.modules():
            for key, parameter in module.named_parameters(recurse=False):
                if parameter is old:
                    setattr(module, key, new)
    return model
