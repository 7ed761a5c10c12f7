"""Reads: every byte of every parameter comes from where it stands, and direct ones are aligned."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import COMPILER, simulated

from bigmodel.checkpoint.spec import Extent, Source
from bigmodel.checkpoint.stamp import FileStamp
from bigmodel.offload.arena import ALIGN_BYTES, Arena
from bigmodel.offload.link import DeviceMemory, Link, Ring
from bigmodel.offload.ranges import PACKED_ALIGN_BYTES, lay_out
from bigmodel.offload.reader import Reader

BLOCK = 4 * ALIGN_BYTES


def filled(sources, file_bytes, tmp_path_factory, device=None):
    """Lay out, read from real files, and give each parameter's bytes, from host memory and from the device, if there is one."""
    folder = tmp_path_factory.mktemp("ranges")
    paths = {}
    for name, content in file_bytes.items():
        paths[name] = str(folder / name)
        with open(paths[name], "wb") as file:
            file.write(content)
    placed = [
        Source(
            s.name,
            s.dtype,
            s.shape,
            s.stored_dtype,
            tuple(Extent(paths[e.file], e.offset, e.nbytes, e.into) for e in s.extents),
        )
        for s in sources
    ]
    layout = lay_out(placed, block_bytes=BLOCK, gap_bytes=1000, for_accelerator=device is not None)
    slab = Arena(layout.nbytes)
    memory = None if device is None else DeviceMemory(layout.device_bytes, Link(torch.device(device)))
    reader = Reader(
        num_threads=2,
        stamps={path: FileStamp.of(path) for path in paths.values()},
        bounce_bytes=layout.staging_bytes,
        ring=None if memory is None else Ring(torch.device(device)),
    )
    try:
        reader.submit("unit", layout, slab).wait()
        if memory is not None:
            ticket = reader.submit("unit", layout, memory)
            ticket.wait()
            if ticket.filled is not None:
                memory.link.wait(ticket.filled)
    finally:
        reader.close()

    def taken(tensor, places):
        return {s.name: tensor[places[s.name] :][: s.nbytes].view(s.dtype).view(s.shape).clone() for s in placed}

    tensors = taken(slab.tensor, layout.places)
    return layout, tensors, None if memory is None else taken(memory.tensor.cpu(), layout.device_places)


@st.composite
def checkpoints(draw):
    """Files of random bytes, and parameters that are ranges of them, in any order, with holes, shared or split."""
    files = {
        f"f{i}": random.Random(draw(st.integers(0, 1 << 32))).randbytes(draw(st.integers(200, 60_000)))
        for i in range(draw(st.integers(1, 3)))
    }
    sources = []
    for number in range(draw(st.integers(1, 8))):
        stored = draw(st.sampled_from([torch.uint8, torch.int16, torch.int32]))
        dtype = draw(st.sampled_from([stored, stored, torch.int64]))
        extents, into = [], 0
        for _ in range(draw(st.integers(1, 3))):
            file = draw(st.sampled_from(sorted(files)))
            nbytes = draw(st.integers(1, 24)) * stored.itemsize
            nbytes *= draw(st.sampled_from([1, 1, 200]))
            nbytes = min(nbytes, len(files[file]) // 8 * 8)
            offset = draw(st.integers(0, len(files[file]) - nbytes))
            extents.append(Extent(file, offset, nbytes, into))
            into += nbytes
        sources.append(Source(f"p{number}", dtype, (into // stored.itemsize,), stored, tuple(extents)))
    return files, sources


@given(checkpoints())
def test_every_parameter_gets_its_bytes(tmp_path_factory, checkpoint):
    files, sources = checkpoint
    layout, tensors, _ = filled(sources, files, tmp_path_factory)
    for source in sources:
        raw = b"".join(files[e.file][e.offset : e.offset + e.nbytes] for e in source.extents)
        expected = torch.frombuffer(bytearray(raw), dtype=source.stored_dtype).to(source.dtype).view(source.shape)
        assert torch.equal(tensors[source.name], expected)
    for block in layout.blocks:
        assert block.nbytes <= BLOCK
        if block.is_aligned:
            assert block.offset % ALIGN_BYTES == block.nbytes % ALIGN_BYTES == block.into % ALIGN_BYTES == 0
    assert layout.nbytes >= max(layout.places[s.name] + s.nbytes for s in sources)


@pytest.mark.skipif(COMPILER is None, reason="simulated accelerators need a C++ compiler")
@settings(max_examples=40)
@given(checkpoints())
def test_every_parameter_gets_its_bytes_on_an_accelerator_and_begins_where_its_allocator_would_have_put_it(
    tmp_path_factory, checkpoint
):
    files, sources = checkpoint
    with simulated(1):
        layout, on_host, on_device = filled(sources, files, tmp_path_factory, "sim:0")
    for source in sources:
        raw = b"".join(files[e.file][e.offset : e.offset + e.nbytes] for e in source.extents)
        expected = torch.frombuffer(bytearray(raw), dtype=source.stored_dtype).to(source.dtype).view(source.shape)
        assert torch.equal(on_host[source.name], expected)
        assert torch.equal(on_device[source.name], expected)
    # Shared bytes may begin inside a parameter that was read before; the others stand alone.
    starts = {(e.file, e.offset) for source in sources for e in source.extents}
    if len(starts) == sum(len(source.extents) for source in sources):
        ranges = sorted((layout.device_places[s.name], s.nbytes) for s in sources)
        is_alone = all(a + n <= b for (a, n), (b, _) in itertools.pairwise(ranges))
        assert not is_alone or all(place % PACKED_ALIGN_BYTES == 0 for place, _ in ranges)
    # One copy from the slab does: it is the slot, behind the lead.
    assert all(layout.places[s.name] - layout.lead == layout.device_places[s.name] for s in sources)


def test_a_parameter_keeps_the_alignment_that_it_has_in_the_file():
    source = Source("w", torch.float32, (100,), torch.float32, (Extent("f", 8 * 1001, 400, 0),))
    other = Source("v", torch.float32, (3,), torch.float32, (Extent("f", 0, 12, 0),))
    alone = lay_out([source], block_bytes=BLOCK, gap_bytes=0)
    together = lay_out([other, source], block_bytes=BLOCK, gap_bytes=0)
    assert alone.places["w"] % ALIGN_BYTES == together.places["w"] % ALIGN_BYTES == 8008 % ALIGN_BYTES


def test_neighbours_are_read_in_one_range_and_shared_bytes_once():
    def at(name, offset, nbytes):
        return Source(name, torch.uint8, (nbytes,), torch.uint8, (Extent("f", offset, nbytes, 0),))

    layout = lay_out(
        [at("a", 0, 4096), at("b", 5000, 4096), at("c", 4096, 904), at("d", 0, 4096)], block_bytes=1 << 20, gap_bytes=0
    )
    assert len(layout.blocks) == 1
    assert layout.read_bytes == 3 * ALIGN_BYTES
    assert layout.places["a"] == layout.places["d"]
    apart = lay_out([at("a", 0, 4096), at("b", 1 << 20, 4096)], block_bytes=1 << 20, gap_bytes=4096)
    assert len(apart.blocks) == 2
