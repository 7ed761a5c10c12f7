"""Loaded, streamed and resident models give the same bits; budgets, maps and lifecycles mean what they say."""

import copy
import gc
import itertools
import logging
import os
import threading
import weakref
from pathlib import Path

import pytest
import torch
from families import FAMILIES, VOCAB, each_family, inputs_for, make_checkpoint, resident
from torch import nn

import bigmodel
from bigmodel.device_map.machine import Machine
from bigmodel.errors import (
    DeviceMapError,
    DoesNotFitError,
    InvalidArgumentError,
    KeyMismatchError,
    MoveRefusedError,
    ReadError,
    StreamingError,
)
from bigmodel.loading.lifecycle import watch

GENERATES = [family for family in FAMILIES if family not in ("bert", "vit")]
PAIR = bigmodel.Workload(batch_size=2, prompt_tokens=16, new_tokens=8)
IDS = torch.arange(3, 14).view(1, 11)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Family -> folder, each made once."""
    made = {}

    def get(family, dtype=torch.float32):
        if (family, dtype) not in made:
            folder = tmp_path_factory.mktemp("checkpoints") / f"{family}-{str(dtype)[6:]}"
            made[family, dtype] = make_checkpoint(family, folder, dtype)
        return made[family, dtype]

    return get


@pytest.fixture
def llama(checkpoints):
    return checkpoints("llama")


def load(folder, device_map="auto", **options):
    defaults = {"workload": PAIR, "progress": False, "offload_folder": Path(folder).parent / "converted"}
    return bigmodel.load_sharded(folder, device_map, **defaults | options)


def make_plan(folder, **options):
    return bigmodel.make_plan(folder, **{"workload": PAIR} | options)


def tight(folder, fraction, **options):
    """A host limit under which about `fraction` of the streamable weights cannot stay."""
    plan = make_plan(folder, **options)
    return {"cpu": int(plan.estimate.peak_bytes["cpu"] - plan.weight_bytes * fraction)}


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("family", each_family())
def test_streamed_output_equals_resident_output(checkpoints, family):
    folder, inputs = checkpoints(family), inputs_for(family)
    expected = logits(resident(folder), **inputs)
    for options in (
        {"device_map": {"": "disk"}},
        {"device_map": "auto", "max_memory": tight(folder, 0.4)},
        {"device_map": "cpu"},
    ):
        model = load(folder, **options)
        assert torch.equal(logits(model, **inputs), expected)
        assert torch.equal(logits(model, **inputs), expected)
        if "disk" in str(options["device_map"]):
            assert bigmodel.stats_of(model).read_bytes > 0
            # Whatever is not hooked must rest on true bytes.
            assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("family", each_family(GENERATES))
def test_generate_is_unmodified(checkpoints, family):
    folder = checkpoints(family)
    inputs = {name: value for name, value in inputs_for(family).items() if name != "decoder_input_ids"}
    reference, model = resident(folder), load(folder, {"": "disk"})
    for options in ({}, {"num_beams": 2}, {"do_sample": True, "top_k": 20}):
        torch.manual_seed(1)
        expected = reference.generate(**inputs, max_new_tokens=6, **options)
        torch.manual_seed(1)
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, **options), expected)


@pytest.mark.parametrize("family", ["llama_tied", "mixtral", "t5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_cast_while_streaming_gives_what_from_pretrained_gives(checkpoints, family, dtype):
    folder, inputs = checkpoints(family), inputs_for(family)
    reference = resident(folder, dtype=dtype)
    model = load(folder, {"": "disk"}, dtype=str(dtype)[6:])
    assert {n: p.dtype for n, p in model.named_parameters()} == {n: p.dtype for n, p in reference.named_parameters()}
    assert torch.equal(logits(model, **inputs), logits(reference, **inputs))
    assert all(torch.equal(value, reference.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("layer_and_norm", list(itertools.product(["cpu", "disk"], repeat=2)))
@pytest.mark.parametrize(
    "table_and_head",
    [
        ("cpu", "disk"),
        *(pytest.param(each, marks=pytest.mark.slow) for each in [("cpu", "cpu"), ("disk", "cpu"), ("disk", "disk")]),
    ],
)
def test_every_mix_of_tiers_is_exact(llama, table_and_head, layer_and_norm):
    parts = ["model.embed_tokens", "lm_head", "model.layers.0", "model.norm"]
    homes = dict(zip(parts, (*table_and_head, *layer_and_norm), strict=True))
    model = load(llama, {"": "disk", **homes})
    assert torch.equal(logits(model, input_ids=IDS), logits(resident(llama), input_ids=IDS))
    found = {placement.unit: placement.home for placement in bigmodel.plan_of(model).placements}
    assert {part: found[part] for part in parts} == homes


def test_a_map_may_go_down_to_a_single_parameter(llama):
    device_map = {
        "": "cpu",
        "model.layers.1.mlp": "disk",
        "model.layers.2.self_attn.q_proj.weight": "disk",
        "model.layers.3": "disk",
        "model.layers.3.input_layernorm.weight": "cpu",
    }
    before = dict(device_map)
    model = load(llama, device_map)
    assert device_map == before
    assert torch.equal(logits(model, input_ids=IDS), logits(resident(llama), input_ids=IDS))
    layer = 32 * 48 * 4 * 3
    assert bigmodel.plan_of(model).streamed_bytes > layer


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"model.layers.9": "cpu", "": "disk"}, r"'model\.layers\.9'"),
        ({"model.layers.1": "disk"}, r"covers no tier for .* parameters"),
        ({"": "cpux"}, "is no tier"),
        ({"": 0}, "this machine has 0"),
        ({"": 1.5}, "is no tier"),
        ("sideways", "Give 'auto'"),
        ("cuda", "there is none here"),
        (7, "Give a string, a dict or a Plan"),
    ],
)
def test_maps_that_mean_nothing_are_refused(llama, device_map, message):
    with pytest.raises(DeviceMapError, match=message):
        load(llama, device_map)


@pytest.mark.parametrize(
    "max_memory",
    [{"cpu": "12 parsecs"}, {"cpu": 1.5}, {"cpu": -1}, {"cpu": "20Gb"}, {"gpu0": "1GiB"}, {0: "1GiB"}, ["1GiB"]],
)
def test_limits_that_mean_nothing_are_refused(llama, max_memory):
    with pytest.raises(InvalidArgumentError):
        load(llama, max_memory=max_memory)


def test_a_budget_too_small_for_one_unit_says_what_would_do(llama):
    with pytest.raises(DoesNotFitError, match=r"needs .* Raise max_memory\['cpu'\] to") as caught:
        load(llama, max_memory={"cpu": "1MiB"})
    enough = caught.value.needed_bytes
    assert caught.value.available_bytes == 1 << 20
    model = load(llama, max_memory={"cpu": enough})
    assert torch.equal(logits(model, input_ids=IDS), logits(resident(llama), input_ids=IDS))
    with pytest.raises(DoesNotFitError, match="let weights rest on disk"):
        load(llama, "cpu", max_memory={"cpu": enough})


def test_streamed_units_are_spread_evenly_among_the_resident_ones(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=16, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    plan = make_plan(tmp_path, max_memory=tight(tmp_path, 0.5))
    away = [n for n in range(16) if plan.home_of(f"model.layers.{n}") == "disk"]
    gaps = [b - a for a, b in itertools.pairwise([*away, away[0] + 16])]
    assert 4 <= len(away) <= 12
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.slow
def test_more_memory_never_keeps_less_resident(llama):
    whole = make_plan(llama).estimate.peak_bytes["cpu"]
    weights = make_plan(llama).weight_bytes
    resident_bytes = []
    for limit in range(whole - weights, whole + 16384, 16384):
        try:
            plan = make_plan(llama, max_memory={"cpu": limit})
        except DoesNotFitError:
            assert not resident_bytes
            continue
        assert plan.estimate.peak_bytes["cpu"] <= limit
        resident_bytes.append(plan.weight_bytes - plan.streamed_bytes)
    assert resident_bytes == sorted(resident_bytes)
    assert resident_bytes[-1] == weights


def test_a_plan_can_be_kept_and_followed(llama, checkpoints):
    plan = make_plan(llama, max_memory=tight(llama, 0.4))
    again = bigmodel.Plan.from_json(plan.to_json())
    assert again == plan
    model = load(llama, again)
    assert bigmodel.plan_of(model).placements == plan.placements
    assert bigmodel.plan_of(model).slots == plan.slots
    assert torch.equal(logits(model, input_ids=IDS), logits(resident(llama), input_ids=IDS))
    with pytest.raises(DeviceMapError, match="another checkpoint"):
        load(checkpoints("qwen3"), plan)
    with pytest.raises(DoesNotFitError, match="may be used"):
        load(llama, plan, max_memory={"cpu": "1MiB"})
    divided = make_plan(llama, device_map={"": "cpu", "model.layers.1.mlp": "disk"})
    assert bigmodel.plan_of(load(llama, divided)).placements == divided.placements


@pytest.mark.slow
def test_a_plan_of_another_machine_is_followed_and_says_so_or_refused_by_tier(llama):
    other = Machine(name="other", host_bytes=1 << 40, num_processors=1, disk_bytes=1 << 40, rates_from="other.json")
    plan = make_plan(llama, machine=other)
    assert "predicted on other (rates: other.json)" in plan.explain()
    model = load(llama, plan)
    assert any(note.startswith("it was made for other (rates: other.json)") for note in bigmodel.plan_of(model).notes)
    card = bigmodel.Machine.load("desktop-24gb")
    with pytest.raises(DeviceMapError, match=r"The plan uses cuda:0, and there is cpu, disk here"):
        load(llama, make_plan(llama, machine=card))
    huge = bigmodel.Workload(batch_size=4096, prompt_tokens=2000, new_tokens=30_000)  # fits there, and not here
    with pytest.raises(DoesNotFitError) as caught:
        load(llama, make_plan(llama, machine=other, workload=huge), workload=huge)
    assert caught.value.available_bytes <= Machine.probe().host_bytes * 1.5
    small = make_plan(llama, machine=other).estimate.peak_bytes["cpu"] - 100_000
    with pytest.raises(DoesNotFitError) as caught:
        load(llama, make_plan(llama, machine=other), max_memory={"cpu": small})
    assert (caught.value.tier, caught.value.available_bytes) == ("cpu", small)


def test_a_plan_of_another_dtype_keeps_the_budget(llama):
    plan = make_plan(llama, device_map="cpu")
    limit = {"cpu": plan.estimate.peak_bytes["cpu"]}
    with pytest.raises(DoesNotFitError):
        load(llama, plan, dtype=torch.float64, max_memory=limit)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}])
def test_a_model_loaded_in_any_context_runs_in_any_other(llama, options):
    expected = logits(resident(llama, **options), input_ids=IDS)
    for context in (torch.inference_mode(), torch.device("meta")):
        with context:
            model = load(llama, {"": "disk"}, **options)
        assert torch.equal(logits(model, input_ids=IDS), expected)
        with torch.inference_mode():
            assert torch.equal(model(input_ids=IDS).logits, expected)
            weight = model.model.layers[0].mlp.up_proj.weight
            assert torch.equal(weight.half(), weight.clone().half())
            assert torch.equal(weight.to("cpu", copy=True), weight.clone())


def test_a_write_through_data_is_not_lost_in_silence(llama):
    from peft import LoraConfig, get_peft_model

    model = load(llama, {"": "disk"})
    logits(model, input_ids=IDS)
    model.model.layers[2].mlp.up_proj.weight.data.mul_(2)
    with pytest.raises(StreamingError, match=r"model\.layers\.2\.mlp\.up_proj\.weight.* changed while resting"):
        logits(model, input_ids=IDS)
    adapted = get_peft_model(
        load(llama, {"": "disk"}), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    adapted.merge_adapter()
    with pytest.raises(StreamingError, match=r"bigmodel\.materialize"):
        logits(adapted, input_ids=IDS)
    merged = logits(bigmodel.materialize(adapted), input_ids=IDS)
    assert not torch.equal(merged, logits(resident(llama), input_ids=IDS))


def test_a_resident_model_is_plain(llama):
    model = load(llama, "cpu")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not hasattr(model, "hf_device_map")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert type(model).__name__ == "LlamaForCausalLM"
    copy.deepcopy(model).half()


def test_the_passes_of_a_plain_model_are_counted_once_somebody_watches(llama):
    model, inputs = load(llama, "cpu"), inputs_for("llama")
    expected = logits(model, **inputs)
    assert bigmodel.stats_of(model).limit is None
    watch(model)
    watch(model)  # a second time changes nothing
    before = bigmodel.stats_of(model)
    for _ in range(3):
        assert torch.equal(logits(model, **inputs), expected)
    found = bigmodel.stats_of(model) - before
    assert found.num_passes == 3
    assert found.limit is not None
    assert found.limit.binds in ("memory of cpu", "arithmetic of cpu")
    bigmodel.unload(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_a_streamed_model_tells_transformers(llama):
    model = load(llama, {"": "disk"})
    assert set(model.hf_device_map.values()) == {torch.device("cpu")}
    assert model.device == torch.device("cpu")
    assert model.generation_config.disable_compile


@pytest.mark.parametrize("family", each_family(["llama_tied", "mixtral", "t5", "gpt2"]))
def test_unload_and_materialize_keep_the_numbers(checkpoints, family):
    folder, inputs = checkpoints(family), inputs_for(family)
    expected = logits(resident(folder), **inputs)
    model = load(folder, {"": "disk"})
    names = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert bigmodel.materialize(model) is model
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(logits(model, **inputs), expected)
    if family in ("llama_tied", "gpt2"):
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == names
    with pytest.raises(InvalidArgumentError, match="not loaded by bigmodel"):
        bigmodel.plan_of(model)
    model.double()
    model = load(folder, {"": "disk"})
    assert torch.equal(logits(model, **inputs), expected)
    bigmodel.unload(model)
    assert torch.equal(logits(model, **inputs), expected)
    assert not hasattr(model, "hf_device_map")


@pytest.mark.parametrize("family", ["llama_tied", "mixtral", "t5"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saving_a_streamed_model_gives_the_true_weights(checkpoints, family, dtype, tmp_path):
    folder = checkpoints(family)
    options = {} if dtype is None else {"dtype": dtype}
    model = load(folder, {"": "disk"}, **options)
    expected = resident(folder, **options).state_dict()
    bigmodel.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for saved in ("ours", "theirs"):
        state = resident(tmp_path / saved).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_moves_and_casts_are_refused_before_anything_changes(llama):
    model = load(llama, {"": "disk"})
    for move in (model.half, model.bfloat16, lambda: model.to(torch.float64), lambda: model.to("meta")):
        with pytest.raises(MoveRefusedError, match=r"bigmodel\.materialize"):
            move()
    assert model.to("cpu") is model
    assert torch.equal(logits(model, input_ids=IDS), logits(resident(llama), input_ids=IDS))


def test_gradients_of_inputs_are_right_and_no_grad_runs(llama):
    model, reference = load(llama, {"": "disk"}), resident(llama)
    embedded, other = (torch.linspace(-1, 1, 160).view(1, 5, 32).requires_grad_() for _ in range(2))
    model(inputs_embeds=embedded).logits.square().sum().backward()
    reference(inputs_embeds=other).logits.square().sum().backward()
    assert torch.equal(embedded.grad, other.grad)
    assert torch.equal(logits(model, inputs_embeds=embedded), logits(reference, inputs_embeds=embedded))
    assert torch.equal(model(input_ids=IDS).logits, logits(resident(llama), input_ids=IDS))


def test_a_pass_beyond_the_workload_runs_while_it_fits_and_is_refused_before_it_allocates(llama):
    small = bigmodel.Workload(batch_size=1, prompt_tokens=8, new_tokens=2)
    needed = make_plan(llama, workload=small, device_map={"": "disk"}).estimate.peak_bytes["cpu"]
    model = load(llama, {"": "disk"}, workload=small, max_memory={"cpu": needed})
    logits(model, input_ids=IDS[:, :8])
    large = torch.ones(64, 128, dtype=torch.int64)
    with pytest.raises(DoesNotFitError, match=r"A pass of 64 x 128 tokens .*=Workload\(batch_size=64"):
        logits(model, input_ids=large)
    assert torch.equal(logits(model, input_ids=IDS[:, :8]), logits(resident(llama), input_ids=IDS[:, :8]))
    roomy = load(llama, {"": "disk"}, workload=small)
    assert torch.equal(logits(roomy, input_ids=large), logits(resident(llama), input_ids=large))


def test_a_models_threads_files_and_memory_go_with_it(checkpoints):
    gc.collect()
    folders = {family: checkpoints(family) for family in ("llama_tied", "mixtral")}  # making them may start threads too
    threads = set(threading.enumerate())
    for family, folder in folders.items():
        model = load(folder, {"": "disk"}, dtype=torch.bfloat16)
        logits(model, **inputs_for(family))
        assert set(threading.enumerate()) > threads
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None
        assert set(threading.enumerate()) == threads
        assert str(folder) not in Path("/proc/self/maps").read_text()
        assert not [fd for fd in os.listdir("/proc/self/fd") if str(folder) in _target(fd)]


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_model_is_gone_when_the_last_that_held_it_lets_go(where, llama):
    gc.collect()
    gc.disable()  # nothing it is made of waits for the collector
    try:
        model = load(llama, {"": where}).requires_grad_(False)
        embeds = torch.randn(1, 8, model.config.hidden_size, requires_grad=True)
        loss = model(inputs_embeds=embeds, labels=IDS[:, :8]).loss
        loss.backward()
        assert embeds.grad is not None
        gone = weakref.ref(model)
        del model, loss
        assert gone() is None
        assert str(llama) not in Path("/proc/self/maps").read_text()
    finally:
        gc.enable()


def test_a_load_that_fails_leaves_nothing_behind(llama, tmp_path):
    import shutil

    gc.collect()
    broken = tmp_path / "broken"
    shutil.copytree(llama, broken)
    threads = set(threading.enumerate())
    weights = sorted(broken.glob("*.safetensors"))
    os.truncate(weights[3], os.path.getsize(weights[3]) - 10)
    weights[5].unlink()
    with pytest.raises(bigmodel.errors.CheckpointError):
        load(broken)
    gc.collect()
    assert set(threading.enumerate()) == threads
    assert str(broken) not in Path("/proc/self/maps").read_text()


def test_materialize_that_fails_leaves_the_model_streaming(llama, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(llama, folder)
    model = load(folder, {"": "disk"})
    expected = logits(model, input_ids=IDS)
    threads = set(threading.enumerate())
    folder.rename(tmp_path / "away")  # which leaves the files themselves as they were
    with pytest.raises(ReadError, match=r"The weights of .* could not be read: .*model-"):
        bigmodel.materialize(model)
    with pytest.raises(InvalidArgumentError, match="There is no device cuda:7 here"):
        bigmodel.materialize(model, "cuda:7")
    assert set(threading.enumerate()) == threads
    (tmp_path / "away").rename(folder)
    assert torch.equal(logits(model, input_ids=IDS), expected)
    assert bigmodel.stats_of(model).num_passes == 2
    assert torch.equal(logits(bigmodel.materialize(model), input_ids=IDS), expected)


def test_generate_takes_a_users_cache_and_streamer(llama):
    from transformers import DynamicCache

    class Collected:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    def answers(model):
        cache, streamer, given = DynamicCache(config=model.config), Collected(), []
        tokens = IDS
        for _ in range(3):  # a conversation: the cache goes on
            tokens = model.generate(
                tokens, past_key_values=cache, streamer=streamer, max_new_tokens=3, do_sample=False, pad_token_id=0
            )
            given.append(tokens)
            assert streamer.ended
        return given, streamer.tokens, cache.get_seq_length(), cache.layers[1].keys

    expected, answered = answers(resident(llama)), answers(load(llama, {"": "disk"}))
    assert all(map(torch.equal, expected[0], answered[0]))
    assert answered[1:3] == expected[1:3]
    assert torch.equal(answered[3], expected[3])


@pytest.mark.parametrize("way", ["touched", "overwritten", "overwritten and given its old time", "replaced"])
def test_a_file_that_changes_under_a_streamed_model_is_an_error_with_the_units_name(llama, tmp_path, way):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(llama, folder)
    model = load(folder, {"": "disk"})
    logits(model, input_ids=IDS)
    for file in folder.glob("*.safetensors"):
        before, data = file.stat(), file.read_bytes()
        if way == "replaced":
            file.unlink()
        if way != "touched":
            file.write_bytes(data[:-8] + b"\x01" * 8)
        times = (1, 1) if way == "touched" else (before.st_atime_ns, before.st_mtime_ns)
        if way in ("touched", "overwritten and given its old time"):
            os.utime(file, ns=times)

    def several_passes():
        # The first units may have been read before the change.
        for _ in range(3):
            logits(model, input_ids=IDS)

    with pytest.raises(
        ReadError,
        match=r"The weights of (model|lm_head)\S* could not be read: .* has changed since its header was read",
    ):
        several_passes()


def test_users_hooks_see_the_weights(llama):
    model, reference = load(llama, {"": "disk"}), resident(llama)
    seen = {}
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda m, a, n=number: seen.update({n: m.mlp.up_proj.weight.clone()}))
    logits(model, input_ids=IDS)
    assert len(seen) == 4
    assert all(torch.equal(seen[n], reference.model.layers[n].mlp.up_proj.weight) for n in seen)


def test_adapters_on_a_streamed_model_give_the_same_logits(llama):
    from peft import LoraConfig, get_peft_model

    def adapted(base):
        torch.manual_seed(5)
        return get_peft_model(
            base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        ).eval()

    reference, model = adapted(resident(llama)), adapted(load(llama, {"": "disk"}))
    assert torch.equal(logits(model, input_ids=IDS), logits(reference, input_ids=IDS))
    assert torch.equal(
        model.generate(input_ids=IDS, max_new_tokens=5), reference.generate(input_ids=IDS, max_new_tokens=5)
    )
    assert bigmodel.stats_of(model).read_bytes > 0


def test_a_part_can_be_copied_and_the_whole_cannot(llama):
    model = load(llama, {"": "disk"})
    expected = resident(llama).model.layers[1].mlp
    twin = copy.deepcopy(model.model.layers[1])
    x = torch.randn(2, 32)
    assert torch.equal(twin.mlp(x), expected(x))
    assert not any(parameter.data_ptr() == other.data_ptr() for parameter, other in zip(
        twin.parameters(), model.model.layers[1].parameters(), strict=True))  # fmt: skip
    with pytest.raises(StreamingError, match="cannot be copied"):
        copy.deepcopy(model)


def test_adapters_may_train_a_copy_of_a_streamed_module(llama):
    peft = pytest.importorskip("peft")
    model = load(llama, {"": "disk"})
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"])
    ).eval()
    assert torch.equal(logits(adapted, input_ids=IDS), logits(resident(llama), input_ids=IDS))


def test_what_is_saved_says_nothing_of_streaming(llama, tmp_path):
    model = load(llama, {"": "disk"})
    assert model.generation_config.disable_compile
    bigmodel.save(model, tmp_path)
    assert "disable_compile" not in (tmp_path / "generation_config.json").read_text()
    assert model.generation_config.disable_compile


@pytest.mark.parametrize("path", [None, 3, b"x", ["a"], ""])
def test_a_path_that_is_none_is_refused_by_name(path):
    with pytest.raises(InvalidArgumentError, match="path is "):
        bigmodel.load_sharded(path)


@pytest.mark.parametrize("change", ["half", "share_memory", "double"])
def test_a_model_that_only_looks_rows_up_in_a_file_cannot_be_cast_either(llama, change):
    model = load(llama, {"": "cpu", "model.embed_tokens": "disk"})
    assert not bigmodel.plan_of(model).slots
    with pytest.raises(MoveRefusedError, match="materialize"):
        getattr(model, change)()
    assert torch.equal(logits(model, input_ids=IDS), logits(resident(llama), input_ids=IDS))


def test_a_plan_brings_its_limit(llama):
    plan = make_plan(llama, max_memory={"cpu": "200MiB"})
    assert bigmodel.plan_of(load(llama, plan)).limits["cpu"] == 200 << 20
    assert bigmodel.plan_of(load(llama, plan, max_memory={"cpu": "300MiB"})).limits["cpu"] == 300 << 20


@pytest.mark.parametrize("family", each_family(["mixtral", "qwen3_vl_moe", "t5", "llama_tied"]))
def test_what_is_resident_is_within_what_was_planned(checkpoints, family):
    folder = checkpoints(family)
    units = [placement.unit for placement in make_plan(folder).placements]
    for offset in (0, 1):
        homes = {"": "cpu"} | {unit: "disk" for number, unit in enumerate(units) if number % 2 == offset}
        homes = {name: home for name, home in homes.items() if "shared" not in name}
        model = load(folder, homes)
        plan = bigmodel.plan_of(model)
        assert bigmodel.stats_of(model).resident_bytes <= -(-plan.resident_bytes // 4096) * 4096 + (2 << 20)
        assert model.hf_device_map.keys() <= dict(model.named_modules()).keys()


def test_a_divided_unit_shows_modules_in_the_device_map(llama):
    model = load(llama, {"": "disk", "model.layers.1.mlp.up_proj": "cpu"})
    assert model.hf_device_map.keys() <= dict(model.named_modules()).keys()
    assert set(model.hf_device_map.values()) == {torch.device("cpu")}


def test_errors_cross_to_another_process(llama):
    import pickle

    with pytest.raises(DoesNotFitError) as caught:
        load(llama, max_memory={"cpu": "1MiB"})
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.tier, again.needed_bytes) == (str(caught.value), "cpu", caught.value.needed_bytes)


def test_unload_waits_for_a_pass_of_another_thread(llama):
    model = load(llama, {"": "disk"})
    expected = logits(resident(llama), input_ids=IDS)
    inside, go_on, results = threading.Event(), threading.Event(), []

    def pause(*_):
        inside.set()
        go_on.wait(10)

    handle = model.model.layers[2].register_forward_hook(pause)
    runner = threading.Thread(target=lambda: results.append(logits(model, input_ids=IDS)))
    runner.start()
    inside.wait(10)
    ender = threading.Thread(target=bigmodel.unload, args=(model,))
    ender.start()
    ender.join(0.3)
    assert ender.is_alive()
    go_on.set()
    runner.join(10)
    ender.join(10)
    handle.remove()
    assert torch.equal(results[0], expected)
    assert torch.equal(logits(model, input_ids=IDS), expected)


def test_a_second_thread_waits_and_two_models_do_not(llama, checkpoints):
    qwen = checkpoints("qwen3")
    models = [load(folder, {"": "disk"}) for folder in (llama, qwen)]
    expected = [logits(resident(folder), input_ids=IDS) for folder in (llama, qwen)]
    results = []

    def run(number):
        results.extend((number, logits(models[number], input_ids=IDS)) for _ in range(4))

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 16
    assert all(torch.equal(result, expected[number]) for number, result in results)


class Odd(nn.Module):
    """A plain module: a parameter of its own, a weight used without its module's forward, a buffer, a shared layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(16))
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.direct = nn.Linear(16, 16, bias=False)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x)) * self.scale
        return self.norm(self.blocks[0](x)) @ self.direct.weight.T


@pytest.fixture
def odd(tmp_path):
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    module = Odd().eval().requires_grad_(False)
    module.norm.running_mean.normal_()
    save_file(module.state_dict(), tmp_path / "odd.safetensors")
    # The last bits of an fp32 product may depend on a weight's address modulo 64: the reference maps the file too.
    module.load_state_dict(load_file(tmp_path / "odd.safetensors"), assign=True)
    return tmp_path / "odd.safetensors", module.requires_grad_(False)


class Rooted(nn.Module):
    """Its own two parameters are one unit, inside which the blocks run: it cannot stream."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x)) * self.scale + self.shift
        return x


def test_a_plan_that_divides_what_cannot_stream_is_followed(tmp_path):
    from safetensors.torch import save_file

    reference = Rooted().eval().requires_grad_(False)
    path = tmp_path / "rooted.safetensors"
    save_file(reference.state_dict(), path)
    plan = make_plan(path, model=Rooted, device_map={"": "disk", "scale": "cpu"})
    assert any("shift" in place.parameters and place.home == "cpu" for place in plan.placements)
    model = load(path, bigmodel.Plan.from_json(plan.to_json()), model=Rooted)
    x = torch.randn(2, 16)
    assert torch.equal(model(x), reference(x))


def test_a_plain_module_streams_too(odd):
    path, reference = odd
    x = torch.randn(3, 16)
    for device_map in ({"": "disk"}, "cpu", "auto", {"": "disk", "blocks.1": "cpu"}):
        model = load(path, device_map, model=Odd)
        assert torch.equal(model(x), reference(x))
        assert torch.equal(model(x), reference(x))
    plan = bigmodel.plan_of(load(path, {"": "disk"}, model=Odd))
    assert "these do not stream" in plan.explain()


def test_missing_weights_are_listed_or_initialised(odd, tmp_path, caplog):
    from safetensors.torch import load_file, save_file

    path, reference = odd
    state = load_file(path)
    del state["blocks.2.weight"]
    state["extra"] = torch.zeros(3)
    save_file(state, tmp_path / "partial.safetensors")
    with pytest.raises(KeyMismatchError, match=r"blocks\.2\.weight") as caught:
        load(tmp_path / "partial.safetensors", model=Odd)
    assert "extra" in str(caught.value)
    with caplog.at_level(logging.WARNING, logger="bigmodel.loading"):
        model = load(tmp_path / "partial.safetensors", {"": "disk"}, model=Odd, strict=False)
    assert "1 weights" in caplog.text
    assert "initialised by the model's own rule: blocks.2.weight" in caplog.text
    assert "passed over: extra" in caplog.text
    assert model.blocks[2].weight.abs().sum() > 0
    assert torch.equal(model.blocks[1](torch.ones(16)), reference.blocks[1](torch.ones(16)))


def test_what_is_initialised_counts(tmp_path):
    from safetensors.torch import save_file

    def build():
        return nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))

    state = build().state_dict()
    save_file(state, tmp_path / "whole.safetensors")
    del state["1.weight"]
    save_file(state, tmp_path / "part.safetensors")
    whole, part = (
        make_plan(tmp_path / name, model=build, strict=False, device_map="cpu").resident_bytes
        for name in ("whole.safetensors", "part.safetensors")
    )
    assert abs(whole - part) < 64 << 10 < 512 * 512 * 4


def test_a_diffusion_transformer_streams(tmp_path):
    from diffusers import PixArtTransformer2DModel
    from safetensors.torch import load_file

    torch.manual_seed(0)
    settings = {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 3, "cross_attention_dim": 16,
        "sample_size": 8, "patch_size": 2, "caption_channels": 16,
    }  # fmt: skip
    reference = PixArtTransformer2DModel(**settings).eval().requires_grad_(False)
    reference.save_pretrained(tmp_path)
    reference.load_state_dict(load_file(tmp_path / "diffusion_pytorch_model.safetensors"), assign=True)
    reference.requires_grad_(False)
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "timestep": torch.tensor([3]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    expected = reference(**inputs).sample
    model = load(tmp_path, {"": "disk"}, model=lambda: PixArtTransformer2DModel(**settings))
    assert torch.equal(model(**inputs).sample, expected)
    assert torch.equal(model(**inputs).sample, expected)
    assert bigmodel.stats_of(model).read_bytes > 0


def test_bin_shards_stream_from_where_they_are(llama, tmp_path):
    reference = resident(llama)
    reference.config.save_pretrained(tmp_path)
    torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    before = {file.name for file in tmp_path.iterdir()}
    model = load(tmp_path, {"": "disk"}, offload_folder=tmp_path / "cache")
    assert torch.equal(logits(model, input_ids=IDS), logits(reference, input_ids=IDS))
    assert bigmodel.stats_of(model).read_bytes > 0
    assert {file.name for file in tmp_path.iterdir()} - {"cache"} == before


def test_planning_a_module_needs_no_checkpoint(llama):
    plan = make_plan(resident(llama), max_memory={"cpu": "1GiB"})
    assert plan.weight_bytes == make_plan(llama).weight_bytes
    machine = Machine(name="small", host_bytes=3 << 30, num_processors=2, disk_bytes=1 << 40)
    assert make_plan(llama, machine=machine).limits["cpu"] == 2 << 30


def _target(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""
