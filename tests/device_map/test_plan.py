"""Plans as data: there and back as JSON, and as a table that a person reads."""

import json

import pytest
from planning import DEMAND, blocks, cost, plan_for

from bigmodel.device_map.plan import Plan, Workload
from bigmodel.errors import InvalidArgumentError


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


@pytest.mark.parametrize(
    "change", [{"version": 99}, {"version": None}, {"placements": 3}, {"slots": [{}]}, {"extra": 1}]
)
def test_texts_that_are_no_plan(change):
    fields = json.loads(example().to_json()) | change
    with pytest.raises(InvalidArgumentError):
        Plan.from_json(json.dumps(fields))


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", "null"])
def test_texts_that_are_no_json_object(text):
    with pytest.raises(InvalidArgumentError):
        Plan.from_json(text)


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


def test_home_of_a_unit():
    plan = example()
    assert plan.home_of("model.layers.3") == "cpu"
    assert plan.home_of("model.layers.4") == "disk"
    assert plan.home_of("model.norm") == "cpu"
    with pytest.raises(KeyError):
        plan.home_of("model")


@pytest.mark.parametrize(
    "fields",
    [{"batch_size": 0}, {"batch_size": True}, {"prompt_tokens": 0}, {"prompt_tokens": 1.5}, {"new_tokens": -1}],
)
def test_workloads_that_mean_nothing(fields):
    (name,) = fields
    with pytest.raises(InvalidArgumentError, match=name):
        Workload(**fields)


def test_a_workload_fills_its_cache_to_the_end():
    assert Workload(prompt_tokens=10, new_tokens=5).total_tokens == 15
    assert Workload(new_tokens=0).total_tokens == 512
