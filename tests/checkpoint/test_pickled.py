"""torch.save files: ranges found without reading data, the rest rewritten once, code never run."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from bigmodel.checkpoint import Checkpoint, TensorSpec, open_checkpoint
from bigmodel.errors import (
    CheckpointError,
    DoesNotFitError,
    MalformedFileError,
    UnsafeFileError,
    UnsupportedCheckpointError,
)


def read(spec: TensorSpec) -> torch.Tensor:
    with open(spec.file, "rb") as file:
        file.seek(spec.offset)
        raw = file.read(spec.nbytes)
    if not raw:
        return torch.empty(spec.shape, dtype=spec.dtype)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(spec.dtype).reshape(spec.shape)


def assert_same(checkpoint: Checkpoint, weights: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.tensors) == set(weights)
    for name, tensor in weights.items():
        spec = checkpoint.tensors[name]
        assert (spec.name, spec.dtype, spec.shape) == (name, tensor.dtype, tuple(tensor.shape))
        want = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(read(spec).reshape(-1).view(torch.uint8), want), name


def contiguous_weights() -> OrderedDict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(20, generator=generator)
    tied = torch.randn(4, 6, generator=generator)
    return OrderedDict(
        embed=tied,
        head=tied,
        rows=tied[1:3],
        part=base[3:7],
        parameter=torch.nn.Parameter(torch.randn(3, generator=generator)),
        bf16=torch.randn(3, 5, generator=generator).bfloat16(),
        scalar=torch.tensor(3),
        empty=torch.empty(0, 4),
        u16=torch.arange(5).to(torch.uint16),
        f8=torch.randn(4, generator=generator).to(torch.float8_e4m3fn),
        mask=torch.tensor([True, False]),
        c64=torch.randn(2, generator=generator, dtype=torch.complex64),
        c128=torch.randn(2, generator=generator, dtype=torch.complex128),
    )


def compressed(source: Path, target: Path) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache folder of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "bigmodel"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "w.pt", "w.pth"])
def test_contiguous_tensors_are_ranges_of_the_users_file(tmp_path, cache, name):
    weights = contiguous_weights()
    torch.save(weights, tmp_path / name)
    checkpoint = open_checkpoint(tmp_path / name)
    assert_same(checkpoint, weights)
    assert {spec.file for spec in checkpoint.tensors.values()} == {str(tmp_path / name)}
    assert checkpoint.tied == (("embed", "head"),)
    assert checkpoint.tensors["rows"].offset == checkpoint.tensors["embed"].offset + 6 * 4
    assert not cache.exists()


def test_no_data_is_read_from_a_plain_file(tmp_path, cache):
    """A sparse file: its data is 8 GiB of holes, which no test machine wants to read or hold."""
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({"w": torch.empty(2**33, dtype=torch.uint8)}, tmp_path / "w.pt")
    status = os.stat(tmp_path / "w.pt")
    assert status.st_size > 2**33 > status.st_blocks * 512
    spec = open_checkpoint(tmp_path / "w.pt").tensors["w"]
    assert spec.nbytes == 2**33
    assert os.stat(tmp_path / "w.pt").st_blocks == status.st_blocks


def test_a_rezipped_file_is_read_by_its_own_directory(tmp_path, cache):
    """Storages in another order, with other padding: offsets computed from the writer's habits would be wrong."""
    weights = {"a": torch.full((16,), 1.0), "b": torch.full((16,), 2.0), "c": torch.full((16,), 3.0)}
    torch.save(weights, tmp_path / "old.pt")
    with zipfile.ZipFile(tmp_path / "old.pt") as old, zipfile.ZipFile(tmp_path / "w.pt", "w") as new:
        infos = old.infolist()
        storages = [info for info in infos if "/data/" in info.filename]
        for info in [i for i in infos if i not in storages] + storages[:1] + storages[:0:-1]:
            new.writestr(info.filename, old.read(info))
    checkpoint = open_checkpoint(tmp_path / "w.pt")
    assert_same(checkpoint, weights)
    assert not cache.exists()


def test_only_tensors_that_are_no_ranges_are_rewritten(tmp_path, cache):
    weights = contiguous_weights()
    weights["transposed"] = weights["embed"].t()
    weights["transposed_too"] = weights["transposed"]
    weights["strided"] = torch.arange(10.0)[::2]
    weights["expanded"] = torch.tensor([7.0]).expand(3)
    weights["conjugate"] = torch.tensor([1 + 2j]).conj()
    torch.save(weights, tmp_path / "w.pt")
    checkpoint = open_checkpoint(tmp_path / "w.pt")
    assert_same(checkpoint, weights)
    moved = {name for name, spec in checkpoint.tensors.items() if spec.file != str(tmp_path / "w.pt")}
    assert moved == {"transposed", "transposed_too", "strided", "expanded", "conjugate"}
    assert checkpoint.tied == (("embed", "head"), ("transposed", "transposed_too"))
    assert checkpoint.files == (str(tmp_path / "w.pt"),)
    (file,) = (cache / "rewritten").iterdir()
    assert set(load_file(file)) == moved - {"transposed_too"}  # written once; anyone can read it
    assert os.stat(cache / "rewritten").st_mode & 0o077 == 0


def write_legacy(weights: dict[str, torch.Tensor], file: Path) -> None:
    torch.save(weights, file, _use_new_zipfile_serialization=False)


def write_compressed(weights: dict[str, torch.Tensor], file: Path) -> None:
    torch.save(weights, file.with_suffix(".old"))
    compressed(file.with_suffix(".old"), file)
    file.with_suffix(".old").unlink()


def write_big_endian(weights: dict[str, torch.Tensor], file: Path) -> None:
    """As a big-endian machine writes it: its mark, and every element's bytes reversed."""
    reversed_bytes = {
        name: tensor.contiguous().reshape(-1, 1).view(torch.uint8).flip(-1).reshape(-1).view(tensor.dtype)
        for name, tensor in weights.items()
    }
    shaped = {name: tensor.reshape(weights[name].shape) for name, tensor in reversed_bytes.items()}
    torch.save(shaped, file.with_suffix(".old"))
    with zipfile.ZipFile(file.with_suffix(".old")) as old, zipfile.ZipFile(file, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, b"big" if info.filename.endswith("/byteorder") else old.read(info))
    file.with_suffix(".old").unlink()


@pytest.mark.parametrize("write", [write_legacy, write_compressed, write_big_endian])
def test_other_formats_are_rewritten_once(tmp_path, write):
    generator = torch.Generator().manual_seed(1)
    weights = {"a": torch.randn(5, 7, generator=generator), "b": torch.arange(9), "h": torch.ones(3).half()}
    write(weights, tmp_path / "w.bin")
    checkpoint = open_checkpoint(tmp_path / "w.bin", cache_folder=tmp_path / "mine")
    assert_same(checkpoint, weights)
    (file,) = (tmp_path / "mine" / "rewritten").iterdir()
    first = os.stat(file)
    again = open_checkpoint(tmp_path / "w.bin", cache_folder=tmp_path / "mine")
    assert again.tensors == checkpoint.tensors
    assert (os.stat(file).st_ino, os.stat(file).st_mtime_ns) == (first.st_ino, first.st_mtime_ns)


def test_tied_tensors_of_a_rewritten_file_stay_tied(tmp_path):
    shared = torch.randn(4, 4)
    write_legacy({"embed": shared, "head": shared, "other": shared.clone()}, tmp_path / "w.bin")
    checkpoint = open_checkpoint(tmp_path / "w.bin", cache_folder=tmp_path / "cache")
    assert checkpoint.tied == (("embed", "head"),)
    assert torch.equal(read(checkpoint.tensors["head"]), shared)


def test_a_changed_file_never_meets_its_old_copy(tmp_path):
    file = tmp_path / "w.bin"
    write_legacy({"a": torch.full((64,), 1.0)}, file)
    old = open_checkpoint(file, cache_folder=tmp_path / "cache")
    status = os.stat(file)
    write_legacy({"a": torch.full((64,), 2.0)}, file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (os.stat(file).st_size, os.stat(file).st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    new = open_checkpoint(file, cache_folder=tmp_path / "cache")
    assert torch.equal(read(new.tensors["a"]), torch.full((64,), 2.0))
    assert new.content_key != old.content_key


@pytest.mark.parametrize("damage", ["truncated", "foreign", "garbage"])
def test_a_damaged_or_foreign_copy_is_written_again(tmp_path, damage):
    write_legacy({"a": torch.full((64,), 1.0)}, tmp_path / "w.bin")
    write_legacy({"a": torch.full((64,), 9.0)}, tmp_path / "other.bin")
    checkpoint = open_checkpoint(tmp_path / "w.bin", cache_folder=tmp_path / "cache")
    copy = Path(checkpoint.tensors["a"].file)
    if damage == "truncated":
        os.truncate(copy, copy.stat().st_size - 8)
    elif damage == "garbage":
        copy.write_bytes(b"x" * 100)
    else:
        other = open_checkpoint(tmp_path / "other.bin", cache_folder=tmp_path / "cache").tensors["a"].file
        copy.write_bytes(Path(other).read_bytes())
    again = open_checkpoint(tmp_path / "w.bin", cache_folder=tmp_path / "cache")
    assert torch.equal(read(again.tensors["a"]), torch.full((64,), 1.0))


@pytest.mark.filterwarnings("ignore:Serializing tensors on the meta device")
def test_tensors_saved_without_data_are_refused(tmp_path):
    torch.save({"a": torch.ones(3), "b": torch.empty(3, device="meta")}, tmp_path / "w.pt")
    with pytest.raises(UnsupportedCheckpointError, match="saved from the meta device: 'b'"):
        open_checkpoint(tmp_path / "w.pt", cache_folder=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_two_processes_can_rewrite_at_once(tmp_path):
    write_legacy({f"w{i}": torch.full((1000,), float(i)) for i in range(50)}, tmp_path / "w.bin")
    code = (
        "import sys\nfrom bigmodel.checkpoint import open_checkpoint\n"
        "print(len(open_checkpoint(sys.argv[1], cache_folder=sys.argv[2]).tensors))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "w.bin"), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in running] == ["50", "50"]
    checkpoint = open_checkpoint(tmp_path / "w.bin", cache_folder=tmp_path / "cache")
    assert all(torch.equal(read(spec), torch.full((1000,), float(n[1:]))) for n, spec in checkpoint.tensors.items())
    assert len(list((tmp_path / "cache" / "rewritten").iterdir())) == 1


def test_a_rewriting_that_fails_leaves_nothing(tmp_path):
    write_legacy({"a": torch.ones(3), "b": torch.ones(3, dtype=torch.complex128)}, tmp_path / "w.bin")
    with pytest.raises(UnsupportedCheckpointError, match=r"'b' is torch.complex128"):
        open_checkpoint(tmp_path / "w.bin", cache_folder=tmp_path / "cache")
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    write_legacy({"a": torch.ones(3)}, tmp_path / "w.bin")
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match=r"w\.bin has tensors that must be rewritten, and .*cannot be written"):
        open_checkpoint(tmp_path / "w.bin", cache_folder=tmp_path / "cache")


def test_a_disk_that_fails_while_it_is_written_leaves_nothing(tmp_path):
    write_legacy({"a": torch.ones(100_000)}, tmp_path / "w.bin")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match="rewritten cannot be written: File too large"):
            open_checkpoint(tmp_path / "w.bin", cache_folder=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "cache" / "rewritten").iterdir()) == []


def test_a_disk_that_is_too_small_is_known_before_it_is_written(tmp_path):
    torch.save({"a": torch.ones(1).expand(2**50)}, tmp_path / "w.pt")
    with pytest.raises(DoesNotFitError, match=r"takes 4096 TiB of disk in .* may be used") as caught:
        open_checkpoint(tmp_path / "w.pt", cache_folder=tmp_path / "cache")
    assert caught.value.tier == "disk"
    assert caught.value.needed_bytes > 2**52 > caught.value.available_bytes
    assert not (tmp_path / "cache").exists()


class Code:
    """Pickles as a call that would leave a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


def save_protocol_4(value: object, file: Path) -> None:
    file.write_bytes(pickle.dumps(value, protocol=4))


def save_compressed(value: object, file: Path) -> None:
    torch.save(value, file.with_suffix(".old"))
    compressed(file.with_suffix(".old"), file)


@pytest.mark.parametrize(
    "save",
    [
        torch.save,
        lambda value, file: torch.save(value, file, _use_new_zipfile_serialization=False),
        lambda value, file: torch.save(value, file, pickle_protocol=4),
        save_compressed,
        save_protocol_4,
    ],
    ids=["zip", "legacy", "zip protocol 4", "compressed", "pickle protocol 4"],
)
def test_a_pickle_with_code_is_refused_by_the_name_of_the_code(tmp_path, cache, save):
    save({"w": torch.ones(3), "x": Code(tmp_path / "trace")}, tmp_path / "w.bin")
    with pytest.raises(UnsafeFileError, match=r"w\.bin holds code.*posix\.system.*not run") as caught:
        open_checkpoint(tmp_path / "w.bin")
    assert str(caught.value).isascii()
    assert not (tmp_path / "trace").exists()
    assert not cache.exists()


def test_a_pickled_module_is_refused_by_its_class(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pt")
    with pytest.raises(UnsafeFileError, match=r"torch\.nn\.modules\.linear\.Linear"):
        open_checkpoint(tmp_path / "w.pt")


def test_torchscript_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("w/data.pkl", b"\x80\x02}.")
        archive.writestr("w/constants.pkl", b"\x80\x02).")
        archive.writestr("w/code/__torch__.py", b"")
    with pytest.raises(UnsafeFileError, match="TorchScript archive, which holds code"):
        open_checkpoint(tmp_path / "w.pt")


def test_weights_of_another_pickle_protocol_are_named(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "w.pt", pickle_protocol=4)
    with pytest.raises(UnsupportedCheckpointError, match="pickle of protocol 4"):
        open_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("key", ["state_dict", "model", "anything"])
@pytest.mark.parametrize("legacy", [False, True])
def test_one_dict_of_weights_inside_is_found(tmp_path, key, legacy):
    weights = {"a": torch.ones(3), "b": torch.zeros(2)}
    value = {key: {**weights, "version": 3}, "epoch": 7, "args": {"lr": 0.1}, "optimizer": {"state": {0: {}}}}
    torch.save(value, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    assert_same(open_checkpoint(tmp_path / "w.pt", cache_folder=tmp_path / "cache"), weights)


def test_entries_that_are_no_tensors_are_dropped(tmp_path):
    torch.save({"a": torch.ones(3), "step": 3, "note": "x", "list": [1]}, tmp_path / "w.pt")
    assert_same(open_checkpoint(tmp_path / "w.pt"), {"a": torch.ones(3)})


ODD_CONTENTS = {
    "two dicts": ({"model": {"a": torch.ones(1)}, "ema": {"a": torch.ones(1)}}, "in 2 dicts .1 in 'model', 1 in 'ema'"),
    "top and dict": ({"a": torch.ones(1), "model": {"a": torch.ones(1)}}, "1 at its top, 1 in 'model'"),
    "nothing": ({"epoch": 3}, "holds no weights: its entries are 'epoch'"),
    "empty": ({}, "holds no weights: its entries are none"),
    "a tensor": (torch.ones(3), "holds a Tensor, not a dict"),
    "a list": ([torch.ones(3)], "holds a list, not a dict"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, r"not plain: 'a' \(torch.sparse_coo\)"),
}


@pytest.mark.parametrize(("value", "message"), ODD_CONTENTS.values(), ids=ODD_CONTENTS)
@pytest.mark.parametrize("legacy", [False, True])
def test_contents_that_are_no_weights_are_refused(tmp_path, value, message, legacy):
    torch.save(value, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UnsupportedCheckpointError, match=message):
        open_checkpoint(tmp_path / "w.pt", cache_folder=tmp_path / "cache")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kept", [0, 3, 100, -1000, -1])
def test_truncated_files_are_refused(tmp_path, kept, legacy):
    torch.save({"a": torch.ones(1000)}, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    whole = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(whole[:kept])
    with pytest.raises(MalformedFileError, match=r"w\.pt"):
        open_checkpoint(tmp_path / "w.pt", cache_folder=tmp_path / "cache")
    assert not list(tmp_path.rglob("*.safetensors"))


def rezip(file: Path, change: dict[str, bytes | None], twice: str = "") -> None:
    """Writes the archive again with members replaced (None: left out)."""
    with zipfile.ZipFile(file) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    root = next(iter(members)).partition("/")[0]
    members |= {f"{root}/{name}": content for name, content in change.items() if content is not None}
    with zipfile.ZipFile(file, "w") as new:
        for name, content in members.items():
            if change.get(name.removeprefix(f"{root}/"), b"") is not None:
                new.writestr(name, content)
        if twice:
            new.writestr(f"{root}/{twice}", b"x" * 4000)


def test_a_storage_smaller_than_its_tensor_is_refused(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "w.pt")
    rezip(tmp_path / "w.pt", {"data/0": b"x" * 3999})
    with pytest.raises(MalformedFileError, match="'a' needs bytes 0 to 4000 of storage '0', which has 3999"):
        open_checkpoint(tmp_path / "w.pt")


def test_a_missing_storage_is_refused(tmp_path):
    torch.save({"a": torch.ones(1000), "b": torch.ones(3)}, tmp_path / "w.pt")
    rezip(tmp_path / "w.pt", {"data/1": None})
    with pytest.raises(MalformedFileError, match=r"w\.pt is damaged"):
        open_checkpoint(tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_named_twice_is_refused(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "w.pt")
    rezip(tmp_path / "w.pt", {}, twice="data/0")
    with pytest.raises(MalformedFileError, match="names a member twice"):
        open_checkpoint(tmp_path / "w.pt")


def test_a_zip_that_is_no_checkpoint_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UnsupportedCheckpointError, match=r"without data\.pkl"):
        open_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("content", [b"hello world, this is no pickle", b"\0" * 64, b"\x89HDF\r\n\x1a\n" + b"\0" * 64])
def test_what_is_no_pickle_is_refused(tmp_path, content):
    (tmp_path / "w.bin").write_bytes(content)
    with pytest.raises(MalformedFileError, match=r"w\.bin"):
        open_checkpoint(tmp_path / "w.bin")


def test_a_fifo_or_pointer_in_place_of_a_pickle_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo.bin")
    (tmp_path / "lfs.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n")
    with pytest.raises(MalformedFileError, match="is a FIFO"):
        open_checkpoint(tmp_path / "fifo.bin")
    with pytest.raises(MalformedFileError, match="git-lfs pointer to 12 bytes"):
        open_checkpoint(tmp_path / "lfs.bin")


def test_split_pickles_with_an_index(tmp_path, cache):
    first, second = {"a": torch.randn(3), "t": torch.randn(3, 2).t()}, {"b": torch.randn(4)}
    torch.save(first, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save(second, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = dict.fromkeys(first, "pytorch_model-00001-of-00002.bin") | {"b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    checkpoint = open_checkpoint(tmp_path)
    assert_same(checkpoint, first | second)
    assert len(list((cache / "rewritten").iterdir())) == 1


def test_the_fingerprint_of_a_rewritten_file_is_the_same_everywhere(tmp_path):
    keys = set()
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        write_legacy({"a": torch.ones(3), "b": torch.ones(4)}, tmp_path / place / "w.bin")
        checkpoint = open_checkpoint(tmp_path / place / "w.bin", cache_folder=tmp_path / place / "cache")
        keys.add((checkpoint.fingerprint, checkpoint.content_key))
    assert len({fingerprint for fingerprint, _ in keys}) == 1
    assert len({content_key for _, content_key in keys}) == 2


def test_a_file_of_a_buffer_opens_like_one_of_a_path(tmp_path):
    """torch names the archive's root after the file; a buffer has none."""
    stream = io.BytesIO()
    torch.save({"a": torch.ones(3)}, stream)
    (tmp_path / "w.pt").write_bytes(stream.getvalue())
    assert_same(open_checkpoint(tmp_path / "w.pt"), {"a": torch.ones(3)})
