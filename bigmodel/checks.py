"""What a value that comes from outside may be: small checks that are put together, and errors that name the field and the value.

check = record({"name": text, "sizes": listed(integer(0, 9))}, needed=("name",))
check({"name": "a", "sizes": [1, 99]}, "")      # InvalidArgumentError: sizes[1] is 99. Give an integer from 0 to 9.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from bigmodel.errors import InvalidArgumentError, join_some, shown

__all__ = [
    "Check",
    "anything",
    "flag",
    "integer",
    "listed",
    "mapped",
    "number",
    "own_device_name",
    "parse_json",
    "record",
    "satisfying",
    "text",
]

Check = Callable[[Any, str], None]
"""Of a value and its name; raises InvalidArgumentError where the value is wrong."""


def parse_json(written: Any, what: str) -> Any:
    """A JSON text's value.

    Raises:
        InvalidArgumentError: it is none, or nested so deeply that Python cannot read it.
    """
    try:
        return json.loads(written)
    except RecursionError:
        raise InvalidArgumentError(f"{what} is nested too deeply. Give a JSON object that was not damaged.") from None
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError(f"{what} is not JSON: {error}.") from error


def satisfying(wanted: str, is_right: Callable[[Any], bool]) -> Check:
    """For values of which `is_right`; `wanted` says in an error what to give."""

    def check(value: Any, name: str) -> None:
        if not is_right(value):
            raise InvalidArgumentError(f"{name} is {shown(value)}. Give {wanted}.")

    return check


def integer(low: int, high: int) -> Check:
    """For ints of a range, both ends included."""
    return satisfying(
        f"an integer from {low} to {high}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
    )


def number(low: float, high: float, *, or_none: bool = False) -> Check:
    """For ints and floats of a range, both ends included; never for NaN."""
    return satisfying(
        f"a number from {low:g} to {high:g}{' or null' if or_none else ''}",
        lambda value: (
            (value is None and or_none)
            or (isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high)
        ),
    )


def listed(each: Check, least: int = 0) -> Check:
    """For lists of at least so many values, each of which is checked."""
    check_list = satisfying(
        f"a list of {least} or more" if least else "a list",
        lambda value: isinstance(value, (list, tuple)) and len(value) >= least,
    )

    def check(value: Any, name: str) -> None:
        check_list(value, name)
        for place, item in enumerate(value):
            each(item, f"{name}[{place}]")

    return check


def mapped(each: Check, *, key: Check | None = None, least: int = 0) -> Check:
    """For objects with any keys, texts where `key` says nothing else, and values each of which is checked."""
    check_object = satisfying(
        f"an object with {least} or more entries" if least else "an object",
        lambda value: isinstance(value, Mapping) and len(value) >= least,
    )

    def check(value: Any, name: str) -> None:
        check_object(value, name)
        for own, item in value.items():
            (key or text)(own, f"a key of {name}")
            each(item, f"{name}[{shown(own)}]")

    return check


def record(fields: Mapping[str, Check], needed: Collection[str] = ()) -> Check:
    """For objects with these fields and no others; `needed` ones must be there."""

    def check(value: Any, name: str) -> None:
        within = f"{name}." if name else ""
        if not isinstance(value, Mapping):
            raise InvalidArgumentError(f"{name or 'it'} is {shown(value)}. Give an object.")
        unknown = [f"{within}{key}" for key in value if key not in fields]
        if unknown:
            raise InvalidArgumentError(f"unknown {join_some(map(shown, unknown))}. Known are {', '.join(fields)}.")
        for key in needed:
            if key not in value:
                raise InvalidArgumentError(f"{within}{key} is missing")
        for key, item in value.items():
            fields[key](item, f"{within}{key}")

    return check


def own_device_name(value: Any) -> str | None:
    """An accelerator's one name, index included, such as ``"cuda:0"`` for ``"cuda"``; None for what names none."""
    import torch  # here: a command line is refused before torch is there

    if not isinstance(value, str):
        return None
    try:
        device = torch.device(value)
    except (RuntimeError, ValueError):
        return None
    if device.type in ("cpu", "meta") or str(device) != value:  # torch counts an index above 127 from below
        return None
    return f"{device.type}:{device.index or 0}"


def _is_text(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(value.encode() or True)
    except UnicodeEncodeError:  # half a pair of surrogates, which no terminal shows
        return False


text = satisfying("a text", _is_text)
flag = satisfying("true or false", lambda value: isinstance(value, bool))
anything = satisfying("anything", lambda value: True)
