"""What a pass takes, measured on tensors that hold nothing, is what a real pass takes."""

import copy

import pytest
import torch
from families import make_checkpoint, resident
from torch import nn

from bigmodel.device_map.cost import measure, work_of_units
from bigmodel.device_map.counter import NotTriedError
from bigmodel.device_map.plan import Workload
from bigmodel.device_map.trial import Trial, like
from bigmodel.device_map.unit import find_units
from bigmodel.models import example_inputs

WORK = Workload(batch_size=2, prompt_tokens=24, new_tokens=8)


def costs_of(model, workload=WORK):
    return measure(Trial(model), model, lambda batch, tokens: example_inputs(model, batch, tokens), workload)


def cache_bytes(cache):
    """Of the storages that a real cache holds: a sliding window may be a view of more than it shows."""
    storages = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            if isinstance(value, torch.Tensor) and value.ndim >= 3:
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "bloom", "mixtral", "deepseek_v3"])
@torch.no_grad()
def test_the_kv_cache_is_what_the_model_s_own_cache_allocates(family, tmp_path):
    model = resident(make_checkpoint(family, tmp_path))
    costs = costs_of(model)
    assert costs.is_measured, costs.reason
    for tokens in (24, 16):
        cache = model(input_ids=torch.ones(2, tokens, dtype=torch.int64), use_cache=True).past_key_values
        assert costs.kv_bytes(2, tokens) == pytest.approx(cache_bytes(cache), rel=0.02), tokens


@torch.no_grad()
def test_activations_cover_what_torch_allocates(tmp_path):
    model = resident(make_checkpoint("llama", tmp_path))
    costs = costs_of(model)
    ids = torch.ones(2, 24, dtype=torch.int64)
    model(input_ids=ids)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(input_ids=ids)
    live = peak = 0
    for event in profile.events():
        live += event.self_cpu_memory_usage
        peak = max(peak, live)
    assert costs.prefill_bytes + costs.kv_bytes(2, 24) >= peak > 0


def test_alike_layers_are_measured_once_and_count_for_all(tmp_path):
    import transformers as t

    def kv(num_layers):
        config = t.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=num_layers,
                               num_attention_heads=4)  # fmt: skip
        with torch.device("meta"):
            return costs_of(t.LlamaForCausalLM(config)).kv_bytes(1, 100)

    assert kv(40) == 10 * kv(4) == 20 * kv(2)


def units_and_work(model, workload=WORK):
    trial = Trial(model)
    costs = measure(trial, model, lambda batch, tokens: example_inputs(model, batch, tokens), workload)
    units = find_units(trial.twin)
    works, beside = work_of_units(costs, units, [name for name, _ in trial.twin.named_modules()])
    return costs, dict(zip((unit.name for unit in units), works, strict=True)), beside


def test_work_of_a_layer_is_what_its_sizes_say():
    import transformers as t

    hidden, inner, heads, kv_heads, vocab, layers = 64, 160, 4, 2, 512, 5
    config = t.LlamaConfig(vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                           num_attention_heads=heads, num_key_value_heads=kv_heads)  # fmt: skip
    with torch.device("meta"):
        model = t.LlamaForCausalLM(config).to(torch.bfloat16)
    costs, works, _ = units_and_work(model)
    width = hidden // heads
    products = hidden * hidden * 2 + hidden * kv_heads * width * 2 + 3 * hidden * inner
    batch, prompt = WORK.batch_size, WORK.prompt_tokens
    last = prompt + WORK.new_tokens / 2 + 1
    for number in range(layers):
        work = works[f"model.layers.{number}"]
        scores = 2 * 2 * batch * heads * prompt * prompt * width
        assert work.prefill.flops == 2 * batch * prompt * products + scores
        assert work.decode.flops == pytest.approx(2 * batch * products + 2 * 2 * batch * heads * last * width, rel=1e-6)
        # A step reads every weight of the layer, and its cache.
        cache = 2 * 2 * batch * kv_heads * width * last
        assert work.decode.touched_bytes > 2 * products + cache
        assert work.kv_bytes == 2 * 2 * batch * kv_heads * width * WORK.total_tokens
    # generate keeps the last token's logits alone
    assert works["lm_head"].prefill.flops == works["lm_head"].decode.flops == 2 * batch * hidden * vocab
    assert works["model.embed_tokens"].decode.flops == 0
    assert works["model.embed_tokens"].decode.touched_bytes < 10 * batch * hidden
    assert sum(work.kv_bytes for work in works.values()) == costs.kv_bytes(batch, WORK.total_tokens)


@pytest.mark.parametrize("family", ["gemma3", "deepseek_v3", "gpt2"])
def test_the_cache_is_shared_out_to_the_layers_that_make_it(family, tmp_path):
    costs, works, beside = units_and_work(resident(make_checkpoint(family, tmp_path)))
    parts = sum(work.kv_bytes for work in works.values()) + beside.kv_bytes
    assert parts == pytest.approx(costs.kv_bytes(WORK.batch_size, WORK.total_tokens), rel=0.01)
    assert beside.kv_bytes < 100  # numbers that count tokens


def test_an_encoder_does_not_run_in_a_decode_step(tmp_path):
    _, works, _ = units_and_work(resident(make_checkpoint("t5", tmp_path)))
    for name, work in works.items():
        assert work.prefill is not None
        assert (work.decode is None) == name.startswith("encoder."), name


def test_a_layer_of_experts_knows_how_many_a_token_is_given_to(tmp_path):
    import transformers as t

    config = t.Qwen3MoeConfig(vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2, head_dim=8,
                              num_attention_heads=4, num_key_value_heads=2, num_experts=16, num_experts_per_tok=4,
                              intermediate_size=64, mlp_only_layers=[], decoder_sparse_step=1)  # fmt: skip
    with torch.device("meta"):
        model = t.Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    costs, works, _ = units_and_work(model, Workload(prompt_tokens=64, new_tokens=8))
    experts = [each for name, each in costs.experts.items() if "layers.1." in name]
    assert len(experts) == 1
    assert (experts[0].num_experts, experts[0].num_routed) == (16, 4.0)
    assert experts[0].expert_bytes == 2 * 3 * 32 * 16
    # One token touches four experts of sixteen; a prompt of 64 nearly all.
    dense = 2 * (2 * 32 * 32 + 2 * 32 * 16)
    all_experts = 16 * experts[0].expert_bytes
    decode, prefill = works["model.layers.1"].decode, works["model.layers.1"].prefill
    assert decode.touched_bytes < dense + 0.5 * all_experts + 40_000
    assert prefill.touched_bytes > all_experts


def test_the_model_is_not_changed(tmp_path):
    model = resident(make_checkpoint("llama", tmp_path))
    calls = []
    trial = Trial(model)
    model.register_forward_hook(lambda *_: calls.append(1))
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    modules = {name: id(module) for name, module in model.named_modules()}
    measure(trial, model, lambda batch, tokens: example_inputs(model, batch, tokens), WORK)
    assert not calls
    assert before == {name: id(parameter) for name, parameter in model.named_parameters()}
    assert modules == {name: id(module) for name, module in model.named_modules()}


class Counting(nn.Module):
    """Reads a number out of a tensor: nothing that holds no numbers can follow."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x) * x.sum().item()


def test_a_pass_that_cannot_be_tried_says_why():
    with pytest.raises(NotTriedError, match="DataDependent"):
        Trial(Counting())(lambda: like([torch.ones(2, 8)], {}))
    costs = measure(Trial(Counting()), Counting(), lambda batch, tokens: None, WORK)
    assert not costs.is_measured
    assert costs.reason == "nothing is known that the model's forward could be called with"
    assert costs.workload_activation_bytes > 0


def test_like_arguments_share_nothing_with_the_real_ones():
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    before = copy.deepcopy(cache.layers[0].keys)
    args, kwargs = like([torch.ones(2)], {"past_key_values": cache, "flag": True})
    kwargs["past_key_values"].update(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), 0)
    assert args[0].shape == (2,)
    assert kwargs["flag"] is True
    assert torch.equal(cache.layers[0].keys, before)
