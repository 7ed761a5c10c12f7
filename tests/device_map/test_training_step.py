"""The time of a pass with its backward: what is fetched twice, and what is computed again, worked out by hand."""

from dataclasses import replace

import pytest
from planning import COPY_S, LAYER, copying, cost, problem

import bigmodel
from bigmodel.device_map.rates import NOTHING
from bigmodel.device_map.tables import Choice, Tables
from bigmodel.device_map.training_step import training_step_s


def step_s(homes, *, c, num_slots=2, again=3.0):
    """Of layers that take COPY_S to be copied and c of it to be computed; a step takes so many times its forward."""
    units = [cost(f"u.{n}", LAYER) for n in range(len(homes))]
    costs = problem([replace(each, prefill=each.decode) for each in units])
    work = NOTHING
    for each in costs.units:
        work = work.plus(each.prefill, again)
    costs = replace(costs, recorded=work)
    tables = Tables(costs, copying(c=c), [[Choice.at(home, "cuda:0")] for home in homes])
    return training_step_s(tables, [0] * len(homes), num_slots)


def test_what_stays_takes_what_is_computed():
    assert step_s(["cuda:0"] * 8, c=0.5) == pytest.approx(3 * 8 * 0.5 * COPY_S)


def test_what_streams_is_fetched_twice_but_for_what_is_still_there():
    # Two are in their slots where backward begins, and two where the next step does.
    assert step_s(["cpu"] * 8, c=0.001) == pytest.approx((16 - 4) * COPY_S, rel=0.02)
    assert step_s(["cuda:0"] * 4 + ["cpu"] * 4, c=0.001) == pytest.approx((8 - 4) * COPY_S, rel=0.02)


def test_copies_hide_behind_longer_computations():
    # Forward takes twice a copy, backward four times.
    assert step_s(["cpu"] * 8, c=2.0) == pytest.approx(3 * 8 * 2 * COPY_S, rel=0.03)


def test_a_workload_that_trains_nothing_has_none(tiny_llama):
    workload = bigmodel.Workload(prompt_tokens=32, new_tokens=1)
    assert bigmodel.make_plan(tiny_llama, workload=workload).estimate.train_step_s is None


def test_a_plan_tells_the_time_of_a_step(tiny_llama):
    workload = bigmodel.Workload(prompt_tokens=32, new_tokens=1, trains=True)
    slow = replace(bigmodel.Machine.probe(), accelerators=(), disk_read_bytes_per_s=1e6)
    plan = bigmodel.make_plan(tiny_llama, slow, workload, device_map={"": "disk"})
    fetched = plan.streamed_bytes_from("disk", in_prefill=True)
    kept = 2 * sum(group.num_slots * group.slot_bytes for group in plan.slots)
    assert (2 * fetched - kept) / 1e6 * 0.95 <= plan.estimate.train_step_s <= 2.1 * fetched / 1e6
    assert "a pass of 1 x 32 tokens with its backward takes" in plan.explain()
    assert "are fetched twice" in plan.explain()
    assert bigmodel.Plan.from_json(plan.to_json()) == plan
