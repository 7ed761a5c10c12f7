"""What really happened to each unit: whole, in the right order, and without any effect on what is computed."""

import contextlib
import functools
import itertools
import re
import time

import pytest
import torch
from families import inputs_for, make_checkpoint, resident
from safetensors.torch import save_file
from simulated import COMPILER, counts, simulated
from torch import nn

import bigmodel
from bigmodel.device_map.demand import CONTEXT_BYTES
from bigmodel.device_map.picture import draw_measured
from bigmodel.errors import DoesNotFitError, InvalidArgumentError
from bigmodel.loading.assembled import assembled
from bigmodel.loading.lifecycle import record
from bigmodel.loading.planning import make_plan_and_timeline

SMALL = bigmodel.Workload(batch_size=2, prompt_tokens=16, new_tokens=8)
ROOM = {"cpu": "4GiB"}
NUM_PASSES = 3
KINDS = ["on disk", "half on disk", "resident", "plain"]

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="simulated accelerators need a C++ compiler")


def homes(folder, tiers, first=None):
    """A map that goes through the tiers in turn, but for the first unit."""
    names = [place.unit for place in bigmodel.make_plan(folder, device_map={"": "disk"}, workload=SMALL).placements]
    return {name: tiers[number % len(tiers)] for number, name in enumerate(names)} | (
        {names[0]: first} if first else {}
    )


def load(folder, device_map, **options):
    options = {"workload": SMALL, "max_memory": ROOM, "progress": False} | options
    return bigmodel.load_sharded(folder, device_map, **options)


def load_kind(folder, kind):
    if kind == "plain":
        return load(folder, "auto", workload=None, max_memory=None)
    tiers = {"on disk": ["disk"], "half on disk": ["disk", "cpu"], "resident": ["cpu"]}[kind]
    return load(folder, {"": tiers[0]} if len(tiers) == 1 else homes(folder, tiers))


def names_of(model):
    return [place.unit for place in bigmodel.plan_of(model).placements]


def num_hooks(model):
    return [
        (len(module._forward_pre_hooks), len(module._forward_hooks), len(module._forward_hooks_always_called))
        for module in model.modules()
    ]


def assert_causal(steps, wall_s):
    """What must hold of any steps, on a device or on several."""
    assert all(0 <= begin <= end <= wall_s for step in steps for begin, end in (step.run,))
    for step in steps:
        for fetched in (step.read, step.copy):
            assert fetched is None or fetched[0] <= fetched[1] <= step.run[0]
        assert step.read is None or step.copy is None or step.read[0] <= step.copy[0]
    for device in {step.device for step in steps}:
        runs = [step.run for step in steps if step.device == device]
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(runs))
        assert sum(end - begin for begin, end in runs) <= wall_s


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_unit_of_every_pass_is_noted_and_nothing_else_changes(kind, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    expected = resident(folder)(**inputs_for("llama")).logits
    model = load_kind(folder, kind)
    before = num_hooks(model)
    if kind == "plain":
        assert not any(map(any, before))
    started_s = time.perf_counter()
    with record(model) as steps:
        for _ in range(NUM_PASSES):
            assert torch.equal(model(**inputs_for("llama")).logits, expected)
        assert num_hooks(model) != before
    wall_s = time.perf_counter() - started_s
    assert num_hooks(model) == before
    num_units = len(names_of(model))
    assert [(step.number, step.unit) for step in steps] == [
        (number, unit) for number in range(NUM_PASSES) for unit in range(num_units)
    ]
    assert {step.device for step in steps} == {"cpu"}
    assert_causal(steps, wall_s)
    slotted = {name for group in bigmodel.plan_of(model).slots for name in group.units}
    read = [{names_of(model)[step.unit] for step in steps if step.number == n and step.read} for n in range(NUM_PASSES)]
    assert read[0] == slotted
    assert bool(slotted) == (kind in ("on disk", "half on disk"))
    num_recorded = len(steps)
    assert torch.equal(model(**inputs_for("llama")).logits, expected)
    assert len(steps) == num_recorded


@torch.no_grad()
def test_a_read_belongs_to_the_pass_that_uses_it(tmp_path):
    model = load_kind(make_checkpoint("llama", tmp_path), "on disk")
    with record(model) as steps:
        for _ in range(NUM_PASSES):
            model(**inputs_for("llama"))
    begins = [min(step.run[0] for step in steps if step.number == number) for number in range(NUM_PASSES)]
    streamed = {step.unit for step in steps if step.number == 2 and step.read}
    assert streamed
    # Prefetch wraps around: the first that streams is read while the pass before it still runs.
    first = next(step for step in steps if step.number == 2 and step.unit in streamed)
    assert first.read[0] < begins[2]
    # A second recording begins with units that were fetched before it.
    with record(model) as steps:
        model(**inputs_for("llama"))
    assert next(step for step in steps if step.unit == first.unit).read is None


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generate_has_the_passes_and_units_that_were_predicted(family, tmp_path):
    folder = make_checkpoint(family, tmp_path)
    ids = inputs_for(family)["input_ids"]
    expected = resident(folder).generate(ids, max_new_tokens=NUM_PASSES, do_sample=False)
    plan, timeline = make_plan_and_timeline(folder, None, SMALL, ROOM, {"": "disk"}, False)
    model = load(folder, plan)
    with torch.inference_mode(), record(model) as steps:
        found = model.generate(ids, max_new_tokens=NUM_PASSES, do_sample=False)
    assert torch.equal(found, expected)
    predicted = [step for step in timeline() if step.number < NUM_PASSES]
    assert [(step.number, step.unit, step.device) for step in steps] == [
        (step.number, step.unit, step.device) for step in predicted
    ]
    page = draw_measured(plan, predicted, steps, [], family)
    for whose, each in (("measured", steps), ("predicted", predicted)):
        num_events = sum(span is not None for step in each for span in (step.read, step.copy, step.run))
        assert len(re.findall(rf"(?:first pass|step \d): {whose} ", page)) == num_events
    tables = {place.unit for place in plan.placements} - {name for group in plan.slots for name in group.units}
    for step, other in zip(steps, predicted, strict=True):
        if step.number == 0 and plan.placements[step.unit].unit not in tables:
            assert (step.read is None) == (other.read is None)


@torch.no_grad()
def test_passes_that_fail_are_left_out_and_hooks_go(tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    expected = resident(folder)(**inputs_for("llama")).logits
    model = load_kind(folder, "on disk")
    before = num_hooks(model)

    def fail(module, args, output):
        raise RuntimeError("broken layer")

    with record(model) as steps:
        model(**inputs_for("llama"))
        handle = model.model.layers[2].mlp.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="broken layer"):
            model(**inputs_for("llama"))
        handle.remove()
        assert torch.equal(model(**inputs_for("llama")).logits, expected)
    units = list(range(len(names_of(model))))
    assert [(step.number, step.unit) for step in steps] == [(number, unit) for number in range(2) for unit in units]
    assert_causal(steps, float("inf"))
    handle = model.model.layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken layer"), record(model) as steps:
        model(**inputs_for("llama"))
    handle.remove()
    assert steps == []
    assert num_hooks(model) == before
    assert torch.equal(model(**inputs_for("llama")).logits, expected)


class Fickle(nn.Linear):
    fails = False

    def forward(self, x):
        if self.fails:
            raise RuntimeError("not today")
        return super().forward(x)


class Twice(nn.Module):
    """Runs its blocks twice in a pass, without those that fail, and uses a parameter of its own between them."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(1, 2, 64))
        self.blocks = nn.ModuleList(Fickle(64, 64) for _ in range(3))

    def forward(self, x):
        for block in (*self.blocks, *self.blocks):
            with contextlib.suppress(RuntimeError):
                x = block(x)
            x = torch.tanh(x) * self.scale
        return x


@torch.no_grad()
def test_a_unit_has_a_step_for_each_stretch_of_its_computation(tmp_path):
    torch.manual_seed(0)
    whole = Twice().eval().requires_grad_(False)
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    model = load(tmp_path, {"": "disk", "scale": "cpu"}, model=Twice)
    x = torch.linspace(-1, 1, 128).view(2, 64)
    with record(model) as steps:
        for fails in (False, True, False):
            model.blocks[1].fails = whole.blocks[1].fails = fails
            assert torch.equal(model(x), whole(x))
    names = names_of(model)
    root = next(name for name in names if name.startswith("(root)"))
    blocks = [f"blocks.{number}" for number in (0, 1, 2, 0, 1, 2)]
    for number in range(3):
        told = [names[step.unit] for step in steps if step.number == number]
        assert told == [root, *(name for block in blocks for name in (block, root))]
    # A slot may keep what it holds: then a second entry has nothing to fetch.
    first = [step for step in steps if step.number == 0 and names[step.unit] in blocks]
    assert all(step.read for step in first[:3])
    assert_causal(steps, float("inf"))


@torch.no_grad()
def test_a_model_around_the_loaded_one_is_recorded_too(tmp_path):
    peft = pytest.importorskip("peft")
    folder = make_checkpoint("llama", tmp_path)
    settings = peft.LoraConfig(target_modules=["q_proj"], r=2)
    model = load_kind(folder, "half on disk")
    around = peft.get_peft_model(model, settings).eval().requires_grad_(False)
    with record(around) as steps:
        around(**inputs_for("llama"))  # which calls the forward of the loaded one without its hooks
        around.generate(**inputs_for("llama"), max_new_tokens=2, do_sample=False)
    units = list(range(len(names_of(model))))
    assert [(step.number, step.unit) for step in steps] == [(number, unit) for number in range(3) for unit in units]


@pytest.fixture(params=[pytest.param("simulated", marks=needs_compiler), pytest.param("real", marks=pytest.mark.gpu)])
def devices(request):
    """Names of up to two accelerators, and bytes/s that their links reach at most."""
    if request.param == "real":
        if not torch.accelerator.is_available():
            pytest.skip("no accelerator here")
        kind = torch.accelerator.current_accelerator().type
        yield [f"{kind}:{index}" for index in range(min(2, torch.accelerator.device_count()))], float("inf")
        return
    with simulated(2, link_bytes_per_s=20e6):
        yield ["sim:0", "sim:1"], 20e6


@pytest.mark.parametrize("tiers", [["cpu"], ["disk"], ["device", "cpu", "disk"]])
@torch.no_grad()
def test_devices_tell_when_they_copied_and_computed(tiers, devices, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    names, rate = devices
    expected = resident(folder).to(names[0])(inputs_for("llama")["input_ids"].to(names[0])).logits.cpu()
    limits = ROOM | dict.fromkeys(names, CONTEXT_BYTES + (64 << 20))
    tiers = [names[-1] if tier == "device" else tier for tier in tiers]
    model = load(folder, homes(folder, tiers, names[0]), max_memory=limits)
    started_s = time.perf_counter()
    with record(model) as steps:
        for _ in range(NUM_PASSES):
            assert torch.equal(model(**inputs_for("llama")).logits, expected)
    assert_causal(steps, time.perf_counter() - started_s)
    plan = bigmodel.plan_of(model)
    slotted = {name for group in plan.slots for name in group.units}
    assert slotted
    for step in steps:
        place = plan.placements[step.unit]
        assert step.device == place.run_on
        if place.unit not in slotted:
            assert (step.read, step.copy) == (None, None)
        elif step.number == 0:
            assert (step.read is not None) == (place.home == "disk")
            assert step.copy[1] - step.copy[0] >= place.weight_bytes / rate


@needs_compiler
@torch.no_grad()
def test_spans_on_a_device_are_those_of_its_own_clock(tmp_path):
    """Under the virtual clock a copy takes what its bytes take, and a unit what its operators take."""
    folder, rate, operator_s = make_checkpoint("llama", tmp_path), 1e8, 1e-5
    with simulated(1, link_bytes_per_s=rate, operator_s=operator_s, with_virtual_clock=True):
        # The layers take turns in one slot, so that copies wait for it.
        on_host = homes(folder, ["cpu"], "sim:0")
        with pytest.raises(DoesNotFitError) as refused:
            load(folder, on_host, max_memory=ROOM | {"sim:0": CONTEXT_BYTES})
        model = load(folder, on_host, max_memory=ROOM | {"sim:0": refused.value.needed_bytes})
        assert min(group.num_slots for group in bigmodel.plan_of(model).slots if len(group.units) > 1) == 1
        operators = []

        def count(sign):
            """A hook of a user's, who computes something too: that is not the unit's."""
            torch.ones(1, device="sim:0").add_(1) if sign < 0 else None
            operators.append(sign * counts(0).operators)
            torch.ones(1, device="sim:0").add_(1) if sign > 0 else None

        for place in bigmodel.plan_of(model).placements:
            module = model.get_submodule(place.unit)
            module.register_forward_pre_hook(lambda *_: count(-1))
            module.register_forward_hook(lambda *_: count(1))
        with record(model) as steps:
            for _ in range(2):
                model(**inputs_for("llama"))
        slabs = {name: slab.numel() for name, slab in model_slabs(model).items()}
        names = names_of(model)
        wanted = [operators[n] + operators[n + 1] for n in range(0, len(operators), 2)]
        assert len(wanted) == len(steps)
        for step, num_operators in zip(steps, wanted, strict=True):
            assert num_operators > 0
            assert step.run[1] - step.run[0] == pytest.approx(num_operators * operator_s, abs=1e-9)
            if step.copy is not None:
                assert step.copy[1] - step.copy[0] == pytest.approx(slabs[names[step.unit]] / rate, abs=1e-9)
                assert step.copy[1] <= step.run[0] + 1e-9
        assert len([step for step in steps if step.copy and step.number == 1]) >= 4


def model_slabs(model):
    """Unit name -> the host memory that is copied for it."""
    stores = assembled(model)[1].attachment._streamer.store._store_of
    return {name: store._slabs[name] for name, store in stores.items()}


@needs_compiler
@torch.no_grad()
def test_a_steady_step_synchronises_and_allocates_nothing_for_being_recorded(tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    limits = ROOM | {"sim:0": CONTEXT_BYTES + (64 << 20)}
    found = {}
    with simulated(1):
        model = load(folder, homes(folder, ["cpu"], "sim:0"), max_memory=limits)
        ids = inputs_for("llama")["input_ids"].to("sim:0")
        for name, recording in (("plain", contextlib.nullcontext), ("recorded", functools.partial(record, model))):
            with recording():
                cache = model(input_ids=ids, use_cache=True).past_key_values
                for _ in range(2):
                    before = counts(0)
                    cache = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).past_key_values
                    after = counts(0)
            found[name] = [
                getattr(after, what) - getattr(before, what) for what in ("allocations", "flushes", "synchronizations")
            ]
        assert found["recorded"] == found["plain"]
        assert found["recorded"][1:] == [0, 0]


def test_what_was_not_loaded_is_refused():
    with pytest.raises(InvalidArgumentError, match="was not loaded by bigmodel"), record(nn.Linear(2, 2)):
        pass
