"""An adapter on the command line: added to weights that stay in memory, beside those that stream."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bigmodel.cli import app
from bigmodel.generation.text import encode_prompt, load_tokenizer

peft = pytest.importorskip("peft")
PROMPT = "the quick brown"


def invoke(*arguments):
    return CliRunner().invoke(app, ["run", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def adapter(tiny_llama, tmp_path_factory):
    """One that changes what is generated."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).save_pretrained(folder)
    return folder


def expected(folder, adapter, *, merged):
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), adapter)
    model = model.merge_and_unload() if merged else model
    tokenizer = load_tokenizer(folder)
    inputs = encode_prompt(tokenizer, PROMPT)
    with torch.no_grad():
        tokens = model.eval().requires_grad_(False).generate(**inputs, max_new_tokens=16, do_sample=False)[0]
    return tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True) + "\n"


@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_an_adapter_is_read(tiny_llama, adapter, where):
    plain = invoke(tiny_llama, "-p", PROMPT, "-n", "16", "--device-map", where)
    done = invoke(tiny_llama, "-p", PROMPT, "-n", "16", "--device-map", where, "--adapter", adapter)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == expected(tiny_llama, adapter, merged=where == "cpu") != plain.stdout
    assert ("beside the weights" if where == "disk" else "added to the weights") in done.stderr
    if where == "disk":
        assert "read per token" in done.stderr


def test_answers_to_many_prompts_have_it_too(tiny_llama, adapter, tmp_path):
    (tmp_path / "prompts").write_text(json.dumps({"prompt": PROMPT}) + "\n")
    done = invoke(tiny_llama, "--prompts", tmp_path / "prompts", "-n", "16", "--adapter", adapter, "-q")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["text"] + "\n" == expected(tiny_llama, adapter, merged=True)


def test_what_is_no_adapter_is_refused_before_anything_is_loaded(tiny_llama, adapter, tmp_path):
    done = invoke(tiny_llama, "-p", PROMPT, "--adapter", tmp_path)
    assert done.exit_code == 1
    assert "has no adapter_config.json, adapter_model.safetensors" in done.stderr
    assert "peak" not in done.stderr  # no plan was told
    (tmp_path / "adapter_config.json").write_text("{")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    done = invoke(tiny_llama, "-p", PROMPT, "--adapter", tmp_path)
    assert done.exit_code == 2
    assert "adapter_config.json cannot be read" in done.stderr


def test_what_it_holds_is_kept_out_of_a_stated_limit(tiny_llama, adapter):
    done = invoke(tiny_llama, "-p", PROMPT, "--adapter", adapter, "--max-memory", "cpu=1KiB")
    assert done.exit_code == 3
    assert "cpu" in done.stderr


def test_weights_that_are_no_file_are_refused_before_anything_is_loaded(tiny_llama, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    done = invoke(tiny_llama, "-p", PROMPT, "--adapter", tmp_path / "a")
    assert done.exit_code == 1
    assert "adapter_model.safetensors" in done.stderr
    assert "tokens/s" not in done.stderr  # of a plan


def test_what_would_change_weights_that_stream_is_refused_by_name(tiny_llama, tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).save_pretrained(tmp_path / "a")
    done = invoke(tiny_llama, "-p", PROMPT, "--device-map", "disk", "--adapter", tmp_path / "a")
    assert done.exit_code == 2
    assert "changes weights of the model itself (bias is 'all'), and they stream" in done.stderr
    assert (
        invoke(tiny_llama, "-p", PROMPT, "-n", "2", "--device-map", "cpu", "--adapter", tmp_path / "a").exit_code == 0
    )
