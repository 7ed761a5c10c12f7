"""Small planning problems: units of any size, and a plan for so much room."""

from bigmodel.device_map.plan import Plan, Workload
from bigmodel.device_map.planner import Demand, UnitCost, decide
from bigmodel.device_map.unit import Unit

WORKLOAD = Workload(batch_size=2, prompt_tokens=16, new_tokens=8)
NOTHING = Demand(kv_bytes=0, activation_bytes=0, buffer_bytes=0)
DEMAND = Demand(kv_bytes=700, activation_bytes=1_300, buffer_bytes=90, baseline_bytes=12345)
DISK = 10**9


def cost(name: str, num_bytes: int, **options) -> UnitCost:
    unit = Unit(name, (f"{name}.weight",), (name,), options.get("must_stay", False), options.get("can_gather", False))
    return UnitCost(
        unit=unit,
        weight_bytes=num_bytes,
        resident_bytes=num_bytes,
        slot_bytes=num_bytes + options.pop("pad", 0),
        **options,
    )


def blocks(count: int, num_bytes: int = 1000, prefix: str = "layers") -> list[UnitCost]:
    return [cost(f"{prefix}.{number}", num_bytes) for number in range(count)]


def plan_for(costs, room: int, demand: Demand = NOTHING, **options) -> Plan:
    """The plan where `room` bytes are left for weights, slots and read buffers."""
    limits = {"cpu": room + demand.total_bytes, "disk": options.pop("disk", DISK)}
    return decide(costs, demand, limits, WORKLOAD, **options)
