"""The front door: a path becomes a model that runs."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from bigmodel.device_map.plan import Workload
from bigmodel.loading.decision import DeviceMap
from bigmodel.loading.planning import workload_of
from bigmodel.loading.prepared import Here, Prepared, begin_early, refuse_strange
from bigmodel.progress import Report, progress_bar

__all__ = ["load_sharded"]

logger = logging.getLogger("bigmodel.loading")


def load_sharded(
    path: str | os.PathLike[str],
    device_map: DeviceMap = "auto",
    max_memory: Mapping[int | str, int | str] | None = None,
    dtype: str | torch.dtype = "auto",
    workload: Workload | None = None,
    allow_cpu_compute: bool = False,
    offload_folder: str | os.PathLike[str] | None = None,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    no_split_module_classes: Collection[str] | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    strict: bool = True,
    trust_remote_code: bool = False,
    progress: bool | Report | None = None,
) -> Any:
    """Load a checkpoint, keep in memory what fits, and stream the rest to where it runs.

    Args:
        path: a folder, a ``*.safetensors`` or ``*.index.json`` file, ``.bin``/``.pt`` weights (read weights-only), or a Hub
            repo id.
        device_map: ``"auto"``; ``"balanced"``, ``"balanced_low_0"``, ``"sequential"``; ``"cpu"`` or ``"cuda"`` (all resident
            there, or DoesNotFitError); a dict of module or parameter names to accelerators, ``"cpu"`` or ``"disk"`` in
            Accelerate's grammar, saying where weights rest (they run on the accelerators, where there are any); or a Plan.
        max_memory: tier -> limit, such as ``{0: "20GiB", "cpu": "48GiB"}``: bytes, or strings with a unit. Of "cpu" and "disk",
            what is left out is what is free now, less max(1 GiB, 5%); an accelerator that is left out is not used. If None,
            a Plan's own limits count, or what is free everywhere.
        dtype: ``"auto"`` (what from_pretrained gives each parameter), a torch dtype, or its name.
        workload: what the budget must hold beside the weights; ``Workload()`` if None.
        allow_cpu_compute: beside an accelerator, whether units may run on the CPU, which rounds differently.
        offload_folder: where weights that must be converted are kept; a private cache if None.
        model: an nn.Module with its parameters on meta, or a callable that builds one; None for the class in config.json.
        no_split_module_classes: classes whose modules are never divided into smaller units; the model's own are where nothing
            fits otherwise.
        revision, subfolder, variant: as in from_pretrained.
        key_mapping: regular expression -> replacement for checkpoint keys.
        strict: whether missing and unexpected weights are errors; if False they are initialised and listed, or ignored.
        trust_remote_code: whether code from the checkpoint may run.
        progress: True, False, None (bars where stderr is a terminal), or a callable ``(phase, done, total)`` (bytes, or steps of
            the phase "planning").

    Returns:
        The model: its own class, in eval mode, no parameter requiring grad.

    Raises:
        CheckpointError: the files, or the keys in them, are not what they should be; all problems of a kind at once.
        DeviceMapError: unknown or uncovered names in `device_map`.
        InvalidArgumentError: any other argument that means nothing.
        DoesNotFitError: a limit is too small; with both numbers and what would do.
    """
    refuse_strange(workload, no_split_module_classes)
    started_s = time.perf_counter()
    # The caller may be inside inference_mode, or a device context: weights are made for every use.
    with torch.inference_mode(False), torch.device("cpu"), progress_bar(progress) as report:
        here = Here.of(max_memory, device_map, offload_folder, report, allow_cpu_compute=allow_cpu_compute)
        prepared = Prepared.of(
            path,
            here,
            model=model,
            dtype=dtype,
            key_mapping=key_mapping,
            strict=strict,
            trust_remote_code=trust_remote_code,
            revision=revision,
            subfolder=subfolder,
            variant=variant,
            no_split=no_split_module_classes,
            begin=lambda checkpoint: begin_early(checkpoint, here, device_map, dtype),
        )
        loaded = prepared.load(device_map, workload or workload_of(device_map))
    logger.info("%s loaded in %.2f s", path, time.perf_counter() - started_s)
    return loaded
