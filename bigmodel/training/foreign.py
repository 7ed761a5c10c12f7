"""Configurations of others, read into a `TrainingConfig`: a DeepSpeed JSON, or the YAML that `accelerate config` writes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigmodel.errors import InvalidArgumentError, MissingFilesError, join_some, shown

__all__ = ["fields_of", "launching_of", "owned_by_deepspeed", "read_file", "refused_by_us"]

logger = logging.getLogger("bigmodel.training")

_AUTO = "auto"  # of transformers' Trainer: to be filled in by whoever runs it
_DTYPES = {"fp32": "fp32", "bf16": "bf16", "bfp16": "bf16", "bfloat16": "bf16", "fp16": "fp16"}
# Keys of a DeepSpeed JSON that a TrainingConfig says: whatever else there is goes through.
_OWNED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "fp16",
    "bf16",
    "data_types",
    "communication_data_type",
    "optimizer",
    "scheduler",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)
_OWNED_OF_ZERO = ("stage",)
# Its sections of what is offloaded, the field that says it, and their keys that fields say.
_OFFLOADS = {"offload_optimizer": "offload_optimizer", "offload_param": "offload_params"}
_OWNED_OF_OFFLOADS = ("device", "nvme_path")
# What divides parameters otherwise than over all processes, computes in other dtypes than `precision` says, or offloads a part.
_REFUSED = ("torch_autocast", "amp", "tensor_parallel", "sequence_parallel_size")
_REFUSED_OF_ZERO = """
    cpu_offload cpu_offload_params cpu_offload_use_pin_memory mics_shard_size zero_hpz_partition_size zero_quantized_weights
    zero_quantized_nontrainable_weights zero_quantized_gradients zenflow
"""
# Of Accelerate's YAML, what says how processes are started: that is the launcher's.
_LAUNCHING = """
    compute_environment debug machine_rank main_process_ip main_process_port main_training_function num_machines num_processes
    rdzv_backend same_network tpu_env tpu_name tpu_use_cluster tpu_use_sudo tpu_zone use_cpu enable_cpu_affinity gpu_ids
    downcast_bf16 dynamo_config commands command_file
"""
# Of its FSDP section, what FSDP2 or our loading does anyway: weights are read by each process, units are the cost model's.
_ANYWAY = """
    fsdp_version fsdp_auto_wrap_policy fsdp_min_num_params fsdp_cpu_ram_efficient_loading
    fsdp_sync_module_states fsdp_use_orig_params fsdp_state_dict_type fsdp_backward_prefetch fsdp_forward_prefetch
"""
_SHARDING = {"FULL_SHARD": True, "SHARD_GRAD_OP": False, "1": True, "2": False}


def read_file(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """A JSON or YAML file's mapping, or the mapping itself.

    Raises:
        MissingFilesError: there is no such file.
        InvalidArgumentError: it holds something else.
    """
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise MissingFilesError(f"{path} could not be read: {error.strerror}. Give a JSON or YAML file.") from error
    try:
        if path.suffix in (".yaml", ".yml"):
            import yaml

            found = yaml.safe_load(text)
        else:
            found = json.loads(text)
    except Exception as error:  # of either parser
        raise InvalidArgumentError(f"{path} is no {path.suffix.lstrip('.') or 'JSON'} file: {error}") from error
    if not isinstance(found, dict):
        raise InvalidArgumentError(f"{path} holds a {type(found).__name__}, not settings by name.")
    return found


def fields_of(
    settings: Mapping[str, Any], num_processes: int, folder: Path, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Fields of a TrainingConfig.

    Args:
        settings: of a DeepSpeed JSON, or of Accelerate's YAML.
        num_processes: that will train, of which DeepSpeed's batch sizes are told.
        folder: of the file, from which others that it names are found.
        given: fields that are stated beside it.

    Raises:
        InvalidArgumentError: it asks for what is not there, or contradicts itself; the message names the key.
    """
    is_accelerates = "distributed_type" in settings or "compute_environment" in settings
    fields = (
        _of_accelerate(settings, num_processes, folder) if is_accelerates else _of_deepspeed(settings, num_processes)
    )
    times = fields.pop("accumulation", None)
    if times not in (None, 1) and not {"global_batch_size"} & (fields.keys() | given.keys()):
        micro = given.get("micro_batch_size", fields.get("micro_batch_size"))
        if not isinstance(micro, int):
            raise InvalidArgumentError(
                f"gradient_accumulation_steps is {times}, and the micro-batch is not stated. Give micro_batch_size=, or "
                f"global_batch_size= micro-batch x {times} x {num_processes} processes."
            )
        fields["global_batch_size"] = micro * times * num_processes
    if fields.get("engine_options") and fields["strategy"] != "fsdp":
        logger.info("passed through to DeepSpeed: %s", ", ".join(_paths(fields["engine_options"])))
    return fields


def launching_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What Accelerate's YAML says of how processes are started, as fields of `LaunchSettings`; nothing of a DeepSpeed JSON.

    Raises:
        InvalidArgumentError: its processes do not divide over its machines.
    """
    if "distributed_type" not in settings and "compute_environment" not in settings:
        return {}
    found: dict[str, Any] = {}
    nodes, processes = settings.get("num_machines") or 1, settings.get("num_processes")
    for key, value in (("num_machines", nodes), ("num_processes", processes)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise InvalidArgumentError(f"{key} is {shown(value)}. Give a whole number from 1 on.")
    if nodes > 1:
        found["num_nodes"] = nodes
    if processes is not None:
        if processes % nodes:
            raise InvalidArgumentError(
                f"num_processes is {processes}, of all machines together, and num_machines is {nodes}. Give a multiple of it."
            )
        found["num_processes"] = processes // nodes
    host, port = settings.get("main_process_ip"), settings.get("main_process_port")
    if host and nodes > 1:
        found["endpoint"] = f"{host}:{port}" if port else str(host)
    return found


def refused_by_us(options: Mapping[str, Any]) -> list[str]:
    """Keys among what is passed through that would change what our ranges of parameters, or our precision, rest on."""
    zero = _section(options, "zero_optimization")
    found = [key for key in _REFUSED if options.get(key)]
    return (
        found
        + [
            f"zero_optimization.{key}"
            for key in _REFUSED_OF_ZERO.split()
            if zero.get(key) not in (None, False, 1, -1, {})
        ]
        + [
            f"zero_optimization.offload_optimizer.{key}"
            for key in ("ratio", "super_offload")
            if _section(zero, "offload_optimizer").get(key) not in (None, False, 1)
        ]
    )


def owned_by_deepspeed(options: Mapping[str, Any]) -> list[str]:
    """Keys that a TrainingConfig says, and that may not be among what is passed through."""
    zero = _section(options, "zero_optimization")
    return (
        [key for key in _OWNED if key in options]
        + [f"zero_optimization.{key}" for key in _OWNED_OF_ZERO if key in zero]
        + [
            f"zero_optimization.{section}.{key}"
            for section in _OFFLOADS
            for key in _OWNED_OF_OFFLOADS
            if key in _section(zero, section)
        ]
    )


def _of_deepspeed(settings: Mapping[str, Any], num_processes: int) -> dict[str, Any]:
    if "bfloat16" in settings:  # its older name
        if "bf16" in settings:
            raise InvalidArgumentError("bf16 and bfloat16 are both there, and are one section. Leave one out.")
        settings = {("bf16" if key == "bfloat16" else key): value for key, value in settings.items()}
    zero = dict(_section(settings, "zero_optimization"))
    fields: dict[str, Any] = {}
    stage = _stated(zero, "stage", 0)
    if stage not in (0, 1, 2, 3):
        raise InvalidArgumentError(f"zero_optimization.stage is {shown(stage)}. DeepSpeed has 0 to 3.")
    fields["strategy"] = f"zero{stage}" if stage else "ddp"
    fields |= _offloads(zero)
    enabled = [key for key in ("fp16", "bf16") if _stated(_section(settings, key), "enabled", False) is True]
    if len(enabled) == 2:
        raise InvalidArgumentError("fp16 and bf16 are both enabled. Enable one.")
    is_open = any(_section(settings, key).get("enabled") == _AUTO for key in ("fp16", "bf16"))
    if enabled or not is_open:
        fields["precision"] = enabled[0] if enabled else "fp32"
    _refuse_precision(settings)
    scale = _stated(_section(settings, "fp16"), "loss_scale", 0)
    if enabled == ["fp16"] and scale:
        fields["loss_scale"] = scale
    clip = _stated(settings, "gradient_clipping", 0)
    if clip:
        fields["grad_clip"] = clip
    reduced = _stated(settings, "communication_data_type", None)
    if reduced is not None:
        fields["reduce_dtype"] = _meaning(_DTYPES, "communication_data_type", reduced)
    summed = _stated(_section(settings, "data_types"), "grad_accum_dtype", "fp32") or "fp32"
    if _meaning(_DTYPES, "data_types.grad_accum_dtype", summed) != "fp32":
        raise InvalidArgumentError(
            f"data_types.grad_accum_dtype is {summed}: gradients are summed in float32 here. Set it to fp32."
        )
    fields |= _batch_sizes(settings, num_processes)
    for key in ("optimizer", "scheduler"):
        made = _section(settings, key)
        values = {name: each for name, each in _section(made, "params").items() if each != _AUTO}
        if made:
            told = ", ".join(f"{name}={each!r}" for name, each in values.items())
            raise InvalidArgumentError(
                f"{key} asks for {made.get('type')}({told}), and here the script makes it. Take the section out, and give "
                f"prepare({key}=...)."
            )
    rest = {key: value for key, value in settings.items() if key not in (*_OWNED, "zero_optimization")}
    of_zero = {key: value for key, value in zero.items() if key not in _OWNED_OF_ZERO}
    for key in _OFFLOADS.keys() & of_zero.keys():
        section = {name: value for name, value in _section(of_zero, key).items() if name not in _OWNED_OF_OFFLOADS}
        del of_zero[key]
        if section and _OFFLOADS[key] in fields:
            of_zero[key] = section
    if of_zero:
        rest["zero_optimization"] = of_zero
    rest = _without_auto(rest)
    if rest and stage:
        fields["engine_options"] = rest
    elif rest:
        logger.info("left out, because ZeRO's stage is 0: %s", ", ".join(_paths(rest)))
    return fields


def _offloads(zero: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that say what is offloaded."""
    fields: dict[str, Any] = {}
    for key, name in _OFFLOADS.items():
        section = _section(zero, key)
        device = _stated(section, "device", "none")
        if device in ("none", None):
            continue
        if device not in ("cpu", "nvme"):
            raise InvalidArgumentError(
                f"zero_optimization.{key} asks for {device}. Set its device to cpu, nvme or none."
            )
        fields[name] = device
        folder = _stated(section, "nvme_path", None)
        if device == "nvme" and folder is not None and fields.setdefault("nvme_folder", str(folder)) != str(folder):
            raise InvalidArgumentError(
                f"zero_optimization.{key} has nvme_path {folder}, and another section {fields['nvme_folder']}. Both lie in "
                "one folder here: give one."
            )
    return fields


def _refuse_precision(settings: Mapping[str, Any]) -> None:
    """InvalidArgumentError for masters or optimizer states that are not float32; what else stands there is told."""
    half = _section(settings, "bf16")
    narrow = [key for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states") if _stated(half, key, False)]
    narrow += ["fp16_master_weights_and_grads"] if _stated(settings, "fp16_master_weights_and_grads", False) else []
    float16 = _section(settings, "fp16")
    if _stated(float16, "enabled", False) is not False:
        asked = ("fp16_master_weights_and_grads", "auto_cast")
        narrow += [f"fp16.{key}" for key in asked if _stated(float16, key, False)]
    if narrow:
        raise InvalidArgumentError(
            f"{', '.join(narrow)}: masters and optimizer states are float32 here, and inputs are the caller's. Set it to false."
        )
    left = [f"bf16.{key}" for key in half if key != "enabled"]
    left += [f"fp16.{key}" for key in _section(settings, "fp16") if key not in ("enabled", "loss_scale")]
    if left:
        logger.info("left out, because TrainingConfig's precision and loss_scale say what is done: %s", ", ".join(left))


def _batch_sizes(settings: Mapping[str, Any], num_processes: int) -> dict[str, Any]:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    whole, micro, times = (_stated(settings, key, None) for key in keys)
    for key, value in zip(keys, (whole, micro, times), strict=True):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise InvalidArgumentError(f"{key} is {shown(value)}. Give a whole number from 1 on.")
    if whole is None and micro is not None:
        whole = micro * (times or 1) * num_processes
    if whole is not None and micro is None and times is not None:
        micro, rest = divmod(whole, times * num_processes)
        if rest:
            raise InvalidArgumentError(
                f"train_batch_size is {whole}, which {times} passes of {num_processes} processes do not divide. Give one that "
                "they do."
            )
    if None not in (whole, micro, times) and whole != micro * times * num_processes:
        raise InvalidArgumentError(
            f"train_batch_size is {whole}, and train_micro_batch_size_per_gpu x gradient_accumulation_steps x processes is "
            f"{micro} x {times} x {num_processes} = {micro * times * num_processes}. Leave one of them out."
        )
    return {
        "accumulation": times,
        **_stated_sizes(whole, micro),
    }


def _stated_sizes(whole: int | None, micro: int | None) -> dict[str, int]:
    return {
        name: value for name, value in (("global_batch_size", whole), ("micro_batch_size", micro)) if value is not None
    }


def _of_accelerate(settings: Mapping[str, Any], num_processes: int, folder: Path) -> dict[str, Any]:
    kind = str(settings.get("distributed_type", "NO")).upper()
    deepspeed, fsdp = dict(_section(settings, "deepspeed_config")), dict(_section(settings, "fsdp_config"))
    times = settings.get("gradient_accumulation_steps", 1)
    known = {"distributed_type", "mixed_precision", "deepspeed_config", "fsdp_config", "gradient_accumulation_steps"}
    known |= set(_LAUNCHING.split())
    strange = sorted(key for key, value in settings.items() if key not in known and value not in (None, {}, False, ""))
    if strange:
        raise InvalidArgumentError(f"{join_some(strange)}: not known here. Take them out, or set them in the script.")
    precision = str(settings.get("mixed_precision") or "no")
    fields: dict[str, Any] = {
        "accumulation": times,
        "precision": _meaning({**_DTYPES, "no": "fp32", "fp8": "fp8"}, "mixed_precision", precision),
    }
    if kind == "DEEPSPEED":
        file = deepspeed.pop("deepspeed_config_file", None)
        if file is not None:
            inside = _of_deepspeed(read_file(folder / str(file)), num_processes)
            if "mixed_precision" in settings and inside.get("precision", fields["precision"]) != fields["precision"]:
                raise InvalidArgumentError(
                    f"mixed_precision is {precision}, and {file} says {inside['precision']}. Let both say the same."
                )
            return fields | inside
        made: dict[str, Any] = {"zero_optimization": {"stage": deepspeed.pop("zero_stage", 2)}}
        for part in ("optimizer", "param"):
            device = deepspeed.pop(f"offload_{part}_device", "none")
            made["zero_optimization"][f"offload_{part}"] = {"device": device}
            nvme_path = deepspeed.pop(f"offload_{part}_nvme_path", None)
            if device == "nvme" and nvme_path not in (None, "none"):
                made["zero_optimization"][f"offload_{part}"]["nvme_path"] = nvme_path
        for key in ("gradient_accumulation_steps", "gradient_clipping"):
            if key in deepspeed:
                made[key] = deepspeed.pop(key)
        times = made.pop("gradient_accumulation_steps", None)
        for key in ("zero3_init_flag", "zero3_save_16bit_model", "deepspeed_multinode_launcher", "deepspeed_hostfile"):
            deepspeed.pop(key, None)
        if deepspeed:
            raise InvalidArgumentError(
                f"deepspeed_config: {join_some(sorted(deepspeed))}: not known here. Take them out."
            )
        if times not in (None, _AUTO):
            made["gradient_accumulation_steps"] = times
        found = _of_deepspeed(made, num_processes)
        return fields | {key: value for key, value in found.items() if key != "precision"}
    if kind == "FSDP":
        fields["strategy"] = "fsdp"
        if fsdp.pop("fsdp_offload_params", False) not in (False, "false", "False"):
            fields |= {"offload_params": "cpu", "offload_optimizer": "cpu"}
        if fsdp.pop("fsdp_activation_checkpointing", False) not in (False, "false", "False"):
            fields["activation_checkpointing"] = "on"
        for key in ("fsdp_sharding_strategy", "fsdp_reshard_after_forward"):
            value = fsdp.pop(key, None)
            if value is not None:
                reshards = value if isinstance(value, bool) else _meaning(_SHARDING, key, str(value).upper())
                fields["reshard_after_forward"] = reshards
        classes = fsdp.pop("fsdp_transformer_layer_cls_to_wrap", None)
        if classes and "SIZE" not in str(fsdp.get("fsdp_auto_wrap_policy", "")).upper():
            units = [each.strip() for each in classes.split(",")] if isinstance(classes, str) else list(classes)
            fields["engine_options"] = {"units": units}
        left = sorted(key for key, value in fsdp.items() if key not in _ANYWAY.split() and value not in (None, False))
        if left:
            raise InvalidArgumentError(f"fsdp_config: {join_some(left)}: not known here. Take them out.")
        return fields
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise InvalidArgumentError(
            f"distributed_type is {kind}. NO, MULTI_CPU, MULTI_GPU, FSDP and DEEPSPEED can be read."
        )
    return fields | {"strategy": "single" if kind == "NO" else "ddp"}


def _section(settings: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = settings.get(key) or {}
    if not isinstance(value, Mapping):
        raise InvalidArgumentError(f"{key} is {shown(value)}. It holds settings by name.")
    return value


def _stated(settings: Mapping[str, Any], key: str, default: Any) -> Any:
    value = settings.get(key, default)
    return default if value == _AUTO else value


def _meaning(known: Mapping[str, Any], key: str, value: Any) -> Any:
    if value not in known:
        raise InvalidArgumentError(f"{key} is {shown(value)}. Give one of: {', '.join(known)}.")
    return known[value]


def _without_auto(settings: Mapping[str, Any]) -> dict[str, Any]:
    cleaned = {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if value != _AUTO
    }
    return {key: value for key, value in cleaned.items() if value != {}}


def _paths(settings: Mapping[str, Any], before: str = "") -> list[str]:
    found: list[str] = []
    for key, value in settings.items():
        found += _paths(value, f"{before}{key}.") if isinstance(value, Mapping) and value else [f"{before}{key}"]
    return found
