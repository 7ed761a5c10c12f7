"""What users say about tiers: limits, maps in Accelerate's grammar, and units that a map divides."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import bigmodel
from bigmodel.device_map.machine import Accelerator, Machine
from bigmodel.device_map.maps import divide_by_home, resolve_limits, resolve_map
from bigmodel.device_map.unit import Unit
from bigmodel.errors import DeviceMapError, InvalidArgumentError

GIB = 1 << 30
HOST = Machine(name="host", host_bytes=64 * GIB, num_processors=2, disk_bytes=500 * GIB)
TWO = Machine(
    name="two",
    host_bytes=64 * GIB,
    num_processors=2,
    disk_bytes=500 * GIB,
    accelerators=tuple(Accelerator(device=f"cuda:{n}", name="a", memory_bytes=24 * GIB) for n in range(2)),
)


def unit(name: str, *parameters: str) -> Unit:
    return Unit(name, parameters, (name,), False, False)


UNITS = (
    unit("model.embed", "model.embed.weight"),
    *(unit(f"model.layer.{n}", f"model.layer.{n}.q.weight", f"model.layer.{n}.norm.weight") for n in (0, 1, 10)),
    unit("lm_head", "lm_head.weight"),
)
NAMES = [
    "model", "model.embed", "model.layer", "lm_head", "model.rotary", "model.rotary.inv_freq",
    *(name for each in UNITS for name in (each.name, *each.parameters, *(p.rpartition(".")[0] for p in each.parameters))),
]  # fmt: skip


def resolve(device_map, machine=HOST):
    return resolve_map(device_map, UNITS, NAMES, machine)


def test_the_longest_prefix_at_a_module_boundary_decides():
    homes = resolve({"": "disk", "model.layer.1": "cpu", "model.layer.1.norm": "disk"})
    assert homes["model.layer.1.q.weight"] == "cpu"
    assert homes["model.layer.1.norm.weight"] == "disk"
    assert homes["model.layer.10.q.weight"] == "disk"
    assert homes["model.layer.0.q.weight"] == "disk"


def test_names_may_be_parameters_and_modules_without_any():
    homes = resolve({"model": "cpu", "lm_head.weight": "disk", "model.rotary": "cpu"})
    assert {name for name, home in homes.items() if home == "disk"} == {"lm_head.weight"}


def test_unknown_names_are_all_told():
    with pytest.raises(DeviceMapError, match=r"2 names .*'model\.layers', 'transformer'"):
        resolve({"": "cpu", "model.layers": "cpu", "transformer": "disk"})
    with pytest.raises(DeviceMapError, match=r"2 names .*: 3, 'decoder'"):
        resolve({"": "cpu", "decoder": "cpu", 3: "cpu"})


def test_a_prefix_inside_a_name_is_unknown():
    with pytest.raises(DeviceMapError, match=r"model\.lay"):
        resolve({"": "cpu", "model.lay": "disk"})


def test_uncovered_parameters_are_all_told():
    with pytest.raises(DeviceMapError, match=r"2 parameters: 'model\.embed\.weight', 'lm_head\.weight'"):
        resolve({"model.layer": "cpu"})


@pytest.mark.parametrize("value", ["gpu", "meta", None, 1.5, True, "cuda:0", 0, torch.device("meta"), ["cpu"], -1])
def test_values_that_are_no_tier_of_this_machine_are_named(value):
    with pytest.raises(DeviceMapError, match=r"device_map\['lm_head'\]"):
        resolve({"": "cpu", "lm_head": value})


@pytest.mark.parametrize(
    ("value", "home"),
    [
        ("cpu", "cpu"), (torch.device("cpu"), "cpu"), ("disk", "disk"), (1, "cuda:1"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"),
        (torch.device("cuda", 1), "cuda:1"), (torch.device("cuda"), "cuda:0"),
    ],
)  # fmt: skip
def test_values(value, home):
    assert set(resolve({"": value}, TWO).values()) == {home}


def test_accelerators_that_are_not_there_are_named():
    with pytest.raises(DeviceMapError, match="accelerator 2, and this machine has 2"):
        resolve({"": 2}, TWO)
    with pytest.raises(DeviceMapError, match="'cuda:7', and this machine has cuda:0, cuda:1"):
        resolve({"": "cuda:7"}, TWO)


def test_a_map_that_divides_a_unit_gives_one_for_each_tier():
    units, homes = divide_by_home(UNITS, resolve({"": "disk", "model.layer.1.norm": "cpu"}))
    parts = [each for each in units if each.sites == ("model.layer.1",)]
    assert [each.parameters for each in parts] == [("model.layer.1.q.weight",), ("model.layer.1.norm.weight",)]
    assert [homes[each.name] for each in parts] == ["disk", "cpu"]
    assert len({each.name for each in units}) == len(units)
    assert sorted(p for each in units for p in each.parameters) == sorted(p for each in UNITS for p in each.parameters)
    whole, homes = divide_by_home(UNITS, resolve({"": "disk"}))
    assert whole == UNITS
    assert set(homes.values()) == {"disk"}


def test_limits_that_nobody_states_leave_a_reserve():
    assert resolve_limits(None, HOST) == {"cpu": 64 * GIB - int(3.2 * GIB), "disk": 475 * GIB}
    small = Machine(name="small", host_bytes=4 * GIB, num_processors=1, disk_bytes=GIB // 2)
    assert resolve_limits(None, small) == {"cpu": 3 * GIB, "disk": 0}
    limits = resolve_limits(None, TWO)
    assert set(limits) == {"cuda:0", "cuda:1", "cpu", "disk"}
    assert limits["cuda:1"] == 24 * GIB - int(1.2 * GIB)


def test_stated_limits_are_used_whole_and_the_dict_is_not_changed():
    given = {"cpu": "200GiB"}
    limits = resolve_limits(given, TWO)
    assert limits["cpu"] == 200 * GIB
    assert limits["disk"] == 475 * GIB
    assert given == {"cpu": "200GiB"}
    # An accelerator that a given dict leaves out is not used.
    assert set(limits) == {"cpu", "disk"}
    assert resolve_limits({1: GIB}, TWO)["cuda:1"] == GIB
    assert "cuda:0" not in resolve_limits({1: GIB}, TWO)
    assert resolve_limits({}, HOST) == resolve_limits(None, HOST)


def test_processes_of_one_job_share_the_host():
    shared = Machine(name="host", host_bytes=64 * GIB, num_processors=2, disk_bytes=500 * GIB, num_sharing=4)
    assert resolve_limits(None, shared)["cpu"] <= 16 * GIB
    assert resolve_limits({"cpu": "40GiB"}, shared)["cpu"] == 40 * GIB


@pytest.mark.parametrize(
    ("num_sharing", "used"),
    [(1, [{0, 1}]), (2, [{0}, {1}]), (3, [{0}, {1}, {0}])],
)
def test_processes_of_one_job_have_accelerators_of_their_own(tmp_path, num_sharing, used):
    for place, indices in enumerate(used):
        own = replace(TWO, num_sharing=num_sharing, place=place)
        limits = resolve_limits(None, own)
        assert set(limits) == {"cpu", "disk", *(f"cuda:{index}" for index in indices)}
        whole = resolve_limits(None, TWO)[f"cuda:{min(indices)}"]
        assert limits[f"cuda:{min(indices)}"] == whole // (2 if num_sharing == 3 else 1)
        assert set(resolve_limits({0: GIB, 1: GIB}, own)) == {
            "cpu",
            "disk",
            "cuda:0",
            "cuda:1",
        }  # what is stated is used
        (tmp_path / "own.json").write_text(own.to_json())
        assert Machine.load(tmp_path / "own.json").own_accelerators == own.own_accelerators


@pytest.mark.parametrize(
    "limits",
    [
        {"gpu": 1},
        {"ram": "1GiB"},
        {0: "1GiB"},
        {"cpu": "20Gb"},
        {"cpu": 1.5},
        {"cpu": -1},
        {"cpu": float("nan")},
        {"cpu": None},
        {"cpu": 2**62 + 1},
        {"cpu": 10**5000},
        {"cpu": "9" * 5000 + "B"},
        {"cpu": " " * 100 + "1GiB"},
        {"cpu": "9999999999TiB"},
    ],
)
def test_limits_that_mean_nothing_are_named(limits):
    (key,) = limits
    with pytest.raises(InvalidArgumentError, match=repr(key)) as told:
        resolve_limits(limits, HOST)
    assert len(str(told.value)) < 300


def test_a_limit_stated_twice_or_not_in_a_dict():
    with pytest.raises(InvalidArgumentError, match="cuda:0 twice"):
        resolve_limits({0: GIB, "cuda:0": GIB}, TWO)
    with pytest.raises(InvalidArgumentError, match="Give a dict"):
        resolve_limits("8GiB", HOST)


def nested(depth=500):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("workload", value) for value in (3, "auto", {}, {"batch_size": 2}, nested(100_000))),
        *(("no_split_module_classes", value) for value in ("Block", b"Block", 3, ["Block", 3], [nn.Linear], iter(["Block"]))),
        *(("offload_folder", value) for value in (3, b"folder", ["folder"], "a\0b", "x" * 10_000)),
    ],
    ids=lambda each: str(type(each)),
)  # fmt: skip
def test_arguments_of_another_kind_are_named(tmp_path, name, value):
    # Before the checkpoint is looked for: there is none.
    for ask in (bigmodel.make_plan, bigmodel.load_sharded):
        with pytest.raises(InvalidArgumentError, match=f"^{name} is ") as told:
            ask(tmp_path / "none", **{name: value})
        assert len(str(told.value)) < 400
