"""What a forward pass of a model needs: for running one without numbers, to learn what it costs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

__all__ = ["example_inputs"]


def example_inputs(model: nn.Module, batch_size: int, num_tokens: int) -> dict[str, torch.Tensor] | None:
    """Keyword arguments for one forward pass of a transformers model, made in the modes that the caller has set.

    Args:
        model: built; may be on meta.
        batch_size: sequences, or images.
        num_tokens: per sequence. An encoder-decoder gets as many on either side: the most that a pass can hold.

    Returns:
        CPU tensors, zeros: token ids int64 [batch, tokens], images and audio features in the model's dtype. None where
        the class does not say what it needs.
    """
    known: Any = model
    main, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    if main is None or config is None:
        return None
    accepted = inspect.signature(known.forward).parameters
    inputs: dict[str, torch.Tensor] = {}

    def tokens() -> torch.Tensor:
        return torch.zeros(batch_size, num_tokens, dtype=torch.int64, device="cpu")

    if main == "input_ids":
        inputs[main] = tokens()
    # A model that generates text takes text alone; one that compares text and images takes both.
    if main == "pixel_values" or ("pixel_values" in accepted and not known.can_generate()):
        shape = _image_shape(config)
        if shape is None:
            return None
        inputs["pixel_values"] = torch.zeros(batch_size, *shape, dtype=known.dtype, device="cpu")
    if main == "input_features":
        bins, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
        if bins is None or positions is None:
            return None
        # two convolutions halve the frames once
        inputs[main] = torch.zeros(batch_size, bins, 2 * positions, dtype=known.dtype, device="cpu")
    if config.is_encoder_decoder and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = tokens()
    return inputs if main in inputs else None


def _image_shape(config: Any) -> tuple[int, ...] | None:
    """(channels, height, width) of the images that a config asks for."""
    for part in (config, getattr(config, "vision_config", None), getattr(config, "encoder", None)):
        size, channels = getattr(part, "image_size", None), getattr(part, "num_channels", 3)
        if isinstance(size, int):
            size = (size, size)
        if isinstance(size, (list, tuple)) and len(size) == 2:
            return (channels, *size)
    return None
