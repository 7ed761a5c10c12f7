"""Text in and text out of a model: its tokenizer, and a stream that writes what generate gives, token by token."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bigmodel.errors import CheckpointError, InvalidArgumentError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextStream", "encode_prompt", "load_tokenizer", "padded"]

UNFINISHED = "\ufffd"
"""What a tokenizer shows for a character whose last bytes are in a token yet to come."""


def load_tokenizer(
    folder: str | os.PathLike[str], *, subfolder: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer that stands beside a checkpoint's weights.

    Args:
        folder: the checkpoint's own folder; no network is used.
        subfolder: set where `folder` is this part of a larger checkpoint; the tokenizer may stand at its top.
        trust_remote_code: whether code of the checkpoint may run.

    Raises:
        CheckpointError: there is none, or it cannot be read, or it needs code that is not trusted.
    """
    from transformers import AutoTokenizer

    beside = Path(folder)
    top = beside.joinpath(*[".."] * len(Path(subfolder or "").parts))
    reasons = []
    for place in dict.fromkeys((beside, top)):
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                place, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # foreign: OSError, ValueError, KeyError, ImportError and tokenizers' own
            reasons.append(error)
        else:
            return tokenizer
    reason = " ".join(str(reasons[0]).split())[:400] or type(reasons[0]).__name__
    raise CheckpointError(
        f"{beside} has no tokenizer that can be loaded. Put the model's tokenizer.json and tokenizer_config.json "
        f"there. What transformers says: {reason}"
    ) from reasons[0]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool = False) -> dict[str, torch.Tensor]:
    """A prompt as generate takes it.

    Args:
        tokenizer: of the model.
        prompt: the text.
        chat: put it into the model's chat template, as a user's message that is to be answered.

    Returns:
        ``input_ids`` and ``attention_mask``, both int64 [1, tokens], on the CPU.

    Raises:
        InvalidArgumentError: the prompt gives no token, or the model has no chat template.
    """
    if chat and not tokenizer.chat_template:
        raise InvalidArgumentError(
            "This model has no chat template. Give the prompt as it should be continued, without --chat."
        )
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    # A chat template writes the special tokens that the model wants.
    encoded: Any = tokenizer(prompt, add_special_tokens=not chat, return_attention_mask=True)
    # Some tokenizers add segment numbers, which most models that generate do not take.
    inputs = {name: torch.tensor([encoded[name]], dtype=torch.long) for name in ("input_ids", "attention_mask")}
    if inputs["input_ids"].numel() == 0:
        raise InvalidArgumentError("The prompt is empty: it gives 0 tokens. Give at least one.")
    return inputs


def padded(sequences: Sequence[torch.Tensor], padding: int) -> dict[str, torch.Tensor]:
    """Sequences of token ids, int64 [tokens] each, as generate takes them: filled up before their beginning.

    Returns:
        ``input_ids`` and ``attention_mask``, both int64 [sequences, longest].
    """
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), padding, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = sequence
        mask[row, longest - len(sequence) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


class TextStream:
    """Takes the tokens of one sequence from ``generate(streamer=...)`` and writes their text as it comes.

    A token's text can depend on its neighbours (joined spaces, characters of several tokens), so a few of them are
    decoded together, and what is not certain yet is held back.

    Attributes:
        num_tokens: new tokens so far, the end token included.
        num_first: of them, those that came first, together: several where guesses were right.
        first_token_s: ``time.perf_counter()`` when the first came; None before.
        last_token_s: when the latest came.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        write: Callable[[str], None],
    ) -> None:
        self._tokenizer = tokenizer
        self._write = write
        self._tokens: list[int] = []
        self._window_start = 0  # decoding starts here ...
        self._written_end = 0  # ... and the text of tokens up to here is written
        self._has_prompt = False
        self.num_tokens = self.num_first = 0
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None

    def put(self, value: torch.Tensor) -> None:
        """Takes token ids of one sequence, of any shape; what the first call of a run brings is the prompt."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        self.last_token_s = time.perf_counter()
        tokens = value.flatten().tolist()
        if self.first_token_s is None:
            self.first_token_s, self.num_first = self.last_token_s, len(tokens)
        self.num_tokens += len(tokens)
        self._tokens += tokens
        self._flush(is_end=False)

    def end(self) -> None:
        """Writes what was held back; the next call of `put` brings a prompt again."""
        self._flush(is_end=True)
        self._has_prompt = False
        self._tokens, self._window_start, self._written_end = [], 0, 0

    def _flush(self, *, is_end: bool) -> None:
        written = self._decode(self._tokens[self._window_start : self._written_end])
        text = self._decode(self._tokens[self._window_start :])
        if len(text) > len(written) and (is_end or not text.endswith(UNFINISHED)):
            self._write(text[len(written) :])
            self._window_start, self._written_end = self._written_end, len(self._tokens)

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text if isinstance(text, str) else "".join(text)
