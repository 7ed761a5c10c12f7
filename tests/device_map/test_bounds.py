"""What each resource needs at least: by formulas, and never more than the simulation takes."""

import json
from dataclasses import replace

import pytest
from planning import DEMAND, HOST, WORKLOAD, accelerator, blocks, cost, plan_for, problem, room_on

from bigmodel.device_map.plan import Plan
from bigmodel.device_map.planner import decide
from bigmodel.device_map.rates import Rates, Work
from bigmodel.errors import InvalidArgumentError

DISK_BYTES_PER_S, MEMORY_BYTES_PER_S, FLOPS_PER_S = 1e9, 1e10, 1e12


def machine(**options):
    rates = Rates.roofline(MEMORY_BYTES_PER_S, {"bfloat16": FLOPS_PER_S}, op_s=1e-3)
    return replace(HOST, host_rates=rates, disk_read_bytes_per_s=DISK_BYTES_PER_S, **options)


def test_a_pass_needs_its_bytes_and_flops_over_their_rates():
    costs = [*blocks(6, 1_000_000), cost("head", 2_000_000, prefill_flops=5e9)]
    homes = {each.unit.name: "disk" for each in costs} | {"layers.0": "cpu"}
    plan = plan_for(costs, 8_000_000, DEMAND, machine=machine(), homes=homes)
    least = plan.estimate.least_s
    # The head has a slot of its own, and is read for the first pass alone.
    assert least["decode"] == pytest.approx(
        {
            "disk": 5e6 / DISK_BYTES_PER_S,
            "memory of cpu": 8e6 / MEMORY_BYTES_PER_S,
            "arithmetic of cpu": 8e6 / FLOPS_PER_S,
        }
    )
    assert least["prefill"]["disk"] == pytest.approx(7e6 / DISK_BYTES_PER_S)
    assert least["prefill"]["arithmetic of cpu"] == pytest.approx((5e9) / FLOPS_PER_S)
    assert plan.estimate.bytes_per_s == {"disk": DISK_BYTES_PER_S, "memory of cpu": MEMORY_BYTES_PER_S}
    # Operators' own time (a millisecond each) is no bound, and everything that is one is kept by the simulation.
    assert max(least["decode"].values()) <= plan.estimate.time_per_token_s
    assert max(least["prefill"].values()) <= plan.estimate.ttft_s


def test_links_that_are_used_together_share_what_they_reach_together():
    devices = tuple(accelerator(index, h2d=1e9) for index in range(2))
    layers = blocks(8, 1_000_000)
    limits = {"cpu": 1 << 30, "disk": 0, **{each.device: room_on(3_000_000) for each in devices}}
    homes = {each.unit.name: "cpu" for each in layers}
    runs = {each.unit.name: (f"cuda:{n % 2}",) * 2 for n, each in enumerate(layers)}
    for together, rate in ((float("inf"), 1e9), (1e9, 5e8)):
        here = machine(accelerators=devices, h2d_bytes_per_s_all=together)
        estimate = decide(problem(layers), here, limits, homes=homes, runs=runs).estimate
        assert estimate.bytes_per_s["link to cuda:0"] == pytest.approx(rate)
        assert estimate.least_s["decode"]["link to cuda:1"] == pytest.approx(4e6 / rate)
        assert estimate.binds["decode"] in estimate.least_s["decode"]


def test_activations_and_copies_of_operands_are_no_bound_of_memory():
    rates = Rates.roofline(MEMORY_BYTES_PER_S, {"bfloat16": FLOPS_PER_S}, op_s=0.0)
    work = Work({("bfloat16", 0): (1e6, 9e6), ("bfloat16 attention", 0): (1e6, 1e6)}, other_bytes=1e9, num_ops=7)
    assert rates.least_shares(work, 2e6) == {"memory": 2e6 / MEMORY_BYTES_PER_S, "arithmetic": 2e6 / FLOPS_PER_S}
    # Products may be measured to read faster than other operators do.
    faster = replace(rates, products={"bfloat16": ((1.0, 5 * MEMORY_BYTES_PER_S), (100.0, FLOPS_PER_S))})
    assert faster.best_bytes_per_s == 5 * MEMORY_BYTES_PER_S


def test_bounds_come_back_from_json_and_older_plans_have_none():
    plan = plan_for(blocks(4, 1_000_000), 3_000_000, machine=machine())
    assert plan.estimate.least_s["decode"]
    assert plan.workload == WORKLOAD
    assert Plan.from_json(plan.to_json()) == plan
    fields = json.loads(plan.to_json())
    for name, wrong in (
        ("least_s", {"decode": 3}),
        ("least_s", {"decode": {"disk": -1}}),
        ("bytes_per_s", {"disk": "1"}),
    ):
        changed = json.loads(plan.to_json())
        changed["estimate"][name] = wrong
        with pytest.raises(InvalidArgumentError, match=name):
            Plan.from_json(json.dumps(changed))
    del fields["estimate"]["least_s"], fields["estimate"]["bytes_per_s"]
    older = Plan.from_json(json.dumps(fields))
    assert (older.estimate.least_s, older.estimate.bytes_per_s) == ({}, {})
