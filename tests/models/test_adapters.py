"""Adapters that were trained before, around models in memory and models that stream."""

import pytest
import torch
from families import make_checkpoint, resident

import bigmodel
from bigmodel.errors import InvalidArgumentError, MalformedFileError, MissingFilesError
from bigmodel.models import adapter_nbytes, load_adapter

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning"),
]
IDS = torch.arange(3, 14)[None]


def saved(folder, family, **options):
    """The folder of a checkpoint, and of an adapter that changes it."""
    made = make_checkpoint(family, folder)
    settings = {"r": 4, "lora_alpha": 64, "target_modules": ["q_proj"], "init_lora_weights": False}
    around = peft.get_peft_model(resident(made), peft.LoraConfig(**(settings | options)))
    around.save_pretrained(folder / "adapter")
    return made, folder / "adapter"


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def is_tied(model):
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("target", ["q_proj", "lm_head", "embed_tokens"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_adapter_is_added_unless_others_use_the_weight_too(tmp_path, family, target):
    folder, adapter = saved(tmp_path, family, target_modules=[target])
    model = resident(folder)
    shared = is_tied(model) and target != "q_proj"
    expected = logits(peft.PeftModel.from_pretrained(resident(folder), adapter).requires_grad_(False))
    plain = logits(model)
    found, is_added = load_adapter(model, adapter, streams=False)
    assert is_added != shared
    assert not any(each.requires_grad for each in found.parameters())
    assert torch.allclose(logits(found), expected, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-3)


def test_beside_weights_that_stream_it_gives_the_bits_of_peft(tmp_path):
    folder, adapter = saved(tmp_path, "llama", target_modules=["q_proj", "lm_head"])
    expected = logits(peft.PeftModel.from_pretrained(resident(folder), adapter).requires_grad_(False))
    model, is_added = load_adapter(bigmodel.load_sharded(folder, {"": "disk"}, progress=False), adapter, streams=True)
    assert not is_added
    for _ in range(2):
        assert torch.equal(logits(model), expected)


def test_what_changes_the_weights_themselves_is_refused_where_they_stream(tmp_path):
    folder, adapter = saved(tmp_path, "llama", init_lora_weights="pissa")
    model = bigmodel.load_sharded(folder, {"": "disk"}, progress=False)
    with pytest.raises(
        InvalidArgumentError, match=r"changes weights of the model itself \(init_lora_weights is 'pissa'\)"
    ):
        load_adapter(model, adapter, streams=True)
    assert torch.equal(logits(model), logits(resident(folder)))


def test_an_adapter_of_another_model_is_refused(tmp_path):
    folder, _ = saved(tmp_path / "1", "llama")
    _, other = saved(tmp_path / "2", "llama", r=2, target_modules=["q_proj"])
    config = (other / "adapter_config.json").read_text()
    (other / "adapter_config.json").write_text(config.replace('"r": 2', '"r": 4'))
    with pytest.raises(InvalidArgumentError, match=r"no adapter of this model: .*size mismatch"):
        load_adapter(resident(folder), other, streams=False)


def test_its_bytes_are_told_by_its_header(tmp_path):
    _, adapter = saved(tmp_path, "llama")
    file = adapter / "adapter_model.safetensors"
    assert 0 < adapter_nbytes(adapter) <= file.stat().st_size
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(MalformedFileError, match=r"adapter_model\.safetensors"):
        adapter_nbytes(adapter)
    file.unlink()
    with pytest.raises(MissingFilesError, match=r"has no adapter_model\.safetensors"):
        adapter_nbytes(adapter)
