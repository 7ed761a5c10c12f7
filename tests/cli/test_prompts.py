"""Many prompts: every line answered once, in order, whatever interrupts the run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bigmodel.cli import app
from bigmodel.generation.text import encode_prompt, load_tokenizer, padded

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
PROMPTS = [{"prompt": " ".join(WORDS[: 1 + n % 9]), "id": n} for n in range(11)]


def invoke(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def written(file: Path, lines) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def lines_of(text: str):
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def expected(tiny_llama):
    """Each prompt answered by the whole model alone."""
    tokenizer = load_tokenizer(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    answers = []
    for line in PROMPTS:
        inputs = encode_prompt(tokenizer, line["prompt"])
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0][inputs["input_ids"].shape[1] :]
        answers.append({**line, "text": tokenizer.decode(tokens, skip_special_tokens=True), "num_tokens": 6})
    return answers


@pytest.mark.parametrize("where", ["disk", "auto"])
def test_every_line_is_answered_in_order(tiny_llama, expected, where, tmp_path):
    file = written(tmp_path / "in.jsonl", PROMPTS)
    done = invoke("run", tiny_llama, "--prompts", file, "-n", "6", "--device-map", where)
    assert done.exit_code == 0, done.stderr
    assert lines_of(done.stdout) == expected
    match = re.search(r"11 prompts, (\d+) at once, [\d.]+ tokens/s over 66 tokens", done.stderr)
    assert match is not None, done.stderr
    assert 1 <= int(match[1]) <= 11
    assert int(match[1]) > 1 or where == "auto"  # a pass that reads everything reads it for all of them
    piped = invoke("run", tiny_llama, "--prompts", "-", "-n", "6", stdin=file.read_text())
    assert lines_of(piped.stdout) == expected


def test_a_run_goes_on_where_it_was_interrupted(tiny_llama, expected, tmp_path):
    file, output = written(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.jsonl"
    first = "".join(json.dumps(line) + "\n" for line in expected[:4])
    output.write_text(first + json.dumps(expected[4])[:20])  # the last line is torn
    command = ["run", tiny_llama, "--prompts", file, "--output", output, "-n", "6"]
    done = invoke(*command)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == ""
    assert "4 of 11 prompts were answered before" in done.stderr
    assert "7 prompts, " in done.stderr
    assert output.read_text().startswith(first)
    assert lines_of(output.read_text()) == expected
    before = output.stat().st_mtime_ns
    assert invoke(*command).exit_code == 0
    assert output.stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_run_that_is_killed_loses_no_line_and_answers_none_twice(tiny_llama, tmp_path):
    lines = [{"prompt": WORDS[n % 9], "id": n} for n in range(30)]
    file, output = written(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    plan = invoke("plan", tiny_llama, "--device-map", "disk", "--batch-size", "2", "--json")
    (tmp_path / "plan.json").write_text(plan.stdout)
    command = [
        sys.executable,
        "-m",
        "bigmodel",
        "run",
        str(tiny_llama),
        "--prompts",
        str(file),
        "--output",
        str(output),
    ]
    command += ["-n", "40", "--device-map", str(tmp_path / "plan.json"), "--quiet"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment) as process:
        while process.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < 4):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    kept = lines_of(output.read_text().rpartition("\n")[0])
    assert 4 <= len(kept) < 30
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    found = lines_of(output.read_text())
    assert [line["id"] for line in found] == list(range(30))
    assert found[: len(kept)] == kept


def test_what_is_no_prompt_or_no_answer_is_named_before_anything_is_loaded(tiny_llama, expected, tmp_path):
    good = written(tmp_path / "good.jsonl", PROMPTS)
    other = written(tmp_path / "other.jsonl", reversed(expected))
    longer = written(tmp_path / "longer.jsonl", [*expected, expected[0]])
    for lines, words in (
        ('{"prompt": "a"}\n{"text"', "Line 2"),
        ('{"question": "a"}', "Line 1"),
        ('{"prompt": ""}', "Line 1"),
        ('{"prompt": "a", "text": "b"}', "'text'"),
        ("\n\n", "has no line"),
        ("[" * 100_000, "Line 1"),
    ):
        (tmp_path / "bad.jsonl").write_text(lines)
        done = invoke("run", tiny_llama, "--prompts", tmp_path / "bad.jsonl")
        assert (done.exit_code, done.stdout) == (2, ""), done.output
        assert words in done.stderr
        assert len(done.stderr) < 600
    for output, words in ((other, "Line 1"), (longer, "Line 12"), (tmp_path, "cannot be written")):
        before = output.read_bytes() if output.is_file() else None
        done = invoke("run", tiny_llama, "--prompts", good, "--output", output)
        assert done.exit_code == 2, done.output
        assert words in done.stderr
        assert before is None or output.read_bytes() == before
    for extra in (["--lookup"], ["--draft", tiny_llama], ["--prompt", "a"]):
        assert invoke("run", tiny_llama, "--prompts", good, *extra).exit_code == 2
    assert invoke("run", tiny_llama, "--prompt", "a", "--output", tmp_path / "out").exit_code == 2


def test_draws_are_the_same_where_a_run_goes_on(tiny_llama, tmp_path):
    file, output = written(tmp_path / "in.jsonl", PROMPTS[:4]), tmp_path / "out.jsonl"
    plan = invoke("plan", tiny_llama, "--batch-size", "1", "--json")
    (tmp_path / "plan.json").write_text(plan.stdout)
    command = ["run", tiny_llama, "--prompts", file, "-n", "6", "--device-map", tmp_path / "plan.json"]
    command += ["--sample", "--seed", "3", "--output", output]
    assert invoke(*command).exit_code == 0
    whole = output.read_text()
    output.write_text("".join(whole.splitlines(keepends=True)[:2]))
    assert invoke(*command).exit_code == 0
    assert output.read_text() == whole


def launched(*arguments):
    """In two processes, as `bigmodel launch` starts them."""
    command = [
        sys.executable,
        "-m",
        "bigmodel",
        "launch",
        "-n",
        "2",
        "--module",
        "bigmodel",
        "run",
        *map(str, arguments),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow  # four launched processes with a model each
def test_launched_processes_divide_the_lines(tiny_llama, expected, tmp_path):
    file, output = written(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.jsonl"
    asked = (tiny_llama, "--prompts", file, "--output", output, "-n", "6")
    done = launched(*asked)
    assert done.returncode == 0, done.stderr
    assert lines_of(output.read_text()) == expected
    match = re.search(r"11 prompts, (\d) at once in each of 2 processes, [\d.]+ tokens/s over 66 tokens", done.stderr)
    assert match is not None, done.stderr
    assert 1 <= int(match[1]) <= 6
    assert done.stderr.count("11 prompts") == 1  # the main process alone tells
    output.write_text("".join(output.read_text().splitlines(keepends=True)[:4]) + '{"torn')
    again = launched(*asked)
    assert "4 of 11 prompts were answered before" in again.stderr
    assert lines_of(output.read_text()) == expected


@pytest.mark.slow  # four launched processes
def test_what_launched_processes_cannot_divide_is_refused(tiny_llama, tmp_path):
    done = launched(tiny_llama, "--prompt", "the quick")
    assert done.returncode == 2
    assert "2 processes were launched, and there is one prompt" in done.stderr
    assert re.search(r"rank [01] failed: it ended with status 2", done.stderr)
    stdin = launched(tiny_llama, "--prompts", "-")
    assert stdin.returncode == 2
    assert "cannot share stdin" in stdin.stderr


def test_shorter_prompts_are_filled_up_before_their_beginning():
    import torch

    inputs = padded([torch.tensor([5, 6, 7]), torch.tensor([8])], 0)
    assert inputs["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
