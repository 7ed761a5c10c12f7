"""Reader threads: fill slabs from files, many large reads at once, straight into their destination; and slots from slabs.

Each block is read in one of two ways, whichever the kernel can serve from where the bytes are: a buffered read where they
are already in the page cache, a direct one (O_DIRECT, no page cache) where they are not. A cyclic scan of more bytes than
there is memory would defeat the page cache anyway, and direct reads cost almost no processor time.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy
import torch

from bigmodel.checkpoint.spec import Source
from bigmodel.checkpoint.stamp import FileStamp
from bigmodel.errors import ReadError, StreamingError
from bigmodel.offload import page_cache
from bigmodel.offload.arena import ALIGN_BYTES, Arena
from bigmodel.offload.link import Chunk, DeviceMemory, Ring
from bigmodel.offload.meter import Meter, Way
from bigmodel.offload.ranges import Block, Layout, lay_out

__all__ = ["BLOCK_BYTES", "Reader", "Ticket", "check_stamp", "layout_of", "read_fully"]

# Measured (NVMe behind a virtual machine): 8 MiB blocks with two or more readers reach the device's rate; reading a gap of
# 128 KiB costs less than a second request.
BLOCK_BYTES = 8 << 20
_GAP_BYTES = 128 << 10
# A block that is at least this much in the page cache is copied from there: 0.03-0.2 s/GB instead of a device read.
_CACHED_ENOUGH = 0.95
# torch splits an elementwise operation over its threads from 32768 elements on.
_SERIAL_ELEMENTS = 32256
_STOP = None


def layout_of(sources: Sequence[Source], *, for_accelerator: bool = False) -> Layout:
    """The layout of parameters in a slot or a slab; those that need a conversion are left out."""
    plain = [source for source in sources if source.conversion is None]
    return lay_out(plain, block_bytes=BLOCK_BYTES, gap_bytes=_GAP_BYTES, for_accelerator=for_accelerator)


@dataclass(eq=False, slots=True)
class Ticket:
    """One filling under way. `wait` returns when every block is in place, or raises what went wrong.

    Attributes:
        filled: for an accelerator's memory: the copies are queued when `wait` returns, and done after this event.
        begun_s, ended_s: of its reads from files, by `time.perf_counter`; None where there are none, or not yet.
    """

    name: str
    num_left: int
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    is_cancelled: bool = False
    filled: torch.Event | None = None
    begun_s: float | None = None
    ended_s: float | None = None

    def wait(self) -> None:
        """Block until the slab is filled.

        Raises:
            ReadError: with the unit's name, when a block could not be read.
        """
        self.done.wait()
        if self.error is not None:
            what = f"The weights of {self.name} could not be read: {str(self.error).rstrip('.')}."
            if isinstance(self.error, RuntimeError):  # torch's, of a copy to an accelerator
                raise ReadError(
                    f"{what} If the device still works, run again; otherwise begin a new process."
                ) from self.error
            raise ReadError(
                f"{what} The model is still usable: mend the file or its disk and run again."
            ) from self.error

    def cancel(self) -> None:
        """Give up the blocks that no thread has begun; `done` is set once no thread writes any more."""
        self.is_cancelled = True


class Reader:
    """A few threads that fill slabs, and accelerators' memory.

    Args:
        num_threads: reads in flight.
        stamps: path -> FileStamp of the files as they were when their headers were checked.
        bounce_bytes: size of each thread's buffer for blocks that cannot be read straight into place; 0 where none exist.
        ring: through which accelerators' memory is filled; None where none is.

    Attributes:
        meter: what was read from files, and how long that took.
    """

    def __init__(
        self,
        *,
        num_threads: int,
        stamps: Mapping[str, FileStamp],
        bounce_bytes: int = 0,
        ring: Ring | None = None,
    ) -> None:
        self._queue: deque[tuple[Ticket, Block | _Piece, _Slab | _Across] | None] = deque()
        self._ring = ring
        self.meter = Meter()
        self._ready = threading.Condition(threading.Lock())
        self._stamps = stamps
        self._bounce_bytes = bounce_bytes
        self._pid = os.getpid()
        self.num_threads = num_threads
        # The threads hold the queue, never this object's owner: a model that nobody holds any more can go.
        self._threads = [
            threading.Thread(target=self._run, name=f"bigmodel-reader-{i}", daemon=True) for i in range(num_threads)
        ]
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError as error:  # a limit on threads, or no memory for their stacks
            self.close()
            raise StreamingError(
                f"{num_threads} reader threads could not be started: {error}. Raise the limits on processes or memory "
                "(ulimit -u, ulimit -v, pids.max), or end other threads."
            ) from error

    def submit(
        self, name: str, layout: Layout, slab: Arena | DeviceMemory, *, is_urgent: bool = False, at_byte: int = 0
    ) -> Ticket:
        """Begin to fill a slab, or an accelerator's memory.

        Args:
            name: the unit, for errors.
            layout: what to read where.
            slab: destination, at least `at_byte + layout.nbytes` long (`layout.device_bytes` on an accelerator); it must not be
                touched until the ticket is done.
            is_urgent: goes before everything that waits.
            at_byte: where in the slab the layout begins; a multiple of ALIGN_BYTES, and 0 on an accelerator.
        """
        target: _Slab | _Across
        if isinstance(slab, DeviceMemory):
            target = _Across(slab, layout.lead)
        else:
            end = at_byte + layout.nbytes
            target = _Slab(slab.memory[at_byte:end], slab.tensor[at_byte:end])
        return self._submit(name, layout.blocks, target, is_urgent)

    def submit_copy(self, name: str, source: torch.Tensor, memory: DeviceMemory, *, is_urgent: bool = False) -> Ticket:
        """Begin to fill an accelerator's memory from the host's, through the ring.

        Args:
            name: the unit, for errors.
            source: uint8, on the host; not written to until the ticket is done.
            memory: at least as long.
            is_urgent: goes before everything that waits.
        """
        pieces = [_Piece(source, start) for start in range(0, source.numel(), BLOCK_BYTES)]
        return self._submit(name, pieces, _Across(memory, 0), is_urgent)

    def _submit(self, name: str, blocks: Sequence[Block | _Piece], target: _Slab | _Across, is_urgent: bool) -> Ticket:
        ticket = Ticket(name, len(blocks))
        if not blocks:
            ticket.done.set()
            return ticket
        items = [(ticket, block, target) for block in blocks]
        with self._ready:
            if is_urgent:
                self._queue.extendleft(reversed(items))
            else:
                self._queue.extend(items)
            self._ready.notify(len(items))
        return ticket

    def close(self) -> None:
        """Stop the threads, after the blocks that they are reading; everything that waits fails."""
        with self._ready:
            waiting = {item[0] for item in self._queue if item is not None}
            self._queue.clear()
            self._queue.extend([_STOP] * self.num_threads)
            self._ready.notify_all()
        for ticket in waiting:
            ticket.error = ReadError(f"The weights of {ticket.name} were not read: the reader was closed.")
            ticket.done.set()
        if os.getpid() == self._pid:
            for thread in self._threads:
                if thread is not threading.current_thread() and thread.ident is not None:
                    thread.join()

    def _run(self) -> None:
        bounce: Arena | None = None
        while True:
            with self._ready:
                while not self._queue:
                    self._ready.wait()
                item = self._queue.popleft()
            if item is _STOP:
                return
            ticket, block, target = item
            # Held by no local name while the thread sleeps: a slab whose model is gone must be freed.
            del item
            try:
                if ticket.is_cancelled and ticket.error is None:
                    ticket.error = ReadError(f"The read of {ticket.name} was given up for another unit.")
                if ticket.error is None:
                    if isinstance(block, _Piece):
                        assert isinstance(target, _Across)
                        assert self._ring is not None
                        target.copy(block, self._ring)
                    else:
                        if ticket.begun_s is None:
                            ticket.begun_s = time.perf_counter()
                        if bounce is None and target.needs_bounce(block):
                            bounce = Arena(self._bounce_bytes)
                        self._read(block, target, bounce)
            except BaseException as error:  # a thread's error belongs to whoever waits for its ticket
                ticket.error = error
            finally:
                with self._ready:
                    ticket.num_left -= 1
                    is_last = ticket.num_left == 0
                if is_last:
                    _finish(ticket, target)
                del ticket, block, target

    def _read(self, block: Block, target: _Slab | _Across, bounce: Arena | None) -> None:
        fd = os.open(block.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            check_stamp(fd, block.file, self._stamps)
            is_cached = page_cache.cached_fraction(fd, block.offset, block.needed) >= _CACHED_ENOUGH
            way = Way.CACHED if is_cached else Way.DIRECT
            if way is Way.DIRECT:
                try:
                    direct_fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
                except OSError as error:
                    if error.errno not in (errno.EINVAL, errno.ENOENT, errno.EACCES):
                        raise
                    way = Way.BUFFERED  # the file system has no direct reads
                else:
                    os.close(fd)
                    fd = direct_fd
            if isinstance(target, _Across):
                assert self._ring is not None
                target.read(_Open(fd, block, way, self.meter), bounce, self._ring)
            else:
                target.read(_Open(fd, block, way, self.meter), bounce)
        finally:
            os.close(fd)


def _finish(ticket: Ticket, target: _Slab | _Across) -> None:
    try:
        ticket.filled = target.mark_filled()
    except BaseException as error:
        ticket.error = ticket.error or error
    if ticket.begun_s is not None:
        ticket.ended_s = time.perf_counter()
    ticket.done.set()


@dataclass(frozen=True, slots=True)
class _Open:
    """A block in a file that was opened for it."""

    fd: int
    block: Block
    way: Way
    meter: Meter

    def into(self, memory: memoryview) -> None:
        """Read the block straight into place."""
        self._read(memory, self.block.offset, self.block.needed)

    def around(self, memory: memoryview, tensor: torch.Tensor) -> torch.Tensor:
        """Read it into a buffer, with what a direct read needs around it: the block's bytes, as they are in the file."""
        block, is_direct = self.block, self.way is Way.DIRECT
        start = block.offset - block.offset % ALIGN_BYTES if is_direct else block.offset
        head = block.offset - start
        wanted = head + block.needed
        length = -(-wanted // ALIGN_BYTES) * ALIGN_BYTES if is_direct else wanted
        self._read(memory[:length], start, wanted)
        return tensor[head : head + block.needed]

    def _read(self, memory: memoryview, offset: int, needed: int) -> None:
        with self.meter.reading(needed, self.way):
            read_fully(self.fd, memory, offset, needed, self.block.file)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A block of host memory: what is copied at once."""

    source: torch.Tensor
    start: int


@dataclass(frozen=True, slots=True)
class _Slab:
    """Host memory that is filled."""

    memory: memoryview
    tensor: torch.Tensor

    def needs_bounce(self, block: Block) -> bool:
        return not block.is_aligned

    def read(self, file: _Open, bounce: Arena | None) -> None:
        block = file.block
        # What is not read past the page cache can go anywhere.
        if block.is_aligned or (block.cast_from is None and file.way is not Way.DIRECT):
            file.into(self.memory[block.into : block.into + block.nbytes])
            return
        assert bounce is not None
        raw = file.around(bounce.memory, bounce.tensor)
        if block.cast_from is None or block.cast_to is None:
            # Without the interpreter's lock, which torch's copies of small pieces would take thousands of times.
            ctypes.memmove(self.tensor.data_ptr() + block.into, raw.data_ptr(), block.needed)
        else:
            _cast(block, raw, self.tensor[block.into : block.into + _cast_bytes(block)])

    def mark_filled(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class _Across:
    """An accelerator's memory that is filled through the ring.

    Attributes:
        memory: of the accelerator.
        lead: where in the layout it begins.
    """

    memory: DeviceMemory
    lead: int

    def needs_bounce(self, block: Block) -> bool:
        return block.cast_to is not None

    def read(self, file: _Open, bounce: Arena | None, ring: Ring) -> None:
        block = file.block
        with ring.chunk() as chunk:
            if block.cast_to is not None:
                assert bounce is not None
                raw = file.around(bounce.memory, bounce.tensor)
                values = chunk.tensor[: _cast_bytes(block)]
                _cast(block, raw, values)
            else:
                values = file.around(chunk.memory, chunk.tensor)
            into = block.into - self.lead
            values, into = values[max(0, -into) :], max(0, into)
            self._send(values, into, chunk)

    def copy(self, piece: _Piece, ring: Ring) -> None:
        with ring.chunk() as chunk:
            source = piece.source[piece.start : piece.start + BLOCK_BYTES]
            values = chunk.tensor[: source.numel()]
            # Without the interpreter's lock, and by this thread alone.
            numpy.copyto(values.numpy(), source.numpy())
            self._send(values, piece.start, chunk)

    def _send(self, values: torch.Tensor, into: int, chunk: Chunk) -> None:
        memory = self.memory
        memory.link.copy(values, memory.tensor[into : into + values.numel()], memory.after)
        chunk.copied = memory.link.mark_copied()

    def mark_filled(self) -> torch.Event:
        return self.memory.link.mark_copied()


def read_fully(fd: int, memory: memoryview, offset: int, needed: int, file: str) -> None:
    """Read at least `needed` bytes at `offset`; the rest of `memory` may lie past the file's end."""
    done = 0
    while done < needed:
        count = os.preadv(fd, [memory[done:]], offset + done)
        if count <= 0:
            raise ReadError(
                f"{file} ends at byte {offset + done}, and {needed - done} more bytes are needed. The file was cut: load again."
            )
        done += count


def _cast_bytes(block: Block) -> int:
    assert block.cast_from is not None
    assert block.cast_to is not None
    return block.needed // block.cast_from.itemsize * block.cast_to.itemsize


def _cast(block: Block, raw: torch.Tensor, into: torch.Tensor) -> None:
    assert block.cast_from is not None
    assert block.cast_to is not None
    if raw.storage_offset() % block.cast_from.itemsize:
        raw = raw.clone()
    _copy_serially(into.view(block.cast_to), raw.view(block.cast_from))


def _copy_serially(into: torch.Tensor, values: torch.Tensor) -> None:
    """Copy (and cast) in pieces below torch's grain size: a reader must not start a team of compute threads of its own."""
    for start in range(0, values.numel(), _SERIAL_ELEMENTS):
        into[start : start + _SERIAL_ELEMENTS].copy_(values[start : start + _SERIAL_ELEMENTS])


def check_stamp(fd: int, path: str, stamps: Mapping[str, FileStamp]) -> None:
    """Raise ReadError where the open file is not the one that was stamped under `path`, or not as it was."""
    then, now = stamps.get(path), FileStamp.of(fd)
    if then is not None and now != then:
        raise ReadError(
            f"{path} has changed since its header was read ({then.size} bytes then, {now.size} now). "
            "Its weights would not be the same model's: load it again."
        )
