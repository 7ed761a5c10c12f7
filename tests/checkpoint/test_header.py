"""The header reader against safetensors' own, and against files that lie."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bigmodel.checkpoint import TensorSpec, encode_header, read_header
from bigmodel.errors import (
    CheckpointError,
    MalformedFileError,
    MissingFilesError,
    UnsupportedCheckpointError,
)

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.uint64,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.float4_e2m1fn_x2,
]


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bits of a dtype: every bit of the file counts, NaNs too (but a bool is 0 or 1)."""
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    bits = torch.randint(0, high, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).reshape(shape)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def read_bits(spec: TensorSpec) -> torch.Tensor:
    with open(spec.file, "rb") as file:
        file.seek(spec.offset)
        return torch.frombuffer(bytearray(file.read(spec.nbytes)) or bytearray(1), dtype=torch.uint8)[: spec.nbytes]


def write_raw(path: Path, header: Any, data: bytes = b"") -> str:
    """A safetensors file with any header, true or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return str(path)


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda t: t != "__metadata__")
tables = st.dictionaries(names, st.tuples(st.sampled_from(DTYPES), shapes, st.integers(0, 9)), max_size=6)


@given(table=tables, metadata=st.none() | st.dictionaries(names, names, min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_equals_safetensors_own_reader(tmp_path_factory, table, metadata):
    tensors = {
        name: random_tensor(dtype, shape, seed)
        for name, (dtype, shape, seed) in table.items()
        if dtype != torch.float4_e2m1fn_x2 or shape  # a pair of values cannot be a scalar
    }
    file = str(tmp_path_factory.mktemp("own") / "w.safetensors")
    save_file(tensors, file, metadata=metadata)
    header = read_header(file)
    with safe_open(file, "pt") as theirs:
        assert {spec.name for spec in header.tensors} == set(theirs.keys())
        assert dict(header.metadata) == (theirs.metadata() or {})
        for spec in header.tensors:
            tensor = theirs.get_tensor(spec.name)
            assert (spec.dtype, spec.shape) == (tensor.dtype, tuple(tensor.shape))
            assert torch.equal(read_bits(spec), bits_of(tensor))
            assert torch.equal(read_bits(spec), bits_of(tensors[spec.name]))
    offsets = [spec.offset for spec in header.tensors]
    assert offsets == sorted(offsets)


@given(table=tables)
@settings(max_examples=60, deadline=None)
def test_encoded_headers_are_safetensors(tmp_path_factory, table):
    tensors = {n: random_tensor(d, s, i) for n, (d, s, i) in table.items() if d != torch.float4_e2m1fn_x2 or s}
    head = encode_header([(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()], {"a": "b"})
    assert len(head) % 4096 == 0
    file = tmp_path_factory.mktemp("ours") / "w.safetensors"
    file.write_bytes(head + b"".join(bits_of(t).numpy().tobytes() for t in tensors.values()))
    with safe_open(str(file), "pt") as theirs:
        assert theirs.metadata() == {"a": "b"}
        for name, tensor in tensors.items():
            assert torch.equal(bits_of(theirs.get_tensor(name)), bits_of(tensor))
    assert {spec.name for spec in read_header(str(file)).tensors} == set(tensors)


small_ints = st.integers(-1, 9)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "BF16", "F32", "F4", "F6_E2M3", "nope"]),
        "shape": st.lists(small_ints, max_size=2),
        "data_offsets": st.lists(small_ints, min_size=2, max_size=2),
    }
)


@given(header=st.dictionaries(st.sampled_from("abc"), entries, max_size=3), size=st.integers(0, 12))
@settings(max_examples=300, deadline=None)
def test_accepts_what_safetensors_accepts(tmp_path_factory, header, size):
    file = write_raw(tmp_path_factory.mktemp("any") / "w.safetensors", header, bytes(size))
    try:
        with safe_open(file, "pt") as theirs:
            keys = set(theirs.keys())
    except SafetensorError:
        with pytest.raises(CheckpointError, match=r"w\.safetensors"):
            read_header(file)
        return
    if any(entry["dtype"] == "F6_E2M3" or (entry["dtype"] == "F4" and odd(entry)) for entry in header.values()):
        with pytest.raises(UnsupportedCheckpointError, match="torch has no dtype for"):  # theirs fails at the read
            read_header(file)
    else:
        assert {spec.name for spec in read_header(file).tensors} == keys


def odd(entry: dict[str, Any]) -> bool:
    """Whether a tensor of half bytes has rows that end within a byte."""
    return not entry["shape"] or entry["shape"][-1] % 2 == 1


def test_header_longer_than_the_first_read(tmp_path):
    tensors = {f"layers.{i}.weight": torch.full((3,), float(i)) for i in range(3000)}
    save_file(tensors, tmp_path / "w.safetensors")
    specs = read_header(str(tmp_path / "w.safetensors")).tensors
    assert len(specs) == 3000
    assert all(torch.equal(read_bits(spec), bits_of(tensors[spec.name])) for spec in specs[::500])


W = entry("U8", [4], 0, 4)
BAD_HEADERS = {
    "json": (b"{nonsense", b"", "not valid JSON"),
    "utf8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "trailing text": (b"{} x", b"", "not valid JSON"),
    "nesting": (b"[" * 100_000, b"", "nested too deeply|not valid JSON"),
    "not an object": ([1], b"", "a JSON list, not an object"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "duplicate tensor": (b'{"a": %b, "a": %b}' % ((json.dumps(W).encode(),) * 2), b"abcd", "'a' stands in it twice"),
    "duplicate field": (b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"a", "'dtype'.*twice"),
    "no dtype": ({"a": {"shape": [4], "data_offsets": [0, 4]}}, b"abcd", "'a' is not an object of dtype"),
    "not an entry": ({"a": 3}, b"", "'a' is not an object of dtype"),
    "three offsets": ({"a": {**W, "data_offsets": [0, 4, 4]}}, b"abcd", "two data_offsets"),
    "unknown dtype": ({"a": entry("F128", [4], 0, 4)}, b"abcd", "'a' has the unknown dtype 'F128'"),
    "dtype is a list": ({"a": entry(["U8"], [4], 0, 4)}, b"abcd", "unknown dtype"),  # type: ignore[arg-type]
    "negative size": ({"a": entry("U8", [-4], 0, 4)}, b"abcd", r"shape \[-4\]"),
    "fractional size": ({"a": entry("U8", [4.0], 0, 4)}, b"abcd", r"shape \[4.0\]"),
    "bool size": ({"a": entry("U8", [True], 0, 1)}, b"a", r"shape \[True\]"),
    "huge size": ({"a": entry("U8", [0, 2**70], 0, 0)}, b"", "shape"),
    "shape no list": ({"a": {**W, "shape": 4}}, b"abcd", "shape 4"),
    "negative offset": ({"a": entry("U8", [4], -4, 0)}, b"abcd", r"data_offsets \[-4, 0\]"),
    "reversed offsets": ({"a": entry("U8", [4], 4, 0)}, b"abcd", r"data_offsets \[4, 0\]"),
    "text offsets": ({"a": entry("U8", [4], "0", 4)}, b"abcd", "data_offsets"),
    "nan offset": (b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[NaN,4]}}', b"abcd", "NaN"),
    "size against shape": ({"a": entry("F32", [3], 0, 4)}, b"abcd", "12 bytes, and its data_offsets hold 4"),
    "overlap": ({"a": W, "b": entry("U8", [4], 2, 6)}, b"abcdef", "'b' begins at byte 2, not 4: it overlaps"),
    "hole": ({"a": W, "b": entry("U8", [4], 6, 10)}, b"abcdefghij", "'b' begins at byte 6, not 4: it leaves a hole"),
    "hole at the start": ({"a": entry("U8", [4], 2, 6)}, b"abcdef", "hole"),
    "data after the end": ({"a": W}, b"abcdef", "has .* bytes, and its tensors end at byte"),
    "half a byte": ({"a": entry("F4", [3], 0, 2)}, b"ab", "1.5 bytes"),
}


@pytest.mark.parametrize(("header", "data", "message"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_refuses_headers_that_contradict_themselves(tmp_path, header, data, message):
    file = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(MalformedFileError, match=message) as caught:
        read_header(file)
    assert file in str(caught.value)
    assert str(caught.value).isascii()


def test_lists_all_problems_of_a_header(tmp_path):
    header = {f"t{i}": entry("F128", [4], 0, 4) for i in range(20)}
    with pytest.raises(MalformedFileError, match=r"20 problems.*'t0'.*'t1'.*and 12 more"):
        read_header(write_raw(tmp_path / "bad.safetensors", header, b"abcd"))


@pytest.mark.parametrize("kept", [0, 7, 8, 20, -1])
def test_a_truncated_file_says_how_many_bytes_are_there(tmp_path, kept):
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(100)}, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    with pytest.raises(MalformedFileError, match="download is incomplete") as caught:
        read_header(str(file))
    assert f"{file} has {len(whole[:kept])} of " in str(caught.value)
    if kept == -1:
        assert f"{len(whole) - 1} of {len(whole)} bytes" in str(caught.value)


def test_a_header_length_past_the_limit_is_not_read(tmp_path):
    file = tmp_path / "w.safetensors"
    file.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(MalformedFileError, match=f"states a header of {2**60} bytes"):
        read_header(str(file))


def test_a_header_length_past_the_end_is_not_read(tmp_path):
    file = tmp_path / "w.safetensors"
    file.write_bytes(struct.pack("<Q", 50_000_000) + b"{}")
    with pytest.raises(MalformedFileError, match="has 10 of at least 50000008 bytes"):
        read_header(str(file))


def test_dtypes_that_torch_lacks_are_named(tmp_path):
    file = write_raw(tmp_path / "w.safetensors", {"a": entry("F6_E2M3", [4], 0, 3)}, b"abc")
    with pytest.raises(UnsupportedCheckpointError, match="'a' is F6_E2M3"):
        read_header(file)


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(MalformedFileError, match="is a FIFO"):
        read_header(str(tmp_path / "fifo.safetensors"))
    with pytest.raises(MalformedFileError, match="is a folder"):
        read_header(str(tmp_path / "folder.safetensors"))
    with pytest.raises(MalformedFileError, match="is a device"):
        read_header("/dev/zero")
    with pytest.raises(MissingFilesError, match="does not exist"):
        read_header(str(tmp_path / "none.safetensors"))


def test_a_git_lfs_pointer_is_named_as_one(tmp_path):
    file = tmp_path / "w.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n")
    with pytest.raises(MalformedFileError, match="git-lfs pointer to 4976698672 bytes"):
        read_header(str(file))


def test_a_torch_file_under_the_wrong_name_is_named(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "w.safetensors")
    with pytest.raises(MalformedFileError, match="It is a zip archive"):
        read_header(str(tmp_path / "w.safetensors"))
