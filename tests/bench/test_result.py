"""Figures from runs: medians, predictions, bounds of the same round, ratios to peers."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from planning import blocks, plan_for

from bigmodel.bench.harness import Outcome
from bigmodel.bench.result import Case, Measured, Result
from bigmodel.device_map.plan import Workload

GB = 10**9


def outcome(result: Any, error: str | None = None, peak: int = 100) -> Outcome:
    return Outcome(
        name="it", result=result, error=error, baseline_bytes=0, peak_rise_bytes=peak, cgroup_peak_bytes=None
    )


def run_of(step_s: float, *, mapped: int = 0, **more: Any) -> dict[str, Any]:
    estimate = {
        "load_s": 0.5,
        "ttft_s": 2.0,
        "time_per_token_s": 1.0,
        "tokens_per_s": 1.0,
        "peak_bytes": {"cpu": 150},
        "least_s": {"prefill": {"disk": 9.0, "arithmetic on cpu": 1.5}, "decode": {"disk": 9.0, "memory of cpu": 0.2}},
    }
    return {
        "load_s": 1.0,
        "ttft_s": 2.5,
        "seconds": [step_s, step_s * 2, step_s],
        "tokens": [5, 6, 7],
        "prompt": [1, 2],
        "plan": {
            "workload": {"batch_size": 1, "prompt_tokens": 2, "new_tokens": 5},
            "limits": {"cpu": 200},
            "estimate": estimate,
            "resident_bytes": 1 * GB,
            "run_devices": ["cpu"],
            "streamed_bytes": {"prefill": {"disk": 2 * GB, "cpu": 0}, "decode": {"disk": 2 * GB, "cpu": 0}},
        },
        "read_bytes": 2 * GB,
        "copied_bytes": 0,
        "stall_s": 0.3,
        "mapped_bytes": mapped,
        "device_peaks": {},
        "ranges": [["file", 0, 1]],
        **more,
    }


def result_of(outcomes: list[Outcome], peers: dict[str, Any] | None = None) -> Result:
    case = Case(workload=Workload(prompt_tokens=2, new_tokens=5), num_tokens=5)
    return Result(
        path="model",
        num_bytes=3 * GB,
        ram_bytes=None,
        limits={"cpu": 200},
        machine={},
        cases=(Measured.of(case, outcomes, [outcome(run_of(1.0))]),),
        disk={1: (1.0 * GB, 1.0 * GB), 2: (2.0 * GB, 4.0 * GB)},
        peers=peers or {},
    )


def figure(result: Result, name: str) -> Any:
    return next(each for each in result.figures if each.name.startswith(name))


def test_a_step_is_held_against_the_disk_of_its_own_round() -> None:
    result = result_of([outcome(run_of(1.25)), outcome(run_of(0.625))])
    step = figure(result, "step of 1 sequence")
    assert step.measured == (1.25, 0.625)  # medians of each run's steps
    assert step.bound == (1.0, 0.5)  # 2 GB at 2 and at 4 GB/s, not the 9 s of the plan's own rate
    assert step.binds == "disk"
    assert step.fractions == [0.8, 0.8]
    assert step.predicted == 1.0
    rate = figure(result, "throughput")
    assert rate.measured == (0.8, 1.6)
    assert rate.fractions == pytest.approx([0.8, 0.8])


def test_what_is_mapped_is_read_by_the_first_pass_and_not_by_the_load() -> None:
    result = result_of([outcome(run_of(1.0)), outcome(run_of(1.0))])
    assert figure(result, "load and planning, page cache cold").bound == (0.5, 0.25)
    assert figure(result, "first token").bound == (1.5, 1.5)  # arithmetic: 2 GB take 1.0 and 0.5 s
    mapped = result_of([outcome(run_of(1.0, mapped=1 * GB)), outcome(run_of(1.0, mapped=1 * GB))])
    assert figure(mapped, "load and planning, page cache cold").bound == ()
    assert figure(mapped, "first token").bound == (1.5, 1.5)
    much = result_of([outcome(run_of(1.0, mapped=4 * GB))])
    assert figure(much, "first token").bound == (3.0,)
    assert figure(much, "first token").binds == "disk"


def test_peaks_count_mapped_weights_and_have_the_limit_beside_them() -> None:
    peak = figure(result_of([outcome(run_of(1.0, mapped=30))]), "peak of host memory")
    assert (peak.measured, peak.predicted, peak.bound) == ((130,), 150, (200,))
    assert peak.fractions == []  # a limit is no aim


def test_bytes_that_are_read_have_a_row_where_there_are_none_and_copies_where_there_is_a_device() -> None:
    resident = run_of(1.0, read_bytes=0)
    resident["plan"]["streamed_bytes"]["decode"]["disk"] = 0
    assert figure(result_of([outcome(resident)]), "read per step").measured == (0,)
    assert not any(each.name.startswith("copied") for each in result_of([outcome(resident)]).figures)
    resident["plan"]["run_devices"] = ["cpu", "cuda:0"]
    assert figure(result_of([outcome(resident)]), "copied to devices per step").measured == (0,)


def test_table_and_page_say_under_which_conditions_and_what_a_bound_is() -> None:
    result = result_of([outcome(run_of(1.0)), outcome(run_of(1.0))])
    plan = plan_for(blocks(3, 1000), GB)
    recorded = {"plan": json.loads(plan.to_json()), "measured": [], "predicted": []}
    result = replace(result, ram_bytes=2 << 30, recorded=recorded, notes=("odd & so",))
    for words in (
        "2 rounds of everything",
        "control group of 2.00 GiB",
        "max_memory: cpu 200 B",
        "by 2 at once: ",
        "bound: the least",
    ):
        assert words in result.table()
        assert words in result.page()
    assert '<p class="soft">note: odd &amp; so</p>' in result.page()


def test_a_round_that_failed_is_left_out_and_told() -> None:
    result = result_of([outcome(None, error="killed"), outcome(run_of(0.625))])
    step = figure(result, "step of 1 sequence")
    assert step.measured == (0.625,)
    assert step.bound == (0.5,)  # of the second round
    assert result.failures() == {"1 x 2 tokens, 5 generated": "failed in 1 of 2 rounds: killed"}
    assert "1 x 2 tokens, 5 generated failed in 1 of 2 rounds: killed" in result.table()


def test_peers_are_compared_round_by_round_and_wrong_answers_are_marked() -> None:
    theirs = {"load_s": 1.0, "ttft_s": 4.0, "peak_bytes": 5, "settings": "its best"}
    peers = {
        "same": [{**theirs, "seconds": [2.5], "tokens": [5, 6, 7]}, {**theirs, "seconds": [2.5], "tokens": [5, 6, 7]}],
        "other": [{"error": "killed"}, {**theirs, "seconds": [1.25], "tokens": [5, 9, 7]}],
        "none": [{"error": "killed"}, {"error": "killed again"}],
    }
    result = result_of([outcome(run_of(1.25)), outcome(run_of(0.625))], peers)
    same, other = result.compared()
    assert same["ratio"] == [2.0, 4.0]
    assert same["bound_ratio"] == [2.5, 5.0]
    assert same["differs_at"] is None
    assert other["ratio"] == [2.0]
    assert other["differs_at"] == 1
    assert "DIFFER from number 1" in result.table()
    assert result.failures() == {
        "other": "failed in 1 of 2 rounds: killed",
        "none": "failed in 2 of 2 rounds: killed again",
    }


def test_every_sample_is_in_the_json() -> None:
    described = json.loads(result_of([outcome(run_of(1.25)), outcome(run_of(0.625))]).to_json())
    step = next(each for each in described["figures"] if each["name"] == "step of 1 sequence")
    assert step["reached"] == [0.8, 0.8]
    assert [run["seconds"] for run in described["cases"][0]["runs"]] == [[1.25, 2.5, 1.25], [0.625, 1.25, 0.625]]
    assert "ranges" not in described["cases"][0]["runs"][0]
