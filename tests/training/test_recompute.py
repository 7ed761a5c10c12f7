"""Activation checkpointing: the same bits from less that is kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from bigmodel.errors import InvalidArgumentError
from bigmodel.training import TrainingConfig, TrainingRun
from training.loops import save_llama, train

ENGINES = ["ddp", "fsdp", pytest.param("zero2", marks=pytest.mark.slow), "zero3"]


def gpt2() -> nn.Module:
    """With dropout, which a second forward must draw as the first did."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "n_positions": 32, "n_embd": 32, "n_layer": 3, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.1))


def equal(found, expected) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], each) for name, each in expected.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", ENGINES)
def test_every_engine_gives_the_same_bits(two, folder, strategy, precision):
    asked = {"path": str(folder), "steps": 3, "strategy": strategy, "precision": precision, "micro_batch_size": 2}
    plain, again = (
        two.run("training.loops:train", activation_checkpointing=each, **asked)[0] for each in ("off", "on")
    )
    assert again["losses"] == plain["losses"]
    assert again["norms"] == plain["norms"]
    assert equal(again["parameters"], plain["parameters"])


@pytest.mark.parametrize("make", [gpt2, t5])
def test_what_is_drawn_at_random_is_drawn_again(folder, make):
    asked = {"steps": 3, "strategy": "single", "precision": "fp32", "micro_batch_size": 4}
    plain, again = (train(folder, model=make(), activation_checkpointing=each, **asked) for each in ("off", "on"))
    assert again["losses"] == plain["losses"]
    assert equal(again["parameters"], plain["parameters"])


def saved_bytes(**options) -> int:
    """Bytes that stay between forward and backward, weights aside."""
    model = TrainingRun(TrainingConfig(strategy="single", precision="fp32", **options)).prepare(gpt2())
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    held: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(97, (4, 32))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return sum(held.values())


def test_blocks_keep_their_inputs_alone():
    plain, again = saved_bytes(activation_checkpointing="off"), saved_bytes(activation_checkpointing="on")
    logits = 4 * 32 * 97 * 4
    assert again < plain / 2
    # Inputs of three blocks and of what is not recomputed: embeddings, the last norm, the head.
    assert again < 3 * logits + 10 * 4 * 32 * 32 * 4


def test_evaluation_and_generation_are_as_ever():
    run = TrainingRun(TrainingConfig(strategy="single", precision="fp32", activation_checkpointing="on"))
    model = run.prepare(gpt2())
    ids = torch.randint(3, 97, (2, 8))
    found = run.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    expected = gpt2().eval().generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(found, expected)
    model.eval()
    with torch.no_grad():
        assert model(input_ids=ids).past_key_values is not None  # a cache where nothing is trained
    model.train()
    assert model(input_ids=ids).past_key_values is None


def test_a_module_without_blocks_is_trained_as_it_is():
    model = TrainingRun(TrainingConfig(precision="fp32", activation_checkpointing="on")).prepare(nn.Linear(2, 2))
    assert "forward" not in vars(model)
    with pytest.raises(InvalidArgumentError, match="activation_checkpointing is 'some'"):
        TrainingConfig(activation_checkpointing="some")


@pytest.mark.parametrize("recompute", ["off", "on"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_compiled_blocks_train_as_others_do_in_every_engine(two, tmp_path, strategy, recompute):
    save_llama(tmp_path, num_hidden_layers=6)
    asked = {
        "path": str(tmp_path),
        "strategy": strategy,
        "precision": "fp32",
        "micro_batch_size": 4,
        "activation_checkpointing": recompute,
    }
    plain = two.run("training.loops:train", steps=3, **asked)[0]
    for found, num_graphs in two.run("training.loops:compiled", **asked):
        assert num_graphs == 1  # for all blocks
        assert max(abs(a - b) for a, b in zip(found["losses"], plain["losses"], strict=True)) <= 5e-6
        for name, values in plain["parameters"].items():
            assert (found["parameters"][name] - values).abs().max() <= 1e-5


def test_what_cannot_be_compiled_is_refused(folder):
    with pytest.raises(InvalidArgumentError, match=r'strategy="zero3" fetches weights by hooks'):
        TrainingConfig(strategy="zero3", compile_blocks=True)
    with pytest.raises(InvalidArgumentError, match="compile_blocks is 1"):
        TrainingConfig(compile_blocks=1)
    run = TrainingRun(TrainingConfig(strategy="single", precision="fp32", compile_blocks="none"))
    with pytest.raises(InvalidArgumentError, match=r"torch\.compile has: "):
        run.prepare(model=folder)
    run = TrainingRun(TrainingConfig(strategy="single", precision="fp32", compile_blocks=True))
    with pytest.raises(InvalidArgumentError, match="it has none"):
        run.prepare(model=nn.Linear(2, 2))
