"""Measurements in processes of their own: what they are given, what holds around them, and what a failure says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigmodel.bench.harness import Bench, Outcome, Trial
from bigmodel.bench.page_cache import cached_bytes, drop_from_cache, read_into_cache
from bigmodel.bench.raw_read import read_into_ring, widened

MIB = 1 << 20
# What children run: this file's own functions, which their import path must reach.
RUNS = """
import time

def tell(**given):
    return given

def tell_on_the_way():
    from bigmodel.bench.child import tell
    print("a library's own words")
    tell("halfway")
    return 1

def hold(num_bytes):
    held = bytearray(num_bytes)
    held[::4096] = b"1" * len(held[::4096])
    time.sleep(0.05)
    return len(held)

def load_of(file):
    from bigmodel.bench.page_cache import cached_bytes
    from pathlib import Path
    return cached_bytes([Path(file)])

def read(file):
    return len(open(file, "rb").read())

def fail():
    raise ValueError("no such thing")

def leave():
    raise SystemExit(3)
"""


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "benched_runs.py").write_text(RUNS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "benched_runs"


def run(call: str, *, limit_bytes: int | None = None, **arguments: object) -> Outcome:
    with Bench(balloon_bytes=0, tell=lambda line: None) as bench:
        return bench.run(Trial(name="it", call=call, arguments=arguments, limit_bytes=limit_bytes))


def test_a_run_gets_its_arguments_and_its_result_comes_back(runs: str) -> None:
    outcome = run(f"{runs}:tell", number=3, names=["a", "b"])
    assert outcome.error is None
    assert outcome.result == {"number": 3, "names": ["a", "b"]}


def test_a_run_tells_who_waits_how_far_it_is(runs: str) -> None:
    told: list[str] = []
    with Bench(balloon_bytes=0, tell=told.append) as bench:
        outcome = bench.run(Trial(name="it", call=f"{runs}:tell_on_the_way", arguments={}))
    assert (outcome.result, told) == (1, ["halfway"])


def test_the_peak_is_what_the_run_holds(runs: str) -> None:
    outcome = run(f"{runs}:hold", num_bytes=64 * MIB)
    assert 64 * MIB <= outcome.peak_rise_bytes <= 80 * MIB


@pytest.mark.parametrize(
    ("call", "words"),
    [("fail", "ValueError: no such thing"), ("leave", "SystemExit: 3"), ("missing", "AttributeError")],
)
def test_a_failure_is_an_outcome(runs: str, call: str, words: str) -> None:
    outcome = run(f"{runs}:{call}")
    assert outcome.result is None
    assert outcome.error is not None
    assert words in outcome.error


@pytest.mark.root
def test_a_run_that_takes_more_than_its_group_has_is_killed_and_says_so(runs: str) -> None:
    outcome = run(f"{runs}:hold", limit_bytes=64 * MIB, num_bytes=256 * MIB)
    assert outcome.error == "killed at the memory limit of 64 MiB"


@pytest.mark.root
def test_a_group_counts_page_cache_too(runs: str, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(64 * MIB))
    drop_from_cache([file])
    little = run(f"{runs}:tell", limit_bytes=512 * MIB).cgroup_peak_bytes
    much = run(f"{runs}:read", limit_bytes=512 * MIB, file=str(file)).cgroup_peak_bytes
    assert little is not None
    assert much is not None
    assert much > little + 120 * MIB  # the bytes, and the pages that they came from


def test_turns_are_interleaved_and_what_fails_twice_is_left(runs: str) -> None:
    told: list[str] = []
    with Bench(balloon_bytes=0, tell=told.append) as bench:
        trials = [
            Trial(name="a", call=f"{runs}:tell", arguments={}),
            Trial(name="b", call=f"{runs}:fail", arguments={}),
        ]
        outcomes = bench.interleaved(trials, 3)
    assert [len(outcomes[name]) for name in "ab"] == [3, 2]
    assert [line.split()[2][0] for line in told] == ["a", "b", "a", "b", "a"]


def test_cold_files_are_in_no_cache_and_warm_ones_are(runs: str, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(4 * MIB))
    with Bench(balloon_bytes=0, tell=lambda line: None) as bench:
        trial = {"name": "it", "call": f"{runs}:load_of", "arguments": {"file": str(file)}, "files": [file]}
        assert bench.run(Trial(**trial, is_cold=True)).result == 0
        assert bench.run(Trial(**trial, is_cold=False)).result == 4 * MIB
    assert cached_bytes([file]) == 4 * MIB
    assert drop_from_cache([file]) == 0
    read_into_cache([file])
    assert cached_bytes([file]) == 4 * MIB


@pytest.mark.root
def test_nothing_is_left_of_a_group_whose_run_was_killed(runs: str) -> None:
    run(f"{runs}:hold", limit_bytes=64 * MIB, num_bytes=256 * MIB)
    assert not list(Path("/sys/fs/cgroup").rglob(f"bigmodel-bench-{os.getpid()}-*"))


def test_ranges_are_aligned_merged_and_read_whole(tmp_path: Path) -> None:
    file = str(tmp_path / "weights")
    Path(file).write_bytes(os.urandom(1 * MIB))
    ranges = widened([(file, 300_000, 10), (file, 100, 5000), (file, 6000, 3000)])
    assert ranges == [(file, 0, 12288), (file, 299008, 4096)]
    read = read_into_ring(ranges, num_threads=2, block_bytes=8192, ring_bytes=16384, num_passes=2)
    assert read["num_bytes"] == 12288 + 4096
    assert len(read["seconds"]) == 2  # type: ignore[arg-type]


def test_the_process_of_a_peer_holds_nothing_of_ours_but_the_harness() -> None:
    code = "import sys, bigmodel.bench.child, bigmodel.bench.peers.running; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "transformers"} & set(done.stdout.split())


def test_an_interrupt_leaves_the_rounds_that_are_whole(runs: str) -> None:
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        if len(told) == stop_at:
            raise KeyboardInterrupt

    trials = [Trial(name=name, call=f"{runs}:tell", arguments={"name": name}) for name in ("a", "b")]
    stop_at = 3  # in the second round
    with Bench(balloon_bytes=0, tell=tell) as bench:
        outcomes = bench.interleaved(trials, 5)
        assert bench.was_interrupted
        assert "interrupted: 1 of 5 rounds" in bench.notes
    assert {name: len(each) for name, each in outcomes.items()} == {"a": 1, "b": 1}
    told.clear()
    stop_at = 1
    with pytest.raises(KeyboardInterrupt), Bench(balloon_bytes=0, tell=tell) as bench:
        bench.interleaved(trials, 5)
