"""Saving: what is written can be read by everyone, a failure leaves nothing, and no file in use is replaced."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bigmodel.checkpoint.header import read_header
from bigmodel.checkpoint.spec import Extent, Source
from bigmodel.errors import DoesNotFitError, InvalidArgumentError, SavingError
from bigmodel.offload.resting import FileMap, resting_parameter
from bigmodel.saving import save


def family(name: str) -> nn.Module:
    import transformers

    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 64,
    }
    configs = {
        "llama": lambda: transformers.LlamaConfig(**small),
        "llama tied": lambda: transformers.LlamaConfig(**small, tie_word_embeddings=True),
        "gpt2": lambda: transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=64, bos_token_id=1, eos_token_id=2
        ),
        "mixtral": lambda: transformers.MixtralConfig(**small, num_local_experts=4),
        "t5": lambda: transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64),
        "llava": lambda: transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**small),
            vision_config=transformers.CLIPVisionConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
                image_size=16,
                patch_size=8,
            ),
            image_token_index=3,
        ),
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
            **small, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8
        ),
    }
    torch.manual_seed(0)
    config = configs[name]()
    if name == "t5":
        model = transformers.T5ForConditionalGeneration(config)
    elif name == "llava":
        model = transformers.LlavaForConditionalGeneration(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval().requires_grad_(False).to(torch.bfloat16)


def reverter(model: nn.Module) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    from transformers.core_model_loading import revert_weight_conversion

    return lambda state: revert_weight_conversion(model, state)


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = load_file(path)
        assert not found.keys() & part.keys()
        found |= part
    return found


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


FAMILIES = ["llama", "llama tied", "gpt2", "t5", "mixtral", "qwen3_moe", "llava"]


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("name", FAMILIES)
def test_from_pretrained_reads_the_model_s_own_names(name: str, max_shard_size: str, tmp_path: Path) -> None:
    model = family(name)
    paths = save(model, tmp_path / "out", max_shard_size)
    assert all(path.is_file() for path in paths)
    assert sorted(paths) == sorted(path for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "generation_config.json").is_file()
    again, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_state(model, again)
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.is_file() == (max_shard_size != "5GB")
    if index.is_file():
        found = json.loads(index.read_text())
        assert set(found["weight_map"]) == set(read_folder(tmp_path / "out"))
        assert found["metadata"]["total_size"] == sum(t.nbytes for t in read_folder(tmp_path / "out").values())
        for file in set(found["weight_map"].values()):
            tensors = load_file(tmp_path / "out" / file)
            assert set(tensors) == {key for key, value in found["weight_map"].items() if value == file}
            assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 20_000


@pytest.mark.parametrize("name", FAMILIES)
def test_with_a_reverter_the_files_hold_what_save_pretrained_writes(name: str, tmp_path: Path) -> None:
    model = family(name)
    save(model, tmp_path / "ours", "20KB", revert=reverter(model))
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = read_folder(tmp_path / "ours"), read_folder(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert_same_state(model, type(model).from_pretrained(tmp_path / "ours"))


def test_a_reverter_that_needs_several_weights_at_once_is_given_them_layer_by_layer(tmp_path: Path) -> None:
    model = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(3, 2, False), "k": nn.Linear(3, 2, False)}) for _ in range(3)])
    asked: list[int] = []

    def revert(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if all(tensor.device.type != "meta" for tensor in state.values()):
            asked.append(len(state))
        layers = sorted({name.split(".")[0] for name in state})
        return {f"{i}.qk": torch.cat([state[f"{i}.q.weight"], state[f"{i}.k.weight"]]) for i in layers}

    save(model, tmp_path, revert=revert)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == {"0.qk", "1.qk", "2.qk"}
    assert all(torch.equal(saved[f"{i}.qk"], torch.cat([m["q"].weight, m["k"].weight])) for i, m in enumerate(model))
    assert asked == [2, 2, 2]


def test_a_plain_module_of_every_dtype_and_layout_comes_back(tmp_path: Path) -> None:
    module = nn.Module()
    torch.manual_seed(0)
    module.register_parameter("turned", nn.Parameter(torch.randn(5, 3).T))
    module.register_parameter("strided", nn.Parameter(torch.randn(6, 6)[::2, ::3]))
    module.register_parameter("expanded", nn.Parameter(torch.randn(1, 4).expand(3, 4)))
    module.register_parameter("scalar", nn.Parameter(torch.tensor(2.5)))
    module.register_parameter("empty", nn.Parameter(torch.empty(0, 3)))
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.complex64):
        module.register_buffer(f"as_{dtype}".replace(".", "_"), torch.tensor([0, 1, 1]).to(dtype))
    module.register_buffer("f8", torch.tensor([0.5, 1.0, -2.0]).to(torch.float8_e4m3fn))
    module.register_buffer("conjugate", torch.tensor([1 + 2j, 3 - 1j]).conj())
    module.register_buffer("gone", torch.ones(3), persistent=False)
    (path,) = save(module, tmp_path)
    saved = load_file(path)
    state = module.state_dict()
    assert saved.keys() == state.keys()
    for name, value in state.items():
        assert saved[name].dtype == value.dtype
        assert saved[name].shape == value.shape
        as_bytes = [t.resolve_conj().contiguous().reshape(-1).view(torch.uint8) for t in (saved[name], value)]
        assert torch.equal(*as_bytes), name


def test_each_tensor_starts_where_its_dtype_can_view_it(tmp_path: Path) -> None:
    module = nn.Module()
    for index, dtype in enumerate([torch.uint8, torch.float64, torch.bool, torch.float16, torch.float32] * 2):
        module.register_buffer(f"b{index}", torch.ones(3, dtype=dtype))
    (path,) = save(module, tmp_path)
    for spec in read_header(str(path)).tensors:
        assert spec.offset % spec.dtype.itemsize == 0


def test_a_tied_weight_is_written_once_under_its_first_name(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    (path,) = save(module, tmp_path)
    assert set(load_file(path)) == {"0.weight", "0.bias", "1.bias"}
    assert read_header(str(path)).metadata == {"format": "pt", "1.weight": "0.weight"}
    from safetensors.torch import load_model

    again = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    again[1].weight = again[0].weight
    load_model(again, path)
    assert_same_state(module, again)


def test_a_diffusion_transformer_is_read_by_its_own_from_pretrained(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8, norm_num_groups=4
    )
    save(model, tmp_path, "20KB")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert_same_state(model, diffusers.DiTTransformer2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False))


def test_progress_ends_at_the_total_and_never_goes_back(tmp_path: Path) -> None:
    model = family("llama")
    seen: list[tuple[str, int, int]] = []
    save(model, tmp_path, "20KB", progress=lambda *figures: seen.append(figures))
    total = sum(p.nbytes for p in model.parameters())
    assert {(phase, of) for phase, _, of in seen} == {("saving", total)}
    done = [done for _, done, _ in seen]
    assert done == sorted(done)
    assert done[-1] == total


# ---- folders that are not empty, and failures


def test_a_second_save_leaves_no_file_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "other.safetensors").write_text("not ours")
    small, large = nn.Linear(2, 2), nn.Linear(64, 64)
    save(large, tmp_path, 8000)
    assert (tmp_path / "model-00001-of-00002.safetensors").is_file()
    save(small, tmp_path)
    names = {"notes.txt", "other.safetensors", "model.safetensors"}
    assert set(os.listdir(tmp_path)) == names
    save(large, tmp_path, 8000)  # a model.safetensors left over would be read instead of the index
    assert "model.safetensors" not in os.listdir(tmp_path)
    saved = load_file(tmp_path / "model-00001-of-00002.safetensors")
    assert torch.equal(saved["weight"], large.weight)


def test_a_failure_in_the_middle_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def stop(phase: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            save(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), folder, 8000, progress=stop)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_saved_onto_itself_from_memory_is_safe(tmp_path: Path) -> None:
    model = family("llama")
    save(model, tmp_path)
    again = type(model).from_pretrained(tmp_path)  # its weights may be maps of the files that are replaced
    save(again, tmp_path)
    assert_same_state(model, again)
    assert_same_state(model, type(model).from_pretrained(tmp_path))


@pytest.mark.parametrize("way", ["map", "reading"])
def test_files_that_a_model_streams_from_are_not_replaced(way: str, tmp_path: Path) -> None:
    first = nn.Linear(8, 8, bias=False)
    (path,) = save(first, tmp_path)
    (spec,) = read_header(str(path)).tensors
    source = Source("weight", spec.dtype, spec.shape, spec.dtype, (Extent(spec.file, spec.offset, spec.nbytes, 0),))
    streamed = nn.Linear(8, 8, bias=False)
    if way == "map":
        streamed.weight = nn.Parameter(FileMap(path).view(source), requires_grad=False)
    else:
        streamed.weight = resting_parameter(source, lambda _: load_file(path)["weight"], "weight", "cpu")
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    for model in (streamed, nn.Linear(2, 2)):
        for folder in (tmp_path, link):
            with pytest.raises(SavingError, match=r"1 files in .*model\.safetensors.*Save to another folder"):
                save(model, folder)
    with pytest.raises(SavingError, match=r"1 files"):
        save(nn.Linear(64, 64), tmp_path, 8000)  # not replaced but removed, as a left-over
    save(streamed, tmp_path / "copy")
    assert torch.equal(load_file(tmp_path / "copy" / "model.safetensors")["weight"], first.weight)
    del streamed, model
    save(nn.Linear(2, 2), tmp_path)


def test_what_cannot_be_saved_is_named_before_anything_is_written(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2))
    with pytest.raises(InvalidArgumentError, match=r"2 entries .*0\.weight \(on meta.*0\.bias \(on meta"):
        save(module, tmp_path / "out")
    module = nn.Module()
    module.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(InvalidArgumentError, match=r"1 entries .*sparse \(torch\.sparse_coo\)"):
        save(module, tmp_path / "out")
    with pytest.raises(InvalidArgumentError, match="max_shard_size is '5Gb'"):
        save(nn.Linear(2, 2), tmp_path / "out", "5Gb")
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgumentError, match=r"file is a file\. Give a folder"):
        save(nn.Linear(2, 2), tmp_path / "file")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks by its old name
def test_a_model_with_adapters_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(family("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(InvalidArgumentError, match=r"carries adapters.*merge_and_unload"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save(model.merge_and_unload(), tmp_path / "out")


def test_a_model_larger_than_the_disk_is_refused_with_both_numbers(tmp_path: Path) -> None:
    module = nn.Module()
    huge = Source("w", torch.uint8, (1 << 50,), torch.uint8, (Extent("/nowhere", 0, 1 << 50, 0),))
    module.w = resting_parameter(huge, lambda _: torch.zeros(0), "w", "cpu")
    with pytest.raises(DoesNotFitError, match=r"The model needs 1024 TiB in .* is free there") as caught:
        save(module, tmp_path / "out")
    assert caught.value.tier == "disk"
    assert caught.value.needed_bytes > caught.value.available_bytes
    assert not (tmp_path / "out").exists()


def test_the_model_s_own_configuration_is_not_changed(tmp_path: Path) -> None:
    model = family("llama")
    before = model.config.to_dict()
    save(model, tmp_path)
    assert model.config.to_dict() == before
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["dtype"] == "bfloat16"
