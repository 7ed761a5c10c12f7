"""One YAML file that says how a script is launched and how it is trained: read, written with comments, made of others'."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigmodel.errors import InvalidArgumentError, shown
from bigmodel.launch.settings import LaunchSettings
from bigmodel.training.config import TrainingConfig
from bigmodel.training.foreign import fields_of, launching_of, read_file

__all__ = ["Configuration", "Read", "convert"]

SECTIONS = ("launch", "training")
# What each says, in the file; in its order. What is not here is not written.
_LAUNCH = {
    "num_nodes": "machines, with a launcher on each; null: those of the SLURM step, or one",
    "num_processes": "on each machine; null: one for each accelerator, or one on the processors",
    "endpoint": "where launchers of several machines meet: HOST or HOST:PORT",
    "job": "name of the meeting, the same on all machines",
    "num_restarts": "how often all processes are started again after one failed",
    "num_threads": "of each process; null: its share of the processors",
    "binds": "whether processes are kept to the processors next to their memory and device",
    "grace_s": "seconds that processes have to end by themselves when the launcher is stopped",
    "logs": "folder in which what each process writes is kept",
}
_TRAINING = {
    "strategy": "auto, single, ddp, fsdp, zero1, zero2 or zero3",
    "precision": "bf16, fp16, fp8 or fp32; what is trained has float32 masters in each",
    "global_batch_size": "samples of an optimizer step, of all processes; null: one micro-batch of each",
    "micro_batch_size": "samples of a pass of a process, or auto",
    "grad_clip": "the largest norm of all gradients together; null: no limit",
    "seed": "of the order of samples, and of what is drawn at random",
    "activation_checkpointing": "auto, on or off: computes activations again in backward, and keeps none",
    "reshard_after_forward": "of fsdp: free gathered weights between forward and backward (as ZeRO-3), or keep them (as ZeRO-2)",
    "replicas": "of fsdp: groups of processes that hold the same parts",
    "offload_optimizer": "none, cpu or nvme",
    "offload_params": "none, cpu or nvme",
    "nvme_folder": "of nvme: on a fast local disk",
    "compile_blocks": "torch.compile for each block",
    "quantize_base": "of adapters: nf4 or fp4 keeps frozen weights in 4 bits",
    "reduce_dtype": "in which gradients are summed: fp32, bf16 or fp16",
    "loss_scale": "of fp16: a number, or dynamic",
    "drop_last": "leave samples out that do not fill a last global batch",
    "skip_samples": "come to a place in iterable data by reading what was seen",
    "find_unused_parameters": "of ddp in fp32: passes may leave trained parameters out",
    "engine_options": "of zero1 to zero3: settings of a DeepSpeed JSON; of fsdp: prefetch, units",
}


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What a file states; everything else has its default.

    Attributes:
        launch: fields of `LaunchSettings`.
        training: fields of `TrainingConfig`.
    """

    launch: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> Configuration:
        """A file that `written` wrote, and people may have edited.

        Raises:
            MissingFilesError: there is no such file.
            InvalidArgumentError: it holds something else; the message names it.
        """
        return cls.of(read_file(file), str(file))

    @classmethod
    def of(cls, settings: Mapping[str, Any], name: str) -> Configuration:
        """The same of what the file holds.

        Args:
            name: of the file, for errors.
        """
        strange = sorted(str(key) for key in settings if key not in SECTIONS)
        if strange:
            raise InvalidArgumentError(f"{name} has {strange[0]!r}. Its sections are: {', '.join(SECTIONS)}.")
        parts: dict[str, dict[str, Any]] = {}
        for section, kind in (("launch", LaunchSettings), ("training", TrainingConfig)):
            found = settings.get(section) or {}
            if not isinstance(found, Mapping):
                raise InvalidArgumentError(f"{section} in {name} is {shown(found)}. It holds settings by name.")
            known = [each.name for each in dataclasses.fields(kind)]
            for key in found:
                if key not in known:
                    near = difflib.get_close_matches(str(key), known, n=1)
                    hint = f"Write {near[0]}." if near else f"They are: {', '.join(known)}."
                    raise InvalidArgumentError(f"{name} has {shown(key)} under {section}, which is no setting. {hint}")
            parts[section] = dict(found)
        made = cls(**parts)
        made.launching()
        made.config()
        return made

    def launching(self) -> LaunchSettings:
        """How it is launched."""
        return LaunchSettings(**self.launch)

    def config(self) -> TrainingConfig:
        """How it is trained."""
        return TrainingConfig(**self.training)

    def written(self) -> str:
        """The file: what is stated, and the rest as comments with its default."""
        lines = [
            "# How a script is launched and trained: bigmodel launch --config THIS_FILE script.py",
            "# What begins with # has its default, which is shown.",
        ]
        for section, comments, kind in (("launch", _LAUNCH, LaunchSettings), ("training", _TRAINING, TrainingConfig)):
            stated: Mapping[str, Any] = getattr(self, section)
            defaults = _defaults(kind)
            lines += ["", f"{section}:" if stated else f"{section}: {{}}"]
            for name, comment in comments.items():
                value = stated.get(name, defaults[name])
                said = f"{name}: {json.dumps(value, default=str)}"
                lines.append(f"  {said:<34} # {comment}" if name in stated else f"  # {said:<32} # {comment}")
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class Read:
    """A file of others, as it was understood.

    Attributes:
        kind: "bigmodel", "Accelerate" or "DeepSpeed".
        configuration: ours.
        said: of each setting in the file: its path, its value, and the fields that it decides; none where nothing here needs it.
    """

    kind: str
    configuration: Configuration
    said: tuple[tuple[str, Any, Mapping[str, Any]], ...] = ()


def convert(file: str | os.PathLike[str], num_processes: int) -> Read:
    """A configuration of ours, Accelerate's YAML or DeepSpeed's JSON.

    Which fields a setting decides is found by leaving it out: what is then otherwise, it had said.

    Args:
        file: any of them.
        num_processes: of which DeepSpeed's batch sizes are told, where the file does not say how many there are.

    Raises:
        MissingFilesError: there is no such file.
        InvalidArgumentError: it asks for what is not there, or contradicts itself; the message names the key.
    """
    settings = read_file(file)
    if settings.keys() & set(SECTIONS):
        return Read(kind="bigmodel", configuration=Configuration.of(settings, str(file)))
    folder = Path(file).parent
    launch = launching_of(settings)
    size = launch.get("num_nodes", 1) * launch["num_processes"] if "num_processes" in launch else num_processes

    def understood(what: Mapping[str, Any]) -> dict[str, Any]:
        return launching_of(what) | fields_of(what, size, folder, {})

    whole = understood(settings)
    training = {name: value for name, value in whole.items() if name not in launch}
    said = []
    for path, value in _leaves(settings):
        try:
            without = understood(_left_out(settings, path))
        except InvalidArgumentError:
            without = {}
        decided = {name: each for name, each in whole.items() if without.get(name) != each}
        said.append((".".join(path), value, decided if len(decided) < len(whole) else {}))
    kind = "Accelerate" if "distributed_type" in settings or "compute_environment" in settings else "DeepSpeed"
    made = Configuration(launch=launch, training=training)
    made.launching()
    made.config()
    return Read(kind=kind, configuration=made, said=tuple(said))


def _leaves(settings: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*before, str(key)))
        else:
            yield (*before, str(key)), value


def _left_out(settings: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    first, *rest = path
    if not rest:
        return {key: value for key, value in settings.items() if str(key) != first}
    return {key: _left_out(value, tuple(rest)) if str(key) == first else value for key, value in settings.items()}


def _defaults(kind: Any) -> dict[str, Any]:
    made = kind()
    return {each.name: getattr(made, each.name) for each in dataclasses.fields(kind)}
