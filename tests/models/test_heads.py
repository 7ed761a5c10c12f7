"""Output heads of real models, in bfloat16 on the CPU: no copies of their weights, and the same bits."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bigmodel
from tests.families import resident as frozen
from tests.random_llamas import save_random

VOCAB = 65_536
MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("large-head")
    save_random(path, "llama_tied", vocab_size=VOCAB, tie_word_embeddings=False)
    return path


@pytest.fixture(scope="module")
def with_bias(tmp_path_factory) -> Path:
    from transformers import PhiConfig, PhiForCausalLM

    path = tmp_path_factory.mktemp("large-head-with-bias")
    config = PhiConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = PhiForCausalLM(config).to(torch.bfloat16)
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
        model.save_pretrained(path)
    return path


class Products(TorchDispatchMode):
    """Names of the operators that gave something as wide as the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and VOCAB in result.shape and "mm" in str(func):
            self.names.append(func.overloadpacket.__name__)
        return result


def resident(folder):
    """As transformers loads it: its weights require gradients."""
    return frozen(folder).requires_grad_(True)


def prompts(num_sequences: int, num_tokens: int = 16) -> torch.Tensor:
    return torch.arange(num_sequences * num_tokens).reshape(num_sequences, num_tokens) % 300 + 3


@pytest.mark.parametrize("home", ["cpu", "disk"])
@pytest.mark.parametrize("num_sequences", [1, 2, 3])
@pytest.mark.parametrize("num_kept", [1, 3])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_last_logits_are_those_of_the_plain_model_bit_for_bit(
    folder, with_bias, home, num_sequences, num_kept, has_bias
):
    inputs = prompts(num_sequences)
    folder = with_bias if has_bias else folder
    model = bigmodel.load_sharded(folder, device_map={"": home})
    with torch.no_grad():
        expected = resident(folder)(inputs, logits_to_keep=num_kept).logits
        found = model(inputs, logits_to_keep=num_kept).logits
    assert type(found) is torch.Tensor
    assert torch.equal(found, expected)


def test_no_weight_is_copied_for_them(folder):
    model = bigmodel.load_sharded(folder)
    with torch.no_grad(), Products() as plain:
        frozen(folder)(prompts(2), logits_to_keep=1)
    with torch.no_grad(), Products() as ours:
        model(prompts(2), logits_to_keep=1)
    assert plain.names == ["bmm"]  # what is avoided
    assert ours.names == ["mm"]


def test_a_plan_counts_no_copies_either(folder):
    workload = bigmodel.Workload(batch_size=8, prompt_tokens=4, new_tokens=4)
    plan = bigmodel.make_plan(folder, workload=workload)
    assert plan.activation_bytes < 4 * VOCAB * 64 * 2  # half of what the copies would take


def test_generated_tokens_are_the_same(folder):
    inputs, options = prompts(3), {"max_new_tokens": 4, "do_sample": False}
    expected = resident(folder).generate(inputs, **options)
    assert torch.equal(bigmodel.load_sharded(folder, device_map={"": "disk"}).generate(inputs, **options), expected)


def test_hooks_of_the_user_see_all_sequences(folder):
    model, seen = bigmodel.load_sharded(folder), []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0] * 1))
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        hidden = model.model(prompts(2)).last_hidden_state
        model(prompts(2), logits_to_keep=1)
    given, output = seen
    assert torch.equal(given, hidden[:, -1:])
    assert type(given) is type(output) is torch.Tensor
    assert output.shape == (2, 1, VOCAB)


def test_a_copy_of_the_model_and_one_with_gradients_run(folder):
    model = bigmodel.load_sharded(folder)
    with torch.no_grad():
        expected = model(prompts(2), logits_to_keep=1).logits
        assert torch.equal(copy.deepcopy(model)(prompts(2), logits_to_keep=1).logits, expected)
    model.model.norm.weight.requires_grad_(True)
    model(prompts(2), logits_to_keep=1).logits.sum().backward()
    assert model.model.norm.weight.grad.abs().sum() > 0


def test_a_compiled_head_has_no_break(folder):
    model = bigmodel.load_sharded(folder)
    hidden = torch.randn(2, 5, 64).to(torch.bfloat16)[:, -1:]
    with torch.no_grad():
        compiled = torch.compile(model.lm_head, backend="eager", fullgraph=True)
        # Compiled it is torch's batched product, which some processors round otherwise.
        torch.testing.assert_close(compiled(hidden), model.lm_head(hidden), rtol=2e-2, atol=2e-2)


def test_small_heads_and_other_dtypes_get_no_hook(folder, tmp_path):
    save_random(tmp_path, "llama")
    models = bigmodel.load_sharded(tmp_path), bigmodel.load_sharded(folder, dtype="float32")
    assert not any(module._forward_pre_hooks for model in models for module in model.modules())


def test_what_is_made_plain_has_no_hook_and_the_same_logits(folder):
    model = bigmodel.load_sharded(folder, device_map={"": "disk"})
    with torch.no_grad():
        expected = model(prompts(2), logits_to_keep=1).logits
        plain = bigmodel.materialize(model)
        assert torch.equal(plain.requires_grad_(True)(prompts(2), logits_to_keep=1).logits, expected)
    assert not any(module._forward_pre_hooks for module in plain.modules())
    unloaded = bigmodel.unload(bigmodel.load_sharded(folder))
    assert not any(module._forward_pre_hooks for module in unloaded.modules())


def test_weights_and_inputs_of_classes_of_their_own_keep_their_ways(folder):
    class Told(torch.Tensor):
        seen = 0

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            Told.seen += func is torch.nn.functional.linear
            return super().__torch_function__(func, types, args, kwargs or {})

    model = bigmodel.load_sharded(folder)
    head = model.lm_head
    hidden = torch.randn(2, 5, 64).to(torch.bfloat16)[:, -1:]
    with torch.no_grad():
        expected = head(hidden)
        near = {"rtol": 2e-2, "atol": 2e-2}  # batched products round otherwise on some processors
        torch.testing.assert_close(head(hidden.as_subclass(Told)).as_subclass(torch.Tensor), expected, **near)
        assert Told.seen == 1
        head.weight = torch.nn.Parameter(head.weight.data.as_subclass(Told), requires_grad=False)
        torch.testing.assert_close(head(hidden).as_subclass(torch.Tensor), expected, **near)
        assert Told.seen == 2


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_a_traced_head_takes_other_batches(folder):
    head = bigmodel.load_sharded(folder).lm_head
    hidden = torch.randn(4, 5, 64).to(torch.bfloat16)[:, -1:]
    with torch.no_grad():
        traced = torch.jit.trace(head, hidden[:2])
        assert traced(hidden).shape == (4, 1, VOCAB)
