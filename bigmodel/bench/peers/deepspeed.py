"""DeepSpeed ZeRO-Inference: ZeRO-3 with the parameters in files, each fetched ahead of the module that uses it."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bigmodel.bench.peers.greedy import generate_greedily, open_text_model
from bigmodel.bench.peers.packages import versions_of
from bigmodel.errors import InvalidArgumentError

__all__ = ["DeepSpeedZero"]

_PACKAGES = ("deepspeed", "transformers")
_FOLDER = "deepspeed"
# Source: the ZeRO-Inference example of DeepSpeedExamples (inference/huggingface/zero_inference/run_model.py).
_AIO = {"block_size": 1 << 20, "queue_depth": 8, "thread_count": 1, "single_submit": False, "overlap_events": True}
_NUM_BUFFERS = 5
# Its buffers are locked in memory, beside the interpreter and two layers.
_BUFFERS_SHARE = 0.75
_M_MMAP_THRESHOLD = -3  # of mallopt, in glibc's malloc.h


class DeepSpeedZero:
    """ZeRO-3 in one process, parameters on disk, with the settings of DeepSpeed's own ZeRO-Inference example.

    DeepSpeed writes its parameter files anew in each load.
    """

    name = "DeepSpeed ZeRO-Inference"
    environment: Mapping[str, str] = {}

    def __init__(self) -> None:
        self._model: Any = None
        self._config: Any = None  # transformers holds it weakly, and looks for it while it loads

    def settings(self) -> str:
        """Versions and settings, in one line.

        Raises:
            ImportError: a package is missing; the message names it.
        """
        return (
            f"{versions_of(*_PACKAGES)}, ZeRO-3, parameters on nvme, blocks of {_AIO['block_size'] >> 20} MiB, queue depth "
            f"{_AIO['queue_depth']}, up to {_NUM_BUFFERS} locked buffers of the largest parameter, on {_device()}"
        )

    def prepare(self, path: str, scratch: str) -> list[str]:
        """Compiles DeepSpeed's operators, below `scratch` unless TORCH_EXTENSIONS_DIR is set: minutes, once.

        Returns:
            The checkpoint's own files: a load reads them and writes others.

        Raises:
            ImportError: a package is missing; the message names it.
            InvalidArgumentError: DeepSpeed cannot run this checkpoint here; the message says why.
        """
        versions_of(*_PACKAGES)
        checkpoint, skeleton = open_text_model(path, self.name)
        _refuse_dtype(checkpoint.config or {}, skeleton.model)
        _begin(scratch)
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise InvalidArgumentError(
                "DeepSpeed reads parameter files with libaio, which is not here. Install its header (libaio-dev on Debian)."
            )
        AsyncIOBuilder().load(verbose=False)
        return [*checkpoint.files, str(checkpoint.path / "config.json")]

    def load(self, path: str, scratch: str) -> None:
        """Builds the model, writes its parameters to files below `scratch`, and puts DeepSpeed's hooks on it."""
        # Freed buffers of tens of MB would stay with the process otherwise: 0.6 GB of them after a load of 2.7 GB.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        _begin(scratch)
        import deepspeed
        import torch
        import transformers
        from transformers.integrations import deepspeed as integration

        known: Any = transformers.AutoModelForCausalLM
        config = transformers.AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            blank = known.from_config(config, dtype=config.dtype)
        settings = _settings(blank, str(Path(scratch) / _FOLDER))
        begins: Any = integration.HfDeepSpeedConfig
        self._config = begins(settings)
        model = known.from_pretrained(path, dtype="auto")
        engine = deepspeed.initialize(model=model, config=settings)[0]
        self._model = engine.module.eval()

    def generate(self, ids: list[int], new_tokens: int, on_token: Callable[[int], None]) -> None:
        """Exactly `new_tokens` tokens, greedy; `on_token` is called with each."""
        generate_greedily(self._model, ids, new_tokens, on_token, device=_device())


def _device() -> str:
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else f"{found.type}:0"


def _refuse_dtype(stated: dict[str, Any], model: Any) -> None:
    import torch

    if not {"dtype", "torch_dtype"} & stated.keys():
        raise InvalidArgumentError("DeepSpeed is told the dtype that config.json states, and this one states none.")
    if model.dtype == torch.float16 and _device() == "cpu":
        raise InvalidArgumentError("DeepSpeed runs no float16 model on a CPU, and the checkpoint is in float16.")


def _begin(scratch: str) -> None:
    """A group of this one process, and the variables that DeepSpeed reads when it is imported."""
    if _device() == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(scratch).absolute() / _FOLDER / "operators"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import deepspeed

    deepspeed.init_distributed()


def _settings(blank: Any, folder: str) -> dict[str, Any]:
    """DeepSpeed's configuration for a model.

    Args:
        blank: the model on meta, in its dtype.
        folder: where parameters are written.
    """
    import torch

    from bigmodel.device_map.machine import Machine

    largest = max(blank.parameters(), key=lambda weight: weight.numel())
    room = int(_BUFFERS_SHARE * Machine.probe().host_bytes) // largest.nbytes
    hidden = blank.config.get_text_config().hidden_size
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": blank.dtype == torch.bfloat16},
        "fp16": {"enabled": blank.dtype == torch.float16},
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": 2 * hidden * hidden,
            "stage3_max_live_parameters": 2 * hidden * hidden,
            "stage3_param_persistence_threshold": hidden,
            "offload_param": {
                "device": "nvme",
                "nvme_path": folder,
                "pin_memory": True,
                "buffer_count": max(2, min(_NUM_BUFFERS, room)),
                "buffer_size": largest.numel(),
            },
        },
        "aio": dict(_AIO),
    }
