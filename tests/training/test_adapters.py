"""Adapters are trained alone, the same in every engine; what they are around is neither changed nor saved."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import bigmodel
from bigmodel.errors import InvalidArgumentError, MissingFilesError, TrainingError
from bigmodel.training import TrainingConfig, TrainingRun
from training.loops import Sentences, adapted, lora, save_llama
from training.test_engines import ZERO, largest_difference

peft = pytest.importorskip("peft")
FILES = ["adapter_config.json", "adapter_model.safetensors"]
ENGINES = ["ddp", "fsdp", *(pytest.param(each, marks=pytest.mark.slow) for each in ZERO)]
SMALL = bigmodel.Workload(batch_size=2, prompt_tokens=16, new_tokens=1)
SGD = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.1), "data": Sentences(8), "progress": False}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint in float32."""
    path = tmp_path_factory.mktemp("wide")
    save_llama(path, stored=torch.float32)
    return path


def in_memory(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


def prepared(model, **options):
    run = TrainingRun(TrainingConfig(**options))
    return run, run.prepare(model=model, adapter=lora(), **SGD)


@pytest.mark.parametrize("strategy", ENGINES)
def test_engines_train_adapters_as_one_process_does(two, wide, strategy):
    asked = {"path": str(wide), "precision": "fp32", "micro_batch_size": 2}
    alone = adapted(strategy="single", **asked)
    for found in two.run("training.loops:adapted", strategy=strategy, **asked):
        assert found["is_base_kept"]
        assert found["is_moved"]
        assert max(abs(a - b) for a, b in zip(found["losses"], alone["losses"], strict=True)) <= 5e-6
        assert largest_difference(found["parameters"], alone["parameters"]) <= 1e-5


@pytest.mark.parametrize("strategy", ENGINES)
def test_in_bfloat16_the_base_stays_as_it_is_stored(two, folder, strategy):
    asked = {"path": str(folder), "precision": "bf16", "micro_batch_size": 2}
    alone = adapted(strategy="single", **asked)
    other = two.run("training.loops:adapted", strategy="fsdp" if strategy == "ddp" else "ddp", **asked)[0]
    for found in two.run("training.loops:adapted", strategy=strategy, **asked):
        assert found["dtypes"] == {"torch.bfloat16"}
        assert found["is_base_kept"]
        assert all(each.dtype == torch.float32 for each in found["parameters"].values())
        assert max(abs(a - b) for a, b in zip(found["losses"], alone["losses"], strict=True)) <= 2e-3
        assert found["norms"] == pytest.approx(alone["norms"], rel=2e-2)
        if strategy != "zero3":  # whose products of linear layers DeepSpeed writes itself
            assert all(torch.equal(each, other["parameters"][name]) for name, each in found["parameters"].items())


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_adapters_in_float32_around_a_base_in_bfloat16(two, folder, strategy):
    asked = {"path": str(folder), "precision": "fp32", "micro_batch_size": 2}
    alone = adapted(strategy="single", **asked)
    assert alone["dtypes"] == {"torch.bfloat16"}
    for found in two.run("training.loops:adapted", strategy=strategy, **asked):
        assert largest_difference(found["parameters"], alone["parameters"]) <= 1e-2


@pytest.mark.parametrize(
    "strategy", ["fsdp", *(pytest.param(each, marks=pytest.mark.slow) for each in ("ddp", "zero3"))]
)
def test_a_model_in_memory_gets_them_too(two, wide, tmp_path, strategy):
    asked = {"path": str(wide), "precision": "fp32", "micro_batch_size": 2, "strategy": strategy}
    adapted(str(wide), steps=1, precision="fp32", exports=str(tmp_path / "first"))
    asked["adapter"] = str(tmp_path / "first")  # the same first values
    read = two.run("training.loops:adapted", **asked)[0]
    held = two.run("training.loops:adapted", from_memory=True, **asked)[0]
    assert held["losses"] == pytest.approx(read["losses"], abs=1e-6)
    assert largest_difference(held["parameters"], read["parameters"]) <= 1e-5


@pytest.mark.parametrize(
    "strategy", ["single", "fsdp", *(pytest.param(each, marks=pytest.mark.slow) for each in ("ddp", *ZERO))]
)
def test_peft_reads_what_is_exported(two, folder, tmp_path, strategy):
    asked = {"path": str(folder), "exports": str(tmp_path / "out"), "precision": "bf16", "micro_batch_size": 2}
    if strategy == "single":
        found = adapted(strategy=strategy, **asked)
    else:
        found = two.run("training.loops:adapted", strategy=strategy, **asked)[0]
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == FILES
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    assert config["inference_mode"] is True
    model = peft.PeftModel.from_pretrained(in_memory(folder), tmp_path / "out")
    values = dict(model.named_parameters())
    assert found["parameters"].keys() == {name for name in values if "lora_" in name}
    assert all(torch.equal(values[name], each) for name, each in found["parameters"].items())


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_what_is_merged_is_what_peft_merges_in_memory(two, folder, tmp_path, strategy):
    asked = {"exports": str(tmp_path / "adapter"), "merges": str(tmp_path / "merged")}
    common = {"strategy": strategy, "precision": "bf16", "path": str(folder)}
    found, plain = (two.run("training.loops:adapted", **common, **each) for each in (asked, {}))
    assert [each["loss"] for each in found] == [each["loss"] for each in plain]  # the model is as it was
    around = peft.PeftModel.from_pretrained(in_memory(folder), tmp_path / "adapter")
    expected = around.merge_and_unload().state_dict()
    found = in_memory(tmp_path / "merged").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], each) and found[name].dtype == each.dtype for name, each in expected.items())
    streamed = bigmodel.load_sharded(tmp_path / "merged", device_map={"": "disk"})
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(streamed(ids).logits, in_memory(tmp_path / "merged").requires_grad_(False)(ids).logits)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("fsdp", "fsdp"),
        pytest.param("single", "ddp", marks=pytest.mark.slow),
        pytest.param("zero3", "fsdp", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_holds_the_adapters_alone(two, wide, tmp_path, before, after):
    asked = {"path": str(wide), "precision": "fp32", "micro_batch_size": 2}
    whole = adapted(strategy="single", steps=4, **asked)
    saves = {"steps": 2, "saves": str(tmp_path / "1")}
    adapted(strategy="single", **asked, **saves) if before == "single" else two.run(
        "training.loops:adapted", strategy=before, **asked, **saves
    )
    names = json.loads((tmp_path / "1" / "manifest.json").read_text())["shapes"]
    assert names.keys() == whole["parameters"].keys()
    for found in two.run("training.loops:adapted", strategy=after, steps=2, loads=str(tmp_path / "1"), **asked):
        assert max(abs(a - b) for a, b in zip(found["losses"], whole["losses"][2:], strict=True)) <= 5e-6
        assert largest_difference(found["parameters"], whole["parameters"]) <= 1e-5
    run = TrainingRun(TrainingConfig(precision="fp32"))
    run.prepare(model=str(wide), **SGD)
    with pytest.raises(TrainingError, match="checkpoint of another model"):
        run.load(tmp_path / "1")


def test_an_exported_adapter_is_gone_on_with(wide, tmp_path):
    first = adapted(str(wide), precision="fp32", steps=2, exports=str(tmp_path / "a"))
    again = adapted(str(wide), precision="fp32", steps=1, adapter=str(tmp_path / "a"))
    assert again["losses"][0] < first["losses"][0] + 1  # of the same data, from where the first run was
    moved = {name: each - first["parameters"][name] for name, each in again["parameters"].items()}
    assert max(float(each.abs().max()) for each in moved.values()) <= 0.0101  # one step of AdamW


@pytest.mark.parametrize("first", [True, *(pytest.param(each, marks=pytest.mark.slow) for each in (False, "gaussian"))])
def test_first_values_are_drawn_as_peft_draws_them(wide, first):
    def drawn(seed):
        run = TrainingRun(TrainingConfig(precision="fp32", seed=seed))
        run.prepare(model=str(wide), adapter=lora(init_lora_weights=first), **SGD)
        return {name: each.detach().clone() for name, each in run.unwrap().named_parameters() if each.requires_grad}

    found, same, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(each, same[name]) for name, each in found.items())
    starts = {name: each for name, each in found.items() if "lora_A" in name}
    assert all(not torch.equal(each, other[name]) for name, each in starts.items())
    around = dict(peft.get_peft_model(in_memory(wide), lora(init_lora_weights=first)).named_parameters())
    for name, each in found.items():
        assert float(each.std()) == pytest.approx(float(around[name].detach().std()), rel=0.4)


def whole_of(parameter):
    """A copy of all of it, whether FSDP2 holds it or leaves it as it is."""
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()).clone()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_layers_that_are_trained_whole(tmp_path, stored):
    save_llama(tmp_path / "m", tie_word_embeddings=False, stored=stored)
    run = TrainingRun(TrainingConfig(precision="bf16"))
    adapter = lora(modules_to_save=["lm_head"])
    model, *_ = run.prepare(model=str(tmp_path / "m"), adapter=adapter, **SGD)
    head = model.base_model.model.lm_head
    assert head.modules_to_save["default"].weight.dtype == torch.float32
    before = whole_of(head.original_module.weight)
    assert torch.equal(head.modules_to_save["default"].weight.full_tensor(), before.float())
    run.train_step()
    run.export(tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    trained = head.modules_to_save["default"].weight.full_tensor()
    assert torch.equal(found["base_model.model.lm_head.weight"], trained)
    assert not torch.equal(trained.to(stored), before)
    assert torch.equal(whole_of(head.original_module.weight), before)  # what is frozen is another tensor
    run.export(tmp_path / "merged", merge=True)
    merged = in_memory(tmp_path / "merged").lm_head.weight
    assert torch.equal(merged, trained.to(stored))


@pytest.mark.parametrize(
    ("adapter", "match"),
    [
        (lora(init_lora_weights="pissa"), "init_lora_weights is 'pissa', and first values"),
        (lora(use_dora=True), r"lora_magnitude_vector.* are made of the model's weights"),
        (lora(target_modules=["nothing"]), "PEFT refuses the adapter for this model: .*nothing"),
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "adapter is a IA3Config"),
        (3, "adapter is a int"),
    ],
)
def test_what_cannot_be_made_is_refused(folder, adapter, match):
    with pytest.raises(InvalidArgumentError, match=match):
        TrainingRun(TrainingConfig()).prepare(model=str(folder), adapter=adapter, **SGD)


def test_folders_that_are_none_are_refused(folder, wide, tmp_path):
    with pytest.raises(MissingFilesError, match=r"has no adapter_config.json, adapter_model.safetensors"):
        TrainingRun(TrainingConfig()).prepare(model=str(folder), adapter=str(folder), **SGD)
    save_llama(tmp_path / "other", hidden_size=32)
    adapted(str(tmp_path / "other"), steps=1, precision="bf16", exports=str(tmp_path / "a"))
    with pytest.raises(InvalidArgumentError, match="is no adapter of this model"):
        TrainingRun(TrainingConfig()).prepare(model=str(folder), adapter=str(tmp_path / "a"), **SGD)
    save_llama(tmp_path / "short", num_hidden_layers=1)
    adapted(str(tmp_path / "short"), steps=1, precision="bf16", exports=str(tmp_path / "b"))
    with pytest.raises(InvalidArgumentError, match=r"b has no .*layers.1.* Give the adapter of this model"):
        TrainingRun(TrainingConfig()).prepare(model=str(folder), adapter=str(tmp_path / "b"), **SGD)


def test_exports_are_not_put_where_they_would_be_misread(folder, wide, tmp_path):
    run, _ = prepared(str(folder), precision="bf16")
    save_llama(tmp_path / "model")
    with pytest.raises(InvalidArgumentError, match="holds a model, which would be read with the adapters"):
        run.export(tmp_path / "model")
    run = TrainingRun(TrainingConfig(precision="bf16"))
    run.prepare(model=str(folder), **SGD)
    with pytest.raises(InvalidArgumentError, match="merge is True, and the model has no adapters"):
        run.export(tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()


def test_one_folder_is_not_both(folder, tmp_path):
    run, _ = prepared(str(folder), precision="bf16")
    run.export(tmp_path / "out")
    with pytest.raises(InvalidArgumentError, match="holds an adapter, which would be read with the model"):
        run.export(tmp_path / "out", merge=True)
    run.export(tmp_path / "out")  # anew


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"target_modules": ["embed_tokens", "q_proj"]}])
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning")
def test_what_is_tied_is_not_merged(folder, tmp_path, options):
    run = TrainingRun(TrainingConfig(precision="fp32"))
    run.prepare(model=str(folder), adapter=lora(**options), **SGD)
    run.train_step()
    with pytest.raises(
        InvalidArgumentError, match=r"cannot be merged: .*(lm_head|embed_tokens).*another layer's weight too"
    ):
        run.export(tmp_path / "merged", merge=True)
    assert list(tmp_path.iterdir()) == []
    run.export(tmp_path / "out")
    around = peft.PeftModel.from_pretrained(in_memory(folder), tmp_path / "out").requires_grad_(False)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        found = run.unwrap().eval().requires_grad_(False)(ids).logits
        assert torch.equal(around(ids).logits, found)


@pytest.mark.parametrize(("strategy", "precision"), [("fsdp", "fp32"), ("ddp", "bf16")])
def test_text_is_generated_with_adapters(two, wide, strategy, precision):
    for found in two.run("training.loops:adapted_text", path=str(wide), strategy=strategy, precision=precision):
        assert found["tokens"] == found["expected"]


def test_text_of_an_encoder_and_decoder(tmp_path):
    from families import make_checkpoint

    folder = make_checkpoint("t5", tmp_path)
    run = TrainingRun(TrainingConfig(precision="fp32"))
    run.prepare(model=str(folder), adapter=lora(target_modules=["q"], task_type="SEQ_2_SEQ_LM"), progress=False)
    assert run.generate(torch.arange(3, 9)[None], max_new_tokens=3, do_sample=False).shape[0] == 1


@pytest.mark.parametrize("strategy", ["single", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_adapters_on_parameters_of_a_checkpoint_that_is_converted(tmp_path, strategy):
    from families import inputs_for, make_checkpoint

    folder = make_checkpoint("mixtral", tmp_path)
    batch = inputs_for("mixtral")
    batch = batch | {"labels": batch["input_ids"]}
    data = [{name: each[number] for name, each in batch.items()} for number in range(2)]
    run = TrainingRun(TrainingConfig(strategy=strategy, precision="fp32", micro_batch_size=2))
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    run.prepare(model=str(folder), adapter=adapter, **SGD | {"data": data})
    plain = in_memory(folder)
    with torch.no_grad():
        expected = plain(**batch).loss
    assert run.train_step().loss == pytest.approx(float(expected), abs=1e-5)  # adapters begin as nothing


def test_two_adapters_at_once_are_not_one_folder(wide, tmp_path):
    model = peft.get_peft_model(in_memory(wide), lora(), adapter_name="first")
    model.add_adapter("second", lora())
    model.base_model.set_adapter(["first", "second"])
    run = TrainingRun(TrainingConfig(precision="fp32"))
    run.prepare(model=model, **SGD)
    with pytest.raises(InvalidArgumentError, match=r"2 adapters are active \(first, second\)"):
        run.export(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_an_adapter_that_is_scaled_otherwise_is_refused(wide, tmp_path):
    adapted(str(wide), steps=1, precision="fp32", saves=str(tmp_path / "1"))
    with pytest.raises(TrainingError, match=r"of another adapter: lora_alpha 16 there and 64 here"):
        adapted(str(wide), steps=1, precision="fp32", adapter=lora(lora_alpha=64), loads=str(tmp_path / "1"))


def test_what_is_refused_leaves_a_users_module_and_configuration_as_they_were(folder, tmp_path):
    save_llama(tmp_path / "other", hidden_size=32)
    adapted(str(tmp_path / "other"), steps=1, precision="bf16", exports=str(tmp_path / "a"))
    model, config = in_memory(folder), lora(task_type="SEQ_CLS")
    before = {name: each.requires_grad for name, each in model.named_parameters()}
    with pytest.raises(InvalidArgumentError, match=r"size mismatch .*lora_A"):
        TrainingRun(TrainingConfig()).prepare(model=model, adapter=str(tmp_path / "a"), **SGD)
    assert {name: each.requires_grad for name, each in model.named_parameters()} == before
    settings = config.to_dict()
    TrainingRun(TrainingConfig(precision="fp32")).prepare(model=in_memory(folder).float(), adapter=config, **SGD)
    assert config.to_dict() == settings
    with pytest.raises(InvalidArgumentError, match='precision is "fp8", and adapters are not trained in it'):
        TrainingRun(TrainingConfig(strategy="fsdp", precision="fp8", engine_options={"emulate_float8": True})).prepare(
            model=str(folder), adapter=lora(), **SGD
        )


# --- On weights that stream


def streamed(path, where="disk"):
    return bigmodel.load_sharded(path, device_map={"": where}, workload=SMALL, progress=False)


def trained(model, folder=None, **options):
    """Losses, gradient norms and adapters after three global batches."""
    run = TrainingRun(TrainingConfig(precision="fp32", global_batch_size=8, micro_batch_size=2, grad_clip=0.05))
    run.prepare(
        model=model,
        adapter=lora(lora_dropout=0.1),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        data=Sentences(64),
        progress=False,
        **options,
    )
    if folder is not None and folder.exists():
        run.load(folder)
    records = [run.train_step() for _ in range(3)]
    values = {name: each.detach().clone() for name, each in run.unwrap().named_parameters() if each.requires_grad}
    return run, [(each.loss, each.grad_norm) for each in records], values


def test_adapters_on_weights_that_stream_are_trained_to_the_same_bits(folder, tmp_path):
    _, expected, adapters = trained(str(folder))
    run, found, values = trained(streamed(folder))
    assert found == expected
    assert all(torch.equal(each, adapters[name]) for name, each in values.items())
    assert bigmodel.stats_of(run.unwrap()).read_bytes > 0
    run.save(tmp_path / "1")
    resumed = [trained(model, tmp_path / "1")[1] for model in (str(folder), streamed(folder))]
    assert resumed[0] == resumed[1]
    assert run.evaluate(run.prepare_eval(Sentences(6))).loss > 0
    run.export(tmp_path / "adapter")
    run.export(tmp_path / "merged", merge=True)
    around = peft.PeftModel.from_pretrained(in_memory(folder), tmp_path / "adapter")
    merged = in_memory(tmp_path / "merged").state_dict()
    assert all(torch.equal(merged[name], each) for name, each in around.merge_and_unload().state_dict().items())
    assert run.train_step().step == 4  # nothing was changed by that


def test_what_weights_that_stream_are_not_trained_with_is_refused(two, folder):
    for options, words in (
        ({"precision": "bf16"}, r'precision is "bf16", and on weights that stream adapters compute in float32'),
        ({"precision": "fp32", "strategy": "fsdp"}, r'strategy is "fsdp", and the model streams its weights'),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            prepared(streamed(folder), **options)
    with pytest.raises(InvalidArgumentError, match=r"only adapters are trained on it.*materialize"):
        TrainingRun(TrainingConfig(precision="fp32")).prepare(model=streamed(folder), **SGD)
    for found in two.run("training.loops:streamed", path=str(folder)):
        assert "2 processes were started" in found
