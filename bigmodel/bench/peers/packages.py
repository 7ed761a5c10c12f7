"""Which versions of a peer's packages are installed here."""

from __future__ import annotations

import importlib.metadata

__all__ = ["versions_of"]


def versions_of(package: str, *beside: str) -> str:
    """Such as ``airllm 4.0.0 (transformers 5.23.0)``.

    Args:
        package: the peer's own, as pip names it.
        beside: what it builds on.

    Raises:
        ImportError: the package is not installed; the message says how it is.
    """
    found = []
    for name in (package, *beside):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(f"{name} is not installed here. Run `pip install {package}`.") from None
    return f"{found[0]} ({', '.join(found[1:])})" if beside else found[0]
