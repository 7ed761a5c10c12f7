"""Products of linear layers in float8, by torchao; the only file that knows it."""

from __future__ import annotations

import torch
from torch import nn

from bigmodel.errors import InvalidArgumentError
from bigmodel.models import owners_of

__all__ = ["refuse_float8", "use_float8"]

_AMD = ("gfx942", "gfx950", "gfx1200", "gfx1201")
_LEAST = (8, 9)  # compute capability from which NVIDIA's devices multiply float8
_MULTIPLE = 16  # of both sizes of a weight that their kernels take


def refuse_float8(device: torch.device, *, emulates: bool) -> None:
    """InvalidArgumentError where float8 cannot be had on a device, naming what can."""
    others = 'Give precision="bf16", or engine_options={"emulate_float8": True} to see what it does to a loss.'
    if not emulates:
        if device.type != "cuda":
            raise InvalidArgumentError(f'precision is "fp8", and a {device.type} does not multiply float8. {others}')
        properties = torch.cuda.get_device_properties(device)
        architecture = str(getattr(properties, "gcnArchName", "")).split(":")[0]
        is_there = architecture in _AMD if torch.version.hip else (properties.major, properties.minor) >= _LEAST
        if not is_there:
            what = architecture or f"compute capability {properties.major}.{properties.minor}"
            raise InvalidArgumentError(
                f'precision is "fp8", and {properties.name} ({what}) does not multiply float8. {others}'
            )
    try:
        import torchao.float8  # noqa: F401
    except ImportError as error:
        raise InvalidArgumentError(
            'precision is "fp8", which is torchao\'s, and it is not installed. Run pip install "bigmodel[training]", or give '
            'precision="bf16".'
        ) from error


def use_float8(module: nn.Module, *, emulates: bool) -> list[str]:
    """Let linear layers multiply in float8, with scales of whole tensors found in each pass; in place.

    Parameters stay as they are, and under their names. The output head stays as it is, as do layers that share a weight, and
    those of other sizes than multiples of 16.

    Args:
        module: the model.
        emulates: whether float8 is only rounded to, on any device.

    Returns:
        The names of the layers.

    Raises:
        InvalidArgumentError: there is none.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    given = getattr(module, "get_output_embeddings", None)
    head = given() if callable(given) else None
    owners = owners_of(module)
    chosen: list[str] = []

    def fits(layer: nn.Module, name: str) -> bool:
        is_one = (
            type(layer) is nn.Linear
            and layer is not head
            and len(owners[id(layer.weight)]) == 1
            and not any(size % _MULTIPLE for size in layer.weight.shape)
        )
        chosen.extend([name] if is_one else [])
        return is_one

    # Numbers of tokens are of any size: the gradient of a weight is a product over them.
    settings = Float8LinearConfig(emulate=emulates, pad_inner_dim=True)
    convert_to_float8_training(module, module_filter_fn=fits, config=settings)
    if not chosen:
        raise InvalidArgumentError(
            f'precision is "fp8", and no linear layer of the {type(module).__name__} has sizes that are multiples of '
            f'{_MULTIPLE}. Give precision="bf16".'
        )
    return chosen
