"""What a step of training takes with each engine: bytes of a process by kind, seconds by what they go to. Pure functions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bigmodel.device_map.rehearsal import Moment, Rehearsal
from bigmodel.footprint import MAPPED_BYTES
from bigmodel.training.cluster import Cluster
from bigmodel.training.job import Job

__all__ = ["KINDS", "Forecast", "Way", "forecast"]

KINDS = ("parameters", "optimizer", "gradients", "activations", "gathered", "buckets")
"""Of bytes: masters and the copies that compute, what is frozen among them; the optimizer's state and what it holds while it
steps; gradients; activations, logits and what backward makes on its way; weights of others that are gathered for a while; what
gradients are reduced in."""

_MASTER = 4  # bytes of a value that is trained
# That libraries of products hold on a host beside results, once they have met a model's shapes: 70 to 80 MiB of two models.
_LIBRARIES_BYTES = 64 << 20
# What the heap takes for a byte of activations that it serves, with holes between them: SmolLM2, passes of 4 x 256 tokens.
_HOLES = 1.35
# Of a parameter in a pass of ZeRO-3: gathered for forward and backward, its gradient sent.
_MESSAGES = 3
# What ZeRO leaves in memory of what it keeps on a disk: tensors below that, and buffers.
_SWAPPED_BYTES = 1 << 20
NUM_SWAPPED, NUM_SWAP_BUFFERS = 32 << 20, 16
"""Of ZeRO's values on a disk: how many are in memory at once for a step, and of how many parameters for passes."""
# DeepSpeed's defaults: elements.
_REDUCED, _MOST_LIVE, _STEPPED = 500_000_000, 1_000_000_000, 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to train: fields of a TrainingConfig.

    Attributes:
        strategy, reshard_after_forward, replicas, offload_optimizer, offload_params: as there.
        checkpoints: whether activation checkpointing is on.
        micro_batch_size: samples of one pass of one process.
        options: of DeepSpeed's `zero_optimization`.
    """

    strategy: str
    reshard_after_forward: bool = True
    replicas: int = 1
    offload_optimizer: str = "none"
    offload_params: str = "none"
    checkpoints: bool = False
    micro_batch_size: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def parts(self, num_processes: int) -> int:
        """Into how many parts states are divided: one where each process has all of them."""
        return 1 if self.strategy in ("single", "ddp") else num_processes // self.replicas

    @property
    def is_on_disk(self) -> bool:
        return "nvme" in (self.offload_optimizer, self.offload_params)

    @property
    def is_offloaded(self) -> bool:
        return self.offload_optimizer != "none" or self.offload_params != "none"

    @property
    def title(self) -> str:
        """For tables."""
        parts = [self.strategy]
        if self.strategy == "fsdp" and not self.reshard_after_forward:
            parts.append("kept")
        if self.replicas > 1:
            parts.append(f"{self.replicas} replicas")
        if self.is_offloaded and self.offload_params == self.offload_optimizer:
            parts.append(f"all on {self.offload_params}")
        elif self.is_offloaded:
            asked = (("parameters", self.offload_params), ("optimizer", self.offload_optimizer))
            parts += [f"{what} on {where}" for what, where in asked if where != "none"]
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a way takes.

    Attributes:
        way: it.
        bytes_by_kind: kind -> bytes of one process, where it computes, when it holds most.
        host_bytes: that one process has offloaded to its host's memory.
        disk_bytes: that it has on a disk.
        seconds_by_kind: "passes", "optimizer", "collectives", "transfers", "disk" -> seconds of an optimizer step.
        hidden_s: of collectives and transfers, what goes on while passes compute.
        tokens_per_s: of all processes.
        limit_bytes, host_limit_bytes, disk_limit_bytes: what one process may use, where it computes, on its host and on a disk.
    """

    way: Way
    bytes_by_kind: Mapping[str, int]
    host_bytes: int
    disk_bytes: int
    seconds_by_kind: Mapping[str, float]
    hidden_s: float
    tokens_per_s: float
    limit_bytes: int
    host_limit_bytes: int
    disk_limit_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most that one process holds where it computes."""
        return sum(self.bytes_by_kind.values())

    @property
    def fits(self) -> bool:
        return (
            self.peak_bytes <= self.limit_bytes
            and self.host_bytes <= self.host_limit_bytes
            and self.disk_bytes <= self.disk_limit_bytes
        )

    @property
    def step_s(self) -> float:
        """Of an optimizer step."""
        return sum(self.seconds_by_kind.values()) - self.hidden_s


def forecast(job: Job, cluster: Cluster, way: Way) -> Forecast:
    """What a way of training a job takes on a cluster."""
    size = cluster.num_processes
    num_passes = max(1, math.ceil(math.ceil(job.global_batch_size / size) / way.micro_batch_size))
    rehearsal = job.rehearsed(way.micro_batch_size, way.checkpoints, cluster.is_host)
    sharing = _Sharing(job, cluster, way, rehearsal, num_passes > 1)
    most = _most(itertools.chain.from_iterable(sharing.piles() for _ in range(min(2, num_passes))))
    on_host = on_disk = 0
    parts = way.parts(size)
    moved = (job.optimizer.state_bytes + 2 * _MASTER * job.num_trained) // parts
    if way.offload_optimizer == "nvme":
        on_disk += moved
    elif way.offload_optimizer == "cpu" and not cluster.is_host:
        on_host += moved
    if (
        way.strategy == "zero3" and way.offload_optimizer != "none" and not cluster.is_host
    ):  # gradients, as they are averaged
        on_host += _MASTER * job.num_trained // parts
    # FSDP2 has no copies beside its masters.
    moved = ((0 if way.strategy == "fsdp" else job.itemsize * job.num_trained) + job.frozen_bytes) // parts
    if way.offload_params == "nvme":
        on_disk += moved
    elif way.offload_params == "cpu" and not cluster.is_host:
        on_host += moved
    if not cluster.is_host:
        on_host += math.ceil(sum(_swap_buffers(job, way, parts)))
    seconds = _seconds(job, cluster, way, rehearsal, num_passes)
    # An accelerator computes while others send; on the host all of it takes the same processors.
    # ZeRO-1 and 2 send what they reduce and gather in turn with the rest.
    beside = seconds["transfers"] + (0.0 if way.strategy in ("zero1", "zero2") else seconds["collectives"])
    hidden_s = 0.0 if cluster.is_host else min(seconds["passes"], beside)
    step_s = sum(seconds.values()) - hidden_s
    return Forecast(
        way=way,
        bytes_by_kind={kind: math.ceil(cluster.allocated * most.get(kind, 0)) for kind in KINDS},
        host_bytes=on_host,
        disk_bytes=on_disk,
        seconds_by_kind=seconds,
        hidden_s=hidden_s,
        tokens_per_s=job.global_batch_size * job.tokens_per_sample / step_s,
        limit_bytes=cluster.limit_bytes,
        host_limit_bytes=cluster.host_limit_bytes,
        disk_limit_bytes=cluster.disk_limit_bytes,
    )


class _Pile:
    """Bytes by kind at a moment; on a host large blocks, which malloc maps by themselves, apart from those in its heap."""

    def __init__(self, before: _Pile | None = None, *, has_heap: bool = False) -> None:
        self.large: dict[str, float] = dict(before.large) if before else {}
        self.heap: dict[str, float] = dict(before.heap) if before else {}
        self._has_heap: bool = has_heap if before is None else before._has_heap

    def add(self, kind: str, nbytes: float, *, block_bytes: float | None = None) -> _Pile:
        """So many bytes, in blocks of a size; in one block if None."""
        is_small = self._has_heap and (nbytes if block_bytes is None else block_bytes) < MAPPED_BYTES
        into = self.heap if is_small else self.large
        into[kind] = into.get(kind, 0) + nbytes
        return self


def _most(piles: Iterable[_Pile]) -> dict[str, int]:
    """Bytes by kind when they are most, of a step's moments in their order.

    What malloc serves from its heap is not given back while what came later lies above it, and not taken again for what is of
    another size: until a step ends the heap keeps the most of each kind that there was.
    """
    heap = dict.fromkeys(KINDS, 0.0)
    most: dict[str, float] = {}
    for pile in piles:
        heap = {kind: max(nbytes, pile.heap.get(kind, 0.0)) for kind, nbytes in heap.items()}
        now = {kind: nbytes + pile.large.get(kind, 0.0) for kind, nbytes in heap.items()}
        most = max(most, now, key=lambda each: sum(each.values()))
    return {kind: math.ceil(nbytes) for kind, nbytes in most.items()}


class _Sharing:
    """Bytes of one process, moment by moment."""

    def __init__(self, job: Job, cluster: Cluster, way: Way, rehearsal: Rehearsal, accumulates: bool) -> None:
        self._job, self._cluster, self._way, self._rehearsal = job, cluster, way, rehearsal
        self._accumulates = accumulates
        self._size = cluster.num_processes
        self._parts = way.parts(self._size)
        self._is_host = cluster.is_host

    def piles(self) -> Iterator[_Pile]:
        strategy = self._way.strategy
        if strategy.startswith("zero"):
            return self._zero(int(strategy[-1]))
        if strategy == "fsdp" or self._job.itemsize < _MASTER:
            return self._sharded()
        return self._whole()

    def _base(self, parameters: float, optimizer: float) -> _Pile:
        """What is there all the time; on a host with what libraries take."""
        pile = _Pile(has_heap=self._is_host).add("parameters", parameters, block_bytes=math.inf)
        pile.add("optimizer", optimizer, block_bytes=math.inf)
        return pile.add("activations", _LIBRARIES_BYTES if self._is_host else 0, block_bytes=math.inf)

    def _until(self, pile: _Pile, moment: Moment) -> _Pile:
        """With the most that activations take until a gradient is made."""
        if not self._is_host:
            return _Pile(pile).add("activations", moment.highest_bytes)
        now = _Pile(pile).add("activations", moment.mapped_bytes, block_bytes=math.inf)
        return now.add("activations", _HOLES * moment.heap_bytes, block_bytes=0)

    def _then(self, pile: _Pile, moment: Moment) -> _Pile:
        """With what is left of them then; in the heap that is no more than before."""
        nbytes = moment.held_mapped_bytes if self._is_host else moment.held_bytes
        return _Pile(pile).add("activations", max(0, nbytes), block_bytes=math.inf)

    def _stepping(self, pile: _Pile, parts: int, *, is_flat: bool = False) -> _Pile:
        """With what an optimizer holds while it steps: of one parameter after the other, or of all at once."""
        job = self._job
        most = job.optimizer.most_bytes
        if not self._is_host:
            values = min(job.num_trained, parts * _STEPPED) if is_flat else job.num_trained
            most = max(0 if is_flat else most, _MASTER * values)
        elif is_flat:  # one parameter, as it sees it
            most = math.ceil(most / (_MASTER * max(job.sizes.values())) * _MASTER * job.num_trained)
        return _Pile(pile).add("optimizer", most / parts, block_bytes=math.inf)

    def _whole(self) -> Iterator[_Pile]:
        """Parameters in float32, and DDP's buckets, which gradients are copied to."""
        job = self._job
        total = _MASTER * job.num_trained
        pile = self._base(total + job.frozen_bytes, job.optimizer.state_bytes)
        if self._size > 1:
            pile.add("buckets", total, block_bytes=math.inf)
        full = _Pile(pile)
        for size in job.sizes.values():
            full.add("gradients", _MASTER * size)
        if self._accumulates:
            pile = full
        for moment in self._rehearsal.moments:
            yield self._until(pile, moment)
            if not self._accumulates:
                pile = _Pile(pile).add("gradients", _MASTER * job.sizes[moment.name])
        yield self._stepping(full, 1)

    def _sharded(self) -> Iterator[_Pile]:
        """FSDP2: groups are gathered into copies that compute, and their gradients reduced group by group."""
        job, parts = self._job, self._parts
        away = not self._is_host and self._way.is_offloaded
        values = 0 if away else _MASTER * job.num_trained + job.frozen_bytes
        pile = self._base(values / parts, 0 if away else job.optimizer.state_bytes / parts)
        full = _Pile(pile)
        for size in job.sizes.values():
            if not away:
                full.add("gradients", _MASTER * size / parts)
        if self._accumulates:  # whole, where the passes compute, until the last one reduces them
            pile = _Pile(pile)
            for size in job.sizes.values():
                pile.add("gradients", _MASTER * size)
        last = len(job.groups) - 1
        is_copied = parts > 1 or job.itemsize < _MASTER
        kept = {last, *range(last - job.num_tail, last)}
        reshards = self._way.reshard_after_forward and parts > 1
        blocks = range(last - job.num_tail)
        again = self._cluster.copies_collectives if parts > 1 else 0  # what a library copies to gather and to reduce
        names: list[list[str]] = [[] for _ in job.groups]
        for name, number in job.group_of.items():
            names[number].append(name)

        def gathered(pile: _Pile, numbers: Iterable[int]) -> _Pile:
            for number in numbers if is_copied else ():
                for name in names[number]:
                    pile.add("gathered", job.itemsize * job.sizes[name])
                if parts > 1:  # where each has all of them, what is frozen computes as it is
                    pile.add("gathered", job.groups[number].frozen_bytes, block_bytes=math.inf)
            return pile

        def pieces(pile: _Pile, number: int) -> _Pile:
            """A group in one piece, and as often again as a library copies it."""
            return pile.add("gathered", (1 + again) * job.gathered_bytes(number) if parts > 1 else 0.0)

        yield pieces(gathered(_Pile(pile), [last]), last)  # forward begins
        unfinished = set(range(len(job.groups)))
        left = [len(each) for each in names]
        made: dict[int, list[str]] = {}
        rest = 0  # of the group that was reduced before
        for moment in self._rehearsal.moments:
            number = job.group_of[moment.name]
            now = _Pile(pile)
            if reshards:
                gathered(now, {*(kept & unfinished), number})
                ahead = max((each for each in blocks if each < number and each in unfinished), default=None)
                if ahead is not None and number not in kept:
                    pieces(gathered(now, [ahead]), ahead)
            else:
                gathered(now, unfinished)
            for each in itertools.chain.from_iterable(made.values()):
                now.add("gradients", job.itemsize * job.sizes[each])
            if self._size > 1:
                yield self._until(_Pile(now).add("buckets", rest), moment)
            else:
                yield self._until(now, moment)
            made.setdefault(number, []).append(moment.name)
            now.add("gradients", job.itemsize * job.sizes[moment.name])
            left[number] -= 1
            if left[number]:
                continue
            # The group's gradients are put into one piece, which a library may copy, and the sum's part comes out.
            rest = _MASTER * job.groups[number].num_trained
            if self._size > 1:
                now.add("buckets", rest).add("buckets", again * rest).add("buckets", rest / parts)
            yield self._then(now, moment)
            for name in made.pop(number):
                if not self._accumulates and not away:
                    pile = _Pile(pile).add("gradients", _MASTER * job.sizes[name] / parts)
            unfinished.discard(number)
        yield full if away else self._stepping(full, parts)

    def _zero(self, stage: int) -> Iterator[_Pile]:
        """DeepSpeed: flat parts of masters and states; copies that compute; gradients in buckets."""
        job, size = self._job, self._size
        total, copies = _MASTER * job.num_trained, job.itemsize * job.num_trained
        options = self._way.options
        bucket = int(options.get("reduce_bucket_size", _REDUCED))
        if self._is_host:  # what is never touched is not there
            bucket = min(bucket, job.num_trained)
        way = self._way
        away = way.offload_optimizer == "nvme" or (not self._is_host and way.offload_optimizer != "none")
        own = (copies + job.frozen_bytes) / (size if stage == 3 else 1)
        if stage == 3 and (way.offload_params == "nvme" or (not self._is_host and way.offload_params != "none")):
            own = 0
        shard = 0 if away else total / size
        pile = self._base(own + shard, 0 if away else job.optimizer.state_bytes / size)
        if self._is_host:
            of_step, of_passes = _swap_buffers(job, way, size)
            pile.add("optimizer", of_step, block_bytes=math.inf).add("gathered", of_passes, block_bytes=math.inf)
        if way.offload_params == "nvme":  # what a module and those that are read ahead have
            pile.add("gathered", 2 * max(job.gathered_bytes(each) for each in range(len(job.groups))))
        elif stage == 3:
            share = _live(job, self._way)
            for each in job.sizes.values():
                pile.add("gathered", share * job.itemsize * each, block_bytes=job.itemsize * each)
            pile.add("gathered", share * job.frozen_bytes, block_bytes=math.inf)
        if stage == 3 and way.offload_optimizer != "none":  # averaged on the host, and put together there for the step
            shard = total / size * ((1 if away else 2) if self._is_host else 0)
        full = _Pile(pile).add("gradients", shard, block_bytes=math.inf)
        if stage == 1 and job.itemsize < _MASTER and self._way.offload_optimizer == "none":
            # DeepSpeed's other optimizer: sums of the whole model in float32, beside gradients in the dtype that computes.
            pile = _Pile(pile).add("gradients", total + copies, block_bytes=math.inf)
            full = pile
        buffers = (job.itemsize + (_MASTER if job.itemsize < _MASTER else 0)) * bucket  # sent in float32
        keeps = stage == 3 or self._accumulates or full is pile
        is_late = stage == 1 and not keeps  # gradients are reduced after backward, when all of them are there
        done = 0
        for moment in self._rehearsal.moments:
            now = _Pile(full if keeps else pile)
            if not keeps and not is_late:
                now.add("gradients", min(done / size, shard), block_bytes=math.inf)
            touched = min(done * job.itemsize / _MASTER, buffers) if self._is_host else buffers
            yield self._until(now.add("buckets", touched), moment)
            done += _MASTER * job.sizes[moment.name]
            if is_late:
                pile = _Pile(pile).add("gradients", _MASTER * job.sizes[moment.name])
        if is_late:
            yield _Pile(pile).add("gradients", shard, block_bytes=math.inf)
        yield _Pile(full).add("buckets", buffers * (1 + self._cluster.copies_collectives))
        if stage < 3 and self._is_host:  # what was averaged is put together for the step
            full = _Pile(full).add("gradients", shard, block_bytes=math.inf)
        yield full if away else self._stepping(full, size, is_flat=True)


def _seconds(job: Job, cluster: Cluster, way: Way, rehearsal: Rehearsal, num_passes: int) -> dict[str, float]:
    size, parts = cluster.num_processes, way.parts(cluster.num_processes)
    passes = num_passes * cluster.compute_s(rehearsal.work)
    is_whole = way.strategy in ("single", "ddp")
    on_host = way.offload_optimizer != "none"
    if way.strategy.startswith("zero") and (on_host or cluster.is_host):  # flat tensors, which no cache holds
        step = cluster.host_s(replace(job.optimizer.work, fresh_bytes=3 * _MASTER * job.num_trained))
    elif on_host or cluster.is_host:  # its operators go through parameters in float32, in order
        step = cluster.host_stream_s(job.optimizer.work)
    else:  # its loops are a few operators on all parameters there
        step = cluster.compute_s(replace(job.optimizer.work, num_ops=0.0))
    seconds = {"passes": passes, "optimizer": step / (1 if is_whole else parts)}
    values, copies = _MASTER * job.num_trained, job.itemsize * job.num_trained
    weights = copies + job.frozen_bytes
    sent = 0.0
    if size > 1 and is_whole:
        sent = cluster.all_reduce_s(values, size) + cluster.copy_s(values, is_fresh=False)  # into buckets
    elif size > 1 and way.strategy == "fsdp":
        gathers = num_passes * (2 if way.reshard_after_forward else 1)
        # Each pass gathers, the last one reduces.
        # In one piece, and apart; gradients in one piece.
        copied = cluster.copy_s((2 * gathers * weights + values) if parts > 1 else 0.0)
        sent = gathers * cluster.gather_s(weights, parts) + cluster.reduce_s(values, parts) + copied
        if way.replicas > 1:
            sent += cluster.all_reduce_s(values / parts, way.replicas, beside=parts)
    elif size > 1:
        stage = int(way.strategy[-1])
        reduces = 1 if stage == 1 else num_passes
        gathers = num_passes * (1 if _live(job, way) == 1.0 else 2) if stage == 3 else 1
        gathered = weights if stage == 3 else copies  # what is frozen is whole
        sent = gathers * cluster.gather_s(gathered, size)
        # ZeRO-1 and 2 make the sum whole everywhere, and keep their part.
        reduce_s = cluster.reduce_s if stage == 3 or cluster.is_host else cluster.all_reduce_s
        sent += reduces * reduce_s(values, size)
        # Into buckets, apart, and together for the step; ZeRO-3 parameter by parameter.
        sent += cluster.copy_s((5 if stage == 3 else 3) * values)
        if stage == 3:
            sent += num_passes * len(job.sizes) * _MESSAGES * cluster.message_s
    seconds["collectives"] = sent
    moved = 0.0
    if not cluster.is_host:
        is_fsdp = way.strategy == "fsdp"
        if way.offload_params != "none":  # to the device for forward and for backward; FSDP2's are cast there
            moved += 2 * num_passes * ((values + job.frozen_bytes) if is_fsdp else weights) / parts
        if on_host:  # gradients there, and ZeRO's values back
            moved += (1 if is_fsdp else num_passes) * values / parts + (0 if is_fsdp else copies / parts)
    seconds["transfers"] = moved / cluster.h2d_bytes_per_s
    read = written = 0.0
    if way.offload_optimizer == "nvme":  # masters and states there and back, gradients written, normed and read again
        read += (3 * values + job.optimizer.state_bytes) / parts
        written += (2 * values + job.optimizer.state_bytes) / parts
    if way.offload_params == "nvme":  # for forward and for backward
        read += 2 * num_passes * weights / parts
        written += copies / parts
    seconds["disk"] = cluster.disk_s(read, written)
    return seconds


def _swap_buffers(job: Job, way: Way, parts: int) -> tuple[float, float]:
    """Bytes in a process's host memory of what ZeRO has on a disk: for a step and for passes."""
    of_step = of_passes = 0.0
    largest = job.num_largest / parts
    group = min(NUM_SWAPPED + largest, job.num_trained / parts)
    if way.offload_optimizer == "nvme":  # masters, gradients and states
        of_step = 2 * _MASTER * group + job.optimizer.state_bytes / max(1, job.num_trained) * group
    if way.offload_params == "nvme":
        shares = [job.itemsize * each / parts for each in job.sizes.values()]
        of_passes = job.itemsize * (NUM_SWAP_BUFFERS * largest + group) + sum(s for s in shares if s < _SWAPPED_BYTES)
    return of_step, of_passes


def _live(job: Job, way: Way) -> float:
    """The share of weights that ZeRO-3 keeps gathered at once, frozen ones among them."""
    number = job.num_trained + job.frozen_bytes / job.itemsize
    return min(1.0, int(way.options.get("stage3_max_live_parameters", _MOST_LIVE)) / max(1, number))
