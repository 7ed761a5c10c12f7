"""A small module whose blocks stream from a store in memory, and stores that are slow or fail."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import torch
from simulated import simulated
from torch import nn

from bigmodel.hooks.attach import Attachment
from bigmodel.hooks.hops import Route
from bigmodel.hooks.slots import DataBinding
from bigmodel.hooks.stats import StreamStats
from bigmodel.hooks.streamer import StreamedUnit, Streamer
from bigmodel.offload.arena import Arena
from bigmodel.offload.link import DeviceMemory, Link
from bigmodel.offload.reader import Ticket

WIDTH = 16
# An accelerator on which the streamed stacks run; the CPU where it is None.
device: str | None = None
UNIT_BYTES = 4 * (WIDTH * WIDTH + WIDTH)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.fail = False
        self.within = None  # what else a test has it do

    def forward(self, x):
        if self.fail:
            raise RuntimeError("broken block")
        x = torch.tanh(x @ self.lin.weight.T + self.lin.bias)
        return x if self.within is None else self.within(x)


class Stack(nn.Module):
    """Runs its blocks in an order that may change between passes."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.order = list(range(num_blocks))

    def forward(self, x):
        for number in self.order:
            x = self.blocks[number](x)
        return x


class MemoryStore:
    """A store over tensors; a fetch takes `delay_s` in a thread of its own, and fails for the units in `broken`."""

    def __init__(self, content: dict[str, torch.Tensor], delay_s: float = 0.0) -> None:
        self.content = content
        self.delay_s = delay_s
        self.broken: set[str] = set()
        self.fetched: list[str] = []
        self.threads: list[threading.Thread] = []

    def fetch(self, unit: str, slot: Arena | DeviceMemory, *, is_urgent: bool) -> Ticket:
        self.fetched.append(unit)
        ticket = Ticket(unit, 1)
        thread = threading.Thread(target=self._fill, args=(unit, slot, ticket, self.delay_s))
        self.threads.append(thread)
        thread.start()
        return ticket

    def _fill(self, unit: str, slot: Arena | DeviceMemory, ticket: Ticket, delay_s: float) -> None:
        time.sleep(delay_s)
        try:
            if unit in self.broken:
                raise OSError("disk on fire")
            if isinstance(slot, DeviceMemory):
                slot.link.copy(self.content[unit], slot.tensor[:UNIT_BYTES], slot.after)
                ticket.filled = slot.link.mark_copied()
            else:
                slot.tensor[:UNIT_BYTES].copy_(self.content[unit])
        except (OSError, RuntimeError) as error:  # belongs to whoever waits
            ticket.error = error
        ticket.num_left = 0
        ticket.done.set()

    def read_bytes(self, unit: str) -> int:
        return UNIT_BYTES

    def close(self) -> None:
        for thread in self.threads:
            thread.join()


@contextlib.contextmanager
def on_an_accelerator() -> Iterator[None]:
    """Stacks stream to a simulated one while the block runs."""
    global device
    with simulated(1):
        device = "sim:0"
        try:
            yield
        finally:
            device = None


def streamed_stack(num_blocks: int = 5, num_slots: int = 2, delay_s: float = 0.0, check_pass=None):
    """A Stack that streams (to `device`, where that is set), an equal one that does not, the attachment and the store."""
    torch.manual_seed(0)
    reference = Stack(num_blocks).eval().requires_grad_(False)
    model = Stack(num_blocks).eval().requires_grad_(False)
    model.load_state_dict(reference.state_dict())
    content, units, sites = {}, [], {}
    for number, block in enumerate(model.blocks):
        name = f"blocks.{number}"
        weight, bias = block.lin.weight, block.lin.bias
        content[name] = torch.cat([weight.flatten(), bias]).clone().view(torch.uint8)
        bindings = [
            DataBinding(f"{name}.lin.weight", weight, weight.detach().clone()),
            DataBinding(f"{name}.lin.bias", bias, bias.detach().clone()),
        ]
        places = {f"{name}.lin.weight": 0, f"{name}.lin.bias": 4 * WIDTH * WIDTH}
        units.append(StreamedUnit(name, bindings, places, 0))
        sites[number] = [(name, block)]
    store = MemoryStore(content, delay_s)
    link = Link(torch.device(device)) if device is not None else None
    lane = [Arena(UNIT_BYTES) if link is None else DeviceMemory(UNIT_BYTES, link) for _ in range(num_slots)]
    streamer = Streamer(units, [lane], store)
    route = Route(link.device) if link is not None else None
    attachment = Attachment(model, streamer, sites, {}, check_pass, StreamStats(), refuses_moves=True, route=route)
    return model, reference, attachment, store
