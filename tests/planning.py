"""Small planning problems: units of any size, and a plan for so much room."""

from bigmodel.device_map.demand import CONTEXT_BYTES, Costs, Demand, UnitCost
from bigmodel.device_map.machine import Accelerator, Machine
from bigmodel.device_map.plan import Plan, Workload
from bigmodel.device_map.planner import decide
from bigmodel.device_map.rates import Rates, Work
from bigmodel.device_map.unit import Unit

WORKLOAD = Workload(batch_size=2, prompt_tokens=16, new_tokens=8)
NOTHING = Demand(kv_bytes=0, activation_bytes=0, buffer_bytes=0)
DEMAND = Demand(kv_bytes=700, activation_bytes=1_300, buffer_bytes=90, baseline_bytes=12345)
DISK = 10**9
# A layer's copy over a link, as others measured it.
COPY_S = 2.74 / 40
H2D = 25e9
LAYER = int(COPY_S * H2D)
HOST = Machine(name="host", host_bytes=1 << 40, num_processors=2, disk_bytes=1 << 40)


def cost(name: str, num_bytes: int, *, prefill_flops: float = 0.0, pad: int = 0, **options) -> UnitCost:
    """A unit that reads its weights once in a decode step, and does so many FLOPs in the prefill."""
    unit = Unit(name, (f"{name}.weight",), (name,), options.get("must_stay", False), options.get("can_gather", False))
    return UnitCost(
        unit=unit,
        weight_bytes=num_bytes,
        resident_bytes=num_bytes,
        slot_bytes=num_bytes + pad,
        prefill=Work.of_product("bfloat16", prefill_flops, float(num_bytes)),
        decode=Work.of_product("bfloat16", float(num_bytes), float(num_bytes)),
        **options,
    )


def blocks(count: int, num_bytes: int = 1000, prefix: str = "layers") -> list[UnitCost]:
    return [cost(f"{prefix}.{number}", num_bytes) for number in range(count)]


def plan_for(
    costs, room: int, demand: Demand = NOTHING, *, machine: Machine = HOST, disk: int = DISK, **options
) -> Plan:
    """The plan where `room` bytes of host memory are left for weights, slots and read buffers."""
    return decide(problem(costs, demand), machine, {"cpu": room + demand.total_bytes, "disk": disk}, **options)


def problem(costs, demand: Demand = NOTHING, *, workload: Workload = WORKLOAD, **options) -> Costs:
    return Costs(units=tuple(costs), demand=demand, workload=workload, **options)


def accelerator(index: int, **rates) -> Accelerator:
    """A fast one, or with other rates: memory and h2d in bytes/s."""
    memory, h2d = rates.pop("memory", 1e12), rates.pop("h2d", 25e9)
    roofline = Rates.roofline(memory, {"bfloat16": 150e12}, 5e-6)
    return Accelerator(
        device=f"cuda:{index}", name="card", memory_bytes=1 << 40, rates=roofline, h2d_bytes_per_s=h2d, **rates
    )


def room_on(num_bytes: int, demand: Demand = NOTHING) -> int:
    """The limit of an accelerator on which so much is left for weights and slots."""
    return int(num_bytes) + CONTEXT_BYTES + demand.device_activation_bytes + demand.buffer_bytes


def copying(num_accelerators=1, *, c=0.5, disk=1e30, **options):
    """Copies of a layer take COPY_S, its computation c times as long, operators nothing beside their bytes."""
    roofline = Rates.roofline(LAYER / (c * COPY_S), {"bfloat16": 1e30}, 0.0)
    cards = tuple(
        Accelerator(device=f"cuda:{n}", name="card", memory_bytes=1 << 50, rates=roofline, h2d_bytes_per_s=H2D)
        for n in range(num_accelerators)
    )
    return Machine(
        name="m",
        host_bytes=1 << 50,
        num_processors=1,
        disk_bytes=1 << 50,
        accelerators=cards,
        disk_read_bytes_per_s=disk,
        **options,
    )
