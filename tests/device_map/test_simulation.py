"""The simulation against what can be worked out by hand, and against figures that others published."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from planning import COPY_S, H2D, HOST, LAYER, cost, plan_for, problem, room_on
from planning import copying as machine

from bigmodel.device_map.planner import decide, timeline
from bigmodel.device_map.simulation import simulate
from bigmodel.device_map.tables import Choice, Tables

GB = 10**9


def step_s(homes, runs, *, num_accelerators=1):
    units = [cost(f"u.{n}", LAYER) for n in range(len(homes))]
    limits = {f"cuda:{n}": 1 << 50 for n in range(num_accelerators)} | {"cpu": 1 << 50, "disk": 0}
    plan = decide(
        problem(units),
        machine(num_accelerators, c=0.1),
        limits,
        homes={f"u.{n}": home for n, home in enumerate(homes)},
        runs={f"u.{n}": (device, device) for n, device in enumerate(runs)},
        max_slots=2,
    )
    return plan.estimate.time_per_token_s


def simulated_s(homes, *, c, num_slots):
    """With exactly so many slots, whatever the planner thinks of fewer."""
    units = [cost(f"u.{n}", LAYER) for n in range(len(homes))]
    tables = Tables(problem(units), machine(c=c), [[Choice.at(home, "cuda:0")] for home in homes])
    outcome = simulate(tables, np.zeros((1, len(homes)), np.int64), np.array([num_slots]))
    return float(outcome.step_s[0])


SPREAD = ["cpu" if n % 2 else "cuda:0" for n in range(80)]
TAIL = ["cuda:0"] * 40 + ["cpu"] * 40


@pytest.mark.parametrize(
    ("c", "tail", "spread_1", "spread_2"),
    [(0.05, 2.74, 2.87, 2.74), (0.25, 3.32, 3.42, 2.74), (0.5, 4.04, 4.11, 2.74), (1.0, 5.48, 5.48, 5.48)],
)
def test_40_of_80_layers_streamed_as_published(c, tail, spread_1, spread_2):
    assert simulated_s(TAIL, c=c, num_slots=2) == pytest.approx(tail, rel=0.006)
    assert simulated_s(SPREAD, c=c, num_slots=1) == pytest.approx(spread_1, rel=0.006)
    assert simulated_s(SPREAD, c=c, num_slots=2) == pytest.approx(spread_2, rel=0.006)


@pytest.mark.parametrize(("num_units", "num_slots", "c"), [*itertools.product([3, 7], [1, 2, 3], [0.2, 1.0, 3.0])])
def test_everything_streamed_takes_what_the_slower_of_link_and_computation_takes(num_units, num_slots, c):
    found = simulated_s(["cpu"] * num_units, c=c, num_slots=num_slots)
    if num_slots >= num_units:
        expected = num_units * c * COPY_S  # what has a slot of its own is fetched once
    elif num_slots == 1:
        expected = num_units * (1 + c) * COPY_S
    else:
        expected = num_units * max(1, c) * COPY_S
    assert found == pytest.approx(expected, rel=1e-9)


def test_two_links_in_turn_are_twice_as_fast_as_one():
    homes = ["cpu"] * 40
    one = step_s(homes, ["cuda:0"] * 40)
    in_turn = step_s(homes, ["cuda:0", "cuda:1"] * 20, num_accelerators=2)
    parts = step_s(homes, ["cuda:0"] * 20 + ["cuda:1"] * 20, num_accelerators=2)
    assert in_turn == pytest.approx(one / 2, rel=0.01)
    assert in_turn < parts < one


def test_links_that_share_a_root_are_no_faster_together():
    units = [cost(f"u.{n}", LAYER) for n in range(20)]
    limits = {"cuda:0": 1 << 50, "cuda:1": 1 << 50, "cpu": 1 << 50, "disk": 0}
    homes = {f"u.{n}": "cpu" for n in range(20)}
    runs = {f"u.{n}": (f"cuda:{n % 2}",) * 2 for n in range(20)}
    times = []
    for together in (2 * H2D, H2D):
        shared = machine(2, c=0.1, h2d_bytes_per_s_all=together)
        times.append(decide(problem(units), shared, limits, homes=homes, runs=runs).estimate.time_per_token_s)
    assert times[1] == pytest.approx(2 * times[0], rel=0.02)


def test_from_disk_through_the_host_the_slower_of_the_two_counts():
    units = [cost(f"u.{n}", LAYER) for n in range(20)]
    limits = {"cuda:0": room_on(3 * LAYER), "cpu": 10 * LAYER, "disk": 0}
    homes = {f"u.{n}": "disk" for n in range(20)}
    for disk, expected in ((H2D / 4, 4 * COPY_S), (H2D * 4, COPY_S)):
        plan = decide(problem(units), machine(c=0.1, disk=disk), limits, homes=homes)
        assert plan.estimate.time_per_token_s == pytest.approx(20 * expected, rel=0.02)
        assert plan.estimate.binds["decode"] == ("disk" if disk < H2D else "link to cuda:0")


def test_the_first_pass_waits_for_what_the_steps_do_not():
    units = [cost(f"u.{n}", GB) for n in range(4)]
    plan = plan_for(units, 3 * GB, homes={f"u.{n}": "disk" for n in range(4)})
    read_s = GB / HOST.disk_read_bytes_per_s
    assert plan.estimate.ttft_s >= 4 * read_s
    assert plan.estimate.time_per_token_s == pytest.approx(4 * read_s, rel=0.1)
    # Nothing is read ahead of it, and the first unit's bytes come before anything runs.
    assert plan.estimate.ttft_s > plan.estimate.time_per_token_s


def test_the_timeline_is_what_the_estimate_says():
    units = [cost(f"u.{n}", GB) for n in range(6)]
    costs = problem(units)
    homes = {f"u.{n}": "cpu" if n % 2 else "disk" for n in range(6)}
    plan = plan_for(units, 6 * GB, homes=homes)
    steps = timeline(plan, costs, HOST)
    first = [step for step in steps if step.number == 0]
    assert [step.unit for step in first] == list(range(6))
    assert first[-1].run[1] == pytest.approx(plan.estimate.ttft_s)
    assert [step.read is not None for step in first] == [True, False] * 3
    ends = [max(step.run[1] for step in steps if step.number == number) for number in range(4)]
    assert (ends[3] - ends[1]) / 2 == pytest.approx(plan.estimate.time_per_token_s)
    for before, after in itertools.pairwise(steps):
        assert before.run[1] <= after.run[0] + 1e-12
    for step in steps:
        assert step.read is None or step.read[1] <= step.run[0]


def test_a_unit_that_does_not_run_in_a_step_is_not_fetched_for_it():
    encoder = [cost(f"encoder.{n}", GB) for n in range(3)]
    for number, unit in enumerate(encoder):
        encoder[number] = type(unit)(**{name: getattr(unit, name) for name in unit.__slots__} | {"decode": None})
    decoder = [cost(f"decoder.{n}", GB) for n in range(3)]
    homes = {unit.unit.name: "disk" for unit in (*encoder, *decoder)}
    read_s = GB / HOST.disk_read_bytes_per_s
    plan = plan_for([*encoder, *decoder], 3 * GB, homes=homes, max_slots=2)
    assert plan.estimate.time_per_token_s == pytest.approx(3 * read_s, rel=0.1)
    assert plan.estimate.ttft_s >= 6 * read_s


def test_the_first_pass_touches_the_hosts_slots_for_the_first_time():
    fresh = replace(HOST, host_rates=replace(HOST.host_rates, fresh_bytes_per_s=GB / 2))
    for num_units, num_touched in ((1, 1), (2, 2), (7, 3)):
        units = [cost(f"u.{n}", GB) for n in range(num_units)]
        homes = {f"u.{n}": "disk" for n in range(num_units)}
        without, touching = (plan_for(units, 9 * GB, homes=homes, machine=each).estimate for each in (HOST, fresh))
        assert touching.ttft_s - without.ttft_s == pytest.approx(2 * num_touched)
        assert touching.time_per_token_s == pytest.approx(without.time_per_token_s)
