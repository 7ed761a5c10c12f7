"""What can be asked of, and done to, a model that bigmodel loaded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from bigmodel import saving
from bigmodel.device_map.machine import Machine
from bigmodel.device_map.plan import Plan
from bigmodel.device_map.simulation import Step
from bigmodel.errors import DoesNotFitError, InvalidArgumentError
from bigmodel.hooks.attach import Attachment
from bigmodel.hooks.record import recorded
from bigmodel.hooks.stats import StreamStats
from bigmodel.loading.assembled import assembled, forget, own_generation_config
from bigmodel.loading.marks import unmark_dispatched
from bigmodel.loading.pass_limit import kind_of
from bigmodel.models import leave_heads, revert_of
from bigmodel.offload.resident import ResidentLoad
from bigmodel.progress import Report, progress_bar
from bigmodel.units import format_bytes

__all__ = ["materialize", "plan_of", "record", "save", "stats_of", "unload", "watch"]


def plan_of(model: nn.Module) -> Plan:
    """The plan that was carried out when the model was loaded.

    Args:
        model: what `load_sharded` returned, or a module (such as a PEFT model) that holds it.

    Raises:
        InvalidArgumentError: bigmodel did not load it.
    """
    return assembled(model)[1].plan


def stats_of(model: nn.Module) -> StreamStats:
    """What the model did since it was loaded. Subtract two for what happened in between, and for its `limit`: what bound it.

    Args:
        model: what `load_sharded` returned, or a module (such as a PEFT model) that holds it.

    Raises:
        InvalidArgumentError: bigmodel did not load it.
    """
    _, state = assembled(model)
    # Without hooks no pass is seen, and a plan would be made for nothing.
    return state.sizes if state.attachment is None else replace(state.attachment.stats(), plan=state.plan)


@contextlib.contextmanager
def record(model: nn.Module) -> Iterator[list[Step]]:
    """When each unit is read, copied and computed, until the block ends: what really happened, as the plan predicts it.

    ::

        with record(model) as steps:
            model.generate(...)

    The list is filled when the block ends without an error, and the hooks are gone then. Passes that failed are left out. A unit
    has a Step for each time that it is computed in a pass: several where its module is called again, or where other units run
    inside of it. What was fetched belongs to the pass that uses it, so that a read may begin before its pass; what was fetched
    before the block, or never used, has no times. A model that an accelerator runs is waited for at both ends of the block, and
    never in between.

    Args:
        model: what `load_sharded` returned, or a module (such as a PEFT model) that holds it; one thread runs it.

    Raises:
        InvalidArgumentError: bigmodel did not load it.
    """
    root, state = assembled(model)
    plan, units = state.decided
    with recorded(model, root, plan, units, state.attachment) as steps:
        yield steps


def watch(model: nn.Module) -> None:
    """Count the passes of a plain model too from now on, so that `stats_of` tells their limit; `unload` ends it.

    Args:
        model: what `load_sharded` returned, or a module that holds it. One with hooks is counted anyway.

    Raises:
        InvalidArgumentError: bigmodel did not load it.
    """
    root, state = assembled(model)
    if state.attachment is None:
        state.attachment = Attachment(root, None, {}, {}, kind_of, state.sizes, refuses_moves=False)


def unload(model: nn.Module) -> nn.Module:
    """Take the hooks off and stop the reader threads; returns the same module.

    What was resident stays; what streamed stays at rest, showing its true bytes from the files: right, and slow to run.
    `materialize` puts all weights in memory instead.

    Raises:
        InvalidArgumentError: bigmodel did not load it.
    """
    root, state = assembled(model)
    if state.attachment is not None:
        state.attachment.detach()
    unmark_dispatched(root, state.compile_before)
    leave_heads(root)
    forget(root)
    return model


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    max_shard_size: int | str = "5GB",
    *,
    progress: bool | Report | None = None,
) -> list[Path]:
    """Write a model's weights and configuration to a folder, from which `from_pretrained` and `load_sharded` read it.

    Tensor by tensor, never the whole model in memory; under temporary names, renamed when all is whole. A transformers model
    gets the names and layout that its architecture's checkpoints have. A tied weight is written once. Weight files of an
    earlier save in the same folder are replaced, and removed where they would be left over.

    Args:
        model: any module; weights may be in memory, on an accelerator, or at rest in their files.
        folder: made if it is not there.
        max_shard_size: the most bytes of weights in one file, such as ``"5GB"``; a larger tensor has a file to itself.
        progress: True, False, None (bars where stderr is a terminal), or a callable ``(phase, done, total)`` (bytes, or steps of
            the phase "planning").

    Returns:
        The files written: weights in order, then index and configuration.

    Raises:
        InvalidArgumentError: for a folder that is a file, or a model whose state is not tensors with bytes.
        DoesNotFitError: where the disk has less room than the weights need.
        SavingError: where a file to be replaced is one that a model in this process reads its weights from.
    """
    with progress_bar(progress) as report:
        return saving.save(
            model,
            folder,
            max_shard_size,
            revert=revert_of(model),
            generation_config=own_generation_config(model),
            progress=report,
        )


def materialize(model: nn.Module, device: str | torch.device = "cpu") -> nn.Module:
    """Put all weights in place and take the hooks off; returns the same module, now a plain one.

    Parameters keep their identity where one tensor shows them at rest, so ties, adapters and optimizers keep seeing them.

    Args:
        model: what `load_sharded` returned, or a module that holds it.
        device: where all weights go.

    Raises:
        InvalidArgumentError: bigmodel did not load it.
        DoesNotFitError: the streamed weights are larger than the free host memory.
        InvalidArgumentError: `device` is not there.
        ReadError: a file could not be read; the model is as before.
    """
    device = torch.device(device)
    _refuse_missing(device)
    root, state = assembled(model)
    needed = sum(source.nbytes for source in state.streamed.values())
    available = Machine.probe().unstated_limit_bytes("cpu")
    if needed > available:
        raise DoesNotFitError(
            f"The weights that stream take {format_bytes(needed)} of host memory, and {format_bytes(available)} is free. "
            "Free some, or keep streaming.",
            tier="cpu",
            needed_bytes=needed,
            available_bytes=available,
        )
    with progress_bar() as report:
        load = ResidentLoad(list(state.streamed.values()), stamps=state.stamps, may_map=False, progress=report)
        tensors = load.finish()
    if state.attachment is not None:
        state.attachment.detach()
    for name, tensor in tensors.items():
        state.bindings[name].settle(tensor)
    unmark_dispatched(root, state.compile_before)
    leave_heads(root)
    forget(root)
    root.to(device)
    return model


def _refuse_missing(device: torch.device) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InvalidArgumentError(
            f"There is no device {device} here ({str(error).splitlines()[0]}). Give another one."
        ) from error
