"""Weights that must be converted before they stream: written once, used again, never when they are another's."""

import shutil

import pytest
import torch
from families import inputs_for, make_checkpoint, resident

import bigmodel
from bigmodel.errors import DoesNotFitError

SMALL = bigmodel.Workload(batch_size=2, prompt_tokens=16, new_tokens=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with weights that are stored transposed."""
    return make_checkpoint("qwen3_vl_moe", tmp_path_factory.mktemp("converted") / "model")


@pytest.fixture(scope="module")
def expected(folder):
    return logits(resident(folder))


def load(folder, cache, device_map=None, **options):
    where = {"": "disk"} if device_map is None else device_map
    return bigmodel.load_sharded(folder, where, workload=SMALL, offload_folder=cache, progress=False, **options)


@torch.no_grad()
def logits(model):
    return model(**inputs_for("qwen3_vl_moe")).logits


def files_of(cache):
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache.rglob("*") if path.is_file()}


def test_they_are_written_once_and_used_again(folder, expected, tmp_path):
    assert torch.equal(logits(load(folder, tmp_path)), expected)
    written = files_of(tmp_path)
    assert len(written) == 1
    assert torch.equal(logits(load(folder, tmp_path)), expected)
    assert files_of(tmp_path) == written


def test_what_stays_is_converted_in_memory_and_nothing_is_written(folder, expected, tmp_path):
    assert torch.equal(logits(load(folder, tmp_path, "cpu")), expected)
    assert not files_of(tmp_path)


def test_another_dtype_and_another_map_have_files_of_their_own(folder, tmp_path):
    half = logits(resident(folder, dtype=torch.bfloat16))
    load(folder, tmp_path)
    assert torch.equal(logits(load(folder, tmp_path, dtype="bfloat16")), half)
    assert torch.equal(logits(load(folder, tmp_path, {"": "disk", "lm_head": "cpu"}, dtype="bfloat16")), half)
    assert len(files_of(tmp_path)) == 2


def test_a_changed_checkpoint_never_meets_the_old_ones(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    before = logits(load(copy, tmp_path / "cache"))
    for file in copy.glob("*.safetensors"):
        save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    after = logits(load(copy, tmp_path / "cache"))
    assert torch.equal(after, logits(resident(copy)))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("damage", ["cut", "header", "emptied"])
def test_a_damaged_file_is_written_again(folder, expected, tmp_path, damage):
    load(folder, tmp_path)
    (file,) = files_of(tmp_path)
    data = file.read_bytes()
    file.write_bytes({"cut": data[:-4], "header": b"x" * 64 + data[64:], "emptied": b""}[damage])
    assert torch.equal(logits(load(folder, tmp_path)), expected)
    assert file.read_bytes() == data


def test_a_failure_in_the_middle_leaves_no_file(folder, tmp_path):
    def stop(phase, done, total):
        if phase == "converting weights" and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bigmodel.load_sharded(
            folder, {"": "disk"}, workload=SMALL, offload_folder=tmp_path, progress=stop, max_memory={"disk": "1GiB"}
        )
    assert not files_of(tmp_path)


def test_the_plan_states_what_is_written_and_the_limit_is_kept(folder, tmp_path):
    plan = bigmodel.make_plan(folder, device_map={"": "disk"}, workload=SMALL, offload_folder=tmp_path)
    load(folder, tmp_path)
    (file,) = files_of(tmp_path)
    assert file.stat().st_size <= plan.estimate.peak_bytes["disk"] + 4096 * 4
    assert "written once" in plan.explain()
    with pytest.raises(
        DoesNotFitError, match=r"converted before they can stream take .* 1\.00 KiB may be used"
    ) as caught:
        load(folder, tmp_path / "other", max_memory={"disk": "1KiB"})
    assert caught.value.tier == "disk"
    assert not (tmp_path / "other").exists()


@torch.no_grad()
def test_a_streamed_model_can_be_saved_and_loaded_again(folder, expected, tmp_path):
    model = load(folder, tmp_path / "cache")
    bigmodel.save(model, tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved", tmp_path / "cache")), expected)
    assert torch.equal(logits(resident(tmp_path / "saved")), expected)


def test_another_conversion_of_the_same_tensors_has_a_file_of_its_own(tmp_path):
    from safetensors.torch import save_file

    from bigmodel.allowance import DiskAllowance
    from bigmodel.checkpoint import open_checkpoint
    from bigmodel.models.conversion import sources_of, trace
    from bigmodel.offload.converted import cached_conversions
    from bigmodel.offload.direct import DirectReads

    stored = torch.randn(4, 6)
    save_file({"w": stored}, tmp_path / "w.safetensors")
    (spec,) = open_checkpoint(tmp_path / "w.safetensors").tensors.values()
    for number in (1, 2, 2, torch.tensor(3.0), torch.tensor(4.0)):
        sources = sources_of({"made": trace(spec).t().contiguous() * number})
        cached = cached_conversions(
            list(sources.values()),
            DirectReads({}).stored,
            folder=tmp_path / "cache",
            content_key="same",
            allowance=DiskAllowance(),
        )
        assert torch.equal(DirectReads({}).parameter(cached["made"]), stored.t() * number)
    assert len(files_of(tmp_path / "cache")) == 4
