"""What a pass takes, measured on tensors that hold nothing, is what a real pass takes."""

import copy

import pytest
import torch
from families import make_checkpoint, resident
from torch import nn

from bigmodel.device_map import trial
from bigmodel.device_map.cost import measure, work_of_units
from bigmodel.device_map.counter import KEPT_HOLES, NotTriedError, tensors_in
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


def test_holes_that_an_earlier_sequence_leaves_between_the_cache_s_blocks_count(tmp_path, monkeypatch):
    model = resident(make_checkpoint("llama", tmp_path))
    with_holes = costs_of(model)
    monkeypatch.setattr(trial, "KEPT_HOLES", 0.0)
    without = costs_of(model)
    assert with_holes.kv_bytes(2, 24) == without.kv_bytes(2, 24) > 0
    expected = KEPT_HOLES * with_holes.kv_bytes(2, 24)
    assert expected > 0
    assert with_holes.prefill_bytes - without.prefill_bytes == pytest.approx(expected, rel=0.02)


def test_alike_layers_are_measured_once_and_count_for_all(tmp_path):
    import transformers as t

    def kv(num_layers):
        config = t.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=num_layers,
                               num_attention_heads=4)  # fmt: skip
        with torch.device("meta"):
            return costs_of(t.LlamaForCausalLM(config)).kv_bytes(1, 100)

    assert kv(40) == 10 * kv(4) == 20 * kv(2)


LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def on_meta(make):
    with torch.device("meta"):
        return make()


def test_a_cache_is_planned_where_the_config_turns_it_off():
    import transformers as t

    off = on_meta(lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA, use_cache=False)))
    on = on_meta(lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA)))
    assert costs_of(off) == costs_of(on)
    assert costs_of(off).kv_bytes(1, 10) == 10 * 3 * 2 * 32 // 2 * 4
    # Nobody makes one for a model that does not generate.
    alone = costs_of(on_meta(lambda: t.LlamaModel(t.LlamaConfig(**LLAMA, use_cache=False))))
    assert alone.is_measured
    assert alone.kv_bytes(1, 10) == 0


def test_a_model_that_refuses_to_keep_a_cache_is_tried_without():
    import transformers as t

    class Refuses(t.LlamaForCausalLM):
        def forward(self, input_ids=None, use_cache=None, **kwargs):
            if use_cache:
                raise NotImplementedError("no cache")
            return super().forward(input_ids=input_ids, use_cache=False, **kwargs)

    costs = costs_of(on_meta(lambda: Refuses(t.LlamaConfig(**LLAMA))))
    assert costs.is_measured, costs.reason
    assert costs.kv_bytes(1, 10) == 0
    assert costs.decode == costs.prefill


RECURRENT = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "bos_token_id": 1, "eos_token_id": 2}


def recurrent(kind):
    import transformers as t

    if kind == "mamba":
        return t.MambaForCausalLM(t.MambaConfig(**RECURRENT, state_size=8))
    if kind == "mamba2":
        sizes = {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "expand": 2, "chunk_size": 8}
        return t.Mamba2ForCausalLM(t.Mamba2Config(**RECURRENT, **sizes))
    if kind == "falcon_mamba":
        return t.FalconMambaForCausalLM(t.FalconMambaConfig(**RECURRENT, state_size=8))
    if kind == "rwkv":
        return t.RwkvForCausalLM(t.RwkvConfig(**RECURRENT, attention_hidden_size=32, context_length=64))
    sizes = {"hidden_size": 128, "num_hidden_layers": 3, "num_blocks": 3, "num_heads": 2}
    return t.xLSTMForCausalLM(t.xLSTMConfig(**RECURRENT | sizes))


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"])
@pytest.mark.parametrize("prompt", [1, 6])
@torch.no_grad()
def test_a_state_is_found_under_the_name_by_which_forward_takes_it(kind, prompt):
    model = on_meta(lambda: recurrent(kind))
    work = Workload(batch_size=2, prompt_tokens=prompt, new_tokens=4)
    costs, works, _ = units_and_work(model, work)
    assert (costs.is_measured, costs.reason) == (True, "")
    real = recurrent(kind).eval()
    output = real(torch.ones(2, 6, dtype=torch.int64), use_cache=True)
    state = output.state if kind == "rwkv" else output.cache_params
    sizes = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors_in(state)}
    assert costs.kv_bytes_per_token == 0
    assert costs.kv_bytes(2, 1) == costs.kv_bytes(2, 1000) == pytest.approx(sum(sizes.values()), rel=0.01)
    layers = [unit for name, unit in works.items() if name.rpartition(".")[2] == "1"]
    assert layers
    for layer in layers:
        assert layer.decode.flops > 0
        assert prompt == 1 or layer.decode.touched_bytes < layer.prefill.touched_bytes
    if kind == "mamba":  # one token's products, and not those of its whole mask
        assert costs.decode.work["lm_head"].flops == 2 * 2 * 32 * 96
        inner, rank, size = 64, 2, 8
        linear = 2 * 2 * (32 * 2 * inner + inner * (rank + 2 * size) + rank * inner + inner * 32)
        assert linear <= layers[0].decode.flops < 1.5 * linear


def test_a_second_pass_that_cannot_be_tried_is_estimated():
    import transformers as t

    class OneShot(t.LlamaForCausalLM):
        def forward(self, input_ids=None, past_key_values=None, use_cache=None, **kwargs):
            if past_key_values is not None:
                input_ids.sum().item()
            return super().forward(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache, **kwargs)

    known = costs_of(on_meta(lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA))))
    costs, works, _ = units_and_work(on_meta(lambda: OneShot(t.LlamaConfig(**LLAMA))))
    assert costs.is_measured
    assert "DataDependent" in costs.reason
    assert costs.kv_bytes(2, 30) == known.kv_bytes(2, 30)
    assert costs.decode_bytes >= known.decode_bytes
    products = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    assert works["model.layers.1"].decode.flops == 2 * WORK.batch_size * products
    assert works["model.embed_tokens"].decode.flops == 0


def test_each_call_of_a_model_without_a_cache_is_a_whole_pass():
    import transformers as t

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    costs, works, _ = units_and_work(on_meta(lambda: t.BertModel(t.BertConfig(**sizes, num_attention_heads=4))))
    assert costs.is_measured
    assert costs.decode == costs.prefill
    assert costs.decode_bytes == costs.prefill_bytes
    assert works["encoder.layer.1"].decode.flops > 0
    assert works["encoder.layer.1"].decode == works["encoder.layer.1"].prefill
    # A small pass holds less than one of the workload's.
    assert costs.activation_bytes(2, 1, 0) < costs.prefill_bytes


def test_work_is_guessed_from_weights_where_no_pass_can_be_tried():
    model = on_meta(lambda: nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 24), nn.Linear(24, 8)))
    costs, works, _ = units_and_work(model)
    assert not costs.is_measured
    tokens = WORK.batch_size * WORK.prompt_tokens
    assert {name: work.flops for name, work in costs.prefill.work.items()} == {
        "1": 2 * tokens * 16 * 24,
        "2": 2 * tokens * 24 * 8,
    }
    assert costs.prefill.work["1"].touched_bytes == 4 * 16 * 24
    assert works["1"].prefill == works["1"].decode == costs.prefill.work["1"]  # it does not generate

    import transformers as t

    class Generates(t.LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            return super().forward(input_ids=input_ids + input_ids.sum().item(), **kwargs)

    costs = costs_of(on_meta(lambda: Generates(t.LlamaConfig(**LLAMA))))
    assert not costs.is_measured
    assert costs.decode.work["lm_head"].flops == 2 * WORK.batch_size * 32 * 64
    assert costs.prefill.work["lm_head"].flops == 2 * tokens * 32 * 64
    assert "model.embed_tokens" not in costs.decode.work


def test_a_plan_of_a_plain_module_says_how_long_it_takes():
    import bigmodel

    model = on_meta(lambda: nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))))
    estimate = bigmodel.make_plan(model, max_memory={"cpu": "4GB"}).estimate
    assert estimate.ttft_s > 1e-4
    assert estimate.time_per_token_s > 1e-4


@pytest.mark.parametrize("new_tokens", [12, 100])
def test_a_prompt_of_one_token_tells_what_grows_from_what_stays(new_tokens):
    import transformers as t

    sizes = LLAMA | {"num_hidden_layers": 4, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "head_dim": 8}
    config = t.BambaConfig(**sizes, attn_layer_indices=[1], mamba_n_groups=1, mamba_chunk_size=8)
    work = Workload(batch_size=1, prompt_tokens=1, new_tokens=new_tokens)
    costs, works, _ = units_and_work(on_meta(lambda: t.BambaForCausalLM(config)), work)
    assert costs.is_measured, costs.reason
    assert costs.kv_bytes_per_token == 2 * 2 * 8 * 4  # one layer's keys and values
    assert costs.kv_fixed_bytes >= 3 * 8 * 8 * 8 * 4  # three layers' states
    # Attention reads what there is in the middle of what is generated.
    llama = on_meta(lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA)))
    _, works, _ = units_and_work(llama, work)
    layer = works["model.layers.1"]
    grown = layer.decode.flops - layer.prefill.flops
    assert grown == pytest.approx(2 * 2 * 32 * (1 + new_tokens / 2), rel=0.1)


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
