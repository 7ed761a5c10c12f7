"""Adapters on a frozen model: PEFT's, made where weights are on meta too. The only file that imports it."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigmodel.checkpoint import open_checkpoint
from bigmodel.errors import BigModelError, InvalidArgumentError, MissingFilesError, join_some
from bigmodel.models.meta import owners_of

__all__ = [
    "ADAPTER_FILES",
    "adapt",
    "adapter_config",
    "adapter_nbytes",
    "adapter_scales",
    "adapter_tensors",
    "is_adapted",
    "load_adapter",
    "lora_of",
    "merge_adapter",
    "trains_adapters_alone",
]

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""Of a folder that PEFT reads."""
_DRAWN = (True, False, "gaussian")  # first values that no weight of the base is needed for
_LORA = ("lora_A.", "lora_B.", "lora_embedding_A.", "lora_embedding_B.")

logger = logging.getLogger("bigmodel.models")


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
    were_trained = [each for each in model.parameters() if each.requires_grad]
    seed = int(torch.randint(1 << 62, ()))
    from peft import get_peft_model

    with _translated("PEFT refuses the adapter for this model"):
        around: Any = get_peft_model(model, config)
    try:
        names = _made(around, config, folder, before, seed)
    except BaseException:
        around.unload()
        for each in were_trained:
            each.requires_grad_(True)
        raise
    _put_where_it_runs(around, model)
    return around.train(), names


def _made(around: nn.Module, config: Any, folder: Path | None, before: dict[int, str], seed: int) -> dict[str, str]:
    """First values of what is trained; names as `adapt` returns them."""
    from peft import LoraConfig
    from peft.utils.other import ModulesToSaveWrapper

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
    if folder is not None:
        _leave_meta(around, trained)
        _read(around, folder, set(trained))
    elif isinstance(config, LoraConfig) and _is_drawn(config):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the same wherever the model's weights are
            _draw(around, config)
    names = {name: before[id(each)] for name, each in _tensors(around) if id(each) in before}
    lost = [name for name in trained if around.get_parameter(name).is_meta and name not in names]
    if lost:
        raise InvalidArgumentError(
            f"The adapter's {join_some(lost)} are made of the model's weights, which are read later. Give prepare a model in "
            "memory with the adapter around it, or leave out what asks for them (use_dora, trainable_token_indices, ...)."
        )
    return names


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], *, streams: bool) -> tuple[nn.Module, bool]:
    """A model with an adapter that was trained before; nothing in it is trained.

    Args:
        model: its weights are in memory, or stream.
        folder: of the adapter.
        streams: whether they stream: then the adapter stays beside them, and otherwise it is added to them, if it can be.

    Returns:
        The model, and whether the adapter was added to its weights.

    Raises:
        InvalidArgumentError: it is not of this model, or changes weights that stream.
        MissingFilesError: the folder holds no adapter.
    """
    config, place = _config_of(folder)
    assert place is not None
    config.inference_mode = True
    changes = [
        f"{name} is {getattr(config, name)!r}"
        for name, harmless in (("bias", ("none",)), ("init_lora_weights", (*_DRAWN, "orthogonal")))
        if getattr(config, name, harmless[0]) not in harmless
    ]
    if streams and changes:
        raise InvalidArgumentError(
            f"{place} changes weights of the model itself ({', '.join(changes)}), and they stream. Let them stay in memory (a "
            "larger --max-memory, or --device-map cpu), or merge the adapter into the checkpoint."
        )
    from peft import get_peft_model

    with _translated(f"{place} is no adapter of this model"):
        around: nn.Module = get_peft_model(model, config)
    _read(around, place, {name for name, _ in around.named_parameters() if _is_adapters(name)})
    _put_where_it_runs(around, model)
    around.requires_grad_(False).eval()
    return (around, False) if streams or _shared(around) else (merge_adapter(around), True)


def merge_adapter(model: nn.Module) -> nn.Module:
    """The model that adapters were around, with them added to its weights, in the memory that these have, a layer at a time.

    Raises:
        InvalidArgumentError: PEFT cannot, or what is changed has another use, such as tied embeddings.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    shared = _shared(model)
    if shared:
        raise InvalidArgumentError(
            f"The adapter cannot be merged: {join_some(shared)} is another layer's weight too, which would change with it. "
            "Export the adapter by itself."
        )
    configs: Any = getattr(model, "peft_config", {})
    if any(getattr(each, "layer_replication", None) for each in configs.values()):
        raise InvalidArgumentError(
            "The adapter cannot be merged: layer_replication uses a layer's weights more than once. Export it by itself."
        )
    around: Any = model
    with _translated("The adapter cannot be merged"):
        for layer in around.modules():
            if isinstance(layer, BaseTunerLayer):
                own = {name: each.data for name, each in layer.get_base_layer().named_parameters()}
                layer.merge()
                for name, each in layer.get_base_layer().named_parameters():
                    if name in own and each.data_ptr() != own[name].data_ptr() and each.shape == own[name].shape:
                        own[name].copy_(each.data)
                        each.data = own[name]
        merged: nn.Module = around.unload()
    return merged


def adapter_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The active adapter's tensors under the names that a folder of PEFT has.

    Args:
        tensors: name in the model -> values, of all that is trained.
    """
    from peft import get_peft_model_state_dict

    active: Any = model.active_adapters
    if len(active) > 1:
        raise InvalidArgumentError(
            f"{len(active)} adapters are active ({join_some(sorted(active))}), and a folder holds one. Make one active "
            "(set_adapter), or give merge=True."
        )
    name: Any = model.active_adapter
    with _translated("PEFT cannot write the adapter"):
        return dict(get_peft_model_state_dict(model, dict(tensors), name, save_embedding_layers=False))


def adapter_config(model: nn.Module, base: str | None) -> str:
    """The text of the active adapter's ``adapter_config.json``, to be used and not trained, on the model at `base`."""
    configs: Any = model.peft_config
    name: Any = model.active_adapter
    config = copy.deepcopy(configs[name])
    config.inference_mode = True
    config.base_model_name_or_path = base or config.base_model_name_or_path
    if config.task_type is None:  # by which PEFT's own classes find the model's
        kind = type(model.get_base_model())  # type: ignore[operator]
        config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return json.dumps(settings, indent=2, sort_keys=True, default=str) + "\n"


def adapter_scales(model: nn.Module) -> dict[str, Any]:
    """What the active adapter's values mean nothing without: ranks, and by what their products are multiplied."""
    configs: Any = model.peft_config
    settings = configs[model.active_adapter].to_dict()
    kept = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
    return {name: str(settings[name]) for name in kept if name in settings}


def adapter_nbytes(folder: str | os.PathLike[str]) -> int:
    """Bytes that a folder's adapter has in memory, in float32; its files are looked at.

    Raises:
        MissingFilesError: the folder holds no adapter.
        MalformedFileError: its weights are no safetensors file.
        InvalidArgumentError: its configuration cannot be read.
    """
    _, place = _config_of(folder)
    assert place is not None
    tensors = open_checkpoint(place / ADAPTER_FILES[1]).tensors
    return sum(4 * math.prod(each.shape) for each in tensors.values())


def lora_of(rank: int) -> Any:
    """A `peft.LoraConfig` of a rank, on all linear layers but the head.

    Raises:
        InvalidArgumentError: PEFT is not installed.
    """
    return _peft().LoraConfig(r=rank, target_modules="all-linear")


# --- How


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise InvalidArgumentError(
            'Adapters are PEFT\'s, which is not installed. Run pip install "bigmodel[training]".'
        ) from error
    return peft


def _config_of(adapter: Any) -> tuple[Any, Path | None]:
    """A configuration of one's own, and the folder that it is of."""
    peft = _peft()
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
    if not _is_drawn(config):
        raise InvalidArgumentError(
            f"init_lora_weights is {config.init_lora_weights!r}, and first values that are not drawn alone are made where the "
            'model\'s weights are. Give True, False or "gaussian", or give prepare a model in memory.'
        )


def _is_drawn(config: Any) -> bool:
    return any(config.init_lora_weights is each for each in (True, False)) or config.init_lora_weights == "gaussian"


def _shared(model: nn.Module) -> list[str]:
    """Names of weights that adapters are on, and that other layers have too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    owners = owners_of(model)
    return [
        f"{name}.{own}"
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
        for own, each in layer.get_base_layer().named_parameters()
        if len(owners[id(each)]) > 1
    ]


def _put_where_it_runs(around: nn.Module, model: nn.Module) -> None:
    """Adapters on the device that computes the layer that they are around, where layers run on several."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    places: Any = getattr(model, "hf_device_map", None)
    if not places:
        return
    names = {module: name for name, module in model.named_modules()}
    for layer in around.modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        base = layer.get_base_layer()
        above = names.get(layer) or names.get(base) or ""
        while above not in places and above:
            above = above.rpartition(".")[0]
        own = {id(each) for each in base.parameters()}
        for each in layer.parameters():
            if id(each) not in own and above in places and not each.is_meta:
                each.data = each.data.to(places[above])


def _draw(model: nn.Module, config: Any) -> None:
    """First values of what came on meta with the base."""
    from peft.tuners.lora import LoraLayer

    layers_of_lora: list[Any] = [each for each in model.modules() if isinstance(each, LoraLayer)]
    for layer in layers_of_lora:
        drawn = [name for name, _ in layer.named_parameters() if name.startswith(_LORA)]
        _leave_meta(layer, drawn)
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
        beside = sorted(name for name in values if ".base_layer." in name)
        for name in beside:  # PEFT writes embeddings and heads that adapters are on; the model has them
            values.pop(name)
        if beside:
            logger.warning(
                "%s holds weights of the model itself, which are the checkpoint's here: %s", folder, beside[0]
            )
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
    except BigModelError:
        raise
    except Exception as error:
        told = " ".join(line.strip() for line in str(error).strip().split("\n")[:2])
        raise InvalidArgumentError(f"{what}: {told or 'it says no more'} ({type(error).__name__})") from error
