"""Guessed tokens, checked many in a pass: the same text, in fewer passes."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import bigmodel
from bigmodel.bench.subject import Stream
from bigmodel.cli import app
from bigmodel.generation.drafts import MOST_GUESSES, best_number, lookup_options
from bigmodel.generation.text import TextStream, encode_prompt, load_tokenizer

REPEATING = "the quick brown fox jumps over the lazy dog. " * 6


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def resident_text(folder, prompt, new_tokens, **options):
    """What transformers' own assisted generation gives with the whole model in memory."""
    tokenizer = load_tokenizer(folder)
    inputs = encode_prompt(tokenizer, prompt)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, **options)[0]
    return tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True) + "\n"


def tokens_per_pass(stderr):
    match = re.search(r"([\d.]+) tokens per pass", stderr)
    return float(match[1]) if match else 1.0


@pytest.fixture(scope="session")
def smaller(tiny_llama, tmp_path_factory):
    """A draft that agrees with the model at times: the model with noise."""
    folder = tmp_path_factory.mktemp("smaller")
    shutil.copytree(tiny_llama, folder, dirs_exist_ok=True)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_what_follows_earlier_tokens_is_guessed_and_checked(tiny_llama: Path, where: str) -> None:
    plain = invoke("run", tiny_llama, "-p", REPEATING, "-n", "48", "--device-map", where)
    done = invoke("run", tiny_llama, "-p", REPEATING, "-n", "48", "--device-map", where, "--lookup")
    assert done.exit_code == 0, done.stderr
    inputs = encode_prompt(load_tokenizer(tiny_llama), REPEATING)
    workload = bigmodel.Workload(
        prompt_tokens=inputs["input_ids"].shape[1] + MOST_GUESSES, new_tokens=48 + MOST_GUESSES
    )
    options = lookup_options(bigmodel.make_plan(tiny_llama, workload=workload, device_map={"": where}))
    assert done.stdout == resident_text(tiny_llama, REPEATING, 48, **options)
    assert done.stdout == plain.stdout  # in float32 here; a pass of n tokens may round otherwise than n of one
    if where == "disk":  # a plain model's passes are not counted
        assert tokens_per_pass(done.stderr) > 2
    assert tokens_per_pass(plain.stderr) == 1


@pytest.mark.parametrize("where", ["disk", "auto"])
def test_a_draft_s_guesses_are_checked(tiny_llama: Path, smaller: Path, where: str) -> None:
    done = invoke("run", tiny_llama, "-p", "the quick brown", "-n", "24", "--device-map", where, "--draft", smaller)
    assert done.exit_code == 0, done.stderr
    draft = AutoModelForCausalLM.from_pretrained(smaller)
    assert done.stdout == resident_text(tiny_llama, "the quick brown", 24, assistant_model=draft)
    itself = invoke("run", tiny_llama, "-p", "the quick brown", "-n", "24", "--draft", tiny_llama)
    assert itself.stdout == done.stdout
    assert tokens_per_pass(itself.stderr) > 1


def test_both_models_are_within_the_budget(tiny_llama: Path, smaller: Path) -> None:
    alone = bigmodel.make_plan(tiny_llama, workload=bigmodel.Workload(prompt_tokens=65, new_tokens=8))
    needed = alone.estimate.peak_bytes["cpu"]
    done = invoke("run", tiny_llama, "-p", "the", "-n", "8", "-m", f"cpu={2 * needed}", "--draft", smaller)
    assert done.exit_code == 0, done.stderr
    match = re.search(r"peak memory ([\d.]+ \w+) of ([\d.]+ \w+) allowed", done.stderr)
    assert match is not None
    assert bigmodel.units.parse_bytes(match[2]) == pytest.approx(2 * needed, rel=0.01)
    refused = invoke("run", tiny_llama, "-p", "the", "-n", "8", "-m", f"cpu={needed}", "--draft", smaller)
    assert refused.exit_code == 3
    assert refused.stderr.startswith("error: ")


@pytest.mark.slow
def test_guesses_of_a_model_with_another_vocabulary_are_translated(smollm2: Path, smaller: Path) -> None:
    done = invoke("run", smollm2, "-p", "The capital of France is", "-n", "8", "--draft", smaller)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == invoke("run", smollm2, "-p", "The capital of France is", "-n", "8").stdout


def test_one_kind_of_guess_at_a_time(tiny_llama: Path, tiny_t5: Path, tmp_path: Path) -> None:
    both = invoke("run", tiny_llama, "-p", "the", "--lookup", "--draft", tiny_llama)
    assert both.exit_code == 2
    assert "--lookup" in both.stderr
    missing = invoke("run", tiny_llama, "-p", "the", "--draft", tmp_path / "none")
    assert missing.exit_code in (1, 2)
    assert "none" in missing.stderr


def test_the_number_of_guesses_is_what_gives_most_tokens_per_second() -> None:
    sizes = (1, 2, 3, 5, 9, 17, 33, 65)
    free = dict.fromkeys(sizes, 1.0)  # a pass costs the same, however many it takes
    assert best_number(free, 0.0, 0.9) == 64
    each = {tokens: float(tokens) for tokens in sizes}  # each token costs a pass
    assert best_number(each, 0.0, 0.9) == 0
    # A guess that costs a tenth of a pass, and is right four times of five.
    gains = {n: (1 - 0.8 ** (n + 1)) / 0.2 / (1 + 0.1 * n) for n in (0, 1, 2, 4, 8, 16, 32, 64)}
    assert best_number(free, 0.1, 0.8) == max(gains, key=gains.get) == 8
    assert best_number({}, 0.0, 0.9) == 0


def test_the_rate_is_of_the_tokens_after_those_that_came_first(tiny_llama: Path) -> None:
    stream = TextStream(load_tokenizer(tiny_llama), lambda text: None)
    for tokens in ([1, 2, 3], [5, 6, 7, 8], [9]):  # the prompt; a pass of three right guesses and one token; one more
        stream.put(torch.tensor(tokens))
    assert (stream.num_tokens, stream.num_first) == (5, 4)


def test_an_answer_that_came_at_once_has_a_rate_too() -> None:
    stream = Stream()
    stream.put(torch.tensor([1, 2, 3]))
    stream.put(torch.tensor([5, 6, 7, 8]))
    assert stream.tokens == [5, 6, 7, 8]
    assert stream.seconds_per_token > 0
