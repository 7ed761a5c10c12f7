"""More tokens per pass: guesses that one pass checks, and how many of them are worth it.

A pass that streams weights takes as long for one token as for many, so tokens are guessed and checked together. Generation is
transformers' own (assisted decoding and prompt lookup); what is chosen here is the number of guesses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import bigmodel
from bigmodel.device_map.demand import CONTEXT_BYTES
from bigmodel.errors import InvalidArgumentError

if TYPE_CHECKING:
    from bigmodel.device_map.plan import Plan

__all__ = ["MOST_GUESSES", "Draft", "best_number", "lookup_options"]

MOST_GUESSES = 64
"""At once; a plan tells what passes of up to so many and one take."""
# How often a guess is right that follows right ones: where a text repeats itself, and of a small model. Assumed, not measured:
# the number of guesses changes little with them as long as passes cost the same.
_LOOKUP_ACCEPTED, _DRAFT_ACCEPTED = 0.95, 0.8
# Longer matches are tried first: what follows them is right more often.
_MATCHED_TOKENS = 4


def best_number(pass_s: Mapping[int, float], guess_s: float, accepted: float) -> int:
    """The number of guesses for which tokens come fastest.

    A pass with n guesses, each right with probability a after right ones, gives (1 - a^(n+1)) / (1 - a) tokens (Leviathan et al.,
    Fast Inference from Transformers via Speculative Decoding, 2023).

    Args:
        pass_s: tokens of a pass -> its seconds.
        guess_s: seconds of one guess.
        accepted: a, below 1.
    """

    def tokens_per_s(tokens: int) -> float:
        expected = (1 - accepted**tokens) / (1 - accepted)
        return expected / max(pass_s[tokens] + (tokens - 1) * guess_s, 1e-12)

    return max(pass_s, key=tokens_per_s, default=1) - 1


def lookup_options(plan: Plan) -> dict[str, Any]:
    """What generate is asked for, so that it guesses what follows the same tokens earlier in the text."""
    number = best_number(plan.estimate.pass_s, 0.0, _LOOKUP_ACCEPTED)
    return {"prompt_lookup_num_tokens": max(1, number), "max_matching_ngram_size": _MATCHED_TOKENS}


@dataclass(frozen=True)
class Draft:
    """A smaller model that guesses, all of it in memory.

    Attributes:
        model: what `load_sharded` gave.
        plan: of it.
        tokenizer: of it, where its vocabulary is not that of the model that checks.
    """

    model: Any
    plan: Plan
    tokenizer: Any = None

    @classmethod
    def load(
        cls,
        path: str,
        tokenizer: Any,
        own_tokenizer: Any,
        limits: Mapping[int | str, int] | None,
        workload: bigmodel.Workload,
        **options: Any,
    ) -> Draft:
        """Load it where it runs fastest: on an accelerator that may be used, or in host memory.

        Args:
            path: of its checkpoint.
            tokenizer, own_tokenizer: of the model that checks, and of the draft; where one has none, their tokens are taken to
                be the same.
            limits: as `max_memory`, for both models.
            workload: of both.
            options: of `load_sharded`.

        Raises:
            DoesNotFitError: it does not fit whole.
            InvalidArgumentError: it does not generate text.
        """
        machine = bigmodel.Machine.probe()
        may_use = [each.device for each in machine.accelerators if limits is None or _states(limits, each.device)]
        model = bigmodel.load_sharded(
            path, device_map="cuda" if may_use else "cpu", max_memory=limits, workload=workload, **options
        )
        if not hasattr(model, "generate") or not model.can_generate():
            raise InvalidArgumentError(
                f"--draft {path} is a {type(model).__name__}, which does not generate text. Give a smaller model that does."
            )
        is_same = None in (tokenizer, own_tokenizer) or own_tokenizer.get_vocab() == tokenizer.get_vocab()
        return cls(model, bigmodel.plan_of(model), None if is_same else own_tokenizer)

    def limits_beside(self) -> dict[int | str, int]:
        """What is left for the model that checks."""
        left: dict[int | str, int] = {}
        for tier, limit in self.plan.limits.items():
            held = self.plan.estimate.peak_bytes.get(tier, 0)
            shared = 0 if tier in ("cpu", "disk") else min(held, CONTEXT_BYTES)  # one context serves both
            left[tier] = max(0, limit - held + shared)
        return left

    def options(self, plan: Plan, tokenizer: Any) -> dict[str, Any]:
        """What generate is asked for. The number of guesses is set on the draft, where generate looks for it.

        Args:
            plan, tokenizer: of the model that checks.
        """
        guess_s = self.plan.estimate.time_per_token_s or 0.0
        settings = self.model.generation_config
        settings.num_assistant_tokens = max(1, best_number(plan.estimate.pass_s, guess_s, _DRAFT_ACCEPTED))
        settings.num_assistant_tokens_schedule = "constant"
        options = {"assistant_model": self.model}
        if self.tokenizer is not None:
            options |= {"tokenizer": tokenizer, "assistant_tokenizer": self.tokenizer}
        return options


def _states(limits: Mapping[int | str, int], device: str) -> bool:
    number = device.rpartition(":")[2]
    return any(str(key) in (device, number) and size > 0 for key, size in limits.items())
