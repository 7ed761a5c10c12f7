"""Layers that are too large for the slots that a device has room for: they are divided, and run as if they were not."""

import contextlib
import gc

import pytest
import torch
from families import inputs_for, make_checkpoint, resident
from simulated import COMPILER, counts, simulated

import bigmodel
from bigmodel.device_map.demand import CONTEXT_BYTES
from bigmodel.errors import DoesNotFitError

pytestmark = pytest.mark.skipif(COMPILER is None, reason="simulated accelerators need a C++ compiler")

SMALL = bigmodel.Workload(batch_size=2, prompt_tokens=16, new_tokens=8)
LAYERS = {"llama": ["LlamaDecoderLayer"], "mixtral": ["MixtralDecoderLayer"], "t5": ["T5Block"]}


def plan_of(folder, kind, devices, room_bytes, **options):
    """A plan with so much of each device beside its context."""
    limits = dict.fromkeys(devices, CONTEXT_BYTES + room_bytes) | {"cpu": "4GiB"}
    if kind == "in host memory":
        return bigmodel.make_plan(folder, None, SMALL, limits | {"disk": 0}, **options)
    return bigmodel.make_plan(folder, None, SMALL, limits, {"": "disk"}, **options)


def least_bytes(folder, kind, devices, **options):
    """What each device needs beside its context, as the refusal of less says."""
    with pytest.raises(DoesNotFitError, match=r"KiB of slots \(the largest unit, .* needs .* KiB\)") as refused:
        plan_of(folder, kind, devices, 30 << 10, **options)
    return refused.value.needed_bytes - CONTEXT_BYTES


@contextlib.contextmanager
def devices_of(plan, devices):
    """The devices, each with no more memory than the plan says that it takes."""
    # No context here: a tensor stands for it.
    peaks = [max(plan.estimate.peak_bytes.get(name, 0), CONTEXT_BYTES) for name in devices]
    gc.collect()
    with simulated(len(devices)):
        left = [counts(index).used_bytes for index in range(len(devices))]  # of other tests
    with simulated(len(devices), memory_bytes=[size + used for size, used in zip(peaks, left, strict=True)]):
        contexts = [torch.empty(CONTEXT_BYTES, dtype=torch.uint8, device=name) for name in devices]
        yield
        del contexts


@pytest.mark.parametrize(
    ("family", "kind", "num_devices"),
    [
        pytest.param(
            family, kind, number, marks=[] if (family, kind, number) == ("llama", "on disk", 1) else pytest.mark.slow
        )
        for family in LAYERS
        for kind in ("on disk", "in host memory")
        for number in (1, 2)
    ],
)
@torch.no_grad()
def test_a_layer_is_divided_where_it_does_not_fit_whole(family, kind, num_devices, tmp_path):
    folder = make_checkpoint(family, tmp_path)
    whole = resident(folder)
    expected = whole(**inputs_for(family)).logits
    ids = torch.arange(4, 36).view(2, 16)
    tokens = whole.generate(ids, max_new_tokens=8, do_sample=False)
    layers = {name for name, module in whole.named_modules() if type(module).__name__ in LAYERS[family]}
    devices = [f"sim:{index}" for index in range(num_devices)]
    with simulated(num_devices):
        room = least_bytes(folder, kind, devices[:1], no_split_module_classes=LAYERS[family]) - 1
        units = layers
        while units & layers:  # several devices need less of each
            plan = plan_of(folder, kind, devices, room)
            units = {place.unit for place in plan.placements}
            room -= room // 16
    assert any(unit.startswith(f"{layer}.") for unit in units for layer in layers)
    assert {place.home for place in plan.placements if place.unit.startswith(tuple(layers))} != {"sim:0"}
    with devices_of(plan, devices):
        model = bigmodel.load_sharded(folder, device_map=plan, max_memory=plan.limits, progress=False)
        for _ in range(3):
            assert torch.equal(model(**inputs_for(family)).logits, expected)
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), tokens)
        del model


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(each, marks=pytest.mark.slow) for each in ("mixtral", "t5"))]
)
def test_the_least_that_a_device_needs_is_told_and_suffices(family, tmp_path):
    folder = make_checkpoint(family, tmp_path)
    with simulated(1):
        least = least_bytes(folder, "on disk", ["sim:0"])
        assert least < least_bytes(folder, "on disk", ["sim:0"], no_split_module_classes=LAYERS[family])
        plan = plan_of(folder, "on disk", ["sim:0"], least)
        assert plan.estimate.peak_bytes["sim:0"] == CONTEXT_BYTES + least
        with pytest.raises(DoesNotFitError, match=r"needs .* of sim:0, .*Raise max_memory\['sim:0'\]"):
            plan_of(folder, "on disk", ["sim:0"], least - 1)


def test_a_layer_that_fits_whole_is_not_divided(tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    with simulated(1):
        least = least_bytes(folder, "on disk", ["sim:0"], no_split_module_classes=LAYERS["llama"])
        plan = plan_of(folder, "on disk", ["sim:0"], least)
    assert {f"model.layers.{number}" for number in range(4)} <= {place.unit for place in plan.placements}
