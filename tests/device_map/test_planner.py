"""The planner keeps every limit, places every unit once, and spreads what streams."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning import HOST, accelerator, cost, problem

from bigmodel.device_map import planner
from bigmodel.device_map.demand import CONTEXT_BYTES, RESERVE_BYTES, Demand, UnitCost
from bigmodel.device_map.plan import Plan, Workload
from bigmodel.device_map.rates import Work
from bigmodel.device_map.unit import Unit
from bigmodel.errors import DoesNotFitError

WORKLOAD = Workload(prompt_tokens=4, new_tokens=4)
DEMAND = Demand(kv_bytes=100, activation_bytes=200, buffer_bytes=10)
BESIDE = DEMAND.total_bytes
MB = 10**6


def decide(costs, demand, limits, workload, *, num_readers=1, **options):
    return planner.decide(problem(costs, demand, workload=workload, num_readers=num_readers), HOST, limits, **options)


def workload_s(plan):
    return plan.estimate.ttft_s + plan.workload.num_steps * plan.estimate.time_per_token_s


def unit_cost(number, size, *, flops=0.0, **options):
    unit = Unit(f"u.{number}", (f"u.{number}.w",), (f"u.{number}",), False, False)
    work = Work.of_product("bfloat16", float(size), float(size))
    return UnitCost(
        unit=unit,
        weight_bytes=size,
        resident_bytes=size,
        slot_bytes=size,
        prefill=Work.of_product("bfloat16", flops, float(size)) if flops else work,
        decode=work,
        **options,
    )


def limits(host, disk=1 << 40):
    return {"cpu": BESIDE + host, "disk": disk}


@st.composite
def models(draw):
    costs = []
    for number in range(draw(st.integers(1, 24))):
        size = draw(st.sampled_from([1, 7, 100, 100, 100, 130, 900]))
        kind = draw(st.sampled_from(["plain"] * 6 + ["gather", "stay", "staged"]))
        costs.append(
            unit_cost(
                number,
                size,
                can_gather=kind == "gather",
                must_stay=kind == "stay",
                staging_bytes=3 if kind == "staged" else 0,
            )
        )
    return costs


@settings(max_examples=40)
@given(models(), st.integers(0, 4000), st.integers(1, 4))
def test_no_limit_is_exceeded_and_every_unit_is_placed_once(costs, host, num_readers):
    smallest = sum(c.resident_bytes for c in costs if c.must_stay)
    try:
        plan = decide(costs, DEMAND, limits(host), WORKLOAD, num_readers=num_readers)
    except DoesNotFitError as error:
        needed, available = error.needed_bytes, error.available_bytes
        # What it says would do, does.
        plan = decide(costs, DEMAND, limits(needed - BESIDE), WORKLOAD, num_readers=num_readers)
    else:
        needed, available = BESIDE + smallest, BESIDE + host
    assert available == BESIDE + host
    assert needed >= BESIDE + smallest
    assert [placement.unit for placement in plan.placements] == [cost.unit.name for cost in costs]
    home = {placement.unit: placement.home for placement in plan.placements}
    streamed = [name for group in plan.slots for name in group.units]
    assert len(streamed) == len(set(streamed))
    for each in costs:
        name = each.unit.name
        assert not (each.must_stay and home[name] != "cpu")
        assert (name in streamed) == (home[name] == "disk" and not each.can_gather)
    sizes = {each.unit.name: each.slot_bytes for each in costs}
    for group in plan.slots:
        assert 1 <= group.num_slots <= 3
        assert group.slot_bytes == max(sizes[name] for name in group.units)
        assert group.slot_bytes < 2 * min(sizes[name] for name in group.units)
    staging = num_readers * max(each.staging_bytes for each in costs)
    needed = sum(c.resident_bytes for c in costs if home[c.unit.name] == "cpu")
    needed += sum(group.num_slots * group.slot_bytes for group in plan.slots) + staging
    assert plan.estimate.peak_bytes["cpu"] == needed + BESIDE <= plan.limits["cpu"]
    assert plan == decide(costs, DEMAND, plan.limits, WORKLOAD, num_readers=num_readers)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.slow
@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(0, 4500))
def test_more_memory_never_keeps_fewer_equal_blocks(num_blocks, host):
    costs = [unit_cost(number, 100) for number in range(num_blocks)]

    def num_resident(host_bytes):
        try:
            plan = decide(costs, DEMAND, limits(host_bytes), WORKLOAD)
        except DoesNotFitError:
            return -1
        return sum(placement.home == "cpu" for placement in plan.placements)

    assert num_resident(host) <= num_resident(host + 37)


@pytest.mark.parametrize(("num_blocks", "num_fit"), [(6, 3), (12, 8), (24, 13), (80, 50)])
def test_no_placement_that_people_would_try_is_faster(num_blocks, num_fit):
    costs = [unit_cost(number, 100 * MB, flops=3e10) for number in range(num_blocks)]
    limit = limits(num_fit * 100 * MB)
    found = decide(costs, DEMAND, limit, WORKLOAD)
    times = []
    for num_slots in (1, 2, 3):
        num_stay = num_fit - num_slots
        even = {number * num_blocks // num_stay for number in range(num_stay)} if num_stay else set()
        for staying in (even, set(range(num_stay)), set(range(num_blocks - num_stay, num_blocks))):
            homes = {f"u.{n}": "cpu" if n in staying else "disk" for n in range(num_blocks)}
            plan = decide(costs, DEMAND, limit, WORKLOAD, homes=homes, max_slots=num_slots)
            assert plan.estimate.peak_bytes["cpu"] <= limit["cpu"]
            times.append(workload_s(plan))
    assert workload_s(found) <= min(times) * (1 + 1e-9)


def test_what_fits_stays():
    plan = decide([unit_cost(n, 100) for n in range(5)], DEMAND, limits(500), WORKLOAD)
    assert not plan.slots
    assert {placement.home for placement in plan.placements} == {"cpu"}


def test_a_table_that_is_looked_up_goes_to_disk_before_blocks_do():
    costs = [unit_cost(0, 400, can_gather=True), *(unit_cost(n, 100) for n in range(1, 5))]
    plan = decide(costs, DEMAND, limits(400), WORKLOAD)
    assert plan.home_of("u.0") == "disk"
    assert not plan.slots


def test_a_large_head_does_not_make_every_slot_large_and_small_units_stay():
    costs = [*(unit_cost(n, 100 * MB) for n in range(10)), unit_cost(10, MB), unit_cost(11, 1000 * MB)]
    plan = decide(costs, DEMAND, limits(1400 * MB), WORKLOAD)
    assert plan.home_of("u.10") == "cpu"
    homes = {cost.unit.name: "disk" for cost in costs}
    plan = decide(costs, DEMAND, limits(1400 * MB), WORKLOAD, homes=homes)
    assert {group.slot_bytes for group in plan.slots} == {MB, 100 * MB, 1000 * MB}


def test_slots_are_given_up_before_the_plan_is():
    costs = [unit_cost(n, 100 * MB, flops=2e10) for n in range(8)]
    plans = [decide(costs, DEMAND, limits(host * MB), WORKLOAD) for host in (100, 200, 300)]
    assert plans[0].slots[0].num_slots == 1
    assert workload_s(plans[0]) > workload_s(plans[1]) > workload_s(plans[2])
    with pytest.raises(DoesNotFitError) as caught:
        decide(costs, DEMAND, limits(100 * MB - 1), WORKLOAD)
    assert caught.value.needed_bytes == BESIDE + 100 * MB
    assert caught.value.tier == "cpu"


def test_homes_are_honoured_and_units_that_must_stay_are_told():
    costs = [unit_cost(0, 100), unit_cost(1, 5, must_stay=True), unit_cost(2, 100)]
    plan = decide(costs, DEMAND, limits(1000), WORKLOAD, homes={"u.0": "disk", "u.1": "disk", "u.2": "cpu"})
    assert [placement.home for placement in plan.placements] == ["disk", "cpu", "cpu"]
    assert "u.1" in plan.explain()


def test_converted_weights_count_against_the_disk():
    costs = [unit_cost(0, 100, converted_bytes=120)]
    homes = {"u.0": "disk"}
    assert decide(costs, DEMAND, limits(1000), WORKLOAD, homes=homes).estimate.peak_bytes["disk"] == 120
    with pytest.raises(DoesNotFitError, match="of disk") as caught:
        decide(costs, DEMAND, limits(1000, disk=119), WORKLOAD, homes=homes)
    assert caught.value.tier == "disk"


def test_the_error_names_what_is_too_large_and_what_would_do():
    costs = [unit_cost(0, 300), unit_cost(1, 5000), unit_cost(2, 5000)]
    with pytest.raises(DoesNotFitError, match=r"largest unit, u\.1, needs 4\.88 KiB.*Raise max_memory\['cpu'\] to"):
        decide(costs, DEMAND, limits(10), WORKLOAD)
    with pytest.raises(DoesNotFitError, match="let weights rest on disk"):
        decide(costs, DEMAND, limits(10), WORKLOAD, all_resident=True)
    big = Demand(kv_bytes=1 << 40, activation_bytes=0, buffer_bytes=0)
    with pytest.raises(DoesNotFitError, match="state a smaller workload"):
        decide(costs, big, {"cpu": 1 << 30, "disk": 0}, WORKLOAD)


def test_the_reserve_is_inside_the_budget():
    assert decide([unit_cost(0, 1)], DEMAND, limits(1), WORKLOAD).estimate.peak_bytes["cpu"] >= RESERVE_BYTES


def test_peaks_are_sums_that_can_be_written_down():
    demand = Demand(
        kv_bytes=5 * 70 + 11,
        activation_bytes=1_300,
        buffer_bytes=90,
        device_activation_bytes=2_000,
        prompt_kv_bytes=(5 * 70 + 11) // 2,
        prefill_activation_bytes=1_300,
        decode_activation_bytes=400,
    )
    units = [cost(f"u.{n}", 1000 + n, kv_bytes=70, staging_bytes=16) for n in range(5)]
    problem_ = problem(units, demand, num_readers=4, ring_bytes=64)
    machine = replace(HOST, accelerators=(accelerator(0),))
    homes = {"u.0": "cuda:0", "u.1": "cuda:0", "u.2": "disk", "u.3": "disk", "u.4": "cpu"}
    limits = {"cuda:0": 1 << 50, "cpu": 1 << 50, "disk": 0}
    plan = planner.decide(problem_, machine, limits, homes=homes, max_slots=2)
    (group,) = plan.slots
    slots = group.num_slots * 1004
    device = CONTEXT_BYTES + 90 + 1000 + 1001 + slots
    host = RESERVE_BYTES + 90 + 1004 + 64 + 4 * 16  # what rests there, the ring, read buffers
    assert plan.estimate.peak_bytes == {"cuda:0": device + 2_000 + 361, "cpu": host, "disk": 0}
    assert plan.estimate.phase_peak_bytes == {
        "load": {"cuda:0": device, "cpu": host},
        "prefill": {"cuda:0": device + 2_000 + 180, "cpu": host},
        "decode": {"cuda:0": device + 2_000 + 361, "cpu": host},
    }
    # The ring is there for whatever an accelerator runs: what rests on the host may prove to be impossible to page-lock.
    on_host = planner.decide(problem_, machine, limits, homes=dict.fromkeys(homes, "cpu"), max_slots=2)
    assert on_host.estimate.peak_bytes["cpu"] == RESERVE_BYTES + 90 + sum(1000 + n for n in range(5)) + 64 + 4 * 16
    everything = planner.decide(problem_, HOST, {"cpu": 1 << 50, "disk": 0})
    resting = RESERVE_BYTES + 90 + sum(1000 + n for n in range(5)) + 4 * 16
    assert everything.estimate.phase_peak_bytes == {
        "load": {"cpu": resting},
        "prefill": {"cpu": resting + 1_300 + 180},
        "decode": {"cpu": resting + 400 + 361},
    }
    assert everything.estimate.peak_bytes["cpu"] == resting + 1_300 + 361
