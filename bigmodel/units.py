"""Byte sizes: the one place where they are parsed and printed."""

from __future__ import annotations

import re

from bigmodel.errors import InvalidArgumentError, shown

__all__ = ["MOST", "format_bytes", "parse_bytes"]

MOST = 2**62
"""Of bytes, or of anything that is counted: what is larger is a mistake."""

_LONGEST = 64  # characters of a size

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_FACTORS: dict[str, int] = {"b": 1} | {
    f"{letter}{suffix}": base ** (power + 1)
    for power, letter in enumerate("kmgt")
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")


def parse_bytes(size: int | str, name: str = "size") -> int:
    """Bytes of a size given as an int (bytes) or as a string with a unit.

    Args:
        size: an int >= 0, or a string such as ``"20GiB"`` (2**30), ``"20GB"`` (10**9), ``"500 MB"``; upper or lower case.
            ``"20Gb"`` is refused: it may mean bits.
        name: what the size is for; named in errors.

    Returns:
        Whole bytes, rounded down.

    Raises:
        InvalidArgumentError: for floats, NaN, negatives, unknown units, a lower-case b after an upper-case letter, and what is
            above `MOST` or longer than a size is written.
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise InvalidArgumentError(
            f"{name} is {shown(size)}, a {type(size).__name__}. Give bytes as an int, or a string with a unit such as '20GiB'."
        )
    if isinstance(size, int):
        if size < 0:
            raise InvalidArgumentError(f"{name} is {shown(size)} bytes. A size cannot be negative.")
        return _not_huge(size, size, name)
    if len(size) > _LONGEST:
        raise InvalidArgumentError(f"{name} is {shown(size)}, which is no size. Give one such as '20GiB'.")
    match = _PATTERN.fullmatch(size)
    if match is None:
        raise InvalidArgumentError(
            f"{name} is {size!r}, which is not a size. Give a number with a unit, such as '20GiB' or '500MB'."
        )
    number, unit = match.groups()
    if unit[-1] == "b" and unit[:-1] != unit[:-1].lower():
        raise InvalidArgumentError(f"{name} is {size!r}: {unit!r} may mean bits. Write {unit[:-1] + 'B'!r} for bytes.")
    factor = _FACTORS.get(unit.lower())
    if factor is None:
        raise InvalidArgumentError(
            f"{name} is {size!r}: the unit {unit!r} is unknown. Use KB, MB, GB, TB, KiB, MiB, GiB or TiB."
        )
    whole, _, fraction = number.partition(".")
    # Ten to a power that is not written down may be a float, for a type checker.
    return _not_huge(int(whole) * factor + int(fraction or 0) * factor // int("1" + "0" * len(fraction)), size, name)


def _not_huge(num_bytes: int, size: int | str, name: str) -> int:
    if num_bytes > MOST:
        raise InvalidArgumentError(
            f"{name} is {shown(size)}, which is more than any machine has. Give a size such as '20GiB'."
        )
    return num_bytes


def format_bytes(num_bytes: float) -> str:
    """A size as people read it: ``1.62 GiB``, ``57.0 MiB``, ``812 B``."""
    sign, num_bytes = ("-", -num_bytes) if num_bytes < 0 else ("", num_bytes)
    for factor, unit in ((1 << 40, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if num_bytes >= factor:
            value = num_bytes / factor
            return f"{sign}{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{sign}{int(num_bytes)} B"
