"""`bigmodel bench`: what is measured of a real model, in processes of their own, and what is refused before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from planning import blocks, plan_for
from typer.testing import CliRunner

import bigmodel
from bigmodel.bench.clock import Clock, first_difference, stated
from bigmodel.bench.measurement import Settings, measure
from bigmodel.bench.result import Case
from bigmodel.bench.subject import look, prompt_ids, run_guesses, run_model, run_recorded, stall_s
from bigmodel.cli import app
from bigmodel.device_map.plan import Plan, Workload
from bigmodel.device_map.simulation import Step
from bigmodel.units import GIB, MIB

LOAD: dict[str, Any] = {
    "device_map": {"": "disk"},
    "max_memory": {"cpu": 200 * MIB},
    "allow_cpu_compute": False,
    "dtype": "auto",
    "trust_remote_code": False,
}


def refused(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert done.exit_code == 2, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--against", "vllm"), "'vllm' is nobody that is known. There are: transformers, accelerate, llama.cpp"),
        (("--prompt-tokens", "128,many"), "--prompt-tokens has 'many' in it"),
        (("--prompt-tokens", "0"), "--prompt-tokens has '0' in it"),
        (("--batch-sizes", "1,-4"), "--batch-size is '-4'"),
        (("--ram", "2Gb"), "2Gb"),
        (("--prompt-tokens", "5000"), "more than the model's 4096 positions"),
        (("--device-map", "nowhere.json"), "nowhere.json"),
        (("--against", "transformers", "--dtype", "float16"), "Leave --dtype and --variant out"),
        (("--html", "/nowhere/page.html"), "/nowhere/page.html"),
    ],
)
def test_what_means_nothing_is_refused_before_anything_runs(
    tiny_llama: Path, options: tuple[str, ...], words: str
) -> None:
    assert words in refused(tiny_llama, *options)


def test_a_checkpoint_that_is_not_there_is_named() -> None:
    done = CliRunner().invoke(app, ["bench", "/nowhere/model"])
    assert done.exit_code == 1
    assert "/nowhere/model" in done.stderr


def test_a_file_that_is_no_checkpoint_is_told_before_anything_is_measured_and_no_page_is_left(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"hello")
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["bench", str(tmp_path / "model.safetensors"), "--html", str(page)])
    assert done.exit_code == 1
    assert "model.safetensors" in done.stderr
    assert "measuring" not in done.stderr
    assert not page.exists()


def test_a_run_tells_times_bytes_and_the_plan(tiny_llama: Path) -> None:
    found = run_model(str(tiny_llama), LOAD, {"prompt_tokens": 8, "new_tokens": 5}, 5, None)
    assert len(found["tokens"]) == 5
    assert len(found["seconds"]) == 3  # not the first token, nor the first step
    assert len(found["prompt"]) == 8
    streamed = found["plan"]["streamed_bytes"]["decode"]["disk"]
    assert streamed > 0
    # A prefetch that is under way when the counts are taken belongs to the step before or after.
    assert found["read_bytes"] == pytest.approx(streamed, rel=0.5)
    assert streamed <= sum(size for _, _, size in found["ranges"]) < streamed + 64 * 4096
    assert all(Path(file).is_file() for file, _, _ in found["ranges"])


def test_a_run_gives_the_tokens_of_plain_transformers(tiny_llama: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    found = run_model(str(tiny_llama), LOAD, {"prompt_tokens": 8, "new_tokens": 5}, 5, None)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="auto")
    ids = torch.tensor([found["prompt"]])
    whole = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert whole[0, 8:].tolist() == found["tokens"]


def test_every_sequence_of_a_batch_counts(tiny_llama: Path) -> None:
    found = run_model(str(tiny_llama), LOAD, {"prompt_tokens": 4, "new_tokens": 3, "batch_size": 3}, 3, None)
    assert found["plan"]["workload"]["batch_size"] == 3
    assert len(found["seconds"]) == 1


def test_plans_are_made_before_and_what_does_not_fit_says_what_it_needs(tiny_llama: Path) -> None:
    cases = [{"prompt_tokens": 8, "new_tokens": 4}, {"prompt_tokens": 8, "new_tokens": 4, "batch_size": 100_000}]
    fits, large = look(str(tiny_llama), LOAD, cases, None)["cases"]
    assert fits["plan"]["workload"]["prompt_tokens"] == 8
    assert large["tier"] == "cpu"
    assert large["needed_bytes"] > large["available_bytes"]


def test_a_step_waits_for_units_that_are_fetched_and_not_for_what_is_done_between_them() -> None:
    def run(unit: int, number: int, begin: float, end: float, read: tuple[float, float] | None = None) -> Step:
        return Step(unit, number, "cpu", read, None, (begin, end))

    first = [run(0, 0, 0.0, 1.0), run(1, 0, 3.0, 4.0, (0.0, 3.0))]
    last = [
        run(0, 1, 4.5, 5.0),
        run(1, 1, 7.0, 8.0, (4.0, 7.0)),
    ]  # half a second of the first's is what comes between passes
    assert stall_s(plan_for(blocks(2), GIB), [*first, *last]) == 2.0


def test_a_step_that_fetches_nothing_is_not_said_to_wait(tiny_llama: Path) -> None:
    load = {**LOAD, "max_memory": None, "device_map": "cpu"}
    (found,) = look(str(tiny_llama), load, [{"prompt_tokens": 8, "new_tokens": 4}], None)["cases"]
    assert found["stall_s"] == 0


def test_a_group_leaves_the_model_what_the_interpreter_does_not_hold(tiny_llama: Path) -> None:
    load = {**LOAD, "max_memory": None}
    found = look(str(tiny_llama), load, [{"prompt_tokens": 8, "new_tokens": 4}], 4096 * MIB)
    assert 1024 * MIB < found["limits"]["cpu"] < (4096 - 128) * MIB
    assert found["cases"][0]["plan"]["limits"]["cpu"] == found["limits"]["cpu"]


def test_guesses_are_counted_and_compared_with_plain_greedy(tiny_llama: Path) -> None:
    found = run_guesses(str(tiny_llama), LOAD, None, None, 32, 24)
    assert found["num_guesses"] >= 1
    assert 1 <= found["tokens_per_pass"] <= 24
    assert (found["differs_at"] is None) == (found["gap"] is None)


def test_a_draft_that_is_the_model_itself_is_always_right(tiny_llama: Path) -> None:
    found = run_guesses(str(tiny_llama), LOAD, str(tiny_llama), None, 32, 24)
    assert found["tokens_per_pass"] == pytest.approx(found["num_guesses"] + 1, rel=0.1)
    assert found["differs_at"] is None or found["gap"] < 1e-3


def test_a_recording_has_what_happened_and_what_was_predicted(tiny_llama: Path) -> None:
    found = run_recorded(str(tiny_llama), LOAD, {"prompt_tokens": 8, "new_tokens": 4}, None)
    assert {step["number"] for step in found["measured"]} == {0, 1, 2}
    assert {step["unit"] for step in found["measured"]} <= {step["unit"] for step in found["predicted"]}
    assert Plan.from_json(json.dumps(found["plan"])).workload.prompt_tokens == 8


def test_made_up_prompts_hold_no_token_with_a_meaning_of_its_own(tiny_llama: Path) -> None:
    import bigmodel

    model = bigmodel.load_sharded(tiny_llama, device_map="cpu")
    model.config.image_token_id = 7
    ids = prompt_ids(model, Workload(batch_size=2, prompt_tokens=4000), None)["input_ids"]
    assert ids.shape == (2, 4000)
    assert not set(ids.flatten().tolist()) & {7, model.config.bos_token_id, model.config.pad_token_id}
    again = prompt_ids(model, Workload(prompt_tokens=12), None, period=4)["input_ids"][0].tolist()
    assert again == again[:4] * 3


def test_a_clock_leaves_the_first_step_out() -> None:
    clock = Clock(lambda: "note")
    clock.start()
    for token in (4, 5, 6, 7):
        clock.tick(token)
    assert clock.tokens == [4, 5, 6, 7]
    assert len(clock.steps()) == 2
    assert clock.notes == ["note"] * 4
    assert clock.started_s <= clock.times[0] <= clock.times[-1]


def test_tokens_are_compared_and_limits_survive_json() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert stated(json.loads(json.dumps({0: 5, "cpu": 6}))) == {0: 5, "cpu": 6}
    assert stated(None) is None


@pytest.mark.slow
def test_a_model_and_a_peer_are_measured_in_rounds(tiny_llama: Path, tmp_path: Path) -> None:
    case = Case(workload=Workload(prompt_tokens=8, new_tokens=4), num_tokens=4)
    told: list[str] = []
    settings = Settings(
        path=str(tiny_llama),
        folder=tiny_llama,
        files=tuple(tiny_llama.glob("*.safetensors")),
        load=LOAD | {"max_memory": None},
        cases=(case,),
        tell=told.append,
        num_rounds=1,
        peers=("accelerate",),
        scratch=tmp_path,
        machine=json.loads(bigmodel.Machine.probe().to_json()),
    )
    result = json.loads(measure(settings).to_json())
    names = [figure["name"] for figure in result["figures"]]
    assert {"load and planning, page cache cold", "first token, 1 x 8 tokens", "step of 1 sequence"} <= set(names)
    assert all(len(figure["measured"]) == 1 for figure in result["figures"])
    (row,) = result["compared"]
    assert row["title"] == "accelerate, disk_offload", result["left_out"]
    assert row["differs_at"] is None
    assert len(row["ratio"]) == 1
    assert any("accelerate" in each for each in told)


@pytest.mark.slow
@pytest.mark.long
def test_bench_measures_everything_and_a_peer_beside_it(tiny_llama: Path, tmp_path: Path) -> None:
    page, scratch = tmp_path / "bench.html", tmp_path / "scratch"
    command = [sys.executable, "-m", "bigmodel", "bench", str(tiny_llama), "--rounds", "1", "--json"]
    command += ["--prompt-tokens", "8", "--batch-sizes", "2", "--new-tokens", "4", "--lookup"]
    command += ["--against", "accelerate", "--html", str(page), "--scratch", str(scratch)]
    if os.geteuid() == 0:
        command += ["--ram", "1500MiB"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    names = [figure["name"] for figure in result["figures"]]
    for name in (
        "load and planning, page cache cold",
        "load and planning, page cache warm, files outside the limit",
        "first token, 1 x 8 tokens",
        "step of 1 sequence",
        "read per step of 1 sequence",
        "throughput of 2 sequences",
        "peak of host memory, 1 x 8 tokens",
    ):
        assert name in names
    assert "measuring the machine: " in done.stderr
    assert all(len(figure["measured"]) == 1 for figure in result["figures"])
    # Equal weights, float32, greedy: every peer gives the same tokens.
    compared = {row["title"]: row for row in result["compared"]}
    assert set(compared) == {"accelerate, disk_offload"}, result["left_out"]
    assert all(row["differs_at"] is None and len(row["ratio"]) == 1 for row in compared.values())
    assert len(result["guesses"]["lookup"]) == 1
    assert result["machine"]["host"]["memory_bytes_per_s"] > 0
    assert result["environment"]["bigmodel"]
    assert page.read_text().startswith("<!doctype html>")
    assert len(list((scratch / "accelerate").glob("*/index.json"))) == 1


@pytest.mark.slow
@pytest.mark.root
def test_a_group_that_is_too_small_says_so_and_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bigmodel", "bench", str(tiny_llama), "--ram", "100MiB", "--rounds", "1"]
    command += ["--against", "transformers"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "In 100 MiB Python's libraries could not be had: killed at the memory limit of 100 MiB" in done.stderr
    assert "--ram" in done.stderr
    assert not list(tiny_llama.parent.glob(".bigmodel-bench-*"))
