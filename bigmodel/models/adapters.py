"""Adapters on a frozen model: PEFT's, made where weights are on meta too. The only file that imports it."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigmodel.errors import InvalidArgumentError, MissingFilesError, join_some
from bigmodel.models.meta import owners_of

__all__ = [
    "ADAPTER_FILES",
    "adapt",
    "adapter_config",
    "adapter_nbytes",
    "adapter_tensors",
    "is_adapted",
    "load_adapter",
    "merge_adapter",
    "trains_adapters_alone",
]

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""Of a folder that PEFT reads."""
_DRAWN = (True, False, "gaussian")  # first values that no weight of the base is needed for


def is_adapted(model: nn.Module) -> bool:
    """Whether it is a PEFT model."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def trains_adapters_alone(model: nn.Module) -> bool:
    """Whether all that is trained is in LoRA layers, which compute in the adapters' dtype whatever the base's is."""
    if not is_adapted(model):
        return False
    from peft.tuners.lora import LoraLayer

    inside = {
        id(each)
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        for name, each in layer.named_parameters()
        if name.startswith("lora_")
    }
    return all(id(each) in inside for each in model.parameters() if each.requires_grad)


def adapt(model: nn.Module, adapter: Any) -> tuple[nn.Module, dict[str, str]]:
    """Put an adapter around a model, to be trained; the model's own parameters are frozen.

    Args:
        model: its parameters may be on meta.
        adapter: a `peft.LoraConfig` (of a model in memory any of PEFT's configurations), whose first values are drawn from
            torch's generator as it is; or the folder of an adapter, whose values are gone on with.

    Returns:
        The PEFT model, its adapters in memory in float32; and, for each name in it that means a parameter or buffer of the model
        that was given, or a copy of one to be trained, the name there.

    Raises:
        InvalidArgumentError: PEFT refuses the adapter for this model, or its first values are made of the model's weights, which
            are on meta.
        MissingFilesError: the folder holds no adapter.
    """
    config, folder = _config_of(adapter)
    if is_adapted(model):
        raise InvalidArgumentError("The model carries adapters, and adapter= was given beside it. Give one of them.")
    is_away = any(each.is_meta for each in model.parameters())
    if is_away:
        _refuse_made_of_weights(config)
    before = {id(each): name for name, each in _tensors(model)}
    from peft import get_peft_model
    from peft.utils.other import ModulesToSaveWrapper

    with _translated("PEFT refuses the adapter for this model"):
        around: nn.Module = get_peft_model(model, config)
    for wrapper in around.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for own in wrapper.modules_to_save.values():
                copies = dict(_tensors(own))
                before |= {
                    id(copies[name]): before[id(each)]
                    for name, each in _tensors(wrapper.original_module)
                    if name in copies and id(each) in before
                }
    trained = [name for name, each in around.named_parameters() if each.requires_grad]
    if folder is None:
        _draw(around, config)
    else:
        _leave_meta(around, trained)
        _read(around, folder, set(trained))
    names = {name: before[id(each)] for name, each in _tensors(around) if id(each) in before}
    lost = [name for name in trained if around.get_parameter(name).is_meta and name not in names]
    if lost:
        raise InvalidArgumentError(
            f"The adapter's {join_some(lost)} are made of the model's weights, which are read later. Give prepare a model in "
            "memory with the adapter around it, or leave out what asks for them (use_dora, trainable_token_indices, ...)."
        )
    return around.train(), names


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], *, merge: bool) -> nn.Module:
    """A model with an adapter around it that was trained before, or added to its weights; nothing in it is trained.

    Args:
        model: its weights are in memory, or stream.
        folder: of the adapter.
        merge: whether the weights are changed: one layer at a time.

    Raises:
        InvalidArgumentError: it is not of this model.
        MissingFilesError: the folder holds no adapter.
    """
    config, place = _config_of(folder)
    assert place is not None
    config.inference_mode = True
    from peft import get_peft_model

    with _translated(f"{place} is no adapter of this model"):
        around = get_peft_model(model, config)
    _read(around, place, {name for name, _ in around.named_parameters() if _is_adapters(name)})
    around.requires_grad_(False).eval()
    return merge_adapter(around) if merge else around


def merge_adapter(model: nn.Module) -> nn.Module:
    """The model that adapters were around, with them added to its weights, in place and one layer at a time."""
    with _translated("The adapter cannot be merged"):
        merged: nn.Module = model.merge_and_unload(progressbar=False)  # type: ignore[operator]
    return merged


def adapter_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The active adapter's tensors under the names that a folder of PEFT has.

    Args:
        tensors: name in the model -> values, of all that is trained.
    """
    from peft import get_peft_model_state_dict

    name: Any = model.active_adapter
    return dict(get_peft_model_state_dict(model, dict(tensors), name, save_embedding_layers=False))


def adapter_config(model: nn.Module, base: str | None) -> str:
    """The text of the active adapter's ``adapter_config.json``, to be used and not trained, on the model at `base`."""
    configs: Any = model.peft_config
    name: Any = model.active_adapter
    config = copy.deepcopy(configs[name])
    config.inference_mode = True
    config.base_model_name_or_path = base or config.base_model_name_or_path
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return json.dumps(settings, indent=2, sort_keys=True, default=str) + "\n"


def adapter_nbytes(folder: str | os.PathLike[str]) -> int:
    """Bytes that a folder's adapter has in memory, at most: in float32, if it was stored in half of that.

    Raises:
        MissingFilesError: the folder holds no adapter.
    """
    _refuse_missing(Path(folder))
    return 2 * (Path(folder) / ADAPTER_FILES[1]).stat().st_size


# --- How


def _config_of(adapter: Any) -> tuple[Any, Path | None]:
    """A configuration of one's own, and the folder that it is of."""
    try:
        import peft
    except ImportError as error:
        raise InvalidArgumentError(
            'Adapters are PEFT\'s, which is not installed. Run pip install "bigmodel[training]".'
        ) from error
    if isinstance(adapter, peft.PeftConfig):
        return copy.deepcopy(adapter), None
    if not isinstance(adapter, (str, os.PathLike)):
        raise InvalidArgumentError(
            f"adapter is a {type(adapter).__name__}. Give a peft.LoraConfig, or the folder of an adapter."
        )
    folder = Path(adapter)
    _refuse_missing(folder)
    with _translated(f"{folder / ADAPTER_FILES[0]} cannot be read"):
        config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode, config.base_model_name_or_path = False, None  # whose names and shapes are compared instead
    return config, folder


def _refuse_missing(folder: Path) -> None:
    missing = [file for file in ADAPTER_FILES if not (folder / file).is_file()]
    if missing:
        raise MissingFilesError(
            f"{folder} has no {join_some(missing)}. Give the folder of an adapter that PEFT saved as safetensors."
        )


def _refuse_made_of_weights(config: Any) -> None:
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise InvalidArgumentError(
            f"adapter is a {type(config).__name__}. Of a checkpoint that is not in memory, give a peft.LoraConfig; or give "
            "prepare a model in memory with the adapter around it."
        )
    if config.init_lora_weights not in _DRAWN:
        raise InvalidArgumentError(
            f"init_lora_weights is {config.init_lora_weights!r}, which is made of the model's weights, and they are read later. "
            'Give True, False or "gaussian", or give prepare a model in memory with the adapter around it.'
        )


def _draw(model: nn.Module, config: Any) -> None:
    """First values of what came on meta with the base."""
    from peft.tuners.lora import LoraLayer

    layers_of_lora: list[Any] = [each for each in model.modules() if isinstance(each, LoraLayer)]
    for layer in layers_of_lora:
        drawn = [name for name, each in layer.named_parameters() if name.startswith("lora_") and each.is_meta]
        _leave_meta(layer, [name for name in drawn if name.startswith(_LORA)])
        for adapter in layer.r if drawn else ():
            if config.init_lora_weights is not False:
                layer.reset_lora_parameters(adapter, config.init_lora_weights)
                continue
            for layers in (layer.lora_A, layer.lora_B):
                if adapter in layers:
                    layers[adapter].reset_parameters()
            for values in (layer.lora_embedding_A, layer.lora_embedding_B):
                if adapter in values:
                    nn.init.normal_(values[adapter])


_LORA = ("lora_A.", "lora_B.", "lora_embedding_A.", "lora_embedding_B.")


def _leave_meta(module: nn.Module, names: list[str]) -> None:
    """Memory, in float32, for parameters that are on meta; its values are anything."""
    owners = owners_of(module)
    for name in names:
        parameter = module.get_parameter(name)
        if parameter.is_meta:
            new = nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32), requires_grad=parameter.requires_grad)
            for owner, attribute in owners[id(parameter)]:
                owner._parameters[attribute] = new


def _read(model: nn.Module, folder: Path, wanted: set[str]) -> None:
    """An adapter's values; all of those that are wanted must be there, and no others."""
    from peft import load_peft_weights, set_peft_model_state_dict

    with _translated(f"{folder} is no adapter of this model"):
        values = load_peft_weights(str(folder), device="cpu")
        found: Any = set_peft_model_state_dict(model, values)
    missing = sorted(wanted.intersection(found.missing_keys))
    if missing or found.unexpected_keys:
        told = [f"has no {join_some(missing)}"] if missing else []
        told += (
            [f"has {join_some(sorted(found.unexpected_keys))} that the model has not"] if found.unexpected_keys else []
        )
        raise InvalidArgumentError(f"{folder} {' and '.join(told)}. Give the adapter of this model.")


def _is_adapters(name: str) -> bool:
    return any(part.startswith("lora_") or part == "modules_to_save" for part in name.split("."))


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return itertools.chain(module.named_parameters(), module.named_buffers())


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """PEFT's errors as one sentence, and without its warnings of what was asked for."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except InvalidArgumentError:
        raise
    except Exception as error:
        told = str(error).strip().split("\n")[0] or type(error).__name__
        raise InvalidArgumentError(f"{what}: {told}") from error
