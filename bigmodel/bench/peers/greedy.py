"""Greedy text of a transformers model, token by token, and which checkpoints give one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigmodel.bench.clock import greedy_options
from bigmodel.checkpoint import Checkpoint, open_checkpoint
from bigmodel.errors import InvalidArgumentError
from bigmodel.models import Skeleton, build_skeleton

__all__ = ["generate_greedily", "open_text_model"]


class _TokensAsTheyCome:
    """What `generate` calls a streamer: it is given the prompt first, and then each token."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token = on_token
        self._has_prompt = False

    def put(self, ids: Any) -> None:
        if self._has_prompt:
            self._on_token(int(ids))
        self._has_prompt = True

    def end(self) -> None:
        pass


def generate_greedily(
    model: Any, ids: list[int], new_tokens: int, on_token: Callable[[int], None], *, device: str = "cpu"
) -> None:
    """Runs the model's own ``generate``, greedy, batch 1.

    Args:
        model: with transformers' ``generate``.
        ids: the prompt.
        new_tokens: how many are generated; an end token is never chosen before.
        on_token: called with each token as soon as the host has it.
        device: where the inputs belong.
    """
    import torch

    prompt = torch.tensor([ids], device=device)
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        **greedy_options(new_tokens),
        pad_token_id=0,  # no sequence ends early, so none is filled up
        streamer=_TokensAsTheyCome(on_token),
    )


def open_text_model(path: str, peer: str) -> tuple[Checkpoint, Skeleton]:
    """The checkpoint and its model on meta, headers read alone.

    Args:
        path: a folder with safetensors files.
        peer: its name, for the error.

    Raises:
        InvalidArgumentError: no safetensors files, or a model that does not continue a text.
        CheckpointError: files that bigmodel does not read either.
    """
    checkpoint = open_checkpoint(path)
    if not Path(path).is_dir() or not all(file.endswith(".safetensors") for file in checkpoint.files):
        raise InvalidArgumentError(f"{peer} is tried with a folder of safetensors files, and {path} is none.")
    skeleton = build_skeleton(checkpoint)
    model: Any = skeleton.model
    if model.config.is_encoder_decoder or not model.can_generate():
        raise InvalidArgumentError(
            f"{peer} is tried with models that continue a text, and {type(model).__name__} does not."
        )
    return checkpoint, skeleton
