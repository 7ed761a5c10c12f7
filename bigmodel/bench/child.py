"""The fresh process of one measurement: import, say so, wait for the word, run one function, print its result.

It speaks in lines that begin with a mark, so that what libraries print does no harm.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import signal
import sys
import traceback
from typing import Any

__all__ = ["MARK", "die_with_parent", "tell"]

MARK = "@benchmark "
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends, however that happens."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def tell(text: str) -> None:
    """Have the parent show a line to whoever waits."""
    _say({"told": text})


def main() -> None:
    die_with_parent()
    setup = json.loads(sys.stdin.readline())
    at_start = set(sys.modules)
    for name in setup["modules"]:
        try:
            importlib.import_module(name)
        except Exception:  # some names in sys.modules are not importable by that name; the run imports them then
            continue
    module, _, function = setup["call"].partition(":")
    try:
        run = getattr(importlib.import_module(module), function)
        # A collection in the middle of a run would walk what the imports made: more for who imports more.
        gc.collect()
        gc.freeze()
        _say({"ready": True})
        sys.stdin.readline()
        result: dict[str, Any] = {"result": run(**setup["arguments"])}
    except BaseException as error:
        # A SystemExit or a KeyboardInterrupt inside a peer is a failed measurement as well.
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"[:500]}
    if setup["names_modules"]:
        result["modules"] = [name for name in sys.modules if name not in at_start]
    _say(result)


def _say(words: dict[str, Any]) -> None:
    print(MARK + json.dumps(words), flush=True)


if __name__ == "__main__":
    main()
