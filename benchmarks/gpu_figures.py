"""What benchmarks.gpu's outcomes say: figures against their targets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.gpu_peers import PEERS, is_installed
from benchmarks.report import Figure, Report

__all__ = ["Found", "add_figures"]

Found = Mapping[str, Mapping[tuple[int, int], dict[str, Any]]]
"""Trial -> (call of the script, round) -> what it returned."""

# A step: the link's share, what the plan may be off, and how much slower the peers have to be.
LEAST_EFFICIENCY, PREDICTED = 0.95, (0.9, 1.1)
LEAST_OVER = {"accelerate": 4.0, "deepspeed": 1.2, "group_offload": 1.2}


def add_figures(report: Report, found: Found, *, with_peers: bool) -> None:
    """All that can be told; what cannot is a row that says why."""
    _guarded(report, "link", lambda: _link(found))
    _guarded(report, "disk", lambda: _disk(found))
    link = max((each["bytes_per_s"] for each in _results(found, "link")), default=None)
    for name in found:
        if not name.startswith("bigmodel"):
            continue
        if name.endswith("prompts"):
            _guarded(report, name, lambda name=name: _prompts(found, name))  # type: ignore[misc]
        else:
            for build in (_step, _memory):
                _guarded(report, name, lambda name=name, build=build: build(found, name, link))  # type: ignore[misc]
    if with_peers:
        for peer in PEERS:
            _guarded(report, peer, lambda peer=peer: _peer(found, peer))  # type: ignore[misc]
        _guarded(report, "best other peer", lambda: _best_other(found))
        _guarded(report, "deepspeed from disk", lambda: _deepspeed_disk(found))
    _guarded(report, "profile", lambda: _profile(found))
    _guarded(report, "bits", lambda: _bits(found))


def _guarded(report: Report, name: str, build: Callable[[], Iterable[Figure]]) -> None:
    """One failure does not take the table."""
    try:
        for figure in build():
            report.add(figure)
    except Exception as error:
        report.add(Figure(name=name, values=[], note=f"could not be told: {type(error).__name__}: {error}"))


def _results(found: Found, name: str) -> list[dict[str, Any]]:
    return list(found.get(name, {}).values())


def _of(results: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float | None]) -> list[float]:
    """One value from each that has one."""
    return [number for number in map(value, results) if number is not None]


def _median_s(result: dict[str, Any]) -> float:
    return statistics.median(result["seconds"])


def _over(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _link(found: Found) -> Iterable[Figure]:
    if results := _results(found, "link"):
        yield Figure(
            name="link: measured peak, page-locked",
            values=[each["bytes_per_s"] / 1e9 for each in results],
            unit=" GB/s",
        )


def _disk(found: Found) -> Iterable[Figure]:
    peaks = [
        max(each["num_bytes"] / seconds for seconds in each["seconds"])
        for name in found
        if name.startswith("disk")
        for each in _results(found, name)
    ]
    if not peaks:
        return
    yield Figure(name="disk: measured peak, O_DIRECT", values=[max(peaks) / 1e9], unit=" GB/s")
    name = "bigmodel, everything on disk"
    values = _of(_results(found, name), lambda each: each["read_bytes"] / _median_s(each) / max(peaks))
    yield Figure(name=f"{name}: bytes read over the disk's peak", values=values, limit=0.85, is_upper=False)


def _step(found: Found, name: str, link: float | None) -> Iterable[Figure]:
    results = _results(found, name)
    if not results:
        return
    last = results[-1]
    note = f"{last['copied_bytes'] / 1e9:.2f} GB over the link, {last['read_bytes'] / 1e9:.2f} GB from disk, a step"
    yield Figure(name=f"{name}: step", values=[_median_s(each) for each in results], unit=" s", note=note)
    yield Figure(
        name=f"{name}: tokens/s", values=[each["tokens_per_s"] for each in results], note=f"batch {last['batch_size']}"
    )
    values = _of(
        results,
        lambda each: _over(each["copied_bytes"] / _median_s(each), link) if each["copied_bytes"] else None,
    )
    yield Figure(
        name=f"{name}: bytes copied over the link's peak",
        values=values,
        limit=LEAST_EFFICIENCY if name == "bigmodel" else None,
        is_upper=False,
        note="" if values else "nothing was copied, or the link was not measured",
    )
    yield Figure(
        name=f"{name}: step over predicted",
        values=_of(results, lambda each: _over(_median_s(each), each["predicted"]["time_per_token_s"])),
        limit=PREDICTED[1],
        floor=PREDICTED[0],
        unit="x",
        note=f"rates: {last['rates_from']}",
    )
    yield from _stall(found, name, results)


def _stall(found: Found, name: str, results: Sequence[dict[str, Any]]) -> Iterable[Figure]:
    """What a step takes beyond the same model's that is whole on the accelerator."""
    whole = _results(found, "resident, bloom-shaped" if name.endswith("bloom-shaped") else "resident")
    resident = whole[-1]["step_s"] if whole and not name.endswith("disk") else {}
    values = _of(
        results,
        lambda each: (
            _median_s(each) - resident[str(each["batch_size"])] if str(each["batch_size"]) in resident else None
        ),
    )
    if values:
        computed = resident[str(results[-1]["batch_size"])]
        yield Figure(
            name=f"{name}: stalls of a step",
            values=values,
            unit=" s",
            note=f"{computed:.4f} s whole on the accelerator; the host waited {results[-1]['stall_s']:.4f} s",
        )


def _memory(found: Found, name: str, link: float | None) -> Iterable[Figure]:
    results = _results(found, name)
    if results:
        yield _peak(name, results)


def _peak(name: str, results: Sequence[dict[str, Any]]) -> Figure:
    last = results[-1]
    return Figure(
        name=f"{name}: peak memory over the plan's",
        values=[each["peak"] / each["stated"] for each in results],
        limit=1.0,
        is_promise=True,
        note=f"{last['peak'] / 1e9:.2f} GB, reserved {last['reserved'] / 1e9:.2f} GB; page-locked: {last['page_locked']}",
    )


def _prompts(found: Found, name: str) -> Iterable[Figure]:
    results = _results(found, name)
    for tokens in sorted({int(key) for each in results for key in each["lengths"]}):
        every = [each["lengths"].get(str(tokens), {}) for each in results]
        good = [each for each in every if "seconds" in each]
        if not good:
            yield Figure(name=f"first token after {tokens}", values=[], note=every[-1].get("error", ""))
            continue
        yield Figure(
            name=f"first token after {tokens}",
            values=[each["seconds"][-1] for each in good],
            unit=" s",
            note=f"{good[-1]['seconds'][0]:.3f} s the first time; predicted {good[-1]['predicted']['ttft_s'] or 0:.3f} s",
        )
        yield _peak(f"first token after {tokens}", good)


def _pairs(found: Found, peer: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(ours, the peer's) of the same round of the same call."""
    ours, theirs = found.get("bigmodel", {}), found.get(peer, {})
    return [(ours[key], theirs[key]) for key in theirs if key in ours]


def _slower(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    return _median_s(theirs) / _median_s(ours)


def _peer(found: Found, peer: str) -> Iterable[Figure]:
    for name in (each for each in found if each == peer or each.startswith(f"{peer},")):
        if name.endswith("disk"):
            continue
        pairs, note = _pairs(found, name), ""
        if pairs:
            last = pairs[-1][1]
            note = f"{last['moved_bytes'] / 1e9:.2f} GB a step ({last['bytes_from']}), {_median_s(last):.3f} s"
            note += f", reserved {last['reserved'] / 1e9:.2f} GB of ours {pairs[-1][0]['reserved'] / 1e9:.2f} GB"
        yield Figure(
            name=f"step of {name} over ours",
            values=[_slower(*pair) for pair in pairs],
            limit=LEAST_OVER[peer],
            is_upper=False,
            unit="x",
            note=note,
        )
        yield Figure(
            name=f"step of {name} over ours, per byte moved",
            values=[
                _slower(ours, theirs) * ours["copied_bytes"] / theirs["moved_bytes"]
                for ours, theirs in pairs
                if theirs["moved_bytes"] and ours["copied_bytes"]
            ],
            unit="x",
        )
    if not is_installed(peer):
        yield Figure(name=f"step of {peer} over ours", values=[], note="not installed")


def _best_other(found: Found) -> Iterable[Figure]:
    """Of all but Accelerate, which is held against a target of its own."""
    slower: dict[tuple[int, int], float] = {}
    for name in found:
        if name.partition(",")[0] in PEERS and name != "accelerate" and not name.endswith("disk"):
            for key, theirs in found[name].items():
                if key in found.get("bigmodel", {}):
                    ours = found["bigmodel"][key]
                    slower[key] = min(slower.get(key, float("inf")), _slower(ours, theirs))
    note = "" if slower else "no other peer ran"
    yield Figure(
        name="best other peer over ours, same run",
        values=list(slower.values()),
        limit=1.2,
        is_upper=False,
        unit="x",
        note=note,
    )


def _deepspeed_disk(found: Found) -> Iterable[Figure]:
    ours, theirs = _results(found, "bigmodel, everything on disk"), _results(found, "deepspeed, from disk")
    if ours and theirs:
        yield Figure(
            name="step of deepspeed from NVMe over ours from disk",
            values=[_slower(ours[-1], theirs[-1])],
            limit=1.2,
            is_upper=False,
            unit="x",
        )


def _profile(found: Found) -> Iterable[Figure]:
    for result in _results(found, "profile")[-1:]:
        for row, each in result["rows"].items():
            if "error" in each:
                yield Figure(name=f"steady step, {row}", values=[], note=each["error"])
            for what in ("synchronisations", "pageable copies", "allocations", "segments taken", "flushes"):
                if what in each:
                    yield Figure(
                        name=f"steady step, {row}: {what}",
                        values=[float(each[what])],
                        limit=0.0 if "device" in row else None,
                        note=", ".join(each.get("waits", ())) if "device" in row else "rows are looked up on the host",
                    )


def _bits(found: Found) -> Iterable[Figure]:
    for result in _results(found, "equal bits")[-1:]:
        units = ", ".join(f"{name} {count}" for name, count in result["streamed_units"].items())
        differing = f"; differing: {', '.join(result['differing'])}" if result["differing"] else ""
        yield Figure(
            name="ways of resting whose logits or tokens differ from from_pretrained's",
            values=[float(len(result["differing"]))],
            limit=0.0,
            is_promise=True,
            note=f"{result['num_logits']} passes; units that stream: {units}{differing}",
        )
