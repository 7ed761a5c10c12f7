"""What the fields of a machine file may hold."""

from __future__ import annotations

from typing import Any

from bigmodel.checks import anything, flag, integer, listed, mapped, number, own_device_name, record, satisfying, text
from bigmodel.device_map.rates import PER_S, RATE_FIELDS
from bigmodel.errors import InvalidArgumentError, shown
from bigmodel.units import parse_bytes

__all__ = ["check_machine"]


def _size(value: Any, name: str) -> None:
    if parse_bytes(value, name) >= _MOST_BYTES:
        raise InvalidArgumentError(f"{name} is {shown(value)}, more than any machine has. Give a size such as '64GiB'.")


# What a machine file may say. A misspelt rate would silently be a default.
_MOST_BYTES, _COUNT = 2**60, integer(1, 2**20)
_DEVICE = satisfying("an accelerator such as 'cuda:0'", lambda value: own_device_name(value) is not None)
_CARD = {
    "name": text,
    "device": _DEVICE,
    "memory": _size,
    "unified": flag,
    "h2d_bytes_per_s": PER_S,
    "source": anything,
}
_HOST = {"memory": _size, "processors": _COUNT, "source": anything}
_DISK = {"free": _size, "read_bytes_per_s": PER_S, "measured": mapped(PER_S), "source": anything}
_MACHINE = record(
    {
        "name": text,
        "rates_from": text,
        "accelerators": listed(record({**_CARD, **RATE_FIELDS}, needed=("memory",))),
        "host": record({**_HOST, **RATE_FIELDS}, needed=("memory",)),
        "disk": record(_DISK),
        "h2d_bytes_per_s_all": number(1e3, 1e18, or_none=True),
        "d2d_bytes_per_s": PER_S,
        "processes": _COUNT,
        "place": integer(0, 2**20),
        **dict.fromkeys(("source", "sources", "notes", "comment"), anything),
    },
    needed=("host",),
)


def check_machine(described: Any) -> None:
    """InvalidArgumentError where the JSON of a machine file does not mean a machine."""
    _MACHINE(described, "")
