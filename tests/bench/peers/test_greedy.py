"""Greedy text token by token, which checkpoints give one, and what a missing package says."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from bigmodel.bench.peers.airllm import AirLlm
from bigmodel.bench.peers.deepspeed import DeepSpeedZero
from bigmodel.bench.peers.greedy import generate_greedily, open_text_model
from bigmodel.bench.peers.packages import versions_of
from bigmodel.errors import InvalidArgumentError

PROMPT = [5, 9, 2, 7]


def test_tokens_are_those_of_generate_and_come_one_by_one(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="auto")
    whole = model.generate(torch.tensor([PROMPT]), do_sample=False, min_new_tokens=6, max_new_tokens=6)
    seen = []
    generate_greedily(model, PROMPT, 6, seen.append)
    assert seen == whole[0, len(PROMPT) :].tolist()


def test_an_end_token_ends_nothing(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="auto")
    first = []
    generate_greedily(model, PROMPT, 1, first.append)
    model.generation_config.eos_token_id = first[0]
    seen = []
    generate_greedily(model, PROMPT, 6, seen.append)
    assert len(seen) == 6


def test_a_model_that_continues_no_text_is_refused(tiny_t5):
    with pytest.raises(InvalidArgumentError, match="T5ForConditionalGeneration does not"):
        open_text_model(str(tiny_t5), "AirLLM")


def test_pickled_weights_are_refused(tiny_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="auto")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    shutil.copy(tiny_llama / "config.json", tmp_path)
    with pytest.raises(InvalidArgumentError, match="AirLLM is tried with a folder of safetensors files"):
        open_text_model(str(tmp_path), "AirLLM")


def test_a_file_in_place_of_its_folder_is_refused(tiny_llama):
    index = tiny_llama / "model.safetensors.index.json"
    assert json.loads(index.read_text())["weight_map"]
    with pytest.raises(InvalidArgumentError, match=r"index\.json is none"):
        open_text_model(str(index), "AirLLM")


def test_versions_name_the_package_and_what_it_builds_on():
    import transformers

    assert (
        versions_of("torch", "transformers") == f"torch {torch.__version__} (transformers {transformers.__version__})"
    )


def test_a_missing_package_is_told_with_the_command_that_installs_it():
    with pytest.raises(ImportError, match=r"no-such-peer is not installed here\. Run `pip install no-such-peer`\."):
        versions_of("no-such-peer", "torch")


@pytest.mark.parametrize(("peer", "package"), [(AirLlm, "airllm"), (DeepSpeedZero, "deepspeed")])
def test_settings_tell_the_version_or_how_to_install_it(peer, package):
    try:
        settings = peer().settings()
    except ImportError as error:
        assert f"pip install {package}`" in str(error)  # noqa: PT017 -- it depends on what is installed which one is right
    else:
        assert settings.startswith(f"{package} ")
        assert "\n" not in settings
