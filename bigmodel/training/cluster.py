"""What there is to train on: equal processes on nodes, what each may use, and how fast they compute and talk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from bigmodel.device_map.machine import Machine
from bigmodel.device_map.rates import Rates, Work
from bigmodel.errors import InvalidArgumentError

__all__ = ["Cluster"]

# Of what is free, left to others: what the system, libraries and the forecast's own error take.
_SPARE = 0.05
# Between nodes, where nobody stated it: eight links of 100 Gbit/s, all processes of a node together.
_NETWORK_BYTES_PER_S = 100e9
# Between processes of one host over gloo: measured on two cores, 32 MiB at a time.
_GLOO_BYTES_PER_S = 1.0e9
# What gloo takes to gather and to reduce into parts, over what it takes to send as many bytes in a sum for all: it copies what it
# gathers, and sums everything everywhere. 8 to 64 MiB on two cores: 1.8 to 3, and 3.3 to 4.
_GLOO_GATHERS, _GLOO_REDUCES = 2.2, 3.6
# Of one collective, Python and hooks of DeepSpeed included.
_GLOO_MESSAGE_S, _DEVICE_MESSAGE_S = 2.5e-3, 2e-5
# Writes of a disk, over its reads, where nobody measured them.
_WRITES = 0.5
# Of blocks and what their allocator adds: see `Forecast`.
_HOST_ALLOCATED, _DEVICE_ALLOCATED = 1.02, 1.05


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal processes on equal nodes.

    Attributes:
        rates: of what one process computes on.
        host_rates: of its share of the host's processors.
        limit_bytes: that one process may use where it computes: of unequal devices the smallest's.
        host_limit_bytes: that it may use of its host's memory.
        num_nodes, num_per_node: processes.
        is_host: whether the host's processors compute.
        link_bytes_per_s: from one process to another of the same node.
        network_bytes_per_s: from one node to another, of all its processes together.
        h2d_bytes_per_s: from host memory to the device, of each process when all copy.
        disk_read_bytes_per_s, disk_write_bytes_per_s: of each process when all do, past the page cache; None for half the
            reads.
        disk_limit_bytes: that one process may keep on its machine's disk; 0 where none is used.
        wasted_bytes: of larger devices, that equal parts leave unused on a node.
        name: of the machine.
    """

    rates: Rates
    host_rates: Rates
    limit_bytes: int
    host_limit_bytes: int
    num_nodes: int = 1
    num_per_node: int = 1
    is_host: bool = True
    link_bytes_per_s: float = _GLOO_BYTES_PER_S
    network_bytes_per_s: float = _NETWORK_BYTES_PER_S
    h2d_bytes_per_s: float = 20e9
    disk_read_bytes_per_s: float = 2e9
    disk_write_bytes_per_s: float | None = None
    disk_limit_bytes: int = 0
    wasted_bytes: int = 0
    name: str = ""

    @classmethod
    def of(
        cls,
        machine: Machine,
        *,
        num_nodes: int = 1,
        num_per_node: int | None = None,
        network_bytes_per_s: float = _NETWORK_BYTES_PER_S,
        link_bytes_per_s: float | None = None,
        spare: float = _SPARE,
    ) -> Cluster:
        """Nodes like a machine.

        Args:
            machine: of which each node is one.
            num_nodes: how many there are.
            num_per_node: processes of each: all accelerators, or one on the host's processors, if None.
            network_bytes_per_s, link_bytes_per_s: as the attributes; the machine's, or a default, if None.
            spare: part of memory and disk that is left to others; 0 where what the machine has is what may be used.

        Raises:
            InvalidArgumentError: there are more processes than accelerators.
        """
        accelerators = machine.accelerators
        number = num_per_node or max(1, len(accelerators))
        if accelerators and number > len(accelerators):
            raise InvalidArgumentError(
                f"{number} processes on a node, and {machine.name!r} has {len(accelerators)} accelerators. Give at most as many."
            )
        host = int(machine.host_bytes * (1 - spare)) // number
        disk: dict[str, Any] = {
            "disk_read_bytes_per_s": machine.disk_read_bytes_per_s / number,
            "disk_limit_bytes": int(machine.disk_bytes * (1 - spare)) // number,
        }
        if not accelerators:
            return cls(
                rates=machine.host_rates,
                host_rates=machine.host_rates,
                limit_bytes=host,
                host_limit_bytes=host,
                num_nodes=num_nodes,
                num_per_node=number,
                link_bytes_per_s=link_bytes_per_s or _GLOO_BYTES_PER_S,
                network_bytes_per_s=network_bytes_per_s,
                name=machine.name,
                **disk,
            )
        used = accelerators[:number]
        least = min(each.memory_bytes for each in used)
        slowest = max(used, key=lambda each: each.rates.seconds(_A_PRODUCT))
        links = min(each.h2d_bytes_per_s for each in used)
        return cls(
            rates=slowest.rates,
            host_rates=machine.host_rates,
            limit_bytes=int(least * (1 - spare)),
            host_limit_bytes=host,
            num_nodes=num_nodes,
            num_per_node=number,
            is_host=False,
            link_bytes_per_s=link_bytes_per_s or machine.d2d_bytes_per_s,
            network_bytes_per_s=network_bytes_per_s,
            h2d_bytes_per_s=min(links, machine.h2d_bytes_per_s_all / number),
            wasted_bytes=sum(each.memory_bytes - least for each in used),
            name=machine.name,
            **disk,
        )

    @property
    def num_processes(self) -> int:
        return self.num_nodes * self.num_per_node

    @property
    def copies_collectives(self) -> int:
        """How many copies the library makes of what is gathered or reduced while it is: gloo one, NCCL none."""
        return int(self.is_host)

    @property
    def allocated(self) -> float:
        """What an allocator takes for a byte that is asked for."""
        return _HOST_ALLOCATED if self.is_host else _DEVICE_ALLOCATED

    def disk_s(self, read_bytes: float, written_bytes: float) -> float:
        """Seconds of reads and writes of each process, one after the other."""
        writes = self.disk_write_bytes_per_s or _WRITES * self.disk_read_bytes_per_s
        return read_bytes / self.disk_read_bytes_per_s + written_bytes / writes

    def compute_s(self, work: Work) -> float:
        """Seconds of work where a process computes; on the host its processors are shared."""
        return self.rates.seconds(work) * (self.num_per_node if self.is_host else 1)

    def host_s(self, work: Work) -> float:
        """Seconds of work on a process's share of the host's processors."""
        return self.host_rates.seconds(work) * self.num_per_node

    def host_stream_s(self, work: Work) -> float:
        """The same of operators that go through large float32 tensors in order: memory at its best."""
        fast = replace(self.host_rates, memory_bytes_per_s=self.host_rates.best_bytes_per_s)
        return fast.seconds(work) * self.num_per_node

    def copy_s(self, num_bytes: float, *, is_fresh: bool = True) -> float:
        """Seconds of copies, into memory that a host gives anew or that was there."""
        return self.compute_s(Work(other_bytes=2 * num_bytes, fresh_bytes=num_bytes if is_fresh else 0.0))

    @property
    def message_s(self) -> float:
        """Seconds that sending takes beside its bytes: gloo's threads wake, NCCL starts a kernel."""
        return _GLOO_MESSAGE_S if self.is_host else _DEVICE_MESSAGE_S

    def gather_s(self, num_bytes: float, size: int) -> float:
        """Seconds until all of `size` processes have all of these bytes, of which each has its part.

        A ring sends (n - 1) / n of them over each link: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms, 2009.
        """
        if size <= 1:
            return 0.0
        times = _GLOO_GATHERS if self.is_host else 1.0
        return times * num_bytes * (size - 1) / size / self._bytes_per_s(size)

    def reduce_s(self, num_bytes: float, size: int) -> float:
        """Seconds until each has its part of a sum."""
        times = _GLOO_REDUCES if self.is_host else 1.0
        return times * num_bytes * (size - 1) / size / self._bytes_per_s(size) if size > 1 else 0.0

    def all_reduce_s(self, num_bytes: float, size: int, *, beside: int = 1) -> float:
        """Seconds until all have all of a sum.

        Args:
            beside: neighbours that do the same at the same time, each with others of its place: where a node holds them, what
                they send leaves it, over one network.
        """
        if size > 1 and beside > 1 and size * beside > self.num_per_node:
            together = min(beside, self.num_per_node)
            return 2 * num_bytes * (size - 1) / size / min(self.link_bytes_per_s, self.network_bytes_per_s / together)
        return 2 * num_bytes * (size - 1) / size / self._bytes_per_s(size) if size > 1 else 0.0

    def _bytes_per_s(self, size: int) -> float:
        """Of a ring over `size` processes: one that leaves a node goes over the network, which its processes share."""
        if size <= self.num_per_node:
            return self.link_bytes_per_s
        return min(self.link_bytes_per_s, self.network_bytes_per_s)


_A_PRODUCT = Work.of_product("bfloat16", 1e12, 1e9)
