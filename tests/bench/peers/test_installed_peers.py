"""Peers that are installed here: what they prepare, what they refuse, and the tokens that they give.

Each runs in processes of its own, as in a benchmark: they change what they import.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

pytestmark = pytest.mark.slow  # each imports its peer several times

PROMPT = [5, 9, 2, 7]
NUM_NEW = 8
CALL = """
import importlib, json, sys
place, method, *arguments = json.loads(sys.argv[1])
module, _, name = place.partition(":")
peer = getattr(importlib.import_module(module), name)()
if method == "prepare":
    answer = peer.prepare(*arguments)
else:
    answer = []
    path, scratch, ids, number = arguments
    peer.load(path, scratch)
    peer.generate(ids, number, answer.append)
print("\\nanswer", json.dumps(answer))
"""
AIRLLM = "bigmodel.bench.peers.airllm:AirLlm"
DEEPSPEED = "bigmodel.bench.peers.deepspeed:DeepSpeedZero"


def run(*arguments):
    """The answer of a process, or the last line that it wrote to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", CALL, json.dumps([str(x) if isinstance(x, Path) else x for x in arguments])],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=1500,
    )
    answers = [line.removeprefix("answer ") for line in done.stdout.splitlines() if line.startswith("answer ")]
    return json.loads(answers[-1]) if answers else done.stderr.strip().splitlines()[-1]


def resident_tokens(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    whole = model.generate(torch.tensor([PROMPT]), do_sample=False, min_new_tokens=NUM_NEW, max_new_tokens=NUM_NEW)
    return whole[0, len(PROMPT) :].tolist()


@pytest.fixture
def airllm():
    return _installed("airllm", AIRLLM)


@pytest.fixture
def deepspeed():
    return _installed("deepspeed", DEEPSPEED)


def _installed(package, place):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return place


def test_airllm_gives_the_tokens_of_the_whole_model_from_its_own_files(airllm, tiny_llama, tmp_path):
    files = run(airllm, "prepare", tiny_llama, tmp_path)
    layers = {Path(file).name for file in files if file.endswith(".safetensors")}
    assert layers >= {"model.embed_tokens.safetensors", "model.layers.3.safetensors", "model.norm.safetensors"}
    assert all(Path(file).is_file() for file in files)
    assert run(airllm, "generate", tiny_llama, tmp_path, PROMPT, NUM_NEW) == resident_tokens(tiny_llama)


def test_airllm_writes_again_only_what_is_not_whole(airllm, tiny_llama, tmp_path):
    files = run(airllm, "prepare", tiny_llama, tmp_path)
    layer = Path(next(file for file in files if file.endswith("layers.2.safetensors")))
    written, size = layer.stat().st_mtime_ns, layer.stat().st_size
    assert run(airllm, "prepare", tiny_llama, tmp_path) == files
    assert layer.stat().st_mtime_ns == written
    os.truncate(layer, size - 8)
    assert run(airllm, "prepare", tiny_llama, tmp_path) == files
    assert layer.stat().st_size == size


def test_airllm_does_not_take_the_layers_of_another_checkpoint(airllm, tiny_llama, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    model = AutoModelForCausalLM.from_pretrained(other, dtype="auto")
    model.lm_head.weight.data.neg_()
    model.save_pretrained(other, max_shard_size="200KB")
    for folder in (tiny_llama, other):
        assert run(airllm, "prepare", folder, tmp_path / "scratch")
        assert run(airllm, "generate", folder, tmp_path / "scratch", PROMPT, NUM_NEW) == resident_tokens(folder)
    assert resident_tokens(other) != resident_tokens(tiny_llama)


def test_airllm_refuses_modules_that_it_does_not_stream(airllm, tmp_path):
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    said = run(airllm, "prepare", tmp_path / "gpt2", tmp_path / "scratch")
    assert "InvalidArgumentError: AirLLM (AirLLMBaseModel) streams model.embed_tokens., " in said
    assert "would leave out transformer." in said
    assert not (tmp_path / "scratch").exists()


@pytest.mark.long  # compiles for minutes, once
@pytest.mark.skipif(not Path("/usr/include/libaio.h").exists(), reason="DeepSpeed compiles against libaio")
def test_deepspeed_gives_the_tokens_of_the_whole_model(deepspeed, tiny_llama, tmp_path):
    files = run(deepspeed, "prepare", tiny_llama, tmp_path)
    assert sorted(Path(file).name for file in files) == sorted(
        file.name for file in tiny_llama.iterdir() if file.suffix == ".safetensors" or file.name == "config.json"
    )
    assert run(deepspeed, "generate", tiny_llama, tmp_path, PROMPT, NUM_NEW) == resident_tokens(tiny_llama)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator runs float16")
def test_deepspeed_refuses_half_precision_on_a_cpu(deepspeed, tiny_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float16)
    model.save_pretrained(tmp_path / "half")
    said = run(deepspeed, "prepare", tmp_path / "half", tmp_path / "scratch")
    assert "InvalidArgumentError: DeepSpeed runs no float16 model on a CPU" in said
