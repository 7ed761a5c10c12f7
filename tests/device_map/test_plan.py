"""Plans as data: there and back as JSON, and as a table that a person reads."""

import json
from dataclasses import replace

import pytest
from planning import DEMAND, DISK, HOST, accelerator, blocks, cost, plan_for, problem, room_on

import bigmodel
from bigmodel.device_map.explanation import holdings
from bigmodel.device_map.machine import Machine
from bigmodel.device_map.plan import Plan, Workload
from bigmodel.device_map.planner import decide
from bigmodel.errors import CheckpointError, InvalidArgumentError
from bigmodel.units import GIB, MIB

RING_BYTES = 1 << 20


def example() -> Plan:
    costs = [
        cost("model.embed", 5_000_000, can_gather=True),
        *blocks(12, 1_000_000, "model.layers"),
        cost("model.norm", 10_000, must_stay=True),
        cost("lm_head", 4_000_000),
    ]
    homes = {each.unit.name: "disk" for each in costs} | {"model.layers.3": "cpu"}
    return plan_for(costs, 20_000_000, DEMAND, homes=homes, fingerprint="abc")


def test_there_and_back():
    plan = example()
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.explain() == plan.explain()
    assert again.fingerprint == "abc"


HUGE = 10**400
WRONG = [
    *(("version", value) for value in (99, None, "2", True)),
    *(("placements", value) for value in (3, [3], [{}], None, {})),
    *((f"placements.0.{name}", value) for name in ("home", "run_on") for value in (3, "gpu", "cuda", None, ["cpu"], "cuda:300")),
    ("placements.0.run_on", "disk"),
    ("placements.0.prefill_on", "cuda:1"),
    ("placements.1.unit", "model.embed"),
    ("placements.0.unit", "\ud800"),
    ("placements.0.parameters", [1]),
    *(("slots.0.num_slots", value) for value in (0, -1, 17, True, 1.5, HUGE)),
    *(("slots.0.units", value) for value in ([1], "abc", None)),
    *((name, value) for name in ("placements.0.weight_bytes", "slots.0.slot_bytes", "kv_bytes", "limits.cpu", "ring_bytes",
        "prefill_from_tokens", "estimate.peak_bytes.cpu", "estimate.baseline_bytes")
        for value in (-1, True, 1.5, 2**63, "1", None)),
    *((name, value) for name in ("estimate.ttft_s", "estimate.tokens_per_s", "alternatives.0.seconds", "gains_s.cpu")
        for value in (float("nan"), float("inf"), "1", True, HUGE)),
    ("estimate.load_s", -1),
    ("estimate.phase_peak_bytes", {"load": 3}),
    ("estimate.binds", {"load": 3}),
    ("workload.batch_size", "auto"),
    ("workload.prompt_tokens", 0),
    *((name, value) for name in ("machine", "rates_from", "fingerprint") for value in (3, None, [])),
    *(("notes", value) for value in ("text", [3], None)),
    ("limits", {"ram": 1}),
    ("extra", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda each: str(each)[:40])
def test_texts_that_are_no_plan(name, value):
    fields = json.loads(example().to_json())
    fields["alternatives"], fields["gains_s"] = [{"what": "other", "seconds": 1.0}], {"cpu": 1.0}
    assert Plan.from_json(json.dumps(fields)).explain()
    *parents, last = name.split(".")
    part = fields
    for key in parents:
        part = part[int(key) if key.isdecimal() else key]
    part[last] = value
    with pytest.raises(InvalidArgumentError, match=last) as told:
        Plan.from_json(json.dumps(fields))
    assert len(str(told.value)) < 600


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", "null", "[" * 100_000, '{"version":' * 100_000, None])
def test_texts_that_are_no_json_object(text):
    with pytest.raises(InvalidArgumentError):
        Plan.from_json(text)


def test_a_plan_at_the_ends_of_what_is_read_is_explained():
    fields = json.loads(example().to_json())
    fields["placements"][0]["unit"] = "layers." + "9" * 5000
    fields["workload"] = {"batch_size": 2**62, "prompt_tokens": 2**62, "new_tokens": 2**62}
    fields["estimate"] |= {"ttft_s": 10**30, "time_per_token_s": 1e30, "tokens_per_s": 5e-324, "binds": {}}
    fields["gains_s"], fields["alternatives"] = {"cpu": -(10**30)}, [{"what": "", "seconds": 0}]
    fields["estimate"]["peak_bytes"] = {"cuda:0": 2**63 - 1, "disk": 1}
    assert Plan.from_json(json.dumps(fields)).explain()


def test_a_plan_in_a_table():
    plan = example()
    text = plan.explain()
    assert "model.layers.[0-2,4-11]" in text
    assert "2 units" in text  # one layer and the norm stay
    assert "13 units" in text
    # what streams: eleven layers and the head, not the table that is looked up
    assert plan.streamed_bytes == 11_000_000 + 4_000_000
    assert "14.3 MiB from disk" in text
    assert "note: " in text
    assert text.isascii()


def on_accelerators(count: int, *, on_disk: bool = False, room: int = 2_000_000, **options) -> Plan:
    """Layers with a cache each, on so many accelerators."""
    layers = [replace(each, kv_bytes=20) for each in blocks(12, 1_000_000)]
    costs = [cost("embed", 5_000_000, can_gather=True), *layers, cost("head", 1_500_000)]
    demand = replace(DEMAND, device_activation_bytes=2_000)
    devices = tuple(accelerator(index) for index in range(count))
    limits = {"cpu": GIB, "disk": DISK, **{each.device: room_on(room, demand) for each in devices}}
    if on_disk:
        options["homes"] = {each.unit.name: "disk" for each in costs}
    return decide(problem(costs, demand, ring_bytes=RING_BYTES), replace(HOST, accelerators=devices), limits, **options)


def halves() -> dict[str, tuple[str, str]]:
    """Half of what `on_accelerators` has runs on the CPU."""
    names = ["embed", *(f"layers.{number}" for number in range(12)), "head"]
    return {name: ("cuda:0" if number % 2 else "cpu",) * 2 for number, name in enumerate(names)}


PLANS = {
    "host, some on disk": example,
    "host, all in memory": lambda: on_accelerators(0),
    "host, all on disk": lambda: on_accelerators(0, on_disk=True),
    "one": lambda: on_accelerators(1, room=10**9),
    "one, some streams": lambda: on_accelerators(1, room=8_000_000),
    "one, all on disk": lambda: on_accelerators(1, on_disk=True, room=8_000_000),
    "two": lambda: on_accelerators(2, room=6_000_000),
    "two, all on disk": lambda: on_accelerators(2, on_disk=True, room=6_000_000),
    "one and the host": lambda: on_accelerators(1, room=8_000_000, runs=halves()),
    "one and the host, all on disk": lambda: on_accelerators(1, on_disk=True, room=8_000_000, runs=halves()),
}


@pytest.mark.parametrize("name", PLANS)
def test_what_a_tier_holds_adds_up_to_its_peak(name):
    plan = PLANS[name]()
    for tier, peak in plan.estimate.peak_bytes.items():
        assert sum(size for _, size in holdings(plan, tier)) == peak
        assert all(size >= 0 for _, size in holdings(plan, tier))


def test_where_an_accelerator_computes_the_host_holds_buffers_of_reads_and_no_cache():
    plan = on_accelerators(1, on_disk=True, room=8_000_000)
    assert {place.home for place in plan.placements} == {"disk"}
    rows = {what: size for what, size in holdings(plan, "cpu") if size}
    assert not [what for what in rows if what.startswith(("KV", "activations"))]
    (ring,) = (size for what, size in rows.items() if what.startswith("host buffers"))
    assert ring == RING_BYTES == plan.ring_bytes
    both = on_accelerators(1, room=8_000_000, runs=halves(), on_disk=True)
    rows = {what.partition(" (")[0]: size for what, size in holdings(both, "cpu")}
    num_layers = sum(place.run_on == "cpu" for place in both.placements if place.unit.startswith("layers"))
    assert num_layers > 0
    assert rows["KV cache and activations of what runs here"] == DEMAND.activation_bytes + 20 * num_layers


@pytest.mark.parametrize("where", ["auto", "cpu", {"": "disk"}, {"": "cpu", "model.layers.0": 0}])
def test_what_a_real_model_holds_adds_up(tiny_llama, where):
    plan = bigmodel.make_plan(tiny_llama, Machine.load("desktop-24gb"), device_map=where)
    for tier, peak in plan.estimate.peak_bytes.items():
        assert sum(size for _, size in holdings(plan, tier)) == peak
    assert plan.estimate.peak_bytes["cpu"] > 50 * MIB


def test_home_of_a_unit():
    plan = example()
    assert plan.home_of("model.layers.3") == "cpu"
    assert plan.home_of("model.layers.4") == "disk"
    assert plan.home_of("model.norm") == "cpu"
    with pytest.raises(KeyError):
        plan.home_of("model")


@pytest.mark.parametrize(
    "fields",
    [
        {"batch_size": 0},
        {"batch_size": True},
        {"prompt_tokens": 0},
        {"prompt_tokens": 1.5},
        {"new_tokens": -1},
        {"batch_size": 2**62 + 1},
        {"prompt_tokens": 10**5000},
    ],
)
def test_workloads_that_mean_nothing(fields):
    (name,) = fields
    with pytest.raises(InvalidArgumentError, match=name):
        Workload(**fields)


def test_a_workload_fills_its_cache_to_the_end():
    assert Workload(prompt_tokens=10, new_tokens=5).total_tokens == 15
    assert Workload(new_tokens=0).total_tokens == 512


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256, "dtype": "bfloat16"} | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_hidden_layers", value) for value in (0, -1, 10**9, "2", float("nan"))),
        *(("hidden_size", value) for value in (0, -64, 10**18, 10**30)),
        *(("head_dim", value) for value in (0, -2, 10**10)),  # the last one's buffers would take 37 GiB
        *(("vocab_size", value) for value in (0, 10**17)),
        *((name, 10**9) for name in ("num_labels", "num_local_experts", "n_layer")),
        ("intermediate_size", 10**16),
        ("num_attention_heads", 0),
        ("architectures", 3),
        ("auto_map", 3),
    ],
)
def test_a_config_of_a_model_that_cannot_be_is_told_in_a_line(tmp_path, name, value):
    stated = {name: value} | ({} if value == 3 else LLAMA | {name: value})
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(CheckpointError, match=r"config\.json") as told:
        bigmodel.make_plan(tmp_path, Machine.load("server-141gb"))
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 700
