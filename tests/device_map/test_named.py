"""Maps that fail elsewhere, with the shapes of Llama-3-8B (16.06 GB in bf16), from its config.json alone."""

import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import bigmodel
from bigmodel.device_map.demand import CONTEXT_BYTES
from bigmodel.device_map.machine import Accelerator, Machine
from bigmodel.device_map.rates import Rates
from bigmodel.errors import DeviceMapError, DoesNotFitError

GB = 10**9
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
SMALL = bigmodel.Workload(prompt_tokens=64, new_tokens=16)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama-3-8b")
    (folder / "config.json").write_text(json.dumps(LLAMA_3_8B))
    return folder


def machine(num_accelerators=2, speeds=None):
    cards = tuple(
        Accelerator(
            device=f"cuda:{n}",
            name="card",
            memory_bytes=80 * GB,
            rates=Rates.roofline((speeds or [1e12] * num_accelerators)[n], {"bfloat16": 150e12}, 5e-6),
        )
        for n in range(num_accelerators)
    )
    return Machine(name="m", host_bytes=200 * GB, num_processors=8, disk_bytes=500 * GB, accelerators=cards)


def homes(plan):
    sizes = {}
    for place in plan.placements:
        sizes[place.home] = sizes.get(place.home, 0) + place.weight_bytes
    return sizes


def test_a_folder_with_a_config_alone_can_be_planned_for(llama):
    plan = bigmodel.make_plan(llama, machine(1), SMALL)
    assert plan.weight_bytes == pytest.approx(16.06e9, rel=0.001)
    assert {place.weight_bytes for place in plan.placements if ".layers." in place.unit} == {436224000}
    assert homes(plan) == {"cuda:0": plan.weight_bytes}
    assert bigmodel.make_plan(llama / "config.json", machine(1), SMALL).weight_bytes == plan.weight_bytes
    assert bigmodel.make_plan(llama, machine(1), SMALL, dtype="float32").weight_bytes == 2 * plan.weight_bytes


def test_one_accelerator_that_holds_all_is_enough(llama):
    plan = bigmodel.make_plan(llama, machine(), SMALL, max_memory={0: "24GB", 1: "8GB", "cpu": "64GB"})
    assert homes(plan) == {"cuda:0": plan.weight_bytes}
    assert {place.run_on for place in plan.placements} == {"cuda:0"}


@pytest.mark.parametrize("name", ["balanced", "balanced_low_0", "sequential", "auto"])
def test_what_two_hold_together_is_not_offloaded(llama, name):
    limits = {0: "10GB", 1: "10GB"}
    plan = bigmodel.make_plan(llama, machine(), SMALL, max_memory=limits, device_map=name)
    assert set(homes(plan)) == {"cuda:0", "cuda:1"}
    assert limits == {0: "10GB", 1: "10GB"}
    for tier, peak in plan.estimate.peak_bytes.items():
        assert peak <= plan.limits[tier]


def test_named_maps_mean_what_accelerates_users_expect(llama):
    limits = {0: "20GB", 1: "20GB", 2: "20GB"}
    made = {
        name: homes(bigmodel.make_plan(llama, machine(3), SMALL, max_memory=limits, device_map=name))
        for name in ("balanced", "balanced_low_0", "sequential")
    }
    assert list(made["sequential"]) == ["cuda:0"]
    shares = made["balanced"].values()
    assert len(shares) == 3
    assert max(shares) - min(shares) < 1.6 * GB
    low = made["balanced_low_0"]
    assert low.get("cuda:0", 0) == 0
    assert low["cuda:1"] == pytest.approx(low["cuda:2"], abs=1.6 * GB)


def test_gaps_in_ids_zero_budgets_and_names(llama):
    plan = bigmodel.make_plan(llama, machine(4), SMALL, max_memory={0: "7GB", 2: "7GB", 3: "7GB"})
    assert set(homes(plan)) == {"cuda:0", "cuda:2", "cuda:3"}
    for name in ("balanced", "sequential", "auto"):
        limits = {"cuda:0": "10GB", "cuda:1": 0, "cuda:2": "10GB"}
        plan = bigmodel.make_plan(llama, machine(3), SMALL, max_memory=limits, device_map=name)
        assert set(homes(plan)) == {"cuda:0", "cuda:2"}
        assert limits == {"cuda:0": "10GB", "cuda:1": 0, "cuda:2": "10GB"}


def test_a_long_context_keeps_less_resident_and_never_runs_out(llama):
    kept = {}
    for tokens in (16, 32_768):
        workload = bigmodel.Workload(prompt_tokens=16, new_tokens=tokens)
        plan = bigmodel.make_plan(llama, machine(1), workload, max_memory={0: "14GB", "cpu": "64GB"})
        kept[tokens] = homes(plan)["cuda:0"]
        assert plan.kv_bytes == pytest.approx((16 + tokens) * 131072, rel=0.01)
        assert plan.estimate.peak_bytes["cuda:0"] <= plan.limits["cuda:0"]
    assert kept[16] - kept[32_768] > 3 * GB


def test_everything_on_disk_is_computed_by_the_accelerator(llama):
    plan = bigmodel.make_plan(llama, machine(1), SMALL, device_map={"": "disk"})
    runs = {place.run_on for place in plan.placements if "embed" not in place.unit}
    assert runs == {"cuda:0"}
    assert set(homes(plan)) == {"disk"}
    assert plan.streamed_bytes > 14 * GB


def test_cuda_is_all_resident_or_an_error(llama):
    plan = bigmodel.make_plan(llama, machine(2), SMALL, device_map="cuda")
    assert set(homes(plan)) == {"cuda:0"}
    with pytest.raises(DoesNotFitError) as caught:
        bigmodel.make_plan(llama, machine(2), SMALL, device_map="cuda", max_memory={0: "10GB", 1: "40GB"})
    assert caught.value.tier == "cuda:0"
    assert caught.value.available_bytes == 10 * GB
    assert caught.value.needed_bytes > 16.06 * GB + CONTEXT_BYTES


def test_cpu_beside_accelerators_runs_on_the_cpu(llama):
    plan = bigmodel.make_plan(llama, machine(1), SMALL, device_map="cpu")
    assert {(place.home, place.run_on) for place in plan.placements} == {("cpu", "cpu")}


def test_the_cpu_computes_only_where_it_may_and_where_that_is_faster(llama):
    limits = {0: "8GB", "cpu": "64GB"}
    without = bigmodel.make_plan(llama, machine(1), SMALL, max_memory=limits)
    allowed = bigmodel.make_plan(llama, machine(1), SMALL, max_memory=limits, allow_cpu_compute=True)
    assert {place.run_on for place in without.placements if "embed" not in place.unit} == {"cuda:0"}
    assert "cpu" in {place.run_on for place in allowed.placements if ".layers." in place.unit}
    assert allowed.estimate.time_per_token_s < without.estimate.time_per_token_s


def test_what_fits_nowhere_names_the_tier_and_what_would_do(llama):
    limits = {0: "1GB", "cpu": "2GB", "disk": "0GB"}
    with pytest.raises(
        DoesNotFitError, match=r"of cuda:0, and 954 MiB may be used.*Raise max_memory\['cuda:0'\]"
    ) as caught:
        bigmodel.make_plan(llama, machine(1), SMALL, max_memory=limits)
    limits[0] = caught.value.needed_bytes
    plan = bigmodel.make_plan(llama, machine(1), SMALL, max_memory=limits)
    assert plan.estimate.peak_bytes["cuda:0"] <= caught.value.needed_bytes


def test_unified_memory_is_counted_once(llama):
    unified = Machine.load("unified-64gb")
    plan = bigmodel.make_plan(llama, unified, SMALL)
    peaks = plan.estimate.peak_bytes
    assert peaks["cpu"] + peaks["mps:0"] <= unified.host_bytes
    assert not plan.slots
    with pytest.raises(DoesNotFitError):
        bigmodel.make_plan(llama, unified, SMALL, max_memory={"mps:0": "9GB", "cpu": "9GB"}, device_map={"": "mps:0"})


SHIPPED_SLOWLY = ("desktop-2x24gb", "server-80gb", "server-141gb", "server-8x80gb")


@pytest.mark.parametrize(
    "name", ["desktop-24gb", "laptop-16gb", *(pytest.param(name, marks=pytest.mark.slow) for name in SHIPPED_SLOWLY)]
)
def test_every_machine_that_is_shipped_can_be_planned_for(llama, name):
    found = Machine.load(name)
    plan = bigmodel.make_plan(llama, found, SMALL)
    assert plan.machine == found.name
    assert plan.rates_from == f"{name}.json"
    # No step is faster than its weights come out of memory.
    rates = [each.rates.memory_bytes_per_s for each in found.accelerators] or [found.host_rates.memory_bytes_per_s]
    assert plan.estimate.time_per_token_s > (plan.weight_bytes - 1.06 * GB) / max(rates)
    if found.accelerators:
        assert set(homes(plan)) == {"cuda:0"}


@pytest.mark.slow
def test_the_batch_with_the_most_tokens_per_second_is_found(llama):
    auto = bigmodel.Workload(batch_size="auto", prompt_tokens=64, new_tokens=16)
    limits = {0: "24GB", "cpu": "64GB"}
    plan = bigmodel.make_plan(llama, machine(1), auto, max_memory=limits)
    size = plan.workload.batch_size
    assert size > 8
    rates = {}
    for batch_size in (1, size // 2, size):
        workload = bigmodel.Workload(batch_size=batch_size, prompt_tokens=64, new_tokens=16)
        estimate = bigmodel.make_plan(llama, machine(1), workload, max_memory=limits).estimate
        rates[batch_size] = batch_size * 16 / (estimate.ttft_s + 16 * estimate.time_per_token_s)
    assert rates[size] > rates[size // 2] > rates[1]
    assert plan.estimate.peak_bytes["cuda:0"] <= 24 * GB


class Direct(nn.Module):
    """A block with a parameter and a buffer of its own, beside its layers."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(300))
        self.register_buffer("table", torch.ones(50))
        self.first, self.second = nn.Linear(300, 300), nn.Linear(300, 300)

    def forward(self, x):
        return self.second(self.first(x) * self.scale)


class Rooted(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(300))
        self.layer = nn.ModuleList(Direct() for _ in range(12))

    def forward(self, x):
        for layer in self.layer:
            x = layer(x)
        return x + self.bias


def test_direct_parameters_of_blocks_and_roots_are_placed_and_prefixes_are_whole_names():
    with torch.device("meta"):
        model = Rooted()
    total = sum(parameter.nbytes for parameter in model.parameters())
    plan = bigmodel.make_plan(model, machine(0))
    assert plan.weight_bytes == total
    device_map = {"": "disk", "layer.1": "cpu"}
    rests = {
        place.unit: place.home for place in bigmodel.make_plan(model, machine(0), device_map=device_map).placements
    }
    assert rests["layer.1"] == "cpu"
    assert {rests[f"layer.{n}"] for n in (0, 2, 10, 11)} == {"disk"}
    # Room for less than one block's 722 KB: its layers stream one by one, and what it uses itself stays.
    tight = plan.estimate.peak_bytes["cpu"] - total + 500_000
    divided = bigmodel.make_plan(model, machine(0), max_memory={"cpu": tight})
    assert divided.weight_bytes == total
    assert divided.estimate.peak_bytes["cpu"] <= tight
    assert {"layer.10", "layer.10.first"} <= {place.unit for place in divided.placements}


def test_bool_and_8_bit_weights_count_by_their_bytes():
    model = nn.Module()
    model.forward = lambda x: x
    model.a = nn.Parameter(torch.empty(1000, dtype=torch.float8_e4m3fn, device="meta"), requires_grad=False)
    model.b = nn.Parameter(torch.empty(1000, dtype=torch.bool, device="meta"), requires_grad=False)
    model.c = model.a
    assert bigmodel.make_plan(model, machine(0)).weight_bytes == 2000


def test_cuda_is_the_first_accelerator_that_may_be_used(llama):
    plan = bigmodel.make_plan(llama, machine(), SMALL, max_memory={1: "40GB"}, device_map="cuda")
    assert {(place.home, place.run_on) for place in plan.placements} == {("cuda:1", "cuda:1")}
    for limits in ({"cpu": "64GB"}, {0: 0, 1: 0}):
        with pytest.raises(DeviceMapError, match="max_memory leaves none"):
            bigmodel.make_plan(llama, machine(), SMALL, max_memory=limits, device_map="cuda")


def test_a_map_is_followed_or_refused_and_never_changed(llama):
    with pytest.raises(DoesNotFitError, match=r"of cuda:0, and 0 B may be used"):
        bigmodel.make_plan(llama, machine(), SMALL, max_memory={0: 0, "cpu": "64GB"}, device_map={"": 0})
    with pytest.raises(DeviceMapError, match=r"names cuda:1, which max_memory leaves out"):
        bigmodel.make_plan(llama, machine(), SMALL, max_memory={0: "40GB"}, device_map={"": 1})
    # Where a map names an accelerator, what streams goes to it and to no other.
    plan = bigmodel.make_plan(llama, machine(), SMALL, device_map={"": "disk", "lm_head": 1})
    assert {place.run_on for place in plan.placements if "embed" not in place.unit} == {"cuda:1"}


def test_parts_of_a_module_run_on_one_device(llama):
    device_map = {"": "disk", "model.layers.5.mlp": "cpu", "model.layers.7.mlp": "cpu", "model.layers.8.mlp": 1}
    plan = bigmodel.make_plan(llama, machine(), SMALL, device_map={**device_map, "lm_head": 0})
    runs = {place.unit: place.run_on for place in plan.placements}
    for number in (5, 7, 8):
        own = {device for unit, device in runs.items() if unit.startswith(f"model.layers.{number} (")}
        assert len(own) == 1
    assert own == {"cuda:1"}


def test_advice_leaves_out_what_may_not_be_used(llama):
    plan = bigmodel.make_plan(llama, machine(1), SMALL, max_memory={0: 0, "cpu": "8GB"})
    assert {place.run_on for place in plan.placements} == {"cpu"}
    assert set(plan.gains_s) == {"cpu"}


def test_what_the_cpu_would_gain_is_said(llama):
    limits = {0: "8GB", "cpu": "64GB"}
    plan = bigmodel.make_plan(llama, machine(1), SMALL, max_memory=limits)
    assert any("allow_cpu_compute=True" in note for note in plan.notes)
    allowed = bigmodel.make_plan(llama, machine(1), SMALL, max_memory=limits, allow_cpu_compute=True)
    assert not any("allow_cpu_compute" in note for note in allowed.notes)
    whole = bigmodel.make_plan(llama, machine(1), SMALL)
    assert not any("allow_cpu_compute" in note for note in whole.notes)


def test_a_long_prompt_runs_on_the_card_and_the_tokens_after_it_where_their_weights_rest(llama):
    # Host memory gives 80 GB/s, the link 20: a token is computed sooner than its weights are there; 2,048 of them are not.
    here = replace(machine(1), host_rates=Rates.roofline(80e9, {"bfloat16": 2e12}, 5e-6))
    here = replace(here, accelerators=(replace(here.accelerators[0], h2d_bytes_per_s=2e10),))
    limits = {0: "4GB", "cpu": "64GB"}
    workload = bigmodel.Workload(prompt_tokens=2048, new_tokens=256)
    plan = bigmodel.make_plan(llama, here, workload, max_memory=limits, allow_cpu_compute=True)
    moving = [place for place in plan.placements if place.run_on != place.prefill_on]
    assert {(place.home, place.run_on, place.prefill_on) for place in moving} == {("cpu", "cpu", "cuda:0")}
    assert len(moving) > 16
    layer = moving[0].weight_bytes
    assert plan.streamed_bytes_from("cpu", in_prefill=True) == plan.streamed_bytes_from("cpu") + len(moving) * layer
    # A layer is 13.5 GFLOP of 32 tokens: 6.8 ms on the host, 22 ms over the link; and so the host's way to 100 tokens or so.
    assert 60 <= plan.prefill_from_tokens <= 130
    assert all(size <= plan.limits[tier] for tier, size in plan.estimate.peak_bytes.items())
    # Activations of the whole prompt are on the card; what the host holds of it is one token's, and the cache.
    cache_bytes = len(moving) * 2 * 8 * 128 * 2 * workload.total_tokens
    steps = plan.estimate.phase_peak_bytes["decode"]["cpu"] - plan.estimate.phase_peak_bytes["load"]["cpu"]
    assert cache_bytes <= steps < cache_bytes + plan.activation_bytes / 3
    told = plan.explain()
    assert f"run on cpu, from {plan.prefill_from_tokens} tokens a pass on cuda:0" in told
    assert "the first pass streams" in told
    assert bigmodel.Plan.from_json(plan.to_json()) == plan
    for others in ({"allow_cpu_compute": False}, {"workload": replace(workload, prompt_tokens=1)}):
        options = {"workload": workload, "allow_cpu_compute": True} | others
        plain = bigmodel.make_plan(llama, here, max_memory=limits, **options)
        assert all(place.run_on == place.prefill_on for place in plain.placements)
        assert plain.prefill_from_tokens == 0
        if "workload" not in others:
            assert plain.estimate.time_per_token_s > plan.estimate.time_per_token_s


def test_a_plan_tells_what_passes_of_several_tokens_take(llama):
    workload = bigmodel.Workload(prompt_tokens=512, new_tokens=64)
    plan = bigmodel.make_plan(llama, machine(1), workload, max_memory={0: "4GB", "cpu": "64GB"})
    pass_s = plan.estimate.pass_s
    assert pass_s[1] == pytest.approx(plan.estimate.time_per_token_s)
    assert list(pass_s.values()) == sorted(pass_s.values())
    assert pass_s[65] < 1.1 * pass_s[1]  # the link binds: guesses are nearly free
    whole = bigmodel.make_plan(llama, machine(0), workload, max_memory={"cpu": "64GB"})
    assert whole.estimate.pass_s[65] > 1.5 * whole.estimate.pass_s[1]  # arithmetic binds
    short = bigmodel.make_plan(llama, machine(1), SMALL, max_memory={0: "4GB", "cpu": "64GB"})
    assert max(short.estimate.pass_s) <= SMALL.prompt_tokens


def test_of_several_tiers_that_are_short_all_are_to_be_raised(llama):
    limits = {0: "1GB", "cpu": "100MB"}
    with pytest.raises(DoesNotFitError) as caught:
        bigmodel.make_plan(llama, machine(1), SMALL, max_memory=limits)
    raised = dict(re.findall(r"max_memory\['([^']+)'\] to (\w+)", str(caught.value)))
    assert raised.keys() == {"cuda:0", "cpu"}
    bigmodel.make_plan(llama, machine(1), SMALL, max_memory=raised)


@pytest.mark.parametrize(
    "room", ["4.5GB", *(pytest.param(each, marks=pytest.mark.slow) for each in ("4.8GB", "5.1GB", "5.45GB"))]
)
@pytest.mark.parametrize("name", ["sequential", "balanced"])
def test_a_name_fits_wherever_auto_does(llama, name, room):
    limits = {0: "8GB", "cpu": room}
    assert bigmodel.make_plan(llama, machine(1), SMALL, max_memory=limits)
    plan = bigmodel.make_plan(llama, machine(1), SMALL, max_memory=limits, device_map=name)
    assert all(size <= plan.limits[tier] for tier, size in plan.estimate.peak_bytes.items())


def test_unified_memory_is_all_that_was_granted_of_it(llama):
    unified = Machine.load("unified-64gb")
    plan = bigmodel.make_plan(llama, unified, SMALL, max_memory={"mps:0": "40GB", "cpu": "8GB"})
    assert not plan.slots  # 16 GB of weights: the host's own 8 GB are not the limit of both
    halves = {"": "mps:0", **{f"model.layers.{n}": "cpu" for n in range(16)}}
    limits = {"mps:0": "40GB", "cpu": "40GB"}
    with pytest.raises(
        DoesNotFitError, match=r"cpu and mps:0 share one memory, of which the model needs 6\d"
    ) as caught:
        bigmodel.make_plan(llama, unified, SMALL, max_memory=limits, device_map=halves, dtype="float64")
    assert caught.value.needed_bytes > caught.value.available_bytes
    assert caught.value.available_bytes <= unified.host_bytes
