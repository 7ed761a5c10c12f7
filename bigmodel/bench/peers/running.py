"""What is run in a process of its own for another library."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from bigmodel.bench.clock import Clock, stated
from bigmodel.bench.peers import CANDIDATES

__all__ = ["prepare_peer", "run_peer"]


def run_peer(
    peer: str, path: str, scratch: str, prompt: Sequence[int], num_tokens: int, limits: Mapping[str, int] | None
) -> dict[str, Any]:
    """Load a model with a peer and generate.

    Args:
        peer: a key of CANDIDATES.
        path: the checkpoint's folder.
        scratch: what its `prepare` has written is below it.
        prompt, num_tokens: ids of one sequence, and how many are generated after it.
        limits: what it may use, as `max_memory`.

    Returns:
        ``load_s``, ``ttft_s``, ``seconds``, ``tokens`` as `subject.run_model` gives them; ``settings`` of the peer.
    """
    candidate = CANDIDATES[peer]()
    candidate.limits, candidate.num_positions = stated(limits), len(prompt) + num_tokens
    settings = candidate.settings()
    clock = Clock()
    started_s = time.perf_counter()
    candidate.load(path, scratch)
    load_s = time.perf_counter() - started_s
    clock.start()
    candidate.generate(list(prompt), num_tokens, clock.tick)
    if len(clock.tokens) != num_tokens:
        raise RuntimeError(f"{peer} gave {len(clock.tokens)} tokens instead of {num_tokens}")
    return {
        "load_s": load_s,
        "ttft_s": clock.times[0] - clock.started_s,
        "seconds": clock.steps(),
        "tokens": clock.tokens,
        "settings": settings,
    }


def prepare_peer(peer: str, path: str, scratch: str, num_positions: int) -> dict[str, Any]:
    """Let a peer write what it needs once, for texts of at most so many tokens.

    Returns:
        ``files`` that its runs read; ``seconds``; ``settings``; ``environment`` of its runs.
    """
    candidate = CANDIDATES[peer]()
    candidate.num_positions = num_positions
    settings, started_s = candidate.settings(), time.perf_counter()
    files = candidate.prepare(path, scratch)
    return {
        "files": [str(file) for file in files],
        "seconds": time.perf_counter() - started_s,
        "settings": settings,
        "environment": dict(candidate.environment),
    }
