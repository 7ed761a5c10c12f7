"""On accelerators: simulated ones here, and the same tests on a real one where there is one (`-m gpu`)."""

import contextlib
import gc
import itertools
import json
import re
import threading
from dataclasses import replace

import pytest
import torch
import transformers
from families import FAMILIES, QUICK, inputs_for, make_checkpoint, resident
from safetensors.torch import load_file, save_file
from simulated import COMPILER, counts, simulated

import bigmodel
from bigmodel.device_map.demand import CONTEXT_BYTES
from bigmodel.errors import DoesNotFitError, MoveRefusedError, ReadError
from bigmodel.loading.route import move_buffers
from bigmodel.offload.link import Link

SMALL = bigmodel.Workload(batch_size=2, prompt_tokens=16, new_tokens=8)
ROOM = CONTEXT_BYTES + (64 << 20)
KINDS = ["on the device", "in host memory", "on disk", "everywhere", "with little room"]

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="simulated accelerators need a C++ compiler")
REAL = pytest.param("real", marks=pytest.mark.gpu)
# transformers 5.17 says it of ids on the host, which a streamed model takes as well.
pytestmark = pytest.mark.filterwarnings(
    "ignore:You are calling .generate.. with the .input_ids. being on a device:UserWarning"
)
SIMULATED = [pytest.param(2, marks=needs_compiler)]
SIMULATED += [pytest.param(number, marks=[needs_compiler, pytest.mark.slow]) for number in (1, 4)]


def on_devices(families=FAMILIES, quick=QUICK):
    """Parameters of a test over families and devices: each family on two simulated ones, a few on one and four as well."""
    return [
        pytest.param(family, number, marks=[*each.marks, *([] if family in quick else [pytest.mark.slow])])
        for family in families
        for each in (*SIMULATED, REAL)
        for number in each.values
        if family in quick or number in (2, "real")
    ]


@pytest.fixture(params=[*SIMULATED, REAL])
def devices(request):
    """Names of the accelerators that there are."""
    if request.param == "real":
        if not torch.accelerator.is_available():
            pytest.skip("no accelerator here")
        kind = torch.accelerator.current_accelerator().type
        yield [f"{kind}:{index}" for index in range(torch.accelerator.device_count())]
        return
    with simulated(request.param):
        yield [f"sim:{index}" for index in range(request.param)]


@pytest.fixture(params=[pytest.param(1, marks=needs_compiler), REAL])
def device(request):
    """One accelerator."""
    if request.param == "real":
        if not torch.accelerator.is_available():
            pytest.skip("no accelerator here")
        yield f"{torch.accelerator.current_accelerator().type}:0"
        return
    with simulated(1):
        yield "sim:0"


@pytest.fixture
def cuda():
    """A real accelerator of the kind whose driver tells what it does, with nothing of earlier tests in torch's cache."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA here")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return "cuda:0"


def on(value, device):
    return {name: tensor.to(device) for name, tensor in value.items()}


def expected_of(folder, family, device):
    """The whole model's output on that kind of device."""
    with torch.no_grad():
        return resident(folder).to(device)(**on(inputs_for(family), device))


def units_of(folder):
    return [place.unit for place in bigmodel.make_plan(folder, device_map={"": "disk"}, workload=SMALL).placements]


def arguments(kind, folder, devices):
    """Of load_sharded, for one way of resting."""
    limits = dict.fromkeys(devices, ROOM) | {"cpu": "4GiB"}
    if kind == "on the device":
        return {"max_memory": limits}
    if kind == "with little room":
        # As much as the map takes that sends everything to disk, and a little more.
        plan = bigmodel.make_plan(folder, device_map={"": "disk"}, workload=SMALL, max_memory=limits)
        peaks = {name: plan.estimate.peak_bytes.get(name, 0) for name in devices}
        return {
            "max_memory": {name: size + (20 << 10) if size else 0 for name, size in peaks.items()} | {"cpu": "4GiB"}
        }
    if kind == "on disk":
        return {"max_memory": limits, "device_map": {"": "disk"}}
    names = units_of(folder)
    if kind == "in host memory":
        return {"max_memory": limits, "device_map": {name: "cpu" if n else devices[0] for n, name in enumerate(names)}}
    tiers = itertools.cycle([*devices, "cpu", "disk"])
    return {"max_memory": limits, "device_map": {name: next(tiers) for name in names}}


def load(folder, **options):
    return bigmodel.load_sharded(folder, **{"workload": SMALL, "progress": False} | options)


def logits_of(output):
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.mark.parametrize(
    ("family", "devices", "kind"),
    [
        pytest.param(*each.values, kind, marks=each.marks)
        for each in on_devices()
        for kind in KINDS
        if each.values[0] in QUICK or kind in ("everywhere", "with little room")
    ],
    indirect=["devices"],
)
@torch.no_grad()
def test_every_way_of_resting_gives_the_bits_of_the_whole_model(family, kind, devices, tmp_path):
    folder = make_checkpoint(family, tmp_path)
    expected = logits_of(expected_of(folder, family, devices[0])).cpu()
    model = load(folder, **arguments(kind, folder, devices))
    plan = bigmodel.plan_of(model)
    assert {place.run_on for place in plan.placements} <= {*devices, "cpu"}
    assert kind == "with little room" or bool(plan.slots) == (kind != "on the device")
    for _ in range(3):
        found = logits_of(model(**inputs_for(family)))
        assert found.device.type == "cpu"  # as the inputs
        assert torch.equal(found, expected)
    assert logits_of(model(**on(inputs_for(family), devices[-1]))).device == torch.device(devices[-1])


@pytest.mark.parametrize("kind", ["on disk", "everywhere"])
@pytest.mark.parametrize("family", ["llama", "t5"])
@torch.no_grad()
def test_generate_gives_the_tokens_of_the_whole_model(family, kind, devices, tmp_path):
    folder = make_checkpoint(family, tmp_path)
    ids = inputs_for(family)["input_ids"]
    whole = resident(folder).to(devices[0])
    model = load(folder, **arguments(kind, folder, devices))
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 2}, {"do_sample": True}):
        torch.manual_seed(7)
        expected = whole.generate(ids.to(devices[0]), max_new_tokens=6, **options).cpu()
        torch.manual_seed(7)
        found = model.generate(ids, max_new_tokens=6, **options)
        if options["do_sample"] and devices[0].startswith("cuda"):
            continue  # drawn on another device
        assert torch.equal(found.cpu(), expected)


@needs_compiler
@pytest.mark.parametrize(
    "link_bytes_per_s", [1e8, *(pytest.param(rate, marks=pytest.mark.slow) for rate in (1e6, 1e10))]
)
@pytest.mark.parametrize("num_devices", [2, pytest.param(1, marks=pytest.mark.slow)])
@torch.no_grad()
def test_nothing_is_read_or_overwritten_before_its_event(num_devices, link_bytes_per_s, tmp_path):
    """Under the virtual clock, where links and computation take about as long as each other, or one far longer."""
    folder = make_checkpoint("llama", tmp_path)
    expected = resident(folder)(**inputs_for("llama")).logits
    with simulated(num_devices, link_bytes_per_s=link_bytes_per_s, operator_s=1e-5, with_virtual_clock=True):
        devices = [f"sim:{index}" for index in range(num_devices)]
        for kind in ("in host memory", "everywhere"):
            model = load(folder, **arguments(kind, folder, devices))
            for _ in range(3):
                assert torch.equal(model(**inputs_for("llama")).logits, expected)
            del model


@needs_compiler
@torch.no_grad()
def test_a_steady_step_synchronises_allocates_and_flushes_nothing(tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    with simulated(1):
        model = load(folder, **arguments("in host memory", folder, ["sim:0"]))
        ids = inputs_for("llama")["input_ids"].to("sim:0")
        whole = resident(folder).to("sim:0")
        steps = {}
        for name, each in (("whole", whole), ("streamed", model)):
            cache = each(input_ids=ids, use_cache=True).past_key_values
            for _ in range(3):
                before = counts(0)
                output = each(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                after = counts(0)
                steps[name] = [getattr(after, what) - getattr(before, what) for what in ("allocations", "flushes")]
                # What is asked of the host while nothing is copied back.
                steps[name].append(after.synchronizations - before.synchronizations)
        assert steps["streamed"] == steps["whole"]
        assert steps["streamed"][1:] == [0, 0]


@pytest.mark.gpu
@torch.no_grad()
def test_a_steady_step_makes_nobody_wait_for_cuda_and_takes_no_memory_from_it(cuda, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    model = load(folder, **arguments("in host memory", folder, [cuda]))
    ids = inputs_for("llama")["input_ids"].to(cuda)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    for step in range(5):
        if step == 4:  # the ones before it have warmed torch's allocator
            torch.cuda.synchronize()
            before = torch.cuda.memory_stats()
            torch.cuda.set_sync_debug_mode("error")
        try:
            cache = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).past_key_values
        finally:
            torch.cuda.set_sync_debug_mode("default")
    after = torch.cuda.memory_stats()
    for name in ("segment.all.allocated", "segment.all.freed", "num_alloc_retries"):
        assert after[name] == before[name], name


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cuda_holds_no_more_than_the_plan_says(kind, cuda, tmp_path):
    """With its context, which torch's own counts leave out, and other processes', of which there should be none."""
    folder = make_checkpoint("llama", tmp_path)
    model = load(folder, **arguments(kind, folder, [cuda]))
    model.generate(torch.ones(2, 16, dtype=torch.int64, device=cuda), max_new_tokens=8, do_sample=False)
    free, total = torch.cuda.mem_get_info(cuda)
    beside = total - free - torch.cuda.memory_reserved(cuda)
    stated = bigmodel.plan_of(model).estimate.peak_bytes[cuda]
    assert torch.cuda.max_memory_reserved(cuda) + beside <= stated


@pytest.mark.gpu
@torch.no_grad()
def test_what_is_copied_from_host_memory_is_page_locked(cuda, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    model = load(folder, **arguments("in host memory", folder, [cuda]))
    model(**inputs_for("llama"))
    resting = [parameter.data for parameter in model.parameters() if parameter.device.type == "cpu"]
    assert resting
    assert all(tensor.is_pinned() for tensor in resting)


@needs_compiler
@pytest.mark.parametrize(
    "kind", [pytest.param(each, marks=[] if each == "everywhere" else pytest.mark.slow) for each in KINDS]
)
@torch.no_grad()
def test_a_device_never_holds_more_than_the_plan_says(kind, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    with simulated(2):
        chosen = arguments(kind, folder, ["sim:0", "sim:1"])
        plan = bigmodel.make_plan(folder, workload=SMALL, **chosen)
    # No context here: what remains of the stated peak is all that there is.
    peaks = [max(0, plan.estimate.peak_bytes.get(name, 0) - CONTEXT_BYTES) for name in ("sim:0", "sim:1")]
    gc.collect()
    left = [counts(index).used_bytes for index in range(2)]  # of other tests
    with simulated(2, memory_bytes=[size + CONTEXT_BYTES + used for size, used in zip(peaks, left, strict=True)]):
        held = torch.empty(CONTEXT_BYTES, dtype=torch.uint8, device="sim:0")
        other = torch.empty(CONTEXT_BYTES, dtype=torch.uint8, device="sim:1")
        model = load(folder, device_map=plan, max_memory=chosen["max_memory"])
        ids = torch.ones(2, 16, dtype=torch.int64)
        model.generate(ids, max_new_tokens=8, do_sample=False)
        del model, held, other


@needs_compiler
@torch.no_grad()
def test_a_device_has_room_for_the_experts_that_a_step_copies(tmp_path):
    """On accelerators transformers' generate lets steps run on copies of the experts that were chosen."""
    config = transformers.MixtralConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=8, vocab_size=512, eos_token_id=None,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    workload = bigmodel.Workload(batch_size=8, prompt_tokens=4, new_tokens=4)
    options = {"device_map": {"": "sim:0"}, "max_memory": {"sim:0": ROOM, "cpu": "4GiB"}, "workload": workload}
    with simulated(1):
        gc.collect()  # of other tests
        before = counts(0).used_bytes
        model = load(tmp_path, **options)
        model.generate(torch.ones(8, 4, dtype=torch.int64), max_new_tokens=4, do_sample=False)
        stated = bigmodel.plan_of(model).estimate.peak_bytes["sim:0"] - CONTEXT_BYTES
        assert counts(0).peak_bytes - before <= stated


@needs_compiler
@torch.no_grad()
def test_a_device_has_room_for_a_copy_of_what_a_pass_is_given(tmp_path):
    """Images may be as large as what a model makes of them."""
    config = transformers.ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    pixels = torch.rand(2, 3, 224, 224)
    with simulated(1):
        gc.collect()  # of other tests
        before = counts(0).used_bytes
        model = load(tmp_path, device_map={"": "sim:0"}, max_memory={"sim:0": ROOM, "cpu": "4GiB"})
        model(pixel_values=pixels)
        stated = bigmodel.plan_of(model).estimate.peak_bytes["sim:0"] - CONTEXT_BYTES
        assert counts(0).peak_bytes - before <= stated


@needs_compiler
@torch.no_grad()
def test_out_of_memory_in_the_middle_of_a_pass_leaves_the_model_usable(tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    expected = resident(folder)(**inputs_for("llama")).logits
    with simulated(1):
        model = load(folder, **arguments("in host memory", folder, ["sim:0"]))
        assert torch.equal(model(**inputs_for("llama")).logits, expected)
        used = counts(0).used_bytes
        layer = next(module for name, module in model.named_modules() if name.endswith("layers.2"))

        def exhaust(*_):
            raise torch.OutOfMemoryError("sim:0 out of memory")

        handle = layer.mlp.register_forward_pre_hook(exhaust)
        for _ in range(3):
            with pytest.raises(torch.OutOfMemoryError):
                model(**inputs_for("llama"))
        handle.remove()
        assert counts(0).used_bytes == used
        assert torch.equal(model(**inputs_for("llama")).logits, expected)


@torch.no_grad()
def test_a_file_that_goes_away_is_an_error_with_the_unit_s_name(device, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    expected = expected_of(folder, "llama", device).logits.cpu()
    model = load(folder, **arguments("on disk", folder, [device]))
    assert torch.equal(model(**inputs_for("llama")).logits, expected)
    files = sorted(folder.glob("*.safetensors"))
    hidden = [file.rename(file.with_suffix(".away")) for file in files]
    with contextlib.suppress(ReadError):  # what was read ahead may do for one pass
        model(**inputs_for("llama"))
    with pytest.raises(ReadError, match="layers"):
        model(**inputs_for("llama"))
    for file, away in zip(files, hidden, strict=True):
        away.rename(file)
    with contextlib.suppress(ReadError):  # renaming changed the files' time stamps
        assert torch.equal(model(**inputs_for("llama")).logits, expected)


@torch.no_grad()
def test_two_models_in_two_threads_are_both_exact(device, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    expected = expected_of(folder, "llama", device).logits.cpu()
    models = [load(folder, **arguments(kind, folder, [device])) for kind in ("on disk", "in host memory")]
    wrong = []

    def run(model):
        with torch.no_grad():
            for _ in range(5):
                if not torch.equal(model(**inputs_for("llama")).logits, expected):
                    wrong.append(model)

    threads = [threading.Thread(target=run, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_a_pass_beyond_the_budget_is_refused_before_it_allocates(device, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    model = load(folder, **arguments("with little room", folder, [device]))
    with pytest.raises(DoesNotFitError, match="workload="):
        model(input_ids=torch.ones(2, 3000, dtype=torch.int64))
    expected = expected_of(folder, "llama", device).logits.cpu()
    assert torch.equal(model(**inputs_for("llama")).logits, expected)


@torch.no_grad()
def test_a_planned_pass_of_images_runs_in_exactly_what_was_planned(device, tmp_path):
    """Which is less than the same pass takes on the host."""
    folder = make_checkpoint("vit", tmp_path)
    plan = bigmodel.make_plan(folder, device_map={"": "disk"}, max_memory={device: ROOM, "cpu": "4GiB"})
    limits = {device: plan.estimate.peak_bytes[device], "cpu": "4GiB"}
    model = bigmodel.load_sharded(folder, {"": "disk"}, max_memory=limits, progress=False)
    inputs = {"pixel_values": inputs_for("vit")["pixel_values"][:1]}
    expected = resident(folder).to(device)(**on(inputs, device)).logits.cpu()
    assert torch.equal(model(**inputs).logits, expected)
    with pytest.raises(DoesNotFitError, match="pixel_values"):
        model(pixel_values=inputs["pixel_values"].repeat(500, 1, 1, 1))


@pytest.mark.parametrize("kind", ["everywhere", "in host memory"])
def test_tokens_are_the_same_in_inference_mode(kind, devices, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    ids = inputs_for("llama")["input_ids"]
    with torch.inference_mode():
        expected = resident(folder).to(devices[0]).generate(ids.to(devices[0]), max_new_tokens=6, do_sample=False).cpu()
        model = load(folder, **arguments(kind, folder, devices))
        for _ in range(2):
            assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)


@torch.no_grad()
def test_what_an_encoder_gave_stays_where_the_caller_has_it(device, tmp_path):
    folder = make_checkpoint("t5", tmp_path)
    inputs = inputs_for("t5")
    encoded = resident(folder).get_encoder()(input_ids=inputs["input_ids"])
    states = encoded.last_hidden_state
    model = load(folder, **arguments("on the device", folder, [device]))
    model(encoder_outputs=encoded, decoder_input_ids=inputs["decoder_input_ids"])
    assert encoded.last_hidden_state is encoded["last_hidden_state"] is states


@pytest.mark.parametrize(
    "kind", ["everywhere", *(pytest.param(each, marks=pytest.mark.slow) for each in ("in host memory", "on disk"))]
)
@torch.no_grad()
def test_a_model_can_be_saved_and_made_plain_again(kind, device, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    whole = resident(folder)
    model = load(folder, **arguments(kind, folder, [device]))
    model(**inputs_for("llama"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.cpu(), whole.state_dict()[name])
    bigmodel.save(model, tmp_path / "saved")
    expected = whole(**inputs_for("llama")).logits
    assert torch.equal(resident(tmp_path / "saved")(**inputs_for("llama")).logits, expected)
    for target in ("cpu", device):
        plain = bigmodel.materialize(load(folder, **arguments(kind, folder, [device])), target)
        assert {parameter.device for parameter in plain.parameters()} == {torch.device(target)}
        found = plain(**on(inputs_for("llama"), target)).logits.cpu()
        assert torch.equal(found, expected_of(folder, "llama", target).logits.cpu())


def test_hf_device_map_says_where_modules_run(device, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    model = load(folder, **arguments("everywhere", folder, [device]))
    assert set(model.hf_device_map.values()) == {torch.device(device)}


def test_nothing_is_left_of_a_model_that_nobody_holds(device, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    expected_of(folder, "llama", device)  # libraries of products keep what they take at the first one
    gc.collect()  # of other tests
    before = torch.accelerator.memory_allocated(device)
    model = load(folder, **arguments("everywhere", folder, [device]))
    with torch.no_grad():
        model(**inputs_for("llama"))
    assert torch.accelerator.memory_allocated(device) > before
    del model
    assert torch.accelerator.memory_allocated(device) == before


@needs_compiler
@torch.no_grad()
def test_nothing_is_left_of_a_model_that_goes_while_its_weights_are_copied(tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    with simulated(1, link_bytes_per_s=5e6):
        gc.collect()  # of other tests
        before = torch.accelerator.memory_allocated("sim:0")
        model = load(folder, **arguments("in host memory", folder, ["sim:0"]))
        model(**inputs_for("llama"))
        del model
        assert torch.accelerator.memory_allocated("sim:0") == before


@pytest.mark.parametrize("kind", ["on the device", "in host memory"])
def test_reader_threads_end_when_all_that_is_in_files_was_read(kind, device, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    before = set(threading.enumerate())
    model = load(folder, **arguments(kind, folder, [device]))
    assert set(threading.enumerate()) == before
    assert bigmodel.plan_of(model).slots or kind == "on the device"


def test_a_load_that_fails_on_its_way_to_the_device_leaves_nothing_running(device, tmp_path, monkeypatch):
    folder = make_checkpoint("llama", tmp_path)
    before = set(threading.enumerate())

    def fail(*_):
        raise RuntimeError("the link is down")

    monkeypatch.setattr(Link, "copy", fail)
    with pytest.raises(ReadError, match="the link is down"):
        load(folder, **arguments("on the device", folder, [device]))
    assert set(threading.enumerate()) == before


def test_weights_in_host_memory_are_told(device, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    model = load(folder, **arguments("in host memory", folder, [device]))
    on_host = sum(place.weight_bytes for place in bigmodel.plan_of(model).placements if place.home == "cpu")
    assert on_host <= bigmodel.stats_of(model).resident_bytes < 1.3 * on_host


@pytest.mark.parametrize("kind", ["on the device", "in host memory", "on disk"])
@torch.no_grad()
def test_a_weight_begins_where_the_device_s_allocator_would_have_put_it(kind, device, tmp_path):
    """Which kernel a product takes, and so its last bits, may depend on that."""
    folder = make_checkpoint("llama", tmp_path)
    model = load(folder, **arguments(kind, folder, [device]))
    seen = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, _: seen.append(module.weight.data_ptr() % 256))
    model(**inputs_for("llama"))
    assert seen == [0] * 29


@pytest.mark.parametrize("kind", ["on the device", "in host memory", "on disk"])
@torch.no_grad()
def test_a_cast_on_the_way_to_the_device_gives_what_from_pretrained_gives(kind, device, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    whole = resident(folder, dtype=torch.bfloat16)
    model = load(folder, dtype="bfloat16", **arguments(kind, folder, [device]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    expected = whole.to(device)(**on(inputs_for("llama"), device)).logits.cpu()
    assert torch.equal(model(**inputs_for("llama")).logits, expected)


@torch.no_grad()
def test_weights_that_are_in_no_file_run_where_their_unit_does(device, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    missing = "model.layers.1.mlp.up_proj.weight"
    for file in folder.glob("*.safetensors"):
        save_file({name: tensor for name, tensor in load_file(file).items() if name != missing}, file, {"format": "pt"})
    for index in folder.glob("*.index.json"):
        content = json.loads(index.read_text())
        del content["weight_map"][missing]
        index.write_text(json.dumps(content))
    model = load(folder, strict=False, **arguments("on the device", folder, [device]))
    found = model(**inputs_for("llama")).logits
    whole = resident(make_checkpoint("llama", tmp_path / "whole"))
    whole.get_parameter(missing).copy_(model.get_parameter(missing))
    assert torch.equal(found, whole.to(device)(**on(inputs_for("llama"), device)).logits.cpu())


class Between(torch.nn.Module):
    """Code between its parts combines what they give."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(96, 64)
        self.second, self.third = (torch.nn.Linear(64, 64) for _ in range(2))

    def forward(self, ids):
        x = self.table(ids)
        self.device_between = x.device
        return self.third(x + self.second(x))


class Residual(Between):
    """Code between its parts writes into what one of them was given."""

    def forward(self, ids):
        x = self.table(ids)
        x += self.second(x)
        return self.third(x)


class Single(torch.nn.Module):
    """All of it is one unit."""

    def __init__(self):
        super().__init__()
        self.table, self.part = torch.nn.Parameter(torch.rand(96, 64)), torch.nn.Linear(64, 64)

    def forward(self, ids):
        return self.part(self.table[ids])


class Around(Single):
    """The root uses a weight by itself, before its blocks and after them."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(3))

    def forward(self, ids):
        x = self.table[ids]
        for block in self.blocks:
            x = block(x)
        return x @ self.table.T


@needs_compiler
@pytest.mark.parametrize(
    ("kind", "homes"),
    [
        (Between, {"table": "sim:0", "second": "sim:1", "third": "sim:1"}),
        (Residual, {"table": "sim:0", "second": "sim:1", "third": "sim:1"}),
        (Single, {"": "sim:1"}),
        (Single, {"": "disk"}),
        (Single, {"table": "sim:0", "part": "sim:1"}),
        (Around, {"": "sim:0", "table": "sim:1"}),
        (Around, {"": "disk", "table": "sim:1"}),
    ],
)
@torch.no_grad()
def test_a_plain_module_of_any_shape_runs_on_any_devices(kind, homes, tmp_path):
    torch.manual_seed(3)
    reference = kind().requires_grad_(False)
    path = tmp_path / "plain.safetensors"
    save_file(reference.state_dict(), path)
    ids = inputs_for("llama")["input_ids"]
    with simulated(2):
        limits = dict.fromkeys(["sim:0", "sim:1"], ROOM) | {"cpu": "4GiB"}
        model = load(path, model=kind, device_map=homes, max_memory=limits)
        for _ in range(2):
            assert torch.equal(model(ids), reference(ids))
        with torch.inference_mode():
            assert torch.equal(model(ids), reference(ids))
        assert getattr(model, "device_between", torch.device("sim:0")) == torch.device("sim:0")


@needs_compiler
@torch.no_grad()
def test_a_block_that_a_map_divides_runs_on_one_device(tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    expected = resident(folder)(**inputs_for("llama")).logits
    with simulated(2):
        limits = dict.fromkeys(["sim:0", "sim:1"], ROOM) | {"cpu": "4GiB"}
        homes = {"": "sim:0", "model.layers.1.mlp": "sim:1", "model.layers.2.mlp": "cpu", "model.layers.2": "sim:1"}
        model = load(folder, device_map=homes, max_memory=limits)
        runs = {place.unit: place.run_on for place in bigmodel.plan_of(model).placements}
        assert runs["model.layers.1 (sim:0)"] == runs["model.layers.1 (sim:1)"]
        assert runs["model.layers.2 (cpu)"] == runs["model.layers.2 (sim:1)"] == "sim:1"
        assert torch.equal(model(**inputs_for("llama")).logits, expected)


def test_a_buffer_that_modules_share_is_moved_once(device):
    model = torch.nn.ModuleList(torch.nn.Module() for _ in range(2))
    buffer = torch.ones(3)
    for module in model:
        module.register_buffer("mask", buffer)
    move_buffers(model, {}, torch.device(device))
    assert model[0].mask is model[1].mask
    assert torch.equal(model[0].mask, buffer.to(device))


@pytest.mark.parametrize("kind", ["in host memory", "everywhere", "on the device"])
@torch.no_grad()
def test_adapters_run_where_their_layer_does(kind, device, tmp_path):
    peft = pytest.importorskip("peft")
    folder = make_checkpoint("llama", tmp_path)

    def adapted(model):
        torch.manual_seed(3)
        return peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        )

    expected = adapted(resident(folder)).to(device).eval()(**on(inputs_for("llama"), device)).logits.cpu()
    model = adapted(load(folder, **arguments(kind, folder, [device]))).eval().requires_grad_(False)
    for _ in range(2):
        assert torch.equal(model(**inputs_for("llama")).logits, expected)


@torch.no_grad()
def test_a_model_on_accelerators_is_not_moved_in_place(device, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    for kind in ("on the device", "in host memory"):
        model = load(folder, **arguments(kind, folder, [device]))
        with pytest.raises(MoveRefusedError, match="materialize"):
            model.to("meta")
        assert torch.equal(model(**inputs_for("llama")).logits, expected_of(folder, "llama", device).logits.cpu())


@torch.no_grad()
def test_an_interrupted_generation_leaves_nothing_running(device, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    model = load(folder, **arguments("everywhere", folder, [device]))
    ids = inputs_for("llama")["input_ids"]
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[2].mlp.register_forward_pre_hook(interrupt)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, max_new_tokens=4, do_sample=False)
    handle.remove()
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)


@needs_compiler
@torch.no_grad()
def test_units_that_the_plan_computes_on_the_cpu_run_there_with_their_cache(tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    ids = inputs_for("llama")["input_ids"]
    expected = resident(folder).generate(ids, max_new_tokens=6, do_sample=False)
    with simulated(2):
        chosen = arguments("in host memory", folder, ["sim:0", "sim:1"])
        plan = bigmodel.make_plan(folder, workload=SMALL, **chosen)
        on_cpu = {"model.layers.1", "model.layers.2"}
        placements = tuple(
            replace(place, run_on="cpu", prefill_on="cpu") if place.unit in on_cpu else place
            for place in plan.placements
        )
        model = load(folder, device_map=replace(plan, placements=placements), max_memory=chosen["max_memory"])
        assert {place.unit for place in bigmodel.plan_of(model).placements if place.run_on == "cpu"} == on_cpu
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
        cache = model(input_ids=ids, use_cache=True).past_key_values
        assert [layer.keys.device.type for layer in cache.layers] == ["sim", "cpu", "cpu", "sim"]


@pytest.mark.parametrize("family", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_cache_that_was_filled_elsewhere_is_used_on(family, devices, tmp_path):
    folder = make_checkpoint(family, tmp_path)
    whole, inputs = resident(folder), inputs_for(family)
    model = load(folder, **arguments("everywhere", folder, devices))
    expected, found = whole(**inputs, use_cache=True), whole(**inputs, use_cache=True)
    name = "decoder_input_ids" if family == "t5" else "input_ids"
    for _ in range(2):
        more = {name: expected.logits[:, -1:].argmax(-1)}
        if family == "t5":
            more["encoder_outputs"] = (expected.encoder_last_hidden_state,)
        expected = whole(**more, past_key_values=expected.past_key_values, use_cache=True)
        found = model(**more, past_key_values=found.past_key_values, use_cache=True)
        assert torch.equal(found.logits, expected.logits)


def with_steps_on_the_cpu(folder, devices):
    """load_sharded's arguments: all layers rest in host memory; every other one is computed there in steps."""
    chosen = arguments("in host memory", folder, devices)
    plan = bigmodel.make_plan(folder, workload=SMALL, **chosen)
    at_rest = [place.unit for place in plan.placements if place.home == "cpu" != place.run_on]
    layers = {name for name in at_rest if re.search(r"(layers|block|blocks|h)\.\d+$", name)}
    moving = set(sorted(layers)[::2]) or set(at_rest)
    placements = [replace(place, run_on="cpu") if place.unit in moving else place for place in plan.placements]
    return {"device_map": replace(plan, placements=tuple(placements)), "max_memory": chosen["max_memory"]}, moving


@pytest.mark.parametrize(
    ("family", "devices"),
    on_devices([each for each in FAMILIES if each not in ("bert", "vit")], ("llama", "t5")),
    indirect=["devices"],
)
@torch.no_grad()
def test_a_prompt_may_run_on_an_accelerator_and_the_tokens_after_it_on_the_cpu(family, devices, tmp_path):
    folder = make_checkpoint(family, tmp_path)
    chosen, moving = with_steps_on_the_cpu(folder, devices)
    model = load(folder, **chosen)
    plan = bigmodel.plan_of(model)
    assert {place.unit for place in plan.placements if place.run_on == "cpu" != place.prefill_on} == moving
    assert 1 < plan.prefill_from_tokens <= 32
    inputs = {name: value for name, value in inputs_for(family).items() if name != "decoder_input_ids"}
    for options in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
        if options and family == "mamba":
            continue
        expected = resident(folder).generate(**inputs, max_new_tokens=5, do_sample=False, **options)
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False, **options), expected)


@torch.no_grad()
def test_what_steps_compute_on_the_cpu_is_copied_for_prompts_alone(device, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    chosen, moving = with_steps_on_the_cpu(folder, [device])
    whole, model = resident(folder), load(folder, **chosen)
    numbers = sorted(int(name.rpartition(".")[2]) for name in moving)
    weight_bytes = sum(place.weight_bytes for place in bigmodel.plan_of(model).placements if place.unit in moving)
    prompt = torch.arange(2 * 16).reshape(2, 16)
    expected, found = (each(input_ids=prompt, use_cache=True) for each in (whole, model))
    before, copied = bigmodel.stats_of(model).copied_bytes, []
    for tokens in (1, 1, 1, 16, 1, 1):
        # On the host whenever a pass is over; and the caller keeps the cache that he holds.
        layers = found.past_key_values.layers
        assert [number for number, layer in enumerate(layers) if layer.keys.device.type == "cpu"] == numbers
        ids = torch.ones(2, tokens, dtype=torch.int64)
        expected = whole(input_ids=ids, past_key_values=expected.past_key_values, use_cache=True)
        found = model(input_ids=ids, past_key_values=found.past_key_values, use_cache=True)
        assert torch.equal(found.logits, expected.logits)
        after = bigmodel.stats_of(model).copied_bytes
        copied.append(after - before)
        before = after
    # A prompt fetches them; in steps they need no slot, and the others keep theirs.
    assert copied[3] >= weight_bytes
    assert copied[1] == copied[2] == copied[5] == 0


@torch.no_grad()
def test_adapters_follow_their_layer_from_the_accelerator_to_the_cpu(device, tmp_path):
    peft = pytest.importorskip("peft")
    folder = make_checkpoint("llama", tmp_path)

    def adapted(model):
        torch.manual_seed(3)
        config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return peft.get_peft_model(model, config).eval().requires_grad_(False)

    chosen, _ = with_steps_on_the_cpu(folder, [device])
    ids = torch.ones(2, 12, dtype=torch.int64)
    expected = adapted(resident(folder)).generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    model = adapted(load(folder, **chosen))
    for _ in range(2):
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False), expected)


@needs_compiler
@pytest.mark.parametrize("family", ["llama", "llama_tied"])
@torch.no_grad()
def test_nothing_is_copied_where_host_and_device_are_one_memory(family, tmp_path):
    folder = make_checkpoint(family, tmp_path)
    expected = resident(folder)(**inputs_for("llama")).logits
    with simulated(1, memory_bytes=8 << 30, is_unified=True):
        model = load(folder)
        plan, before = bigmodel.plan_of(model), bigmodel.stats_of(model)
        assert not plan.slots
        assert {place.run_on for place in plan.placements} == {"sim:0"}
        assert torch.equal(model(**inputs_for("llama")).logits, expected)
        assert (bigmodel.stats_of(model) - before).copied_bytes == 0
        on_host = load(folder, device_map={"": "cpu", "model.norm": "sim:0"})
        assert not bigmodel.plan_of(on_host).slots
        assert torch.equal(on_host(**inputs_for("llama")).logits, expected)


@pytest.mark.parametrize("kind", ["in host memory", "everywhere"])
@torch.no_grad()
def test_generation_s_static_cache_stays_with_its_layers(kind, devices, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    ids = inputs_for("llama")["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    expected = resident(folder).to(devices[0]).generate(ids.to(devices[0]), **options).cpu()
    model = load(folder, **arguments(kind, folder, devices))
    for _ in range(2):
        assert torch.equal(model.generate(ids, **options).cpu(), expected)


@needs_compiler
@torch.no_grad()
def test_several_devices_take_turns_and_what_is_moved_is_told(tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    with simulated(2, link_bytes_per_s=1e8):
        limits = arguments("on the device", folder, ["sim:0", "sim:1"])["max_memory"]
        homes = {"": "cpu", "model.embed_tokens": "disk", "lm_head": "disk"}  # on no device: all of them take turns
        here = bigmodel.Machine.probe()
        slow = tuple(replace(each, h2d_bytes_per_s=1e6) for each in here.accelerators)
        plan = bigmodel.make_plan(folder, replace(here, accelerators=slow), SMALL, limits, homes)
        model = load(folder, device_map=plan, max_memory=limits)
        plan = bigmodel.plan_of(model)
        streamed = {name for group in plan.slots for name in group.units}
        layers = [place for place in plan.placements if place.unit in streamed and ".layers." in place.unit]
        assert {place.run_on for place in layers} == {"sim:0", "sim:1"}
        model(**inputs_for("llama"))
        done = bigmodel.stats_of(model)
        assert done.copied_bytes == plan.streamed_bytes  # each has a slot of its own, and is fetched once
        assert done.num_misses == 1  # the first one


@pytest.mark.parametrize("kind", ["in host memory", "on disk"])
@torch.no_grad()
def test_a_copy_that_fails_is_an_error_with_the_unit_s_name(kind, device, tmp_path, monkeypatch):
    folder = make_checkpoint("llama", tmp_path)
    expected = expected_of(folder, "llama", device).logits.cpu()
    model = load(folder, **arguments(kind, folder, [device]))
    assert torch.equal(model(**inputs_for("llama")).logits, expected)

    def fail(*_):
        raise RuntimeError("the link is down")

    with monkeypatch.context() as broken:
        broken.setattr(Link, "copy", fail)
        with contextlib.suppress(ReadError):  # what was fetched ahead may do for one pass
            model(**inputs_for("llama"))
        with pytest.raises(ReadError, match=r"of model\.[a-z_.0-9]+ could not be read: the link is down"):
            model(**inputs_for("llama"))
    assert torch.equal(model(**inputs_for("llama")).logits, expected)
