"""The command line on real models: what it writes where, and how it ends."""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import bigmodel
from bigmodel.cli import app
from bigmodel.cli.arguments import parse_device_map, parse_limits
from bigmodel.device_map import measuring
from bigmodel.errors import CheckpointError, InvalidArgumentError
from bigmodel.footprint import PeakFootprint, footprint_bytes
from bigmodel.generation.text import TextStream, encode_prompt, load_tokenizer
from bigmodel.units import GIB, MIB, parse_bytes

COMMAND = [sys.executable, "-m", "bigmodel"]
FIGURES = re.compile(
    r"TTFT [\d.]+ s, [\d.]+ tokens/s over (?P<tokens>\d+) tokens, (?P<read>[\d.]+ \w+) read per token, "
    r"\d+% of the time waiting for weights, (?P<headline>[a-z ]+( [\d.]+ \w+/s)?, \d+% of [a-z ]+, )?"
    r"peak memory (?P<peak>[\d.]+ \w+) of (?P<limit>[\d.]+ \w+) allowed"
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny models gain nothing from more, and a busy machine makes them wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


def invoke(*arguments: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def expected_text(folder: Path, prompt: str, new_tokens: int, *, chat: bool = False, **options: object) -> str:
    """What plain transformers gives."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    tokenizer = load_tokenizer(folder)
    is_encoder_decoder = AutoConfig.from_pretrained(folder).is_encoder_decoder
    auto_class = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
    model = auto_class.from_pretrained(folder, dtype="auto")
    inputs = encode_prompt(tokenizer, prompt, chat=chat)
    tokens = model.generate(**inputs, max_new_tokens=new_tokens, **{"do_sample": False, **options})[0]
    start = 1 if is_encoder_decoder else inputs["input_ids"].shape[1]
    return str(tokenizer.decode(tokens[start:], skip_special_tokens=True))


def figures_of(stderr: str) -> dict[str, str]:
    lines = stderr.splitlines()
    while lines[-1].startswith("below the limit: "):
        lines.pop()
    match = FIGURES.fullmatch(lines[-1])
    assert match is not None, stderr
    return match.groupdict()


# ---------------------------------------------------------------------------------------------------------------- run


@pytest.mark.parametrize("where", ["cpu", "disk", "auto"])
def test_run_writes_the_text_alone_to_stdout(tiny_llama: Path, where: str) -> None:
    done = invoke("run", tiny_llama, "--prompt", "the quick brown", "-n", "12", "--device-map", where)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == expected_text(tiny_llama, "the quick brown", 12) + "\n"
    figures = figures_of(done.stderr)
    assert figures["tokens"] == "12"
    assert (parse_bytes(figures["read"]) > 0) == (where == "disk")
    assert figures["headline"] is not None  # of what stays in memory too
    assert parse_bytes(figures["peak"]) <= parse_bytes(figures["limit"])
    assert "\x1b" not in done.stderr


def test_run_shows_the_plan_first(tiny_llama: Path) -> None:
    done = invoke("run", tiny_llama, "--prompt", "the", "-n", "2", "--device-map", "disk")
    assert done.exit_code == 0, done.stderr
    plan, _, last = done.stderr.partition("\nTTFT")
    assert "model.layers" in plan
    assert last
    quiet = invoke("run", tiny_llama, "--prompt", "the", "-n", "2", "--quiet")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, done.stdout, "")


def test_chat_uses_the_template(tiny_llama: Path) -> None:
    done = invoke("run", tiny_llama, "--chat", "--prompt", "the dog?", "-n", "8")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == expected_text(tiny_llama, "<s>user: the dog?\nassistant:", 8) + "\n"


def test_prompt_comes_from_a_file_or_stdin(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("the lazy dog\n", encoding="utf-8")
    expected = expected_text(tiny_llama, "the lazy dog", 6) + "\n"
    assert invoke("run", tiny_llama, "--prompt-file", file, "-n", "6").stdout == expected
    assert invoke("run", tiny_llama, "--prompt-file", "-", "-n", "6", stdin="the lazy dog\n").stdout == expected


def test_sampling_is_repeatable(tiny_llama: Path) -> None:
    arguments = ["run", tiny_llama, "--prompt", "the", "-n", "12", "--sample", "--temperature", "2.0", "--top-k", "50"]
    first, again, other = (invoke(*arguments, "--seed", seed) for seed in ("1", "1", "2"))
    assert first.exit_code == 0, first.stderr
    assert first.stdout == again.stdout != other.stdout
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        expected = expected_text(tiny_llama, "the", 12, do_sample=True, temperature=2.0, top_k=50)
    assert first.stdout == expected + "\n"


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_encoder_decoder_models_run(tiny_t5: Path, where: str) -> None:
    done = invoke("run", tiny_t5, "--prompt", "the quick brown fox", "-n", "8", "--device-map", where)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == expected_text(tiny_t5, "the quick brown fox", 8) + "\n"


def test_a_saved_plan_runs(tiny_llama: Path, tmp_path: Path) -> None:
    made = invoke("plan", tiny_llama, "--device-map", "disk", "--prompt-tokens", "64", "--new-tokens", "8", "--json")
    assert made.exit_code == 0, made.stderr
    assert bigmodel.Plan.from_json(made.stdout).workload.prompt_tokens == 64
    file = tmp_path / "plan.json"
    file.write_text(made.stdout, encoding="utf-8")
    done = invoke("run", tiny_llama, "--device-map", file, "--prompt", "the quick", "-n", "4")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == expected_text(tiny_llama, "the quick", 4) + "\n"
    assert parse_bytes(figures_of(done.stderr)["read"]) > 0


def test_plan_is_for_people_too(tiny_llama: Path) -> None:
    done = invoke("plan", tiny_llama, "--max-memory", "cpu=1GiB")
    assert done.exit_code == 0, done.stderr
    assert "model.layers" in done.stdout
    assert done.stderr == ""


def test_plan_is_for_other_machines_and_for_browsers(tiny_llama: Path, tmp_path: Path) -> None:
    machine = {
        "name": "a workstation",
        "host": {"memory": "64GiB"},
        "accelerators": [{"memory": "24GiB", "flops_per_s": {"float32": 8e13}, "memory_bytes_per_s": 1e12}],
    }
    (tmp_path / "machine.json").write_text(json.dumps(machine))
    page = tmp_path / "plan.html"
    done = invoke("plan", tiny_llama, "--machine", tmp_path / "machine.json", "--html", page)
    assert done.exit_code == 0, done.stderr
    assert "predicted on a workstation (rates: machine.json): first token after" in done.stdout
    assert "what binds: prefill: operators of cuda:0; decode: operators of cuda:0" in done.stdout
    assert page.read_text().startswith("<!doctype html>")
    peak = bigmodel.make_plan(tiny_llama).estimate.peak_bytes["cpu"]
    shipped = invoke("plan", tiny_llama, "--machine", "laptop-16gb", "--max-memory", f"cpu={peak - 300_000}")
    assert shipped.exit_code == 0, shipped.stderr
    assert "one more GB of cpu: " in shipped.stdout
    assert "runner-up: " in shipped.stdout
    unknown = invoke("plan", tiny_llama, "--machine", "none")
    assert unknown.exit_code == 2
    assert "machines that come with bigmodel are desktop-24gb" in unknown.stderr
    assert invoke("plan", tiny_llama, "--html", tmp_path / "none" / "plan.html").exit_code == 2


@pytest.mark.slow
def test_a_plan_for_another_machine_is_followed_there(tiny_llama: Path, tmp_path: Path) -> None:
    described = {"host": {"memory": "64GiB"}, "disk": {"free": "1TB"}, "accelerators": [{"memory": "24GiB"}]}
    large, small, file = (tmp_path / name for name in ("large.json", "small.json", "plan.json"))
    large.write_text(json.dumps(described))
    small.write_text(json.dumps(described | {"accelerators": [{"memory": "12GiB"}]}))
    made = invoke("plan", tiny_llama, "--machine", large, "--prompt-tokens", "64", "--batch-size", "2", "--json")
    assert made.exit_code == 0, made.stderr
    file.write_text(made.stdout)
    plan = bigmodel.Plan.from_json(made.stdout)
    assert {place.run_on for place in plan.placements} >= {"cuda:0"}
    arguments = ("plan", tiny_llama, "--device-map", file, "--json")
    for machine, limit in ((large, plan.limits["cuda:0"]), (small, 12 * GIB)):
        done = invoke(*arguments, "--machine", machine, "--html", tmp_path / "page.html")
        assert done.exit_code == 0, done.stderr
        again = bigmodel.Plan.from_json(done.stdout)
        assert again.placements == plan.placements
        assert again.workload == plan.workload
        assert dict(again.limits) == dict(plan.limits) | {"cuda:0": limit}
        assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    other = invoke(*arguments, "--machine", large, "--new-tokens", "7")
    assert bigmodel.Plan.from_json(other.stdout).workload == bigmodel.Workload(
        batch_size=2, prompt_tokens=64, new_tokens=7
    )
    here = invoke(*arguments)
    assert here.exit_code == 2
    assert "there is cpu, disk here" in here.stderr
    without = invoke("plan", tiny_llama, "--machine", large, "--new-tokens", "7", "--json")
    assert bigmodel.Plan.from_json(without.stdout).workload == bigmodel.Workload(new_tokens=7)


@pytest.mark.slow
def test_calibrate_measures_once_and_plans_use_it(tiny_llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(measuring, "DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(measuring, "_TURNS", 1)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    weights = checkpoint / "weights.bin"
    weights.write_bytes(os.urandom(80 << 20))
    before = invoke("plan", tiny_llama)
    assert "nobody measured this machine" in before.stdout
    done = invoke("calibrate", checkpoint)
    assert done.exit_code == 0, done.stderr
    for name in ("disk:", "host memory:", "host float32:", "host operator:"):
        assert name in done.stdout
    assert [file.name for file in checkpoint.iterdir()] == ["weights.bin"]
    after = invoke("plan", tiny_llama)
    assert "rates: measured 20" in after.stdout
    assert "nobody measured" not in after.stdout
    assert invoke("calibrate", tmp_path / "none").exit_code == 2

    machine = bigmodel.Machine.probe().reading_from(weights)
    assert machine.rates_from.startswith("measured 20")
    assert 1e7 < machine.disk_read_bytes_per_s < 1e12
    assert 1e8 < machine.host_rates.memory_bytes_per_s < 1e13
    assert 1e-8 < machine.host_rates.op_s < 1e-2
    curve = machine.host_rates.products["float32"]
    assert curve[-1][1] > curve[0][1]  # one row reads the weight from memory; many rows compute
    torch_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(torch_threads + 1)
        assert bigmodel.Machine.probe().rates_from != machine.rates_from  # measured with other threads
    finally:
        torch.set_num_threads(torch_threads)


# --------------------------------------------------------------------------------------------------------- how it ends


def test_wrong_usage_ends_with_2(tiny_llama: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (["run", tiny_llama], "--prompt"),
        (["run", tiny_llama, "--prompt", "a", "--prompt-file", "b"], "--prompt-file"),
        (["run", tiny_llama, "--prompt-file", tmp_path / "none.txt"], "none.txt"),
        (["run", tiny_llama, "--prompt", "a", "--max-memory", "cpu=3Gb"], "'GB'"),
        (["run", tiny_llama, "--prompt", "a", "--max-memory", "3GiB"], "TIER=SIZE"),
        (["run", tiny_llama, "--prompt", "a", "--temperature", "1"], "--sample"),
        (["run", tiny_llama, "--prompt", "a", "--sample", "--temperature", "0"], "--temperature"),
        (["run", tiny_llama, "--prompt", "a", "--sample", "--temperature", "nan"], "--temperature"),
        (["run", tiny_llama, "--prompt", "a", "--sample", "--top-p", "1.5"], "--top-p"),
        (["run", tiny_llama, "--prompt", "a", "--device-map", "{"], "JSON"),
        (["run", tiny_llama, "--prompt", "a", "--device-map", "nowhere"], "nowhere"),
        (["run", tiny_llama, "--prompt", "a", "--dtype", "float17"], "float17"),
        (["run", tiny_llama, "--prompt", ""], "0 tokens"),
        (["plan", tiny_llama, "--max-memory", "moon=1GiB"], "moon"),
        (["plan", tiny_llama, "--batch-size", "0"], "--batch-size"),
        (["plan", tiny_llama, "--batch-size", "9" * 5000], "--batch-size"),
        (["plan", tiny_llama, "--batch-size", "9" * 20], "batch_size"),
        (["plan", tiny_llama, "--prompt-tokens", "9" * 20], "prompt_tokens"),
        (["plan", tiny_llama, "-m", f"cpu={'9' * 5000}"], "--max-memory cpu"),
        (["plan", tiny_llama, "-m", f"cpu={'9' * 20}"], "--max-memory cpu"),
        (["plan", tiny_llama, "-m", f"cpu={'9' * 5000}GiB"], "--max-memory cpu"),
        (["plan", tiny_llama, "-m", "cpu=9999999999TiB"], "--max-memory cpu"),
        (["plan", tiny_llama, "-m", f"{'9' * 5000}=1GiB"], "max_memory"),
        (["plan", tiny_llama, "--device-map", '{"a":' * 100_000], "nested too deeply"),
        (["plan", tiny_llama, "--device-map", _written(tmp_path / "nested.json", "[" * 100_000)], "nested too deeply"),
        (["plan", tiny_llama, "--device-map", '{"": ' + "[" * 500 + "]" * 500 + "}"], "which is no tier"),
        (["walk"], "walk"),
    ):
        done = invoke(*arguments)
        assert done.exit_code == 2, (arguments, done.output)
        assert words in done.stderr, (arguments, done.stderr)
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        assert len(done.stderr) < 1000


def test_rates_that_cannot_be_kept_are_refused_at_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(_written(tmp_path / "file", "")))
    done = invoke("calibrate", tmp_path)
    assert done.exit_code == 2
    assert f"{tmp_path}/file/bigmodel, which cannot be written" in done.stderr


def _written(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def test_what_does_not_fit_ends_with_3(tiny_llama: Path) -> None:
    for command in (["run", tiny_llama, "--prompt", "the"], ["plan", tiny_llama]):
        done = invoke(*command, "--max-memory", "cpu=64KiB")
        assert done.exit_code == 3, done.output
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert "64.0 KiB" in done.stderr


def test_other_errors_end_with_1_and_one_message(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path, dirs_exist_ok=True)
    weights = sorted(tmp_path.glob("*.safetensors"))
    weights[-1].unlink()
    done = invoke("run", tmp_path, "--prompt", "the")
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert weights[-1].name in done.stderr
    assert "Traceback" not in done.stderr
    shown = invoke("run", tmp_path, "--prompt", "the", "--traceback")
    assert shown.exit_code == 1
    assert "Traceback" in shown.stderr
    assert shown.stderr.endswith(done.stderr)


def test_a_model_that_does_not_generate_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(tmp_path)
    done = invoke("run", tmp_path, "--prompt", "the")
    assert done.exit_code == 2
    assert "BertModel" in done.stderr


def test_no_tokenizer_and_no_template_are_told(tiny_llama: Path, tmp_path: Path) -> None:
    for path in (tiny_llama / "config.json", *tiny_llama.glob("model*")):
        shutil.copy(path, tmp_path)
    done = invoke("run", tmp_path, "--prompt", "the")
    assert done.exit_code == 1
    assert "tokenizer.json" in done.stderr
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    done = invoke("run", tmp_path, "--prompt", "the", "--chat")
    assert done.exit_code == 2
    assert "chat template" in done.stderr


def test_interrupt_ends_with_130_and_leaves_nothing(tiny_llama: Path) -> None:
    # A test run that was started in the background may hand down an ignored SIGINT.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom bigmodel.cli import main; main()"
    )
    arguments = ["run", str(tiny_llama), "--prompt", "the", "-n", "4000", "--device-map", "disk"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.read(1)  # it generates
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.endswith("interrupted\n")
    assert "Traceback" not in stderr


@pytest.mark.slow
def test_a_reader_that_leaves_ends_it_quietly(tiny_llama: Path) -> None:
    command = [*COMMAND, "run", str(tiny_llama), "--prompt", "the", "-n", "4000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    with process.stderr:
        stderr = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert "Error" not in stderr


# ------------------------------------------------------------------------------------------------------- the real model


def test_the_real_model_answers_from_disk_within_its_budget(smollm2: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "run", str(smollm2), "--chat", "-p", "What is the capital of France?", "-m", "cpu=192MiB"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\n"
    figures = figures_of(done.stderr)
    assert parse_bytes(figures["limit"]) == 192 * MIB
    assert parse_bytes(figures["peak"]) <= 192 * MIB
    assert parse_bytes(figures["read"]) > 64 * MIB  # of 257: what a pass needs beside them leaves little room


@pytest.mark.slow
def test_the_peak_counts_weights_that_stay(smollm2: Path) -> None:
    # As private memory or as a map of the files: both are weights that the budget pays for.
    command = [*COMMAND, "run", str(smollm2), "--chat", "-p", "What is the capital of France?", "-m", "cpu=4GiB"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\n"
    figures = figures_of(done.stderr)
    assert parse_bytes(figures["read"]) == 0
    assert 256 * MIB <= parse_bytes(figures["peak"]) <= 512 * MIB


# -------------------------------------------------------------------------------------------------------- smaller parts


def test_env_and_version_and_help() -> None:
    assert invoke("--version").stdout == f"bigmodel {bigmodel.__version__}\n"
    described = invoke("env")
    assert described.exit_code == 0, described.stderr
    for name in ("bigmodel:", "python:", "torch:", "transformers:", "memory:", "processor:"):
        assert name in described.stdout
    shown = invoke("--help").stdout
    assert all(command in shown for command in ("run", "plan", "calibrate", "env"))
    assert "Examples" in invoke("run", "--help").stdout


def test_limits() -> None:
    assert parse_limits(None) is None
    assert parse_limits("cpu=1GiB, 0=20GiB,disk=5") == {"cpu": GIB, 0: 20 * GIB, "disk": 5}
    for wrong in ("", "cpu", "cpu=", "=1GiB", "cpu=1GiB,cpu=2GiB", "cpu=1.5", "cpu=-1GiB"):
        with pytest.raises(InvalidArgumentError):
            parse_limits(wrong)


def test_device_maps(tmp_path: Path) -> None:
    assert parse_device_map("auto") == "auto"
    assert parse_device_map("disk") == {"": "disk"}
    assert parse_device_map('{"": "disk", "lm_head": 0}') == {"": "disk", "lm_head": 0}
    file = tmp_path / "map.json"
    file.write_text(json.dumps({"model": "cpu"}), encoding="utf-8")
    assert parse_device_map(str(file)) == {"model": "cpu"}
    for wrong in ("{", str(tmp_path / "none.json")):
        with pytest.raises(InvalidArgumentError):
            parse_device_map(wrong)


@pytest.mark.parametrize(
    "text",
    ["Hello, world. It's 3 o'clock.", "naive cafe: \u00e9\u4f60\u597d \U0001f600!\n\n  done", "<s>a</s> b", " \n"],
)
def test_streamed_text_is_the_decoded_text(tiny_llama: Path, text: str) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    tokens = tokenizer(text)["input_ids"]
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    for _ in range(2):  # one stream serves run after run
        pieces.clear()
        stream.put(torch.tensor([[1, 2, 3]]))
        for token in tokens:
            stream.put(torch.tensor([token]))
        stream.end()
        assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)
        assert "\ufffd" not in "".join(pieces)
    assert stream.num_tokens == 2 * len(tokens)


def test_text_comes_with_every_token(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    tokens = tokenizer("the quick brown fox")["input_ids"]
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([tokens[:1]]))
    for count, token in enumerate(tokens[1:], start=1):
        stream.put(torch.tensor([token]))
        assert len(pieces) == count


def test_tokenizer_of_a_subfolder_may_stand_at_the_top(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "weights" / "main").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(tmp_path / "weights" / "main", subfolder="weights/main")
    load_tokenizer(tiny_llama).save_pretrained(tmp_path)
    found = load_tokenizer(tmp_path / "weights" / "main", subfolder="weights/main")
    assert found("the dog")["input_ids"] == load_tokenizer(tiny_llama)("the dog")["input_ids"]


def test_peak_footprint_sees_what_is_gone_again() -> None:
    before = footprint_bytes()
    with PeakFootprint() as memory, mmap.mmap(-1, 64 * MIB) as held:  # whatever malloc has free, this is new
        for _ in range(64):  # of one large piece, malloc may keep the memory
            held.write(b"x" * MIB)
        time.sleep(0.1)
    assert memory.peak_bytes - before >= 48 * MIB
    assert footprint_bytes() - before < 48 * MIB


def test_progress_shows_long_work_on_a_terminal_only() -> None:
    code = (
        "import time\nfrom bigmodel.progress import progress_bar\n"
        "with progress_bar() as report:\n"
        "    for step in range(15):\n        report('reading weights', step << 20, 15 << 20)\n        time.sleep(0.1)\n"
        "    report('quick work', 1, 2)\n    report('quick work', 2, 2)\n"
    )
    plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (plain.stdout, plain.stderr) == ("", "")
    main_end, child_end = os.openpty()
    child = subprocess.Popen([sys.executable, "-c", code], stderr=child_end, env=os.environ | {"TERM": "xterm"})
    os.close(child_end)
    shown = b""
    try:
        while piece := os.read(main_end, 65536):
            shown += piece
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(main_end)
    assert child.wait() == 0
    assert b"reading weights" in shown
    assert b"MiB" in shown
    assert b"quick work" not in shown
