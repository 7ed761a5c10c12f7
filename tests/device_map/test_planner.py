"""Plans keep their limits, place every unit once, and make the most of the memory there is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning import DEMAND, DISK, NOTHING, WORKLOAD, blocks, cost, plan_for

from bigmodel.device_map.plan import Plan
from bigmodel.device_map.planner import MAX_SLOTS, RESERVE_BYTES, Demand, UnitCost, decide, refuse_accelerators
from bigmodel.errors import DeviceMapError, DoesNotFitError


def away(plan: Plan) -> list[str]:
    return [placement.unit for placement in plan.placements if placement.home == "disk"]


def resident_bytes(plan: Plan) -> int:
    return sum(placement.weight_bytes for placement in plan.placements if placement.home == "cpu")


@st.composite
def cost_lists(draw: st.DrawFn) -> list[UnitCost]:
    """A few kinds of units, as models have: runs of equal blocks, odd ones, tables, units that must stay."""
    costs: list[UnitCost] = []
    for kind in range(draw(st.integers(1, 4))):
        size = draw(st.sampled_from([1, 7, 100, 130, 199, 250, 1000, 1024]))
        shape = draw(st.sampled_from(["blocks", "blocks", "table", "stays"]))
        for number in range(draw(st.integers(1, 9)) if shape == "blocks" else 1):
            costs.append(
                cost(
                    f"kind{kind}.{number}",
                    size + draw(st.integers(0, 3)),
                    pad=draw(st.integers(0, 5)),
                    can_gather=shape == "table",
                    must_stay=shape == "stays",
                    staging_bytes=draw(st.sampled_from([0, 0, 16])),
                )
            )
    return draw(st.permutations(costs)) if draw(st.booleans()) else costs


def check(plan: Plan, costs: list[UnitCost], demand: Demand, num_readers: int = 1) -> None:
    by_name = {each.unit.name: each for each in costs}
    assert [placement.unit for placement in plan.placements] == [each.unit.name for each in costs]
    assert all(placement.home in ("cpu", "disk") for placement in plan.placements)
    assert (
        {placement.run_on for placement in plan.placements}
        == {placement.prefill_on for placement in plan.placements}
        == {"cpu"}
    )
    gone = away(plan)
    assert not any(by_name[name].must_stay for name in gone)
    streamed = sorted(name for group in plan.slots for name in group.units)
    assert streamed == sorted(name for name in gone if not by_name[name].can_gather)
    for group in plan.slots:
        sizes = [by_name[name].slot_bytes for name in group.units]
        assert group.slot_bytes == max(sizes) < 2 * min(sizes)
        assert 1 <= group.num_slots <= min(len(sizes), MAX_SLOTS)
    stay = sum(each.resident_bytes for each in costs if each.unit.name not in gone)
    slots = sum(group.num_slots * group.slot_bytes for group in plan.slots)
    staging = num_readers * max(each.staging_bytes for each in costs)
    peak = stay + slots + staging + demand.kv_bytes + demand.activation_bytes + demand.buffer_bytes + RESERVE_BYTES
    assert plan.estimate.peak_bytes["cpu"] == peak <= plan.limits["cpu"]
    assert plan.estimate.baseline_bytes == demand.baseline_bytes
    assert resident_bytes(plan) + sum(by_name[name].weight_bytes for name in gone) == plan.weight_bytes


@given(cost_lists(), st.integers(0, 12_000), st.sampled_from([1, 4]))
def test_any_plan_keeps_its_limit_and_places_every_unit_once(costs, room, num_readers):
    try:
        plan = plan_for(costs, room, DEMAND, num_readers=num_readers)
    except DoesNotFitError as error:
        refusal = error
    else:
        refusal = None
    if refusal is not None:
        assert refusal.tier == "cpu"
        assert refusal.available_bytes == room + DEMAND.total_bytes < refusal.needed_bytes
        return
    check(plan, costs, DEMAND, num_readers)
    assert plan == plan_for(costs, room, DEMAND, num_readers=num_readers)


@given(cost_lists(), st.integers(0, 12_000), st.integers(1, 3_000))
def test_more_memory_never_leaves_fewer_bytes_resident(costs, room, more):
    try:
        less = plan_for(costs, room)
    except DoesNotFitError:
        return
    assert resident_bytes(plan_for(costs, room + more)) >= resident_bytes(less)


@given(cost_lists(), st.integers(0, 3_000))
def test_the_limit_that_an_error_names_is_the_smallest_that_would_do(costs, room):
    try:
        plan_for(costs, room)
    except DoesNotFitError as error:
        plan_for(costs, error.needed_bytes - NOTHING.total_bytes)
        with pytest.raises(DoesNotFitError):
            plan_for(costs, error.needed_bytes - NOTHING.total_bytes - 1)


@given(cost_lists(), st.integers(0, 12_000), st.data())
def test_homes_that_are_given_are_honoured(costs, room, data):
    homes = {each.unit.name: data.draw(st.sampled_from(["cpu", "disk"])) for each in costs}
    stays = {each.unit.name for each in costs if each.must_stay}
    try:
        plan = plan_for(costs, room, homes=homes)
    except DoesNotFitError:
        return
    check(plan, costs, NOTHING)
    for placement in plan.placements:
        assert placement.home == ("cpu" if placement.unit in stays else homes[placement.unit])
    moved = [name for name in stays if homes[name] == "disk"]
    assert all(name in " ".join(plan.notes) for name in moved)


def test_what_fits_stays():
    costs = [cost("embed", 500, can_gather=True), *blocks(8), cost("head", 900)]
    plan = plan_for(costs, 9_400)
    assert away(plan) == []
    assert plan.slots == ()
    assert away(plan_for(costs, 9_399)) == ["embed"]


def test_tables_rest_on_disk_before_blocks_do_and_need_no_slot():
    costs = [cost("embed", 5_000, can_gather=True), *blocks(8)]
    plan = plan_for(costs, 8_000)
    assert away(plan) == ["embed"]
    assert plan.slots == ()


@pytest.mark.parametrize(("count", "room"), [(24, 15_000), (24, 23_000), (24, 4_000), (7, 6_000), (32, 20_000)])
def test_streamed_units_are_spread_evenly_among_resident_ones(count, room):
    plan = plan_for(blocks(count), room)
    numbers = [int(name.rpartition(".")[2]) for name in away(plan)]
    # 3 slots are reserved, the rest of the room is resident blocks
    assert len(numbers) == count - room // 1000 + 3
    # as a ring: after the last comes the first of the next pass
    gaps = [(after - before) % count for before, after in zip(numbers, [*numbers[1:], numbers[0]], strict=True)]
    assert max(gaps) - min(gaps) <= 1


def test_small_units_stay_before_large_ones():
    costs = [*blocks(12, 10, "norms"), *blocks(12)]
    plan = plan_for(costs, 3_000 + 120 + 2_500)
    assert {name.partition(".")[0] for name in away(plan)} == {"layers"}
    assert len(away(plan)) == 10


def test_slots_fall_to_two_and_one_before_the_plan_gives_up():
    costs = blocks(10)
    assert [plan_for(costs, room).slots[0].num_slots for room in (3_000, 2_999, 2_000, 1_999, 1_000)] == [3, 2, 2, 1, 1]
    with pytest.raises(DoesNotFitError):
        plan_for(costs, 999)
    assert plan_for(costs, 9_000, max_slots=1).slots[0].num_slots == 1


def test_units_of_unlike_size_have_slots_of_their_own():
    costs = [*blocks(6), *blocks(6, 90, "small"), cost("odd", 1_900)]
    plan = plan_for(costs, 8_000, homes={each.unit.name: "disk" for each in costs})
    assert [(group.slot_bytes, group.num_slots, len(group.units)) for group in plan.slots] == [
        (1_900, 3, 7),
        (90, 3, 6),
    ]


def test_all_resident_or_an_error_with_the_numbers():
    assert away(plan_for(blocks(4), 4_000, all_resident=True)) == []
    with pytest.raises(DoesNotFitError, match=r"Raise max_memory\['cpu'\] to \d+MiB") as caught:
        plan_for(blocks(4), 3_999, all_resident=True)
    assert caught.value.needed_bytes == 4_000 + RESERVE_BYTES
    assert caught.value.available_bytes == 3_999 + RESERVE_BYTES
    assert "device_map='auto'" in str(caught.value)


def test_a_workload_that_is_too_large_is_told_apart_from_weights():
    demand = Demand(kv_bytes=1 << 30, activation_bytes=1 << 20, buffer_bytes=0)
    with pytest.raises(DoesNotFitError, match="state a smaller workload"):
        decide(blocks(4), demand, {"cpu": 100 << 20, "disk": DISK}, WORKLOAD)
    with pytest.raises(DoesNotFitError) as caught:
        decide(blocks(4, 1 << 30), NOTHING, {"cpu": 100 << 20, "disk": DISK}, WORKLOAD)
    assert "workload" not in str(caught.value)


def test_converted_weights_that_rest_on_disk_are_within_its_limit():
    costs = [cost(f"layers.{number}", 1000, converted_bytes=400) for number in range(4)]
    plan = plan_for(costs, 3_000, homes={each.unit.name: "disk" for each in costs})
    assert plan.estimate.peak_bytes["disk"] == 1_600
    with pytest.raises(DoesNotFitError, match="disk") as caught:
        plan_for(costs, 3_000, disk=1_599, homes={each.unit.name: "disk" for each in costs})
    assert caught.value.tier == "disk"


def test_read_buffers_are_counted_for_every_reader():
    costs = [cost("a", 100, staging_bytes=40), cost("b", 100, staging_bytes=60)]
    assert plan_for(costs, 2_000, num_readers=4).staging_bytes == 240
    with pytest.raises(DoesNotFitError):
        plan_for(costs, 439, num_readers=4, all_resident=True)


def test_accelerators_are_refused_by_name():
    refuse_accelerators({"a": "cpu", "b": "disk"})
    with pytest.raises(DeviceMapError, match="cuda:0, cuda:1"):
        refuse_accelerators({"a": "cuda:1", "b": "cuda:0", "c": "cpu"})
