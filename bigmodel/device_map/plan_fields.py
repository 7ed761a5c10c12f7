"""What the fields of a saved plan may hold: checked before they become one, so that what is read can be told and followed."""

from __future__ import annotations

from collections import Counter
from typing import Any

from bigmodel.checks import integer, listed, mapped, number, own_device_name, record, satisfying, text
from bigmodel.errors import InvalidArgumentError, shown
from bigmodel.units import MOST

__all__ = ["check_plan"]

_MOST_SLOTS = 16
_MOST_NUMBER = 1e30  # seconds, and whatever is counted per second


def _is_device(value: Any) -> bool:
    return value == "cpu" or (isinstance(value, str) and own_device_name(value) == value)


def _is_number_of_tokens(value: Any) -> bool:
    return isinstance(value, str) and value.isdecimal() and value.isascii() and len(value) < 10


_DEVICE = satisfying("'cpu' or an accelerator such as 'cuda:0'", _is_device)
_TIER = satisfying(
    "'cpu', 'disk' or an accelerator such as 'cuda:0'", lambda value: value == "disk" or _is_device(value)
)
_SIZE = integer(0, 2**63 - 1)
_SIZES = mapped(_SIZE, key=_TIER)
_SECONDS = number(0, _MOST_NUMBER, or_none=True)

_PLACEMENT = record(
    {
        "unit": text,
        "home": _TIER,
        "run_on": _DEVICE,
        "prefill_on": _DEVICE,
        "weight_bytes": _SIZE,
        "parameters": listed(text),
    },
    needed=("unit", "home", "run_on", "prefill_on", "weight_bytes", "parameters"),
)
_SLOTS = {"device": _DEVICE, "num_slots": integer(1, _MOST_SLOTS), "slot_bytes": _SIZE, "units": listed(text)}
_ESTIMATE = {
    "peak_bytes": _SIZES,
    "baseline_bytes": _SIZE,
    "load_s": _SECONDS,
    "ttft_s": _SECONDS,
    "time_per_token_s": _SECONDS,
    "tokens_per_s": _SECONDS,
    "binds": mapped(text),
    "phase_peak_bytes": mapped(_SIZES),
    "pass_s": mapped(number(0, _MOST_NUMBER), key=satisfying("a number of tokens", _is_number_of_tokens)),
    "least_s": mapped(mapped(number(0, _MOST_NUMBER))),
    "bytes_per_s": mapped(number(0, _MOST_NUMBER)),
    "train_step_s": _SECONDS,
}
_NEEDED = {
    "placements": listed(_PLACEMENT),
    "slots": listed(record(_SLOTS, needed=_SLOTS)),
    # A plan was made for a number of sequences, never for "auto".
    "workload": record(
        {
            "batch_size": integer(1, MOST),
            "prompt_tokens": integer(1, MOST),
            "new_tokens": integer(0, MOST),
            "trains": satisfying("true or false", lambda value: isinstance(value, bool)),
        }
    ),
    "limits": _SIZES,
    "resident_bytes": _SIZE,
    "buffer_bytes": _SIZE,
    "staging_bytes": _SIZE,
    "kv_bytes": _SIZE,
    "activation_bytes": _SIZE,
    "reserve_bytes": _SIZE,
    "estimate": record(_ESTIMATE, needed=("peak_bytes",)),
}
_PLAN = record(
    _NEEDED
    | {
        "machine": text,
        "rates_from": text,
        "fingerprint": text,
        "notes": listed(text),
        "alternatives": listed(record({"what": text, "seconds": number(0, _MOST_NUMBER)}, needed=("what", "seconds"))),
        "gains_s": mapped(number(-_MOST_NUMBER, _MOST_NUMBER), key=_TIER),
        "ring_bytes": _SIZE,
        "prefill_from_tokens": _SIZE,
    },
    needed=_NEEDED,
)


def check_plan(fields: Any) -> None:
    """InvalidArgumentError where the fields of a plan's JSON, its version left out, do not mean one."""
    _PLAN(fields, "")
    times = Counter(each["unit"] for each in fields["placements"])
    for unit, count in times.items():
        if count > 1:
            raise InvalidArgumentError(f"placements has the unit {shown(unit)} {count} times. Place each unit once.")
    for each in fields["placements"]:
        if each["run_on"] != each["prefill_on"] and (each["home"], each["run_on"]) != ("cpu", "cpu"):
            raise InvalidArgumentError(
                f"{shown(each['unit'])} rests in {each['home']} and runs on {each['run_on']} and on {each['prefill_on']}. Only "
                "what rests in and runs on the cpu may have another device in prefill_on."
            )
