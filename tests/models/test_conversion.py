"""Ranges followed through operations, against the same operations on real tensors."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from by_hand import assemble
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigmodel.checkpoint import Source, TensorSpec
from bigmodel.errors import ReadError, UnsupportedCheckpointError
from bigmodel.models.boxes import extents_of
from bigmodel.models.conversion import Traced, equal_values, sources_of, trace

ROW = 4096  # bytes: pieces of this size stay ranges


def store(folder: Path, *tensors: torch.Tensor, gap_bytes: int = 8) -> list[TensorSpec]:
    """Writes tensors into one file, a gap before each, and says where they are."""
    specs, offset = [], 0
    with open(folder / "stored", "wb") as file:
        for index, tensor in enumerate(tensors):
            file.write(b"\xee" * gap_bytes + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
            name = f"tensor{index}"
            specs.append(TensorSpec(name, tensor.dtype, tuple(tensor.shape), file.name, offset + gap_bytes))
            offset += gap_bytes + tensor.nbytes
    return specs


def source_of(traced: torch.Tensor) -> Source:
    assert isinstance(traced, Traced)
    return sources_of({"made": traced})["made"]


def check(folder: Path, make: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> Source:
    """The Source of what `make` gives, which must describe exactly what it gives on real tensors."""
    expected = make(*tensors)
    source = source_of(make(*map(trace, store(folder, *tensors))))
    made = assemble(source)
    assert (made.dtype, made.shape) == (expected.dtype, expected.shape)
    assert torch.equal(made, expected)
    return source


def experts(num: int = 4, rows: int = 3, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(rows, ROW // 4).to(dtype) for _ in range(num)]


def test_a_stored_tensor_is_one_range(tmp_path: Path) -> None:
    (spec,) = store(tmp_path, torch.randn(5, 7))
    source = source_of(trace(spec))
    assert [(e.offset, e.nbytes, e.into) for e in source.extents] == [(8, 5 * 7 * 4, 0)]
    assert source.is_view
    assert source.conversion is None


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda *ts: torch.stack(ts), id="stack"),
        pytest.param(lambda *ts: torch.stack(ts, dim=1), id="stack in the middle"),
        pytest.param(lambda *ts: torch.cat(ts), id="cat"),
        pytest.param(lambda *ts: torch.cat([torch.stack(ts[:2]), torch.stack(ts[2:])], dim=1), id="gate_up"),
        pytest.param(lambda *ts: ts[0].chunk(3)[1].contiguous(), id="chunk"),
        pytest.param(lambda *ts: torch.split(torch.cat(ts), [2, 3, 7])[2], id="split across inputs"),
        pytest.param(lambda *ts: torch.stack(ts).unbind(0)[2], id="unbind"),
        pytest.param(lambda *ts: torch.stack(ts)[-1, 1:], id="index"),
        pytest.param(lambda *ts: torch.cat(ts).view(2, 6, -1).narrow(1, 1, 4).clone(), id="view and narrow"),
        pytest.param(lambda *ts: torch.cat(ts).reshape(-1)[1024:9000].reshape(2, -1), id="flatten across rows"),
        pytest.param(lambda *ts: torch.stack(ts).flatten(0, 1).unsqueeze(1).squeeze(), id="squeeze"),
        pytest.param(lambda *ts: torch.stack(ts).transpose(0, 1).contiguous(), id="transposed rows"),
        pytest.param(lambda *ts: torch.stack(ts).permute(1, 0, 2)[2], id="permuted rows"),
        pytest.param(lambda *ts: torch.cat([ts[0][:0], *ts]), id="cat with nothing"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moved_ranges_need_no_conversion(tmp_path: Path, make: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
    tensors = [torch.randn(3, ROW // dtype.itemsize).to(dtype) for _ in range(4)]
    source = check(tmp_path, make, *tensors)
    assert source.conversion is None
    assert source.stored_dtype == dtype


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda *ts: ts[0].t().contiguous(), id="transpose"),
        pytest.param(lambda *ts: ts[0] * 2 + 1, id="arithmetic"),
        pytest.param(lambda *ts: torch.stack(ts).mean(0), id="mean"),
        pytest.param(lambda *ts: ts[0].view(3, 512, 2).transpose(1, 2).reshape(3, -1), id="rope permute"),
        pytest.param(lambda *ts: ts[0][:, ::2], id="step"),
        pytest.param(lambda *ts: ts[0].flip(0), id="flip"),
        pytest.param(lambda *ts: ts[0].expand(2, 3, -1).clone(), id="expand"),
        pytest.param(lambda *ts: torch.cat([ts[0], ts[1].bfloat16().float()]), id="different casts"),
        pytest.param(lambda *ts: ts[0].bfloat16().float(), id="two casts"),
        pytest.param(lambda *ts: ts[0].view(torch.int32), id="other dtype's view"),
        pytest.param(lambda *ts: ts[0].index_select(0, torch.tensor([2, 0])), id="index tensor"),
        pytest.param(lambda *ts: ts[0] + torch.ones(3, 1), id="real constant"),
        pytest.param(lambda *ts: torch.zeros_like(ts[0], device="cpu") + ts[0], id="factory with a device"),
        pytest.param(lambda *ts: ts[0].topk(5, dim=1)[0], id="named tuple"),
        pytest.param(lambda *ts: torch.nn.functional.pad(ts[0], (0, 4)), id="pad"),
    ],
)
def test_anything_else_is_converted_exactly(tmp_path: Path, make: Callable[..., torch.Tensor]) -> None:
    source = check(tmp_path, make, *experts())
    assert source.conversion is not None
    assert source.stored_dtype == source.dtype


def test_a_cast_keeps_ranges(tmp_path: Path) -> None:
    source = check(tmp_path, lambda *ts: torch.stack([t.to(torch.bfloat16) for t in ts]), *experts())
    assert source.conversion is None
    assert (source.stored_dtype, source.dtype) == (torch.float32, torch.bfloat16)
    assert not source.is_view


def test_a_cast_before_arithmetic_is_repeated_in_that_order(tmp_path: Path) -> None:
    tensors = experts(2)
    source = check(tmp_path, lambda a, b: a.bfloat16() + b.bfloat16(), *tensors)
    assert not torch.equal(assemble(source), (tensors[0] + tensors[1]).bfloat16())  # else the order would not show


def test_neighbours_in_the_file_become_one_range(tmp_path: Path) -> None:
    tensors = experts(4)
    specs = store(tmp_path, *tensors, gap_bytes=0)
    source = source_of(torch.stack([trace(spec) for spec in specs]))
    assert [(e.offset, e.into) for e in source.extents] == [(0, 0)]
    source = source_of(torch.stack([trace(spec) for spec in reversed(specs)]))
    assert len(source.extents) == 4


def test_many_small_pieces_of_an_input_are_converted(tmp_path: Path) -> None:
    small = check(tmp_path, lambda a, b: torch.cat([a, b], dim=1), torch.randn(100, 8), torch.randn(100, 8))
    assert small.conversion is not None
    # as many pieces, each worth a read
    large = check(tmp_path, lambda a, b: torch.cat([a, b], dim=1), torch.randn(100, 1024), torch.randn(100, 1024))
    assert len(large.extents) == 200
    # small inputs, each taken whole: a conversion would read them one by one too
    whole = check(tmp_path, lambda *ts: torch.stack(ts), *[torch.randn(8) for _ in range(100)])
    assert len(whole.extents) == 100


def test_outputs_of_the_same_inputs_share_a_conversion(tmp_path: Path) -> None:
    fused, other = torch.randn(12, 64), torch.randn(4, 4)
    specs = store(tmp_path, fused, other)
    q, k, v = (part * 2 for part in trace(specs[0]).chunk(3))
    sources = sources_of({"q": q, "k": k, "v": v, "alone": trace(specs[1]).t(), "kept": trace(specs[1])})
    assert sources["q"].conversion is sources["k"].conversion is sources["v"].conversion is not None
    assert sources["q"].conversion.outputs == ("q", "k", "v")
    assert [spec.name for spec in sources["q"].conversion.inputs] == ["tensor0"]
    assert sources["alone"].conversion not in (None, sources["q"].conversion)
    assert sources["kept"].is_view
    for name, part in zip("qkv", fused.chunk(3), strict=True):
        assert torch.equal(assemble(sources[name]), part * 2)


def test_conversions_that_share_an_input_by_way_of_a_third_are_one(tmp_path: Path) -> None:
    a, b, c, d = (trace(spec) for spec in store(tmp_path, *experts(4)))
    sources = sources_of({"ab": a + b, "cd": c * d, "bc": b - c})
    conversions = {id(source.conversion) for source in sources.values()}
    assert len(conversions) == 1
    assert set(sources["ab"].conversion.outputs) == {"ab", "cd", "bc"}
    assert len(sources["ab"].conversion.inputs) == 4


def test_a_conversion_can_be_run_again_and_changes_nothing_that_it_is_given(tmp_path: Path) -> None:
    tensor = torch.randn(4, 6)
    (spec,) = store(tmp_path, tensor)
    conversion = source_of(trace(spec).t().contiguous() + 1).conversion
    assert conversion is not None
    given_in = {spec.name: tensor.clone()}
    first, second = conversion.run(given_in)["made"], conversion.run(given_in)["made"]
    assert torch.equal(first, second)
    assert torch.equal(given_in[spec.name], tensor)
    assert first.is_contiguous()


def test_what_a_conversion_read_goes_with_it(tmp_path: Path) -> None:
    (spec,) = store(tmp_path, torch.randn(4, 6))
    conversion = source_of(trace(spec).t().contiguous() + 1).conversion
    assert conversion is not None
    given_in = torch.randn(4, 6)
    gone = weakref.ref(given_in)
    gc.collect()
    gc.disable()  # weights that wait for the collector would be memory beyond the budget
    try:
        conversion.run({spec.name: given_in})
        del given_in
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_an_empty_tensor_has_neither_ranges_nor_conversion(tmp_path: Path, shape: tuple[int, ...]) -> None:
    source = check(tmp_path, lambda a: a.bfloat16(), torch.empty(shape))
    assert (source.extents, source.conversion, source.nbytes) == ((), None, 0)


def test_a_scalar_is_a_range(tmp_path: Path) -> None:
    assert len(check(tmp_path, lambda a: a.reshape(1), torch.tensor(7)).extents) == 1
    assert len(check(tmp_path, lambda a: a.clone(), torch.tensor(2.5)).extents) == 1


def test_values_that_must_be_known_are_read(tmp_path: Path) -> None:
    specs = store(tmp_path, torch.tensor([1.0, 5.0]), torch.tensor([1, 0, 2]))
    assert (trace(specs[0]) * 2).max().item() == 10.0
    assert trace(specs[1]).nonzero().tolist() == [[0], [2]]
    assert bool((trace(specs[1]) > 1).any())
    filled = torch.zeros(2)
    filled.copy_(trace(specs[0]))
    assert filled.tolist() == [1.0, 5.0]


def test_tracing_reads_nothing(tmp_path: Path) -> None:
    gone = [TensorSpec(f"t{i}", torch.float32, (8, 1024), str(tmp_path / "none"), 0) for i in range(4)]
    made = torch.stack([trace(spec) for spec in gone])
    assert source_of(made.transpose(1, 2) * 3).conversion is not None
    assert repr(made) == "Traced(shape=(4, 8, 1024), dtype=torch.float32, placed=True)"
    with pytest.raises(ReadError, match="No such file"):
        made.max().item()


def test_writing_into_a_stored_tensor_is_refused(tmp_path: Path) -> None:
    (spec,) = store(tmp_path, torch.randn(4))
    traced = trace(spec)
    with pytest.raises(UnsupportedCheckpointError, match="in place"):
        traced.mul_(2)
    with pytest.raises(UnsupportedCheckpointError, match="in place"):
        traced[:2] = 0
    with pytest.raises(UnsupportedCheckpointError, match="in place"):
        torch.add(torch.ones(4), 1, out=traced)


def test_a_file_that_ends_early_is_told(tmp_path: Path) -> None:
    (spec,) = store(tmp_path, torch.randn(64))
    with open(spec.file, "r+b") as file:
        file.truncate(100)
    with pytest.raises(ReadError, match=r"ends after 92 of the 256 bytes of 'tensor0'"):
        trace(spec).sum().item()


def test_equality_is_that_of_torch(tmp_path: Path) -> None:
    big = torch.randn(3 << 20)  # several chunks
    other = big.clone()
    other[-1] += 1
    specs = store(tmp_path, big, big, other, big.double(), torch.tensor([0.0]), torch.tensor([-0.0]))
    same, copy, off, double, zero, minus_zero = map(trace, specs)
    assert equal_values(same, trace(specs[0]))
    assert torch.equal(same, copy)
    assert not torch.equal(same, off)
    assert equal_values(same, double.float())
    assert not equal_values(same, double)
    assert equal_values(zero, minus_zero)
    assert equal_values(same + 1, copy + 1)
    assert equal_values(same, big)
    assert not equal_values(same, trace(specs[4]))
    assert not equal_values(same, torch.empty_like(big, device="meta"))
    assert equal_values(same.bfloat16(), (big + 0.0).bfloat16())


def test_equality_of_what_torch_cannot_compare(tmp_path: Path) -> None:
    values = torch.tensor([1.0, 2.0, 3.0]).to(torch.float8_e4m3fn)
    changed = torch.tensor([1.0, 2.0, 4.0]).to(torch.float8_e4m3fn)
    one, two, three = map(trace, store(tmp_path, values, values, changed))
    assert equal_values(one, two)
    assert not equal_values(one, three)


def test_equal_ranges_are_equal_unread(tmp_path: Path) -> None:
    spec = TensorSpec("t", torch.float32, (4, 4), str(tmp_path / "none"), 0)
    assert equal_values(trace(spec), trace(spec))
    assert equal_values(trace(spec)[1:].bfloat16(), trace(spec)[1:].bfloat16())


def test_a_parameter_of_one_is_one(tmp_path: Path) -> None:
    (spec,) = store(tmp_path, torch.randn(4, 4))
    parameter = torch.nn.Parameter(trace(spec), requires_grad=False)
    assert isinstance(parameter, Traced)
    module = torch.nn.Linear(4, 4, bias=False, device="meta")
    module.weight = parameter
    assert isinstance(module.weight, torch.nn.Parameter)
    assert source_of(module.weight).is_view


@st.composite
def moves(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[Callable[[torch.Tensor], torch.Tensor]]]:
    """Shapes that can be stacked, and a random chain of operations that only move elements."""
    rank = draw(st.integers(1, 3))
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank)))
    shapes = [shape] * draw(st.integers(1, 3))
    dim = draw(st.integers(0, rank))
    chain: list[Callable[[torch.Tensor], torch.Tensor]] = []
    now = torch.empty(*shape[:dim], len(shapes), *shape[dim:], device="meta")
    chain.append(lambda ts, dim=dim: torch.stack(ts, dim=dim))
    for _ in range(draw(st.integers(0, 5))):
        kind = draw(st.sampled_from(["reshape", "narrow", "transpose", "select", "cat", "chunk", "unbind"]))
        d = draw(st.integers(0, max(now.dim() - 1, 0)))
        e = draw(st.integers(0, max(now.dim() - 1, 0)))
        if kind == "reshape" or now.dim() == 0:
            target, rest = [], now.numel()
            for prime in (2, 2, 3):
                if rest % prime == 0 and draw(st.booleans()):
                    target.append(prime)
                    rest //= prime
            target.insert(draw(st.integers(0, len(target))), rest)
            target.insert(draw(st.integers(0, len(target))), 1)
            step = lambda t, target=tuple(target): t.reshape(target)  # noqa: E731
        elif kind == "narrow":
            start = draw(st.integers(0, now.shape[d] - 1))
            length = draw(st.integers(1, now.shape[d] - start))
            step = lambda t, d=d, start=start, length=length: t.narrow(d, start, length)  # noqa: E731
        elif kind == "transpose":
            step = lambda t, d=d, e=e: t.transpose(d, e)  # noqa: E731
        elif kind == "select":
            index = draw(st.integers(0, now.shape[d] - 1))
            step = lambda t, d=d, index=index: t.select(d, index)  # noqa: E731
        elif kind == "cat":
            step = lambda t, d=d: torch.cat([t.narrow(d, 0, 1), t], dim=d)  # noqa: E731
        elif kind == "chunk":
            step = lambda t, d=d: t.chunk(2, dim=d)[-1].contiguous()  # noqa: E731
        else:
            step = lambda t, d=d: t.unbind(d)[0]  # noqa: E731
        now = step(now)
        chain.append(step)
    return shapes, chain


@given(moves())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_chain_of_moves_is_followed(
    tmp_path: Path, case: tuple[list[tuple[int, ...]], list[Callable[[torch.Tensor], torch.Tensor]]]
) -> None:
    shapes, chain = case
    tensors = [torch.arange(math.prod(s)).view(s) + 1000 * i for i, s in enumerate(shapes)]

    def make(*inputs: torch.Tensor) -> torch.Tensor:
        value = chain[0](list(inputs))
        for step in chain[1:]:
            value = step(value)
        return value

    expected = make(*tensors)
    traced = make(*map(trace, store(tmp_path, *tensors)))
    assert isinstance(traced, Traced)
    assert traced.boxes is not None
    # element by element, whatever the size of the ranges
    found = torch.empty(expected.shape, dtype=torch.int64)
    for box in traced.boxes:
        inner = tensors[int(box.spec.name.removeprefix("tensor"))].flatten()
        area = tuple(slice(a, a + n) for a, n in zip(box.start, box.size, strict=True))
        found[area] = inner.as_strided(box.size, box.stride, box.base)
    assert torch.equal(found, expected)
    extents = extents_of(traced.boxes, tuple(traced.shape), 8)
    assert extents is None or sum(extent.nbytes for extent in extents) == expected.nbytes
    assert torch.equal(assemble(source_of(traced)), expected)
