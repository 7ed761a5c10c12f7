"""A frozen base in 4 bits, under adapters that are trained: with bitsandbytes' own arithmetic, and never written."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import bigmodel
from bigmodel.errors import InvalidArgumentError, TrainingError
from bigmodel.training import TrainingConfig, TrainingRun
from bigmodel.training.cluster import Cluster
from bigmodel.training.job import job_of
from bigmodel.training.outlook import look_out
from bigmodel.training.quantized import Quantized
from bigmodel.training.weights import Origin
from training.loops import Sentences, adapted, lora
from training.test_engines import largest_difference

peft = pytest.importorskip("peft")
IDS = torch.arange(3, 27).view(2, 12)


def prepared(folder, adapter=None, **options):
    run = TrainingRun(TrainingConfig(quantize_base="nf4", **options))
    run.prepare(
        model=str(folder), adapter=lora() if adapter is None else adapter, progress=False,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1), data=Sentences(8),
    )  # fmt: skip
    return run


def in_memory(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").requires_grad_(False)


def gradients(model):
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.requires_grad}


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_passes_and_gradients_are_those_of_the_values_that_transformers_has_in_4_bits(folder, tmp_path, kind):
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    adapted(str(folder), precision="fp32", quantize_base=kind, exports=str(tmp_path / "adapter"))
    run = TrainingRun(TrainingConfig(precision="fp32", quantize_base=kind))
    run.prepare(model=str(folder), adapter=str(tmp_path / "adapter"), progress=False,
                optimizer=lambda params: torch.optim.SGD(params, lr=0.1), data=Sentences(8))  # fmt: skip
    ours = run._prepared().module
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True)
    packed = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype="auto")
    base = in_memory(folder)
    changed = 0
    for name, each in packed.named_parameters():
        if each.dtype == torch.uint8:
            base.get_parameter(name).data = dequantize_4bit(each.data, each.quant_state)
            changed += 1
    assert changed == 2 * 7
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).train()
    expected, found = gradients(theirs), gradients(ours)
    assert found.keys() == expected.keys()
    assert all(torch.equal(each, expected[name]) for name, each in found.items())
    for model in (ours, theirs):
        model.eval()
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_two_processes_train_as_one_does(two, folder, precision):
    asked = {"path": str(folder), "precision": precision, "micro_batch_size": 2, "quantize_base": "nf4"}
    alone = adapted(strategy="single", **asked)
    assert alone["dtypes"] == {"torch.uint8", "torch.bfloat16"}
    for found in two.run("training.loops:adapted", strategy="ddp", **asked):
        assert found["is_base_kept"]
        assert found["is_moved"]
        least = 5e-6 if precision == "fp32" else 2e-3
        assert max(abs(a - b) for a, b in zip(found["losses"], alone["losses"], strict=True)) <= least
        if precision == "fp32":
            assert largest_difference(found["parameters"], alone["parameters"]) <= 1e-5


def test_a_run_that_is_gone_on_with_takes_the_same_steps(folder, tmp_path):
    asked = {"path": str(folder), "precision": "fp32", "micro_batch_size": 2, "quantize_base": "nf4"}
    whole = adapted(steps=4, **asked)
    adapted(steps=2, saves=str(tmp_path / "1"), **asked)
    rest = adapted(steps=2, loads=str(tmp_path / "1"), **asked)
    assert rest["losses"] == whole["losses"][2:]
    assert all(torch.equal(each, whole["parameters"][name]) for name, each in rest["parameters"].items())


def test_an_adapter_is_merged_into_the_weights_that_the_checkpoint_has(folder, tmp_path):
    out = {"exports": str(tmp_path / "adapter"), "merges": str(tmp_path / "merged")}
    found = adapted(str(folder), precision="fp32", quantize_base="nf4", **out)
    assert found["loss"] == adapted(str(folder), precision="fp32", quantize_base="nf4")["loss"]  # as it was
    around = peft.PeftModel.from_pretrained(in_memory(folder), tmp_path / "adapter")
    expected = around.merge_and_unload().state_dict()
    merged = in_memory(tmp_path / "merged").state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], each) and merged[name].dtype == each.dtype for name, each in expected.items())


def test_blocks_are_in_4_bits_as_it_was_forecast(folder):
    run = prepared(folder, precision="fp32")
    layers = [each for each in run._prepared().module.modules() if isinstance(each, Quantized)]
    assert len(layers) == 2 * 7
    assert run._prepared().module.get_output_embeddings().weight.dtype == torch.bfloat16
    for each in layers:
        held = each.weight.nbytes + each.state.absmax.nbytes + each.state.state2.absmax.nbytes
        assert held == each.held_bytes < 0.6 * each.in_features * each.out_features
    job = job_of(
        Origin.of(str(folder), adapter=lora(), quantize_base="nf4"),
        precision="fp32", global_batch_size=2, num_tokens=16,
    )  # fmt: skip
    named = run._prepared().module.named_parameters()
    frozen = sum(each.nbytes for _, each in named if not each.requires_grad)
    scales = sum(each.held_bytes - each.weight.nbytes for each in layers)
    assert sum(each.frozen_bytes for each in job.groups) == frozen + scales
    two = Cluster.of(replace(bigmodel.Machine.probe(), accelerators=()), num_per_node=2)
    asked = TrainingConfig(precision="fp32", global_batch_size=2, micro_batch_size=1, quantize_base="nf4")
    assert {each.way.strategy for each in look_out(job, two, asked).forecasts} == {"ddp"}


def test_what_is_recomputed_has_the_same_gradients(folder):
    asked = {"path": str(folder), "precision": "fp32", "micro_batch_size": 2, "quantize_base": "nf4"}
    plain = adapted(**asked)
    again = adapted(activation_checkpointing="on", **asked)
    assert plain["losses"] == again["losses"]
    assert all(torch.equal(each, plain["parameters"][name]) for name, each in again["parameters"].items())


def test_copies_of_layers_are_trained_as_they_are(folder, tmp_path):
    adapter = lora(modules_to_save=["up_proj"])
    asked = {"precision": "bf16", "quantize_base": "nf4", "adapter": adapter}
    found = adapted(str(folder), exports=str(tmp_path / "out"), **asked)
    whole = [name for name in found["parameters"] if "up_proj" in name]
    assert len(whole) == 2
    assert all(found["parameters"][name].dtype == torch.float32 for name in whole)
    assert found["is_moved"]
    assert found["is_base_kept"]
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(torch.equal(each, found["parameters"][whole[0]]) for each in saved.values())


def test_layers_that_an_adapter_repeats(folder):
    run = prepared(folder, lora(layer_replication=[[0, 2], [1, 2]]), precision="fp32")
    module = run._prepared().module
    layers = [each for each in module.modules() if isinstance(each, Quantized)]
    assert len(layers) == 3 * 7
    assert len({id(each.weight) for each in layers}) == 2 * 7
    assert not any(each.weight.is_meta or each.state is None for each in layers)
    assert all(bool(each.isfinite().all()) for each in gradients(module).values())


@pytest.mark.parametrize("family", ["t5", "qwen3_moe", "mamba", "llava"])
def test_families(tmp_path, family):
    from families import inputs_for, make_checkpoint

    targets = {"t5": ["q"], "mamba": ["in_proj"]}.get(family, ["q_proj"])
    run = prepared(make_checkpoint(family, tmp_path), lora(target_modules=targets, task_type=None), precision="fp32")
    module = run._prepared().module
    layers = {name for name, each in module.named_modules() if isinstance(each, Quantized)}
    assert layers
    # What their own code reads, and what is in no block.
    assert not any(name.endswith((".wo", ".dt_proj", "linear_1", "lm_head")) for name in layers)
    inputs = inputs_for(family)
    labels = inputs["decoder_input_ids" if family == "t5" else "input_ids"].contiguous()
    module(**inputs, labels=labels).loss.backward()
    found = [each.grad for each in module.parameters() if each.grad is not None]  # a tower's last layer has none
    assert all(bool(each.isfinite().all()) for each in found)
    assert any(bool(each.any()) for each in found)


def test_biases_are_trained_where_they_are_asked_for(tmp_path):
    from families import make_checkpoint

    folder = make_checkpoint("opt", tmp_path)
    run = prepared(folder, lora(bias="all", target_modules=["q_proj"]), precision="fp32")
    module = run._prepared().module.eval()  # without dropout
    found = gradients(module)
    name = next(name for name in found if name.endswith("bias"))
    bias = module.get_parameter(name)
    step = 1e-2 * found[name] / found[name].norm()
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            bias += sign * step
            losses.append(float(module(input_ids=IDS, labels=IDS).loss))
            bias -= sign * step
    assert losses[0] - losses[1] == pytest.approx(2e-2 * float(found[name].norm()), rel=2e-2)


def test_what_cannot_be_quantised_is_refused(two, folder, monkeypatch):
    config = TrainingConfig(quantize_base="nf4", precision="fp32")
    asked = {"progress": False, "optimizer": lambda params: torch.optim.SGD(params, lr=0.1)}
    with pytest.raises(InvalidArgumentError, match='quantize_base is "nf4", and strategy="fsdp" divides'):
        TrainingConfig(quantize_base="nf4", strategy="fsdp")
    with pytest.raises(InvalidArgumentError, match="Give one of: nf4, fp4"):
        TrainingConfig(quantize_base="int4")
    with pytest.raises(InvalidArgumentError, match="there is no adapter: what is in 4 bits is not trained"):
        TrainingRun(config).prepare(model=str(folder), **asked)
    model = bigmodel.load_sharded(folder, device_map={"": "disk"}, progress=False)
    with pytest.raises(InvalidArgumentError, match="the model is in memory: weights are quantised as they are read"):
        TrainingRun(config).prepare(model=model, adapter=lora(), **asked)
    dora = lora(use_dora=True)
    with pytest.raises(InvalidArgumentError):
        TrainingRun(config).prepare(model=str(folder), adapter=dora, **asked)
    with pytest.raises(InvalidArgumentError, match='adapters are not trained with precision="fp8"'):
        TrainingConfig(quantize_base="nf4", precision="fp8")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InvalidArgumentError, match=r'pip install "bigmodel\[quantization\]"'):
        TrainingRun(config)


def test_a_model_without_linear_layers_in_blocks_is_refused(tmp_path):
    from families import make_checkpoint

    with pytest.raises(InvalidArgumentError, match="has no block with a linear layer of its own"):
        prepared(make_checkpoint("gpt2", tmp_path), lora(target_modules=["c_attn"]), precision="fp32")


def test_a_checkpoint_is_gone_on_with_on_the_same_base(folder, tmp_path):
    prepared(folder, precision="fp32").save(tmp_path / "one")
    prepared(folder, precision="fp32").load(tmp_path / "one")
    whole = TrainingRun(TrainingConfig(precision="fp32"))
    model = whole.prepare(
        model=str(folder), adapter=lora(), progress=False, optimizer=torch.optim.SGD, data=Sentences(8)
    )[0]
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(TrainingError, match=r"on a base in nf4, and this one is as it is stored.*quantize_base='nf4'"):
        whole.load(tmp_path / "one")
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
