"""Folders, files and indexes as they are met, whole, partial and hostile."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bigmodel.checkpoint import Checkpoint, open_checkpoint, read_header, refuse_prequantised
from bigmodel.errors import (
    CheckpointError,
    InvalidArgumentError,
    MalformedFileError,
    MissingFilesError,
    UnsafeFileError,
    UnsupportedCheckpointError,
)

NUM_FILES = 5


def part_name(number: int, stem: str = "model") -> str:
    return f"{stem}-{number:05d}-of-{NUM_FILES:05d}.safetensors"


def write_split(folder: Path, stem: str = "model", index: str | None = "model.safetensors.index.json") -> None:
    """Five files of two tensors each, with an index that has no metadata, as some in the wild."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number in range(1, NUM_FILES + 1):
        tensors = {f"layers.{number}.{part}": torch.full((4, number), float(number)) for part in ("a", "b")}
        save_file(tensors, folder / part_name(number, stem))
        weight_map |= dict.fromkeys(tensors, part_name(number, stem))
    if index:
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))


def change_index(folder: Path, **changes: object) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= changes
    file.write_text(json.dumps(index))


@pytest.fixture
def split(tmp_path: Path) -> Path:
    write_split(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "llama", "limit": Infinity}')
    return tmp_path / "m"


def assert_reads(checkpoint: Checkpoint) -> None:
    """Every spec leads to the bytes that safetensors reads."""
    assert checkpoint.tensors
    for name, spec in checkpoint.tensors.items():
        with open(spec.file, "rb") as file:
            file.seek(spec.offset)
            raw = bytearray(file.read(spec.nbytes))
        tensor = torch.frombuffer(raw, dtype=spec.dtype).reshape(spec.shape)
        assert torch.equal(tensor, load_file(spec.file)[name])


def test_a_split_checkpoint_with_an_index(split):
    checkpoint = open_checkpoint(split)
    assert checkpoint.path == split
    assert checkpoint.files == tuple(str(split / part_name(number)) for number in range(1, NUM_FILES + 1))
    assert set(checkpoint.tensors) == {f"layers.{n}.{part}" for n in range(1, NUM_FILES + 1) for part in "ab"}
    assert checkpoint.config == {"model_type": "llama", "limit": float("inf")}
    assert checkpoint.tied == ()
    assert_reads(checkpoint)
    places = [(spec.file, spec.offset) for spec in checkpoint.tensors.values()]
    assert places == sorted(places)


def test_the_index_itself_and_a_text_path_open_the_same(split):
    checkpoint = open_checkpoint(split)
    for path in (split / "model.safetensors.index.json", str(split / "model.safetensors.index.json"), f"{split}/"):
        again = open_checkpoint(path)
        assert again.tensors == checkpoint.tensors
        assert (again.path, again.files, again.config) == (checkpoint.path, checkpoint.files, checkpoint.config)
        assert (again.fingerprint, again.content_key) == (checkpoint.fingerprint, checkpoint.content_key)


def test_a_path_from_the_home_or_the_current_folder(split, monkeypatch):
    monkeypatch.setenv("HOME", str(split.parent))
    monkeypatch.chdir(split.parent)
    assert open_checkpoint("~/m").tensors == open_checkpoint("m").tensors == open_checkpoint("./m").tensors
    assert all(os.path.isabs(spec.file) for spec in open_checkpoint("m").tensors.values())


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "diffusion_pytorch_model.safetensors",
        "adapter.safetensors",
        "consolidated.00.safetensors",
        "model-00001-of-00001.safetensors",
    ],
)
def test_a_folder_with_one_file(tmp_path, name):
    save_file({"w": torch.arange(6.0)}, tmp_path / name)
    for path in (tmp_path, tmp_path / name, str(tmp_path / name)):
        checkpoint = open_checkpoint(path)
        assert checkpoint.path == tmp_path
        assert checkpoint.files == (str(tmp_path / name),)
        assert checkpoint.config is None
        assert_reads(checkpoint)


@pytest.mark.parametrize(
    ("stem", "index"),
    [
        ("diffusion_pytorch_model", "diffusion_pytorch_model.safetensors.index.json"),
        ("other", "other.safetensors.index.json"),
        ("model", None),
    ],
)
def test_other_splits(tmp_path, stem, index):
    write_split(tmp_path, stem, index)
    assert len(open_checkpoint(tmp_path).tensors) == 2 * NUM_FILES


def test_the_order_of_preference(tmp_path):
    """Safetensors before pickles, the usual name before others: as transformers chooses."""
    torch.save({"bin": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    save_file({"other": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["bin"]
    write_split(tmp_path)
    assert len(open_checkpoint(tmp_path).tensors) == 2 * NUM_FILES
    save_file({"single": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["single"]


def test_variants(tmp_path):
    save_file({"full": torch.ones(1)}, tmp_path / "model.safetensors")
    save_file({"half": torch.ones(1).half()}, tmp_path / "model.fp16.safetensors")
    write_split(tmp_path, "model.fp8", "model.safetensors.index.fp8.json")
    assert list(open_checkpoint(tmp_path).tensors) == ["full"]
    assert list(open_checkpoint(tmp_path, variant="fp16").tensors) == ["half"]
    assert len(open_checkpoint(tmp_path, variant="fp8").tensors) == 2 * NUM_FILES
    assert len(open_checkpoint(tmp_path / "model.safetensors.index.fp8.json").tensors) == 2 * NUM_FILES
    with pytest.raises(MissingFilesError, match=r"no weights of variant 'ema'. Expected model.ema.safetensors"):
        open_checkpoint(tmp_path, variant="ema")


def test_subfolders(tmp_path):
    (tmp_path / "unet").mkdir()
    save_file({"w": torch.ones(1)}, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "unet" / "config.json").write_text("{}")
    (tmp_path / "model_index.json").write_text("{}")
    assert open_checkpoint(tmp_path, subfolder="unet").path == tmp_path / "unet"
    assert open_checkpoint(tmp_path, subfolder="unet").config == {}
    with pytest.raises(MissingFilesError, match=r"Weights are in its folders 'unet': name one with subfolder"):
        open_checkpoint(tmp_path)
    with pytest.raises(MissingFilesError, match=r"has no folder 'vae'. It holds model_index.json, unet"):
        open_checkpoint(tmp_path, subfolder="vae")
    with pytest.raises(InvalidArgumentError, match="inside"):
        open_checkpoint(tmp_path / "unet", subfolder="../unet")


def test_options_that_do_not_go_with_the_path_are_refused(split):
    with pytest.raises(InvalidArgumentError, match=r"revision is 'main'.*local path"):
        open_checkpoint(split, revision="main")
    with pytest.raises(InvalidArgumentError, match=r"variant is 'fp16'.*is a file"):
        open_checkpoint(split / part_name(1), variant="fp16")
    with pytest.raises(InvalidArgumentError, match=r"subfolder is 'x'.*is a file"):
        open_checkpoint(split / part_name(1), subfolder="x")
    with pytest.raises(InvalidArgumentError, match="path is empty"):
        open_checkpoint("")


# What is missing


def test_missing_files_are_counted_and_named_with_the_command(split):
    (split / "config.json").write_text('{"_name_or_path": "org/name"}')
    for number in (1, 3, 4):
        (split / part_name(number)).unlink()
    (split / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (split / ".cache" / "huggingface" / "download" / "x.0123.incomplete").write_bytes(b"begun")
    with pytest.raises(MissingFilesError) as caught:
        open_checkpoint(split)
    names = [part_name(number) for number in (1, 3, 4)]
    text = str(caught.value)
    assert f"3 of 5 files are missing in {split}: {', '.join(names)}." in text
    assert "1 unfinished download is there (*.incomplete)." in text
    assert text.endswith(f"hf download org/name {' '.join(names)} --local-dir {split}")
    assert isinstance(caught.value, FileNotFoundError)


def test_the_command_leaves_a_place_for_an_unknown_repo(split):
    (split / part_name(2)).unlink()
    with pytest.raises(MissingFilesError, match=f"hf download <repo id> {part_name(2)} --local-dir {split}$"):
        open_checkpoint(split)


def test_a_broken_link_is_missing(split):
    (split / part_name(2)).unlink()
    (split / part_name(2)).symlink_to(split / "gone")
    with pytest.raises(MissingFilesError, match="1 of 5 files is missing"):
        open_checkpoint(split)


def test_a_split_without_index_knows_how_many_it_should_be(tmp_path):
    write_split(tmp_path, index=None)
    (tmp_path / part_name(2)).unlink()
    with pytest.raises(MissingFilesError, match=f"1 of 5 files is missing in .*: {part_name(2)}"):
        open_checkpoint(tmp_path)


def test_many_missing_files_are_not_all_named(tmp_path):
    weight_map = {f"w{i}": f"model-{i:05d}-of-00400.safetensors" for i in range(1, 401)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(MissingFilesError, match=r"400 of 400 files are missing.*and 392 more") as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).endswith(f"hf download <repo id> --local-dir {tmp_path} --include '*.safetensors'")


def test_a_folder_without_weights_says_what_is_expected(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "optimizer.pt").write_bytes(b"")
    with pytest.raises(MissingFilesError) as caught:
        open_checkpoint(tmp_path)
    text = str(caught.value)
    assert f"{tmp_path} holds no weights. Expected model.safetensors, model.safetensors.index.json" in text
    assert "pytorch_model.bin" in text
    assert "it holds config.json, optimizer.pt" in text


def test_several_files_without_an_index_are_ambiguous(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(MissingFilesError, match="not clear: give the file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "./none", "../none", "a/b/c", "none.safetensors", "org/m.bin", "~/x"]
)
def test_a_path_that_does_not_exist_says_so(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFilesError, match="does not exist"):
        open_checkpoint(path)


def test_a_path_object_is_never_a_repo_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFilesError, match="org/name does not exist in"):
        open_checkpoint(Path("org/name"))


def test_formats_that_are_not_read_are_named(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedCheckpointError, match=r"model.gguf is not of a format that is read: .safetensors"):
        open_checkpoint(tmp_path / "model.gguf")


# What leaves the folder


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "..\\x.safetensors", "C:\\x.safetensors"],
)
def test_an_index_that_leaves_the_folder_is_refused(split, name):
    save_file({"layers.1.a": torch.ones(1)}, split.parent / "x.safetensors")
    change_index(split, **{"layers.1.a": name, "layers.2.a": "../y.safetensors"})
    with pytest.raises(UnsafeFileError, match="names 2 of 7 files outside its folder") as caught:
        open_checkpoint(split)
    assert "../y.safetensors" in str(caught.value)


def test_links_out_of_the_folder_are_refused(split):
    for number in (2, 3):
        shutil.move(split / part_name(number), split.parent / part_name(number))
        (split / part_name(number)).symlink_to(split.parent / part_name(number))
    with pytest.raises(UnsafeFileError, match=f"2 weight files that are links out of the folder: {part_name(2)} -> "):
        open_checkpoint(split)


def test_links_inside_the_folder_and_to_it_are_fine(split):
    shutil.move(split / part_name(2), split / "moved")
    (split / part_name(2)).symlink_to("moved")
    (split.parent / "link").symlink_to(split)
    assert len(open_checkpoint(split).tensors) == 2 * NUM_FILES
    assert len(open_checkpoint(split.parent / "link").tensors) == 2 * NUM_FILES


def test_a_link_that_the_user_names_is_followed(split):
    (split.parent / "mine.safetensors").symlink_to(split / part_name(1))
    assert list(open_checkpoint(split.parent / "mine.safetensors").tensors) == ["layers.1.a", "layers.1.b"]


def test_files_in_folders_of_the_checkpoint_are_fine(split):
    (split / "parts").mkdir()
    shutil.move(split / part_name(1), split / "parts" / part_name(1))
    change_index(split, **{f"layers.1.{p}": f"./parts/{part_name(1)}" for p in "ab"})
    assert len(open_checkpoint(split).tensors) == 2 * NUM_FILES


# What contradicts itself


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{nonsense", "not valid JSON"),
        ("[]", "not an index"),
        ("{}", "not an index"),
        ('{"weight_map": {}}', "not an index"),
        ('{"weight_map": [1]}', "not an index"),
        ('{"weight_map": {"a": 1, "b": null, "c": ""}}', "names no file for 3 tensors: 'a', 'b', 'c'"),
        ('{"weight_map": {"a": "x\\u0000.safetensors"}}', "names no file for 1 tensors"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' stands in it twice"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(MalformedFileError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "model.safetensors.index.json" in str(caught.value)


def test_an_index_naming_other_formats_is_refused(split):
    change_index(split, **{"layers.1.a": "model.h5"})
    with pytest.raises(UnsupportedCheckpointError, match=r"'model\.h5'"):
        open_checkpoint(split)


def test_tensors_that_their_file_does_not_hold_are_listed(split):
    change_index(split, ghost=part_name(1), other=part_name(2), **{"layers.1.a": part_name(2)})
    with pytest.raises(MalformedFileError) as caught:
        open_checkpoint(split)
    text = str(caught.value)
    assert "names 12 tensors, and 3 of them are not in their files" in text
    assert f"'ghost' in {part_name(1)}" in text
    assert f"'layers.1.a' in {part_name(2)}" in text


def test_the_index_decides_between_two_copies(split):
    tensors = load_file(split / part_name(1))
    save_file({**tensors, "layers.2.a": torch.zeros(9), "extra": torch.ones(1)}, split / part_name(1))
    checkpoint = open_checkpoint(split)
    assert checkpoint.tensors["layers.2.a"].file == str(split / part_name(2))
    assert "extra" in checkpoint.tensors  # held though not named: key matching will tell whether it is wanted


def test_a_name_in_two_files_without_an_index_is_refused(tmp_path):
    write_split(tmp_path, index=None)
    save_file(load_file(tmp_path / part_name(1)), tmp_path / part_name(2))
    with pytest.raises(MalformedFileError, match=f"2 tensors are in two files.*'layers.1.a' in {part_name(1)}"):
        open_checkpoint(tmp_path)


def test_faults_of_all_files_are_told_at_once(split):
    for number in (2, 4):
        os.truncate(split / part_name(number), (split / part_name(number)).stat().st_size - 8)
    (split / part_name(5)).write_bytes(b"")
    with pytest.raises(MalformedFileError) as caught:
        open_checkpoint(split)
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 of 5 files cannot be read:"
    size = (split / part_name(2)).stat().st_size
    assert lines[1] == f"{split / part_name(2)} has {size} of {size + 8} bytes: the download is incomplete."
    assert lines[-1].startswith("Fetch them again with: hf download <repo id> ")
    assert lines[-1].endswith("--force-download")


def test_one_truncated_file_comes_with_the_command(split):
    os.truncate(split / part_name(2), 50)
    with pytest.raises(MalformedFileError, match=f"incomplete. Fetch it again with: hf download .*{part_name(2)}"):
        open_checkpoint(split)


def test_a_fifo_in_place_of_a_file_does_not_hang(split):
    (split / part_name(3)).unlink()
    os.mkfifo(split / part_name(3))
    with pytest.raises(MalformedFileError, match=f"{part_name(3)} is a FIFO"):
        open_checkpoint(split)
    (split / "model.safetensors.index.json").unlink()
    os.mkfifo(split / "model.safetensors.index.json")
    with pytest.raises(MalformedFileError, match="is a FIFO"):
        open_checkpoint(split)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "JSON list, not an object")])
def test_a_config_that_is_none_is_refused(split, text, message):
    (split / "config.json").write_text(text)
    with pytest.raises(MalformedFileError, match=f"config.json .*{message}"):
        open_checkpoint(split)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(split):
    (split / part_name(1)).chmod(0)
    with pytest.raises(CheckpointError, match=f"{part_name(1)} cannot be opened: Permission denied"):
        open_checkpoint(split)


# Identity


def test_the_fingerprint_is_that_of_every_copy(split, tmp_path):
    shutil.copytree(split, tmp_path / "copy")
    one, two = open_checkpoint(split), open_checkpoint(tmp_path / "copy")
    assert one.fingerprint == two.fingerprint
    assert one.content_key != two.content_key
    assert open_checkpoint(split).content_key == one.content_key


@pytest.mark.parametrize("change", ["name", "dtype", "shape", "place"])
def test_the_fingerprint_tells_structures_apart(tmp_path, change):
    tensors = {"a": torch.ones(4), "b": torch.ones(4)}
    others = {
        "name": {"a": torch.ones(4), "c": torch.ones(4)},
        "dtype": {"a": torch.ones(4), "b": torch.ones(4, dtype=torch.int32)},
        "shape": {"a": torch.ones(4), "b": torch.ones(2, 2)},
        "place": {"a": torch.ones(2), "b": torch.ones(6)},
    }
    for folder, weights in (("one", tensors), ("two", others[change])):
        (tmp_path / folder).mkdir()
        save_file(weights, tmp_path / folder / "model.safetensors")
    assert open_checkpoint(tmp_path / "one").fingerprint != open_checkpoint(tmp_path / "two").fingerprint


def test_the_content_key_follows_the_bytes(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4)}, file)
    one, status = open_checkpoint(tmp_path), os.stat(file)
    save_file({"a": torch.ones(4)}, file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    two = open_checkpoint(tmp_path)
    assert one.fingerprint == two.fingerprint
    assert one.content_key != two.content_key


# Pre-quantised


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "'fp8' (quantization_config"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "'gptq' (text_config.quantization_config"),
        ({"quantization_config": {"load_in_4bit": True}}, "'bitsandbytes'"),
        ({"quantization_config": {"bits": 4}}, "'unnamed'"),
    ],
)
def test_a_prequantised_checkpoint_is_refused_by_its_method(split, config, method):
    (split / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedCheckpointError) as caught:
        refuse_prequantised(open_checkpoint(split))
    assert f"pre-quantised with the method {method}" in str(caught.value)


@pytest.mark.parametrize("config", [None, {}, {"quantization_config": None}, {"quantization_config": {}}])
def test_other_checkpoints_are_not_refused(split, config):
    (split / "config.json").unlink()
    if config is not None:
        (split / "config.json").write_text(json.dumps(config))
    refuse_prequantised(open_checkpoint(split))


# Real files


def test_what_transformers_saves(tiny_llama):
    checkpoint = open_checkpoint(tiny_llama)
    assert len(checkpoint.files) > 1
    assert checkpoint.config["model_type"] == "llama"
    assert_reads(checkpoint)
    assert sum(len(read_header(file).tensors) for file in checkpoint.files) == len(checkpoint.tensors)


def test_headers_of_many_files_need_no_open_files_or_threads_afterwards(tmp_path):
    weight_map = {}
    for number in range(60):
        name = f"model-{number:05d}.safetensors"
        save_file({f"w{number}": torch.ones(2)}, tmp_path / name)
        weight_map[f"w{number}"] = name
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    assert len(open_checkpoint(tmp_path).tensors) == 60
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
