"""The way to an accelerator: its memory, copies on a stream of their own, and the events that order them."""

from __future__ import annotations

import contextlib
import copy
import logging
import queue
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bigmodel.offload.arena import ALIGN_BYTES, Arena
from bigmodel.offload.meter import Moved

__all__ = ["RING_BYTES", "Chunk", "DeviceMemory", "Link", "Ring", "TimedLink", "hold_to", "page_lock"]

logger = logging.getLogger("bigmodel.offload")

# Two buffers for each of four readers: while one is copied the next one is read. Each holds a block, cast to twice its size at
# most, and what a direct read needs around it.
_NUM_CHUNKS, _CHUNK_BYTES = 8, (16 << 20) + 2 * ALIGN_BYTES
RING_BYTES = _NUM_CHUNKS * _CHUNK_BYTES
# Of torch's own pinned memory, which is rounded up to powers of two: it holds one buffer less, and takes no more.
_PINNED_BYTES = 1 << (RING_BYTES.bit_length() - 1)
# Of the limit on an accelerator, what its context may take (300-500 MiB on CUDA by nvidia-smi).
_CONTEXT_BYTES = 512 << 20
# cudaHostRegisterPortable: for all devices, not only for the current one.
_PORTABLE = 1


class Link:
    """Copies from host memory to one accelerator; the host waits for none of them.

    Args:
        device: the accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.Stream(device)
        self._lock = threading.Lock()
        self._pending: deque[tuple[torch.Event, torch.Event, int]] = deque()  # begin, end and bytes of copies
        self._moved = Moved()

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: torch.Event | None) -> None:
        """Queue a copy.

        Args:
            source: uint8, on the host; not written to until what `mark_copied` gives afterwards has happened.
            target: uint8, as long, on the device.
            after: what the copy waits for: the end of the work that still reads the target.
        """
        # Threads enter a stream by an object of their own: it keeps what was current before.
        stream = torch.Stream(
            stream_id=self._stream.stream_id,
            device_index=self._stream.device_index,
            device_type=self._stream.device_type,
        )
        with self._lock:  # no copy of another thread between the marks of this one
            with torch.no_grad(), stream:
                if after is not None:
                    self._stream.wait_event(after)
                begun = self._mark_time()
                target.copy_(source, non_blocking=True)
                ended = self._mark_time()
            self._pending.append((begun, ended, target.nbytes))
            self._settle()

    def moved(self) -> Moved:
        """What was copied up to now, as far as its end is known."""
        with self._lock:
            self._settle()
            return self._moved

    def _mark_time(self) -> torch.Event:
        event = torch.Event(self.device, enable_timing=True)
        event.record(self._stream)
        return event

    def _settle(self) -> None:
        """Count the copies that have ended; they end in the order in which they were queued."""
        while self._pending and self._pending[0][1].query():
            begun, ended, num_bytes = self._pending.popleft()
            try:
                seconds = begun.elapsed_time(ended) / 1000
            except RuntimeError:  # a kind of device whose events have no time
                seconds = 0.0
            self._moved = Moved(self._moved.num_bytes + num_bytes, self._moved.busy_s + seconds)

    def mark_copied(self) -> torch.Event:
        """An event after all copies so far."""
        return self._stream.record_event()

    def writes_into(self, tensor: torch.Tensor) -> None:
        """Let the device's allocator give the tensor's memory to others only after the copies that were queued before it went."""
        tensor.record_stream(self._stream)

    def mark_computed(self) -> torch.Event:
        """An event after all work that was given to the device's current stream so far."""
        return torch.accelerator.current_stream(self.device).record_event()

    def drain(self) -> None:
        """Return when no copy is under way: the memory on both sides may go."""
        self._stream.synchronize()

    def wait(self, event: torch.Event) -> None:
        """Work that is given to the device's current stream from now on begins after the event."""
        torch.accelerator.current_stream(self.device).wait_event(event)


class TimedLink(Link):
    """Another way to speak to a link, which tells when its copies began and ended; they take turns with all others.

    Args:
        link: whose stream they go to.

    Attributes:
        begun: an event at the beginning of each copy, when it had waited for its target.
    """

    def __init__(self, link: Link) -> None:
        self.device, self._stream, self._link = link.device, link._stream, link
        self.begun: list[torch.Event] = []

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: torch.Event | None) -> None:
        if after is not None:
            self._stream.wait_event(after)
        self.begun.append(self.mark_copied())
        self._link.copy(source, target, None)

    def moved(self) -> Moved:
        return self._link.moved()

    def mark_copied(self) -> torch.Event:
        return self._stream.record_event(torch.Event(self.device, enable_timing=True))


class DeviceMemory:
    """Memory of an accelerator that weights are copied into; what `Arena` is on the host.

    Raises:
        torch.OutOfMemoryError: the accelerator has less.

    Attributes:
        nbytes: usable bytes.
        tensor: uint8 tensor of shape (nbytes,), where the device's allocator aligned it (512 bytes on CUDA).
        link: over which it is filled.
        after: what a copy into it has to wait for.
    """

    __slots__ = ("after", "link", "nbytes", "tensor")

    def __init__(self, nbytes: int, link: Link) -> None:
        self.nbytes = nbytes
        self.link = link
        with torch.inference_mode(False):
            self.tensor = torch.empty(nbytes, dtype=torch.uint8, device=link.device)
        link.writes_into(self.tensor)
        # Whose memory this was may still be at work with it.
        self.after: torch.Event | None = link.mark_computed()

    def mark_free(self) -> None:
        """Let the next copy come after the device's work up to now, whichever streams it was given to."""
        if self.after is not None:
            self.link.wait(self.after)
        self.after = self.link.mark_computed()

    def fresh(self) -> DeviceMemory:
        """Another one, as large."""
        return DeviceMemory(self.nbytes, self.link)

    def over(self, link: Link) -> DeviceMemory:
        """The same memory, as it is now, filled over `link`."""
        same = copy.copy(self)
        same.link = link
        return same


@dataclass(eq=False, slots=True)
class Chunk:
    """A buffer of the ring: its bytes, and the end of the copy that still reads them."""

    memory: memoryview
    tensor: torch.Tensor
    copied: torch.Event | None = None


class Ring:
    """Buffers on the way to accelerators, used in turn: while some are copied the next ones are filled.

    Args:
        device: one of the accelerators.

    Attributes:
        is_page_locked: whether the system agreed to that.
    """

    def __init__(self, device: torch.device) -> None:
        tensor, self.is_page_locked = _ring_memory(device)
        self._chunks: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
        for start in range(0, tensor.numel() - _CHUNK_BYTES + 1, _CHUNK_BYTES):
            chunk = tensor[start : start + _CHUNK_BYTES]
            self._chunks.put(Chunk(chunk.numpy().data, chunk))

    @contextlib.contextmanager
    def chunk(self) -> Iterator[Chunk]:
        """The buffer that was used the longest time ago, when nothing reads it any more."""
        chunk = self._chunks.get()
        try:
            if chunk.copied is not None:
                chunk.copied.synchronize()
                chunk.copied = None
            yield chunk
        finally:
            self._chunks.put(chunk)


def hold_to(limit_bytes: int, device: torch.device) -> None:
    """Let torch's allocator hold no more than a limit: it gives back what it keeps for later before it takes more.

    Otherwise blocks that a growing cache has left stay with it as long as the device has other memory.

    Args:
        limit_bytes: of all that the process has on the device, context included.
        device: an accelerator; nothing is done for other kinds than CUDA's.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, limit_bytes - _CONTEXT_BYTES) / total), device)


def page_lock(arena: Arena, device: torch.device) -> int:
    """Make host memory known to CUDA's driver, so that copies from it run at the link's rate and beside the computation.

    In place: torch's own pinned tensors are rounded up to powers of two.

    Args:
        arena: the memory, released by the driver just before it goes.
        device: an accelerator.

    Returns:
        CUDA's error, where the system refuses: the host would wait for each copy. Otherwise 0, also where there is nothing to
        do, as for other kinds of accelerators.
    """
    runtime = _runtime_of(device)
    if arena.nbytes == 0 or runtime is None:
        return 0
    address = arena.tensor.data_ptr()
    with torch.accelerator.device_index(device.index):
        error = int(runtime.cudaHostRegister(address, arena.nbytes, _PORTABLE))
    if error:
        # The runtime keeps it for the next check of a kernel's launch, which would raise: this one.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=device)
        return error
    arena.before_release(lambda: runtime.cudaHostUnregister(address))
    return 0


def _runtime_of(device: torch.device) -> Any:
    """CUDA's functions; None for other kinds of accelerators."""
    return torch.cuda.cudart() if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _ring_memory(device: torch.device) -> tuple[torch.Tensor, bool]:
    """Bytes from a multiple of ALIGN_BYTES on: page-locked in place, or torch's own pinned memory where that is refused.

    And whether they are page-locked.
    """
    arena = Arena(RING_BYTES)
    error = page_lock(arena, device)
    if not error:
        return arena.tensor, True
    try:
        with torch.inference_mode(False):
            pinned = torch.empty(_PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
            return pinned[-pinned.data_ptr() % ALIGN_BYTES :], True
    except RuntimeError:
        logger.warning(
            "No host memory could be page-locked (CUDA error %d): weights are copied to %s at a part of the link's rate. Raise "
            "the limit on locked memory (ulimit -l).",
            error,
            device,
        )
        return arena.tensor, False
