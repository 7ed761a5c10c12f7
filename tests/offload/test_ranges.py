"""Reads: every byte of every parameter comes from where it stands, and direct ones are aligned."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from bigmodel.checkpoint.spec import Extent, Source
from bigmodel.checkpoint.stamp import FileStamp
from bigmodel.offload.arena import ALIGN_BYTES, Arena
from bigmodel.offload.ranges import lay_out
from bigmodel.offload.reader import Reader

BLOCK = 4 * ALIGN_BYTES


def filled(sources, file_bytes, tmp_path_factory):
    """Lay out, read from real files, and give each parameter's bytes."""
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
    layout = lay_out(placed, block_bytes=BLOCK, gap_bytes=1000)
    slab = Arena(layout.nbytes)
    reader = Reader(
        num_threads=2, stamps={path: FileStamp.of(path) for path in paths.values()}, bounce_bytes=layout.staging_bytes
    )
    try:
        reader.submit("unit", layout, slab).wait()
    finally:
        reader.close()
    tensors = {
        s.name: slab.tensor[layout.places[s.name] :][: s.nbytes].view(s.dtype).view(s.shape).clone() for s in placed
    }
    return layout, tensors


@st.composite
def checkpoints(draw):
    """Files of random bytes, and parameters that are ranges of them, in any order, with holes, shared or split."""
    files = {
        f"f{i}": draw(st.randoms(use_true_random=False)).randbytes(draw(st.integers(200, 60_000)))
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
    layout, tensors = filled(sources, files, tmp_path_factory)
    for source in sources:
        raw = b"".join(files[e.file][e.offset : e.offset + e.nbytes] for e in source.extents)
        expected = torch.frombuffer(bytearray(raw), dtype=source.stored_dtype).to(source.dtype).view(source.shape)
        assert torch.equal(tensors[source.name], expected)
    for block in layout.blocks:
        assert block.nbytes <= BLOCK
        if block.is_aligned:
            assert block.offset % ALIGN_BYTES == block.nbytes % ALIGN_BYTES == block.into % ALIGN_BYTES == 0
    assert layout.nbytes >= max(layout.places[s.name] + s.nbytes for s in sources)


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
