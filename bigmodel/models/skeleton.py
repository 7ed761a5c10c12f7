"""A model whose weights are still in the checkpoint, and how any module becomes one by the names of its keys."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from bigmodel.checkpoint import Checkpoint, Source, TensorSpec
from bigmodel.errors import KeyMismatchError, join_some
from bigmodel.models.conversion import Traced, equal_values, sources_of, trace

__all__ = ["Skeleton", "change_tensors", "match_names", "refuse_mismatch", "take_sources"]

_NAMES_SHOWN = 10  # of each kind, in an error

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """A model whose weights are still in the checkpoint.

    Attributes:
        model: in eval mode, nothing requires grad. Parameters are on meta, tied ones the same object at each name;
            buffers are real, on the CPU, and right, but for those in `sources`, which are zeros to be read into.
        sources: how each distinct parameter and persistent buffer gets its bytes, by its first name in the model.
        initialised: names that the checkpoint does not have, made real on the CPU by the model's own rule.
        unexpected: names in the checkpoint that the model does not have and that were passed over.
        no_split: class names of modules that the model wants kept whole.
    """

    model: nn.Module
    sources: Mapping[str, Source]
    initialised: tuple[str, ...]
    unexpected: tuple[str, ...]
    no_split: frozenset[str]


def match_names(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None,
    key_mapping: Mapping[str, str],
    strict: bool,
) -> Skeleton:
    """Fills a module by the names of its parameters and persistent buffers alone.

    Args:
        model: parameters on meta.
        checkpoint: opened.
        dtype: of floating-point weights and buffers; None: as stored.
        key_mapping: regular expression -> replacement; each is applied in turn, at its first match.
        strict: refuse missing and unexpected keys.

    Raises:
        KeyMismatchError: what does not match, all of it.
    """
    persistent, transient = _named_buffers(model)
    tensors: dict[str, torch.Tensor] = {**dict(model.named_parameters(remove_duplicate=False)), **persistent}
    found: dict[str, TensorSpec] = {}
    ignored: list[str] = []
    unexpected: list[str] = []
    conflicts: dict[str, str] = {}
    for key, spec in checkpoint.tensors.items():
        name = key
        for pattern, replacement in key_mapping.items():
            name = re.sub(pattern, replacement, name, count=1)
        if name in found:
            conflicts[name] = f"{found[name].name!r} and {key!r} of the checkpoint both become this name"
        elif name in tensors:
            found[name] = spec
        else:
            ignored.append(key)
            if name not in transient and not _is_ignorable(model, "unexpected", name):
                unexpected.append(key)

    names_of: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names_of.setdefault(id(tensor), []).append(name)
    chosen: dict[tuple[str, ...], TensorSpec] = {}
    missing: dict[str, Shape] = {}
    misshaped: dict[str, tuple[Shape, Shape]] = {}
    for names in names_of.values():
        shape = tuple(tensors[names[0]].shape)
        stored = [name for name in names if name in found]
        misshaped.update({name: (found[name].shape, shape) for name in stored if found[name].shape != shape})
        for name in stored[1:]:
            if misshaped.keys().isdisjoint(stored) and not equal_values(trace(found[stored[0]]), trace(found[name])):
                conflicts[name] = f"the model ties it to {stored[0]!r}, and the checkpoint has other values for it"
        if stored:
            chosen[tuple(names)] = found[stored[0]]
        else:
            missing[names[0]] = shape
    refuse_mismatch(
        model,
        checkpoint,
        missing={n: s for n, s in missing.items() if not _is_ignorable(model, "missing", n)} if strict else {},
        unexpected=unexpected if strict else [],
        misshaped=misshaped,
        failed=conflicts,
    )

    once: dict[TensorSpec, nn.Parameter] = {}  # bytes that the checkpoint holds once become one parameter
    for aliases, spec in chosen.items():
        source = trace(spec)
        if dtype is not None and spec.dtype.is_floating_point:
            source = cast(Traced, source.to(dtype))
        filling: torch.Tensor = source
        if aliases[0] not in persistent:
            filling = nn.Parameter(source, requires_grad=False)
            if spec.nbytes:
                filling = once.setdefault(TensorSpec("", spec.dtype, spec.shape, spec.file, spec.offset), filling)
        for name in aliases:
            _set(model, name, filling)
    sources = take_sources(model)
    if dtype is not None:  # as Module.to does
        floating = {id(buffer) for buffer in transient.values() if buffer.is_floating_point()}
        change_tensors(model, lambda tensor: tensor.to(dtype) if id(tensor) in floating else None)
    _initialise(model, checkpoint, {name: names for names in names_of.values() if (name := names[0]) in missing}, dtype)
    return Skeleton(
        model=model,
        sources=sources,
        initialised=tuple(missing),
        unexpected=tuple(ignored),
        no_split=frozenset(getattr(model, "_no_split_modules", None) or ()),
    )


def take_sources(model: nn.Module) -> dict[str, Source]:
    """Replaces every Traced in a module by a parameter on meta or a buffer of zeros, and returns where they come from.

    Returns:
        name -> Source, by the first name of each, parameters first.
    """
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    sources = sources_of({name: tensor for name, tensor in named if isinstance(tensor, Traced)})

    def empty(tensor: torch.Tensor) -> torch.Tensor | None:
        if not isinstance(tensor, Traced):
            return None
        plain: torch.Tensor
        if isinstance(tensor, nn.Parameter):
            plain = nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), requires_grad=False)
        else:
            plain = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
        if getattr(tensor, "_is_hf_initialized", False):  # keeps transformers from initialising what is to be read
            plain._is_hf_initialized = True  # type: ignore[attr-defined]
        return plain

    change_tensors(model, empty)
    return sources


def change_tensors(model: nn.Module, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Puts `change(tensor)`, where it is not None, in the place of parameters and buffers; shared ones stay shared."""
    changed: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}  # holds the old one too: its id stays its own
    for module in list(model.modules()):
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if id(tensor) not in changed:
                new = change(tensor)
                if new is not None and isinstance(tensor, nn.Parameter) and not isinstance(new, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                changed[id(tensor)] = (tensor, new)
            new = changed[id(tensor)][1]
            if new is not None and new is not tensor:
                setattr(module, key, new)


def refuse_mismatch(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    missing: Mapping[str, Shape],
    unexpected: Sequence[str],
    misshaped: Mapping[str, tuple[Shape, Shape]],
    failed: Mapping[str, str],
) -> None:
    """Raises one error for everything that does not match.

    Args:
        missing: name -> shape in the model.
        unexpected: names in the checkpoint.
        misshaped: name -> shape in the checkpoint, shape in the model.
        failed: name -> why its value cannot be made from the checkpoint.

    Raises:
        KeyMismatchError: if any of them holds something.
    """
    kinds = {
        "missing": [f"{name} {shape}" for name, shape in missing.items()],
        "unexpected": [
            f"{name} {checkpoint.tensors[name].shape}" if name in checkpoint.tensors else name for name in unexpected
        ],
        "mis-shaped": [f"{name}: checkpoint {found}, model {needed}" for name, (found, needed) in misshaped.items()],
        "not convertible": [f"{name}: {reason}" for name, reason in failed.items()],
    }
    kinds = {kind: lines for kind, lines in kinds.items() if lines}
    if not kinds:
        return
    counts = ", ".join(f"{len(lines)} {kind}" for kind, lines in kinds.items())
    parts = [f"{checkpoint.path} does not match {type(model).__name__}: {counts}."]
    for kind, lines in kinds.items():
        parts.append(f"  {kind}:\n    " + join_some(lines, limit=_NAMES_SHOWN, separator="\n    "))
    remedy = "Give the model that the checkpoint was made from (config.json, or model=), or key_mapping= to rename keys"
    if missing or unexpected:
        remedy += "; strict=False initialises what is missing and ignores what is unexpected"
    parts.append(f"{remedy}.")
    raise KeyMismatchError("\n".join(parts))


def _named_buffers(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The persistent buffers, which a checkpoint holds, and the others."""
    persistent: dict[str, torch.Tensor] = {}
    transient: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, buffer in module.named_buffers(recurse=False):
            kind = transient if key in module._non_persistent_buffers_set else persistent
            kind[f"{prefix}.{key}" if prefix else key] = buffer
    return persistent, transient


def _is_ignorable(model: nn.Module, kind: str, name: str) -> bool:
    """Whether the class declares that `name` may be missing or unexpected."""
    patterns = getattr(model, f"_keys_to_ignore_on_load_{kind}", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _set(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, key = name.rpartition(".")
    setattr(model.get_submodule(owner), key, tensor)


def _initialise(
    model: nn.Module, checkpoint: Checkpoint, missing: Mapping[str, Sequence[str]], dtype: torch.dtype | None
) -> None:
    """Makes missing parameters real by the `reset_parameters` of their owners; buffers are real already."""
    owners: dict[str, None] = {}
    hopeless: dict[str, str] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, aliases in missing.items():
        if name not in parameters:
            continue
        old = parameters[name]
        owner = name.rpartition(".")[0]
        if not callable(getattr(model.get_submodule(owner), "reset_parameters", None)):
            hopeless[name] = f"missing, and {type(model.get_submodule(owner)).__name__} has no reset_parameters()"
            continue
        kind = dtype if dtype is not None and old.is_floating_point() else old.dtype
        real = nn.Parameter(torch.empty(old.shape, dtype=kind, device="cpu"), requires_grad=False)
        for alias in aliases:
            _set(model, alias, real)
        owners[owner] = None
    refuse_mismatch(model, checkpoint, missing={}, unexpected=[], misshaped={}, failed=hopeless)
    with torch.device("cpu"):
        for owner in owners:
            cast(Callable[[], object], model.get_submodule(owner).reset_parameters)()
