"""load_sharded(path) and nothing else: files are read, or mapped, while the model is built."""

import gc
import json
import os
import shutil
import threading
import weakref

import pytest
import torch
from families import FAMILIES, inputs_for, make_checkpoint, resident

import bigmodel
from bigmodel.errors import KeyMismatchError
from bigmodel.offload import page_cache


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def get(family):
        if family not in made:
            made[family] = make_checkpoint(family, tmp_path_factory.mktemp("defaults") / family)
        return made[family]

    return get


@torch.no_grad()
@pytest.mark.parametrize(
    "family",
    # Its plan tries a pass that runs token by token in Python.
    [pytest.param(family, marks=pytest.mark.slow) if family == "mamba" else family for family in FAMILIES],
)
def test_every_family_is_exact_and_plain(folders, family):
    folder = folders(family)
    model, reference = bigmodel.load_sharded(folder, progress=False), resident(folder)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert not hasattr(model, "hf_device_map")
    assert not model._forward_pre_hooks
    inputs = inputs_for(family)
    expected = reference(**inputs)
    assert torch.equal(
        model(**inputs)[0 if family == "vit" else "logits"], expected[0 if family == "vit" else "logits"]
    )
    plan = bigmodel.plan_of(model)
    assert all(placement.home == "cpu" for placement in plan.placements)
    assert bigmodel.plan_of(model) is plan


def is_mapped(tensor, folder):
    address = tensor.data_ptr()
    with open("/proc/self/maps", encoding="utf-8") as file:
        for line in file:
            fields = line.split(maxsplit=5)
            begin, end = (int(each, 16) for each in fields[0].split("-"))
            if begin <= address < end:
                return len(fields) == 6 and str(folder) in fields[5]
    return False


def drop(folder):
    """The folder's files out of the page cache; what is dirty is written first."""
    for file in folder.glob("*.safetensors"):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def cached(folder):
    """The least that is in the page cache of one of the folder's files, 0..1."""
    fractions = []
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as opened:
            fractions.append(page_cache.cached_fraction(opened.fileno(), 0, file.stat().st_size))
    return min(fractions)


def test_warm_files_are_mapped_and_cold_ones_read(tmp_path):
    from safetensors.torch import save_file

    # Large beside what the kernel reads ahead of a header.
    state = {"weight": torch.randn(4096, 2048), "bias": torch.randn(4096)}
    save_file(state, tmp_path / "one.safetensors")

    def load():
        return bigmodel.load_sharded(
            tmp_path / "one.safetensors", model=lambda: torch.nn.Linear(2048, 4096), progress=False
        )

    drop(tmp_path)  # and what was written is clean
    (tmp_path / "one.safetensors").read_bytes()
    if cached(tmp_path) < 1:
        pytest.skip("what was just read is not in the page cache, as far as this system says")
    warm = load()
    assert is_mapped(warm.weight, tmp_path)
    assert torch.equal(warm.weight, state["weight"])
    del warm  # its map would keep the pages
    gc.collect()
    drop(tmp_path)
    if cached(tmp_path) > 0:
        pytest.skip("this file system keeps pages that it was asked to drop (a tmpfs has nowhere else to put them)")
    cold = load()
    assert not is_mapped(cold.weight, tmp_path)
    assert torch.equal(cold.weight, state["weight"])


def test_a_stated_limit_wants_private_memory(folders):
    folder = folders("llama")
    model = bigmodel.load_sharded(folder, max_memory={"cpu": "1GiB"}, progress=False)
    assert not any(is_mapped(parameter, folder) for parameter in model.parameters())


def test_an_early_read_ends_with_a_load_that_fails(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(folders("llama"), copy)
    for file in copy.glob("*.safetensors"):
        state = load_file(file)
        if state.pop("model.layers.1.mlp.up_proj.weight", None) is not None:
            save_file(state, file, {"format": "pt"})
    del state  # it maps the last file itself
    index = copy / "model.safetensors.index.json"
    text = json.loads(index.read_text())
    del text["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    index.write_text(json.dumps(text))
    before = set(threading.enumerate())
    with pytest.raises(KeyMismatchError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        bigmodel.load_sharded(copy, progress=False)
    gc.collect()
    assert set(threading.enumerate()) == before
    with open("/proc/self/maps", encoding="utf-8") as maps:
        assert str(copy) not in maps.read()


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_is_cast(folders, dtype):
    folder = folders("qwen3")
    model = bigmodel.load_sharded(folder, dtype=dtype, progress=False)
    reference = resident(folder, dtype=getattr(torch, dtype))
    assert torch.equal(model(**inputs_for("qwen3")).logits, reference(**inputs_for("qwen3")).logits)


def test_a_plan_asked_for_late_is_of_the_model_that_was_loaded(folders):
    folder = folders("llama")
    model = bigmodel.load_sharded(folder, progress=False)
    early = bigmodel.make_plan(folder)
    model.half()
    del model.model.layers[2:]
    late = bigmodel.plan_of(model)
    assert late.placements == early.placements
    assert late.estimate.peak_bytes["cpu"] == early.estimate.peak_bytes["cpu"]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
