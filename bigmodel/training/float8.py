"""Products of linear layers in float8, by torchao; the only file that knows it."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from bigmodel.errors import InvalidArgumentError

__all__ = ["refuse_float8", "use_float8"]

_LEAST = (8, 9)  # compute capability from which NVIDIA's devices multiply float8
_MULTIPLE = 16  # of both sizes of a weight that their kernels take


def refuse_float8(device: torch.device) -> None:
    """InvalidArgumentError where float8 cannot be had on a device, naming what can."""
    others = 'Give precision="bf16".'
    if device.type != "cuda":
        raise InvalidArgumentError(f'precision is "fp8", and a {device.type} does not multiply float8. {others}')
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < _LEAST:
        raise InvalidArgumentError(
            f'precision is "fp8", and {torch.cuda.get_device_name(device)} has compute capability '
            f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}; float8 needs "
            f"{'.'.join(map(str, _LEAST))}. {others}"
        )
    try:
        import torchao.float8  # noqa: F401
    except ImportError as error:
        raise InvalidArgumentError(
            'precision is "fp8", which is torchao\'s, and it is not installed. Run pip install "bigmodel[training]", or give '
            'precision="bf16".'
        ) from error


def use_float8(module: nn.Module, groups: Collection[nn.Module], *, emulates: bool = False) -> list[str]:
    """Let the linear layers inside these modules multiply in float8, with scales of whole tensors found in each pass; in place.

    Parameters stay as they are, and under their names. Layers of other sizes than multiples of 16 stay as they are too, as does
    what is outside, such as an output head.

    Args:
        module: the model.
        groups: its repeated modules.
        emulates: whether float8 is only rounded to, on any device.

    Returns:
        The names of the layers.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    inside = {each for group in groups for each in group.modules()}
    chosen: list[str] = []

    def fits(layer: nn.Module, name: str) -> bool:
        is_one = (
            layer in inside and type(layer) is nn.Linear and not any(size % _MULTIPLE for size in layer.weight.shape)
        )
        chosen.extend([name] if is_one else [])
        return is_one

    convert_to_float8_training(module, module_filter_fn=fits, config=Float8LinearConfig(emulate=emulates))
    if not chosen:
        raise InvalidArgumentError(
            f'precision is "fp8", and no linear layer of the {type(module).__name__}\'s repeated modules has sizes that are '
            f'multiples of {_MULTIPLE}. Give precision="bf16".'
        )
    return chosen
