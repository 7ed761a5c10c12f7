from __future__ import annotations

import pytest

from training.loops import save_llama
from training.pool import started


@pytest.fixture(scope="session")
def two():
    """Two processes over gloo."""
    with started(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny llama in bfloat16; nobody writes into it."""
    path = tmp_path_factory.mktemp("llama")
    save_llama(path)
    return path
