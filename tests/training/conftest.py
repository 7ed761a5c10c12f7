from __future__ import annotations

import pytest

from training.pool import started


@pytest.fixture(scope="session")
def two():
    """Two processes over gloo."""
    with started(2) as pool:
        yield pool
