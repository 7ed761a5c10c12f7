"""What a training run is asked for."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bigmodel.errors import InvalidArgumentError, shown
from bigmodel.training.foreign import fields_of, owned_by_deepspeed, read_file, refused_by_us
from bigmodel.training.quantized import QUANTIZATIONS

__all__ = ["CONFIGURATION", "DTYPES", "OFFLOADS", "PRECISIONS", "STRATEGIES", "TrainingConfig"]

CONFIGURATION = "BIGMODEL_CONFIG"
"""Names the file that `bigmodel launch --config` was given, in the environment of the processes that it starts."""

STRATEGIES = ("auto", "single", "ddp", "fsdp", "zero1", "zero2", "zero3")
OFFLOADS = ("none", "cpu", "nvme")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = {**DTYPES, "fp8": torch.bfloat16}
"""The dtype that passes compute in, of which "fp8" rounds the products' factors further; masters of what is trained are
float32 in each."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What a training run is asked for.

    Attributes:
        strategy: "single" (one process), "ddp" (each process holds the model), "fsdp" (each holds a part of every unit);
            DeepSpeed's "zero1" (each holds a part of the optimizer's state), "zero2" (of the gradients too) and "zero3" (of the
            parameters too); "auto" is what a forecast says is the fastest that fits (`TrainingRun.explain`), and "single" for one
            process on the host.
        precision: "bf16" (bfloat16 copies compute; masters, gradients and their reduction are float32), "fp16" (the same with
            float16 and a loss that is scaled), "fp8" ("bf16" with the products of linear layers in float8; of "fsdp", by
            torchao, where the device multiplies float8) or "fp32".
        loss_scale: of "fp16": a number, or "dynamic": 65536 at first, halved after each step that it made overflow, and doubled
            after 2000 steps that it did not.
        global_batch_size: samples of one optimizer step, over all processes and micro-batches; None: one micro-batch of each
            process.
        micro_batch_size: samples of one pass of one process; "auto" is the batch size of the DataLoader that is given, or, where
            `global_batch_size` is stated, what a forecast says has most tokens/s among what fits; otherwise 1.
        grad_clip: the largest norm of all gradients together; None for no limit.
        seed: of the order of samples, of what they draw at random, and of weights that no checkpoint has.
        drop_last: whether samples that do not fill a last global batch are left out; otherwise it is stepped as it is.
        skip_samples: whether a place in iterable data without a state of its own is come to by reading and skipping what was
            seen; otherwise `load` raises.
        reshard_after_forward: of "fsdp": whether gathered weights of units are freed between forward and backward (as in
            ZeRO-3), or kept (as in ZeRO-2); what is in no unit, or comes after the last block, is kept.
        replicas: of "fsdp": groups of processes that hold the same parts; 1 divides each unit over all processes.
        activation_checkpointing: "on": between forward and backward each unit keeps its inputs alone, and computes the rest
            again, for about a third more time; "off"; "auto" is what a forecast says, where one chooses the strategy or the
            micro-batch, and otherwise "off".
        compile_blocks: whether torch.compile makes code of units' forward and backward, one for all that are alike; or the name
            of its backend. Losses differ in last bits, and the first passes take the compiler's time (on the host it needs g++).
            Not with "zero3", whose hooks fetch weights inside of units.
        offload_optimizer: where the optimizer's state lies, with the masters that it steps: "none", where the model computes, or
            "cpu", in host memory, and the step is computed there; or "nvme", in files of `nvme_folder`, from which it comes there
            a range at a time. "fsdp" has "cpu" with `offload_params`, "zero1" and "zero2" "cpu", "zero3" either, by itself.
        offload_params: where parameters lie between passes: the same. "fsdp" has "cpu" with `offload_optimizer`, "zero3" either,
            by itself.
        nvme_folder: of "nvme", on a fast local disk: each process makes a folder of its own there, and removes it at its end.
            Tensors below 1 MiB stay in host memory. DeepSpeed compiles its reader at the first use (g++ and libaio's headers).
        quantize_base: of "single" and "ddp" under adapters: "nf4" or "fp4" keeps the frozen weights of linear layers in blocks in
            4 bits (by bitsandbytes; QLoRA), quantised as they are read; None for the dtype that they are stored in.
        reduce_dtype: in which gradients are summed over processes: "fp32", or "bf16" or "fp16", which sums micro-batches
            in it too; None for "fp32".
        engine_options: of "zero1" to "zero3": settings of a DeepSpeed JSON that no other field says; of "fsdp": `prefetch`, how
            many units are gathered ahead, and `units`, which modules are gathered each by itself: names of classes, or a function
            of a module's name and itself; otherwise the cost model's units; with "fp8" also `emulate_float8`, whether it is only
            rounded to, slowly, on any device: to try what it does to a loss.
        find_unused_parameters: of "ddp" in float32: whether passes may leave trained parameters out; costs a look at each graph.
    """

    strategy: str = "auto"
    precision: str = "bf16"
    loss_scale: float | str = "dynamic"
    global_batch_size: int | None = None
    micro_batch_size: int | str = "auto"
    grad_clip: float | None = None
    seed: int = 0
    drop_last: bool = False
    skip_samples: bool = True
    reshard_after_forward: bool = True
    replicas: int = 1
    activation_checkpointing: str = "auto"
    compile_blocks: bool | str = False
    offload_optimizer: str = "none"
    offload_params: str = "none"
    nvme_folder: str | os.PathLike[str] | None = None
    quantize_base: str | None = None
    reduce_dtype: str | None = None
    find_unused_parameters: bool = False
    engine_options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        *,
        num_processes: int | None = None,
        **fields: Any,
    ) -> TrainingConfig:
        """What a file asks for: one that `bigmodel config` wrote, a DeepSpeed JSON, or the YAML that `accelerate config` writes.

        Args:
            source: file, or its settings; the file that `bigmodel launch --config` was given if None, where there is one.
            num_processes: that will train; those of the launcher (WORLD_SIZE) if None.
            fields: of TrainingConfig, beside it; what both say must be the same.

        Raises:
            MissingFilesError: there is no such file.
            InvalidArgumentError: it asks for what is not there, or contradicts itself or `fields`; the message names the key.
        """
        source = source if source is not None else os.environ.get(CONFIGURATION)
        if source is None:
            return cls(**fields)
        size = int(os.environ.get("WORLD_SIZE", "1")) if num_processes is None else num_processes
        folder = Path() if isinstance(source, Mapping) else Path(source).parent
        settings = read_file(source)
        if settings.keys() & {"launch", "training"}:
            from bigmodel.training.configuration import Configuration

            name = "the settings" if isinstance(source, Mapping) else str(source)
            found = dict(Configuration.of(settings, name).training)
        else:
            found = fields_of(settings, size, folder, fields)
        if "engine_options" in found and isinstance(fields.get("engine_options"), Mapping):
            both = found["engine_options"].keys() & fields["engine_options"].keys()
            found["engine_options"] = {**fields["engine_options"], **found["engine_options"]}
            if not both:  # they go together
                fields["engine_options"] = found["engine_options"]
        for name in found.keys() & fields.keys():
            if found[name] != fields[name]:
                raise InvalidArgumentError(
                    f"{name} is {shown(fields[name])}, and {'the settings say' if isinstance(source, Mapping) else source} "
                    f"{shown(found[name])}. Say it in one place."
                )
        return cls(**found, **{name: value for name, value in fields.items() if name not in found})

    def __post_init__(self) -> None:
        _one_of("strategy", self.strategy, STRATEGIES)
        _one_of("precision", self.precision, tuple(PRECISIONS))
        _one_of("activation_checkpointing", self.activation_checkpointing, ("auto", "on", "off"))
        _one_of("offload_optimizer", self.offload_optimizer, OFFLOADS)
        _one_of("offload_params", self.offload_params, OFFLOADS)
        self._refuse_offloads()
        if not isinstance(self.compile_blocks, (bool, str)) or self.compile_blocks == "":
            raise InvalidArgumentError(
                f"compile_blocks is {shown(self.compile_blocks)}. Give True, False, or the name of a backend of torch.compile."
            )
        if self.compile_blocks and self.strategy == "zero3":
            raise InvalidArgumentError(
                f'compile_blocks is {shown(self.compile_blocks)}, and strategy="zero3" fetches weights by hooks inside of units, '
                'which compiled code would leave out. Give another strategy ("fsdp" divides parameters too), or leave it out.'
            )
        if self.quantize_base is not None:
            _one_of("quantize_base", self.quantize_base, QUANTIZATIONS)
            if self.precision == "fp8":
                raise InvalidArgumentError(
                    f'quantize_base is "{self.quantize_base}", and adapters are not trained with precision="fp8". Give '
                    'precision="bf16".'
                )
            if self.strategy not in ("auto", "single", "ddp"):
                raise InvalidArgumentError(
                    f'quantize_base is "{self.quantize_base}", and strategy="{self.strategy}" divides what is in 4 bits. Give '
                    'strategy="single" or "ddp", or leave it out.'
                )
        if self.reduce_dtype is not None:
            _one_of("reduce_dtype", self.reduce_dtype, tuple(DTYPES))
        scale = self.loss_scale
        is_scale = isinstance(scale, (int, float)) and not isinstance(scale, bool) and 0 < scale < math.inf
        if scale != "dynamic" and not is_scale:
            raise InvalidArgumentError(f'loss_scale is {shown(scale)}. Give a positive number, or "dynamic".')
        if scale != "dynamic" and self.precision != "fp16":
            raise InvalidArgumentError(
                f'loss_scale is {shown(scale)}, which is for precision="fp16", and it is "{self.precision}". Leave it out.'
            )
        if self.global_batch_size is not None:
            _whole("global_batch_size", self.global_batch_size, 1)
        if self.micro_batch_size != "auto":
            _whole("micro_batch_size", self.micro_batch_size, 1)
        _whole("replicas", self.replicas, 1)
        _whole("seed", self.seed, 0)
        clip = self.grad_clip
        is_number = isinstance(clip, (int, float)) and not isinstance(clip, bool)
        if clip is not None and not (is_number and clip > 0 and not math.isnan(clip)):
            raise InvalidArgumentError(f"grad_clip is {shown(clip)}. Give a positive number, or None.")
        self._refuse_options()
        for name in ("drop_last", "skip_samples", "reshard_after_forward", "find_unused_parameters"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgumentError(f"{name} is {shown(getattr(self, name))}. Give True or False.")

    def _refuse_offloads(self) -> None:
        asked = {
            name: value
            for name, value in (("offload_optimizer", self.offload_optimizer), ("offload_params", self.offload_params))
            if value != "none"
        }
        told = " and ".join(f'{name} is "{value}"' for name, value in asked.items())
        if asked and self.strategy in ("auto", "single", "ddp"):
            raise InvalidArgumentError(
                f'{told}, and strategy is "{self.strategy}". Give strategy="fsdp" (both "cpu"), "zero1" or "zero2" '
                '(offload_optimizer alone) or "zero3" (each by itself).'
            )
        if self.strategy == "fsdp" and len(asked) == 1:
            raise InvalidArgumentError(
                f'{told} alone, and strategy="fsdp" keeps parameters and optimizer state in one place. Give both "cpu", or '
                'strategy="zero3", which has each by itself.'
            )
        if self.strategy in ("zero1", "zero2") and self.offload_params != "none":
            raise InvalidArgumentError(
                f'{told}, and strategy="{self.strategy}" offloads the optimizer alone. Give strategy="zero3".'
            )
        on_disk = "nvme" in asked.values()
        if on_disk and self.strategy != "zero3":
            raise InvalidArgumentError(
                f'{told}, and strategy="{self.strategy}" offloads to "cpu" alone. Give that, or strategy="zero3".'
            )
        if on_disk and self.nvme_folder is None:
            raise InvalidArgumentError(f"{told}, and there is no nvme_folder. Give a folder on a fast local disk.")
        if self.nvme_folder is not None and not isinstance(self.nvme_folder, (str, os.PathLike)):
            raise InvalidArgumentError(f"nvme_folder is {shown(self.nvme_folder)}. Give a folder, or None.")
        if self.nvme_folder is not None and not on_disk and self.strategy != "auto":
            raise InvalidArgumentError(
                f"nvme_folder is {shown(self.nvme_folder)}, and nothing is offloaded there. Leave it out, or give "
                'offload_optimizer="nvme".'
            )

    def _refuse_options(self) -> None:
        options = self.engine_options
        if not isinstance(options, Mapping):
            raise InvalidArgumentError(f"engine_options is {shown(options)}. Give settings by name.")
        if self.strategy.startswith("zero"):
            owned = owned_by_deepspeed(options)
            if owned:
                raise InvalidArgumentError(
                    f"engine_options has {', '.join(owned)}, which other fields of TrainingConfig say. Say it there."
                )
            refused = refused_by_us(options)
            if refused:
                raise InvalidArgumentError(
                    f"engine_options has {', '.join(refused)}, which would divide parameters or compute otherwise than the "
                    "other fields say. Leave it out."
                )
        elif self.strategy == "fsdp":
            strange = sorted(options.keys() - {"prefetch", "units", "emulate_float8"})
            if strange:
                raise InvalidArgumentError(
                    f'engine_options has {", ".join(strange)}. Those of "fsdp" are: prefetch, units, emulate_float8.'
                )
            if "prefetch" in options:
                _whole("prefetch", options["prefetch"], 0)
            if options.get("emulate_float8", False) not in (True, False):
                raise InvalidArgumentError(f"emulate_float8 is {shown(options['emulate_float8'])}. Give True or False.")
            if options.get("emulate_float8") and self.precision != "fp8":
                raise InvalidArgumentError(
                    f'emulate_float8 is for precision="fp8", and it is "{self.precision}". Leave it out.'
                )
            units = options.get("units", ())
            is_named = (
                isinstance(units, Sequence) and not isinstance(units, str) and all(isinstance(u, str) for u in units)
            )
            if "units" in options and not callable(units) and not (is_named and units):
                raise InvalidArgumentError(
                    f"units is {shown(units)}. Give names of classes, or a function of a module's name and itself."
                )
        elif options:
            raise InvalidArgumentError(
                f'engine_options has {", ".join(sorted(options))}, and strategy="{self.strategy}" has none. Leave them out.'
            )


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not (isinstance(value, str) and value in allowed):
        raise InvalidArgumentError(f"{name} is {shown(value)}. Give one of: {', '.join(allowed)}.")


def _whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidArgumentError(f"{name} is {shown(value)}. Give a whole number from {least} on.")
