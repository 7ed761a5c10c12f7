"""Which processors a process is kept to: those next to its memory and its device."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

__all__ = ["bind", "share_of"]

_NVIDIA, _DISPLAYS = "0x10de", ("0x0300", "0x0302")


def bind(
    local_rank: int, num_local: int, *, root: Path = Path("/"), environment: Mapping[str, str] | None = None
) -> None:
    """Keep this process, and what it starts, to its share of the processors; does nothing where all are equally near."""
    nodes = _nodes(root)
    known = os.environ if environment is None else environment
    share = share_of(os.sched_getaffinity(0), nodes, local_rank, num_local, _device_nodes(root, known))
    if share:
        os.sched_setaffinity(0, share)


def share_of(
    allowed: Collection[int],
    nodes: Mapping[int, Collection[int]],
    local_rank: int,
    num_local: int,
    device_nodes: Sequence[int] = (),
) -> set[int]:
    """Processors of one process; none where it is better left alone.

    Args:
        allowed: processors that this process may use.
        nodes: number of a NUMA node -> its processors.
        local_rank, num_local: of the process, among those of its machine.
        device_nodes: of the accelerators, by index; where they are not known processes are spread over nodes in order.
    """
    own = {number: set(each) & set(allowed) for number, each in sorted(nodes.items())}
    own = {number: each for number, each in own.items() if each}
    if len(own) < 2:
        return set()
    if len(device_nodes) >= num_local:
        return own.get(device_nodes[local_rank], set())
    if num_local >= len(own):
        return own[list(own)[local_rank * len(own) // num_local]]
    first, last = (place * len(own) // num_local for place in (local_rank, local_rank + 1))
    return set().union(*list(own.values())[first:last])


def _nodes(root: Path) -> dict[int, set[int]]:
    found = {}
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        try:
            found[int(folder.name[4:])] = _numbers((folder / "cpulist").read_text())
        except (OSError, ValueError):
            continue
    return found


def _device_nodes(root: Path, environment: Mapping[str, str]) -> list[int]:
    """NUMA nodes of the devices that CUDA shows, in its order for equal ones (by bus); empty where it is not known."""
    buses = []
    for folder in (root / "sys/bus/pci/devices").glob("*"):
        try:
            is_one = (folder / "vendor").read_text().strip() == _NVIDIA
            if is_one and (folder / "class").read_text().strip().startswith(_DISPLAYS):
                buses.append((folder.name, int((folder / "numa_node").read_text())))
        except (OSError, ValueError):
            continue
    nodes = [node for _, node in sorted(buses)]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        places = visible.split(",")
        if not all(place.strip().isdecimal() and int(place) < len(nodes) for place in places):
            return []
        nodes = [nodes[int(place)] for place in places]
    return [] if any(node < 0 for node in nodes) else nodes


def _numbers(text: str) -> set[int]:
    found: set[int] = set()
    for piece in text.strip().split(","):
        if piece:
            first, _, last = piece.partition("-")
            found |= set(range(int(first), int(last or first) + 1))
    return found
