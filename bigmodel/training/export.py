"""A trained model as others read it: safetensors in the dtype that it came in, configuration and tokenizer."""

from __future__ import annotations

import copy
import math
import shutil
import tempfile
from collections.abc import Set
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from bigmodel import saving
from bigmodel.errors import InvalidArgumentError
from bigmodel.models import ADAPTER_FILES, adapter_config, adapter_tensors, is_adapted, merge_adapter, revert_of
from bigmodel.training.checkpoint import together
from bigmodel.training.processes import Processes
from bigmodel.training.quantized import Quantized
from bigmodel.training.strategy import Engine
from bigmodel.training.weights import Origin

__all__ = ["export_model"]

# Beside the weights, what a user of the model needs: tokenizers, processors, templates.
_BESIDE = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")


def export_model(
    folder: Path, engine: Engine, origin: Origin, processes: Processes, max_shard_size: int | str, *, merge: bool
) -> list[Path]:
    """Write the model, or its adapters alone; every process calls it, and one writes.

    Each parameter is put together in turn and kept in a file beside the target, so that no process holds the model.

    Args:
        folder: made if it is not there.
        engine: that has it.
        origin: where it came from: dtypes, and the files beside its weights.
        processes: all of them.
        max_shard_size: of a file.
        merge: whether adapters are added to the model's weights, in files, one layer at a time, and the model is written.

    Returns:
        What was written; in other processes than the main one, nothing.
    """
    adapters = is_adapted(engine.module)
    if merge and not adapters:
        raise InvalidArgumentError("merge is True, and the model has no adapters. Leave it out.")
    if adapters and not merge and (folder / "config.json").exists():
        raise InvalidArgumentError(
            f"{folder} holds a model, which would be read with the adapters from now on. Give another folder, or merge=True."
        )
    if (merge or not adapters) and (folder / ADAPTER_FILES[0]).exists():
        raise InvalidArgumentError(
            f"{folder} holds an adapter, which would be read with the model. Give another folder."
        )
    together(processes, "export")
    names = set(engine.trained()) if adapters and not merge else None
    gathered: _Gathered | None = None
    written: list[Path] = []
    failed: BaseException | None = None
    try:
        gathered = _Gathered(folder, engine, origin, processes, names)
        twin = gathered.twin(engine.module)
        if processes.is_main and adapters and not merge:
            own = {id(each) for name, each in twin.named_parameters() if names and name in names}
            every = twin.named_parameters(remove_duplicate=False)
            trained = {name: each.detach() for name, each in every if id(each) in own}
            config = adapter_config(twin, None if origin.path is None else str(origin.path))
            kept = adapter_tensors(twin, trained)
            written = saving.save_beside(folder, ADAPTER_FILES[1], kept, {ADAPTER_FILES[0]: config})
        elif processes.is_main:
            twin = merge_adapter(twin) if merge else twin
            written = saving.save(twin, folder, max_shard_size, revert=revert_of(twin))
            written += _copy_beside(origin.path, folder)
    except Exception as error:
        failed = error
    finally:
        if gathered is not None:
            gathered.close()
    processes.all_right(failed)
    return written


class _Gathered:
    """Whole parameters as maps of files of the main process: those of these names as they are trained, or all in the dtype that
    they came in. In other processes they pass by."""

    def __init__(
        self, folder: Path, engine: Engine, origin: Origin, processes: Processes, names: Set[str] | None
    ) -> None:
        self._is_main = processes.is_main
        self._scratch: Path | None = None
        self.tensors: dict[int, torch.Tensor] = {}
        if self._is_main:
            folder.absolute().parent.mkdir(parents=True, exist_ok=True)
            self._scratch = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=".exporting-"))
        # The checkpoint has the values of what is in 4 bits.
        packed = {f"{name}.weight" for name, each in engine.module.named_modules() if isinstance(each, Quantized)}
        try:
            for number, (name, parameter) in enumerate(engine.module.named_parameters()):
                if names is not None and name not in names:
                    continue
                whole = engine.whole(name) if name not in packed else origin.whole(name) if self._is_main else None
                if self._scratch is not None and whole is not None:
                    dtype = whole.dtype if names is not None else origin.stored_dtypes.get(name, parameter.dtype)
                    self.tensors[id(parameter)] = _mapped(self._scratch / str(number), whole, dtype)
                del whole
        except BaseException:
            self.close()
            raise

    def twin(self, module: nn.Module) -> nn.Module:
        """The user's module with these weights: the classes that it had before an engine took it."""
        modules = list(module.modules())
        twins = {each: object.__new__(_own_class(each)) for each in modules}
        parameters: dict[int, nn.Parameter] = {}
        for each, twin in twins.items():
            # What merging adapters notes in a layer is not to be seen in the user's.
            twin.__dict__.update(
                {
                    key: copy.copy(value) if isinstance(value, (list, dict, set)) else value
                    for key, value in vars(each).items()
                }
            )
            twin.__dict__["_modules"] = {
                key: None if child is None else twins[child] for key, child in each._modules.items()
            }
            own = {}
            for key, parameter in each._parameters.items():
                if parameter is not None and id(parameter) in self.tensors and id(parameter) not in parameters:
                    parameters[id(parameter)] = nn.Parameter(self.tensors[id(parameter)], requires_grad=False)
                own[key] = None if parameter is None else parameters.get(id(parameter), parameter)
            twin.__dict__["_parameters"] = own
        return twins[module]

    def close(self) -> None:
        self.tensors.clear()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)


def _mapped(file: Path, whole: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not whole.numel():
        return torch.empty(whole.shape, dtype=dtype)
    flat = torch.from_file(str(file), shared=True, size=math.prod(whole.shape), dtype=dtype)
    flat.copy_(whole.detach().reshape(-1))
    return flat.view(whole.shape)


def _own_class(module: nn.Module) -> type[nn.Module]:
    """FSDP2 puts a class of its own before the module's, and what is in 4 bits has one."""
    kind = type(module)
    if kind is Quantized:
        return nn.Linear
    return next(each for each in kind.__mro__[1:] if each is not FSDPModule) if isinstance(module, FSDPModule) else kind


def _copy_beside(source: Path | None, folder: Path) -> list[Path]:
    """Files of the source that are neither weights nor configuration, which are written anew."""
    written: list[Path] = []
    if source is None or not source.is_dir() or source.resolve() == folder.resolve():
        return written
    anew = {"config.json", "generation_config.json", ADAPTER_FILES[0]}
    for file in sorted({each for pattern in _BESIDE for each in source.glob(pattern)}):
        if file.name not in anew and not file.name.endswith(".index.json") and file.is_file():
            shutil.copyfile(file, folder / file.name)
            written.append(folder / file.name)
    return written
