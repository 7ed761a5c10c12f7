"""A model without its weights, and where the bytes of each weight come from. The owner of transformers.

A transformers model is filled by transformers' own loading code, which is handed tensors without bytes (conversion.py):
its renames, merges, splits, casts and ties happen as written there, for every architecture, and what ends up in a
parameter says which bytes of which file it is made of. Nothing of its rules is repeated here.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from bigmodel.checkpoint import Checkpoint, refuse_prequantised
from bigmodel.errors import CheckpointError, InvalidArgumentError, UnsupportedCheckpointError
from bigmodel.models.config_checks import naming_config, refuse_counts, refuse_impossible, refuse_no_blocks
from bigmodel.models.conversion import trace
from bigmodel.models.heads import quicken_heads
from bigmodel.models.meta import call_on_meta, refuse_meta_buffers, refuse_real
from bigmodel.models.skeleton import Skeleton, change_tensors, match_names, refuse_mismatch, take_sources

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["build_skeleton", "build_without_weights", "import_libraries", "load_generation_config", "revert_of"]


class _Noise(logging.Filter):
    """Leaves out what is of no use to who loads a model: transformers imports torchao, whose kernels for other machines do not
    load on this one."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = str(record.msg)
        is_noise = text.startswith("Failed to load") or "register_constant() on Enum" in text
        return not is_noise or torch.cuda.is_available()


for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).addFilter(_Noise())


def import_libraries() -> None:
    """Import what every load uses, so that memory measured afterwards is the load's own."""
    import torch._dynamo  # noqa: F401
    import transformers  # noqa: F401
    from torch._subclasses import fake_tensor  # noqa: F401


def build_skeleton(
    checkpoint: Checkpoint,
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    dtype: str | torch.dtype = "auto",
    key_mapping: Mapping[str, str] | None = None,
    strict: bool = True,
    trust_remote_code: bool = False,
) -> Skeleton:
    """Builds the model of a checkpoint on meta and finds out where the bytes of its weights are. Reads headers only.

    Two weights that the model says are tied, and that are both stored, are compared: only these are read.

    Args:
        checkpoint: opened.
        model: a module on meta, or a callable without arguments that builds one (called once, its parameters put on
            meta as they are created, its buffers real). None: the class that config.json names.
        dtype: "auto" gives each parameter the dtype that `from_pretrained` gives it, and one of a plain module the
            dtype that it is stored in; or a floating-point torch dtype, or its name, with the exceptions that the
            model's class makes.
        key_mapping: regular expression -> replacement, applied to the checkpoint's keys before all other rules.
        strict: refuse missing and unexpected keys, but for what the class declares ignorable, tied aliases and
            non-persistent buffers. Otherwise missing weights are initialised by the model's own rule.
        trust_remote_code: whether Python code of the checkpoint may be run.

    Raises:
        UnsupportedCheckpointError: pre-quantised, or a class that is not known or cannot be built.
        KeyMismatchError: keys that are missing, unexpected or mis-shaped, all of them together.
        InvalidArgumentError: a dtype, key_mapping or model that means nothing here.
    """
    refuse_prequantised(checkpoint)
    wanted = _parse_dtype(dtype)
    renames = _parse_key_mapping(key_mapping)
    with torch.inference_mode(False), torch.no_grad():
        if model is None:
            built, main_dtype = _build_from_config(checkpoint, wanted, trust_remote_code=trust_remote_code)
            filled = _fill_pretrained(built, checkpoint, main_dtype, renames, strict=strict)
        else:
            given = call_on_meta(model) if not isinstance(model, nn.Module) else refuse_real(model)
            if _is_pretrained(given):
                main_dtype = _cast_given(given, checkpoint, wanted)
                filled = _fill_pretrained(given, checkpoint, main_dtype, renames, strict=strict)
            else:
                filled = match_names(given, checkpoint, dtype=wanted, key_mapping=renames, strict=strict)
        refuse_meta_buffers(dict(filled.model.named_buffers()))
        filled.model.requires_grad_(False).eval()
        quicken_heads(filled.model)
    return filled


def build_without_weights(
    checkpoint: Checkpoint, *, dtype: str | torch.dtype = "auto", trust_remote_code: bool = False
) -> Skeleton:
    """The model that config.json names, for a checkpoint without tensors: something to plan for, not to fill.

    Parameters stay on meta; buffers become real as in `build_skeleton`: they count, and passes are tried with small ones.

    Args:
        checkpoint: with a config.
        dtype: of the weights; "auto": the config's.
        trust_remote_code: whether Python code of the checkpoint may be run.

    Raises:
        UnsupportedCheckpointError, InvalidArgumentError: as `build_skeleton`.
    """
    refuse_prequantised(checkpoint)
    wanted = _parse_dtype(dtype)
    stated = checkpoint.config or {}
    if wanted is None and not {"dtype", "torch_dtype"} & stated.keys():
        wanted = torch.float32
    with torch.inference_mode(False), torch.no_grad():
        model, _ = _build_from_config(checkpoint, wanted, trust_remote_code=trust_remote_code)
        refuse_impossible(model, checkpoint)
        known = cast(Any, model)
        transient = {id(buffer) for _, buffer in known.named_non_persistent_buffers()}

        def as_if_read(tensor: torch.Tensor) -> torch.Tensor | None:
            if id(tensor) in transient:
                return None
            is_lost = tensor.is_meta and not isinstance(tensor, nn.Parameter)
            filled: Any = torch.zeros_like(tensor, device="cpu") if is_lost else tensor
            filled._is_hf_initialized = True
            return cast(torch.Tensor, filled)

        real_buffers = _real_buffers(known)
        change_tensors(known, as_if_read)
        with naming_config(checkpoint, type(known).__name__):
            _initialise(known, set(), real_buffers)
        known.requires_grad_(False).eval()
        quicken_heads(model)
    no_split = frozenset(getattr(model, "_no_split_modules", None) or ())
    return Skeleton(model=model, sources={}, initialised=(), unexpected=(), no_split=no_split)


def load_generation_config(model: nn.Module, checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> None:
    """Gives a transformers model the generation settings that stand beside its weights, as `from_pretrained` does.

    Args:
        model: any module; one that cannot generate is left as it is.
        checkpoint: its folder may hold generation_config.json; without it the settings come from config.json.
        trust_remote_code: whether the folder's own generate function, where it has one, may replace the model's.
    """
    if not _is_pretrained(model):
        return
    known: Any = model
    known.name_or_path = known.config.name_or_path = str(checkpoint.path)
    if not known.can_generate() or not (checkpoint.path / "config.json").is_file():
        return
    try:
        known.adjust_generation_fn(
            None,
            False,
            False,
            str(checkpoint.path),
            cache_dir=None,
            force_download=False,
            proxies=None,
            local_files_only=True,
            token=None,
            revision=None,
            subfolder="",
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"The generation settings in {checkpoint.path} cannot be read: {error}. Mend or remove "
            "generation_config.json."
        ) from error


def revert_of(model: nn.Module) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None:
    """From a transformers model's weights to the names and layout that its architecture's checkpoints have.

    Returns:
        A function of a state dict, or of a part of it; None where the model's own names are those.
    """
    if not _is_pretrained(model):
        return None
    from transformers.core_model_loading import revert_weight_conversion

    def revert(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        reverted: dict[str, torch.Tensor] = revert_weight_conversion(cast(Any, model), weights)
        return reverted

    return revert


# --- What the arguments mean


def _parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """None for "auto"."""
    if isinstance(dtype, str) and dtype == "auto":
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    # 8-bit floats are formats to store: torch neither computes in them nor takes one as its default
    if isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize >= 2:
        return found
    raise InvalidArgumentError(
        f"dtype is {dtype!r}, which is not a dtype that a model can run in. Give 'auto', or one such as 'bfloat16', "
        "'float16' or 'float32'."
    )


def _parse_key_mapping(key_mapping: Mapping[str, str] | None) -> dict[str, str]:
    for pattern, replacement in (key_mapping or {}).items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise InvalidArgumentError(
                f"key_mapping has {pattern!r}, which is not a regular expression: {error}. Give patterns of checkpoint "
                "keys -> what to put in place."
            ) from None
        if not isinstance(replacement, str):
            raise InvalidArgumentError(f"key_mapping maps {pattern!r} to {replacement!r}. Give a string.")
    return dict(key_mapping or {})


def _is_pretrained(model: nn.Module) -> bool:
    """Whether a module is a transformers model; where transformers was never imported, none is."""
    owner = sys.modules.get("transformers.modeling_utils")
    return owner is not None and isinstance(model, owner.PreTrainedModel)


# --- Transformers models


def _build_from_config(
    checkpoint: Checkpoint, wanted: torch.dtype | None, *, trust_remote_code: bool
) -> tuple[PreTrainedModel, torch.dtype]:
    """The model that config.json names, wholly on meta, and its main dtype; as `from_pretrained` builds it."""
    if checkpoint.config is None:
        raise InvalidArgumentError(
            f"{checkpoint.path} has no config.json, so the model's class is not known. Give model=, a callable that "
            "builds it."
        )
    model_class = _find_class(checkpoint, checkpoint.config, trust_remote_code=trust_remote_code)
    with naming_config(checkpoint, model_class.__name__):
        refuse_counts(checkpoint.config)
        config = cast(Any, model_class.config_class).from_pretrained(str(checkpoint.path))
        config.name_or_path = str(checkpoint.path)
        if not checkpoint.tensors:
            refuse_no_blocks(config)
        config, dtype = _settle_dtype(config, checkpoint, wanted)
        model = _construct(model_class, config, dtype)
    return model, dtype


def _construct(model_class: type[PreTrainedModel], config: Any, dtype: torch.dtype) -> PreTrainedModel:
    from transformers.monkey_patching import patch_output_recorders

    with contextlib.ExitStack() as contexts:
        for context in model_class.get_init_context(dtype, False, False, False):
            contexts.enter_context(context)
        # transformers' classes can make their buffers again after meta; others may not know that they must
        model: Any = call_on_meta(lambda: model_class(config)) if model_class.is_custom_code() else model_class(config)
        patch_output_recorders(model)
    return cast("PreTrainedModel", model)


def _find_class(checkpoint: Checkpoint, stated: Mapping[str, Any], *, trust_remote_code: bool) -> type[PreTrainedModel]:
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    architectures = stated.get("architectures")
    if not isinstance(architectures, list):
        architectures = (architectures,)
    names = [name for name in architectures if isinstance(name, str)]
    auto_map = stated.get("auto_map")
    own_code = {
        kind: reference
        for kind, reference in (auto_map if isinstance(auto_map, dict) else {}).items()
        if kind.startswith("AutoModel") and isinstance(reference, str)
    }
    if trust_remote_code and own_code:
        named = [reference for reference in own_code.values() if reference.rpartition(".")[2] in names]
        reference = (named or [own_code[max(own_code, key=len)]])[0]  # AutoModelForX says more than AutoModel
        try:
            own_class: Any = get_class_from_dynamic_module(reference, str(checkpoint.path))
        except Exception as error:  # whatever the checkpoint's own code raises
            raise UnsupportedCheckpointError(
                f"The code of {checkpoint.path} could not be loaded ({reference}): {type(error).__name__}: {error}."
            ) from error
        own_class.register_for_auto_class("AutoModel")  # as from_pretrained marks a class that is not transformers' own
        return cast("type[PreTrainedModel]", own_class)
    for name in names:
        found = getattr(transformers, name, None)
        if inspect.isclass(found) and issubclass(found, transformers.PreTrainedModel):
            return found
    if not names and "model_type" in stated:
        with contextlib.suppress(Exception):  # no class for this type: told below
            config = transformers.AutoConfig.from_pretrained(str(checkpoint.path), local_files_only=True)
            found = transformers.MODEL_MAPPING[type(config)]
            return cast("type[PreTrainedModel]", found[0] if isinstance(found, (list, tuple)) else found)
    what = f"the class {names[0]!r}" if names else f"the model type {stated.get('model_type')!r} and no class"
    remedy = "Give model=, a callable that builds it, or install a newer transformers."
    if own_code:
        remedy = "The checkpoint brings code of its own: trust_remote_code=True lets it run on this machine."
    raise UnsupportedCheckpointError(
        f"config.json of {checkpoint.path} names {what}, which transformers {transformers.__version__} does not have. "
        f"{remedy}"
    )


def _settle_dtype(
    config: Any, checkpoint: Checkpoint, wanted: torch.dtype | None
) -> tuple[PreTrainedConfig, torch.dtype]:
    """transformers' own choice of the main dtype, written into the config and its sub-configs."""
    from transformers.modeling_utils import _get_dtype

    first_file = next((spec.file for spec in checkpoint.tensors.values()), "")
    stored = {
        name: torch.empty((), dtype=spec.dtype, device="meta")
        for name, spec in checkpoint.tensors.items()
        if spec.file == first_file
    }
    config, dtype = _get_dtype(wanted or "auto", None, config, None, stored, True)
    return config, dtype


def _cast_given(model: Any, checkpoint: Checkpoint, wanted: torch.dtype | None) -> torch.dtype:
    """Gives a model that somebody else built the dtypes of a loaded one; returns the main dtype.

    Its class, built as `from_pretrained` builds it, says which. For what that does not have: what is of the dtype of
    most of the model was built in the default dtype, and follows; the rest is as its builder asked.
    """
    _, dtype = _settle_dtype(model.config, checkpoint, wanted)
    twin: dict[str, torch.Tensor] = {}
    with contextlib.suppress(Exception):  # a constructor may want more than a config
        built = _construct(type(model), copy.deepcopy(model.config), dtype)
        twin = dict(itertools.chain(built.named_parameters(), built.named_buffers()))
    size_of: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        size_of[parameter.dtype] = size_of.get(parameter.dtype, 0) + parameter.numel()
    most = max(size_of, key=lambda kind: size_of[kind], default=dtype)
    transient = dict(model.named_non_persistent_buffers())
    target: dict[int, torch.dtype] = {}
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if name in twin:
            target[id(tensor)] = twin[name].dtype
        elif tensor.dtype == most and tensor.is_floating_point() and name not in transient:
            target[id(tensor)] = dtype
    # What such a class computed in its constructor, and lost on meta, its twin has.
    kept = {id(tensor): twin[name] for name, tensor in transient.items() if tensor.is_meta and name in twin}
    change_tensors(
        model,
        lambda tensor: kept.get(id(tensor), tensor.to(target[id(tensor)])) if id(tensor) in target else None,
    )
    if model.is_custom_code():
        refuse_meta_buffers(dict(model.named_non_persistent_buffers()))
    return dtype


def _fill_pretrained(
    model: Any, checkpoint: Checkpoint, dtype: torch.dtype, renames: Mapping[str, str], *, strict: bool
) -> Skeleton:
    """Runs transformers' own loading on tensors without bytes, then takes these out of the model again."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    real_buffers = _real_buffers(model)
    shape_of = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    rules: Any = get_model_conversion_mapping(model, dict(renames) or None)
    settings = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=rules,
        # Where anything may be on disk it takes one tensor after the other; threads would only wait for each other.
        device_map={"": "cpu", "(none)": "disk"},
    )
    with _no_progress_bar(), _shallow_copies(rules):
        info, _ = convert_and_load_state_dict_in_model(
            model, {name: trace(spec) for name, spec in checkpoint.tensors.items()}, settings
        )
    model.mark_tied_weights_as_initialized(info)
    # from_pretrained ties last. Tying first tells what is truly missing, before memory is given to it.
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    absent = set(info.missing_keys)
    ignored = set(info.unexpected_keys)
    model._adjust_missing_and_unexpected_keys(info)
    buffers = {name for name, _ in model.named_buffers()}  # what once was persistent may still be stored
    unexpected = sorted(
        name for name in info.unexpected_keys if buffers.isdisjoint((name, f"{model.base_model_prefix}.{name}"))
    )
    missing = sorted(info.missing_keys - info.conversion_errors.keys())
    refuse_mismatch(
        model,
        checkpoint,
        missing={name: shape_of[name] for name in missing} if strict else {},
        unexpected=unexpected if strict else [],
        misshaped={name: (tuple(found), tuple(needed)) for name, found, needed in sorted(info.mismatched_keys)},
        failed={name: _reason(text) for name, text in info.conversion_errors.items()},
    )

    sources = take_sources(model)
    _initialise(model, absent, real_buffers)
    return Skeleton(
        model=model,
        sources=sources,
        initialised=tuple(sorted(absent)),
        unexpected=tuple(sorted(ignored)),
        no_split=frozenset(model._no_split_modules or ()),
    )


def _real_buffers(model: Any) -> dict[str, torch.Tensor]:
    """The non-persistent buffers that a model's builder made, not on meta."""
    return {name: buffer for name, buffer in model.named_non_persistent_buffers() if buffer.device.type != "meta"}


def _initialise(model: Any, absent: set[str], real_buffers: Mapping[str, torch.Tensor]) -> None:
    """Gives values to `absent` weights and to non-persistent buffers, by the model's own rule, and ties again.

    Args:
        absent: weights that no file has.
        real_buffers: stay as their builder made them: the rule knows transformers' own buffers only.
    """
    with torch.device("cpu"):
        model._move_missing_keys_from_meta_to_device(absent, None, None, None)
        model._initialize_missing_keys(False)
    model.tie_weights(recompute_mapping=False)
    for name, buffer in real_buffers.items():
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, buffer)


@contextlib.contextmanager
def _shallow_copies(rules: Sequence[Any]) -> Iterator[None]:
    """Lets the copies of `rules` share their patterns and operations.

    transformers makes a deep copy of a rule for every key that it matches: half the time that tracing 256 experts in
    each of 60 layers takes (2.4 of 4.9 s, 46,000 keys).
    """

    def copy_shallow(rule: Any, memo: dict[int, Any]) -> Any:
        twin = object.__new__(type(rule))
        for name in itertools.chain.from_iterable(getattr(kind, "__slots__", ()) for kind in type(rule).__mro__):
            value = getattr(rule, name)
            object.__setattr__(twin, name, value.copy() if isinstance(value, (list, dict, set)) else value)
        return twin

    plain = [(rule, type(rule)) for rule in rules if not hasattr(rule, "__dict__")]
    added = {"__slots__": (), "__deepcopy__": copy_shallow}
    quick = {kind: type(kind.__name__, (kind,), added) for kind in {kind for _, kind in plain}}
    try:
        for rule, kind in plain:
            rule.__class__ = quick[kind]
        yield
    finally:
        for rule, kind in plain:
            rule.__class__ = kind


def _reason(text: str) -> str:
    """What went wrong, of the traceback that transformers keeps for a conversion that failed."""
    return text.partition("\nError: ")[0].splitlines()[-1]


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Nothing is loaded yet: transformers' "Loading weights" would say otherwise."""
    from transformers.utils.logging import set_tqdm_hook

    before = set_tqdm_hook(lambda make, args, kwargs: make(*args, **{**kwargs, "disable": True}))
    try:
        yield
    finally:
        set_tqdm_hook(before)
