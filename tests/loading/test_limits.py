"""Limits are kept whoever asks for more: passes beyond the workload, reads at rest, and everything that is written."""

import random
from collections import deque
from functools import lru_cache

import numpy as np
import pytest
import torch
from families import inputs_for, make_checkpoint, resident
from torch import nn

import bigmodel
from bigmodel.errors import DoesNotFitError, WeightNotResidentError
from bigmodel.loading import pass_limit

SMALL = bigmodel.Workload(batch_size=1, prompt_tokens=8, new_tokens=4)
MIB = 1 << 20


def load(folder, device_map=None, **options):
    return bigmodel.load_sharded(folder, device_map or {"": "disk"}, **{"workload": SMALL, "progress": False} | options)


def tight(folder, **options):
    """A limit that the plan just keeps."""
    plan = bigmodel.make_plan(folder, device_map={"": "disk"}, **{"workload": SMALL} | options)
    return {"cpu": plan.estimate.peak_bytes["cpu"] + MIB}


@torch.no_grad()
def test_an_encoder_called_by_itself_is_held_to_the_limit(tmp_path):
    folder = make_checkpoint("t5", tmp_path)
    model = load(folder, max_memory=tight(folder))
    ids = torch.ones(1, 8, dtype=torch.int64)
    expected = resident(folder).get_encoder()(input_ids=ids).last_hidden_state
    assert torch.equal(model.get_encoder()(input_ids=ids).last_hidden_state, expected)
    with pytest.raises(
        DoesNotFitError, match=r"1 x 3000 tokens .*workload=Workload\(batch_size=1, prompt_tokens=3000\)"
    ):
        model.get_encoder()(input_ids=torch.ones(1, 3000, dtype=torch.int64))
    with pytest.raises(DoesNotFitError, match="1 x 3000 tokens"):
        model.generate(input_ids=torch.ones(1, 3000, dtype=torch.int64), max_new_tokens=2)
    assert torch.equal(model.get_encoder()(input_ids=ids).last_hidden_state, expected)


@torch.no_grad()
def test_images_beyond_the_workload_are_held_to_the_limit(tmp_path):
    folder = make_checkpoint("vit", tmp_path)
    model = load(folder, max_memory=tight(folder))
    inputs = inputs_for("vit")
    expected = resident(folder)(**inputs).logits
    assert torch.equal(model(**inputs).logits, expected)
    many = inputs["pixel_values"].repeat(6000, 1, 1, 1)
    with pytest.raises(DoesNotFitError, match=r"pixel_values \[\d+, 3, 16, 16\].* needs .* is left beside the weights"):
        model(pixel_values=many)
    assert torch.equal(model(**inputs).logits, expected)


def test_the_heap_is_trimmed_before_a_new_sequence_and_not_before_each_token(tmp_path, monkeypatch):
    folder = make_checkpoint("llama", tmp_path)
    model = load(folder, max_memory=tight(folder))
    trimmed = []
    monkeypatch.setattr(pass_limit, "trim_heap", lambda: trimmed.append(1))
    for number in (1, 2):
        model.generate(torch.ones(1, 8, dtype=torch.int64), max_new_tokens=4, do_sample=False)
        assert len(trimmed) == number


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x).relu()
        return x


@torch.no_grad()
def test_a_plain_module_s_inputs_are_held_to_the_limit(tmp_path):
    from safetensors.torch import load_file, save_file

    reference = Wide().requires_grad_(False)
    path = tmp_path / "wide.safetensors"
    save_file(reference.state_dict(), path)
    reference.load_state_dict(load_file(path), assign=True)
    model = load(path, model=Wide, max_memory=tight(path, model=Wide))
    x = torch.randn(3, 64)
    assert torch.equal(model(x), reference(x))
    with pytest.raises(DoesNotFitError, match=r"x \[400000, 64\] needs .*Make its inputs smaller"):
        model(torch.empty(400_000, 64))
    assert torch.equal(model(x), reference(x))


@torch.no_grad()
def test_adapters_go_past_the_root_and_are_held_to_the_limit(tmp_path):
    peft = pytest.importorskip("peft")
    folder = make_checkpoint("llama", tmp_path)
    model = load(folder, max_memory=tight(folder))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    before = bigmodel.stats_of(adapted).num_passes
    adapted(input_ids=torch.ones(1, 8, dtype=torch.int64))
    assert bigmodel.stats_of(adapted).num_passes == before + 1
    with pytest.raises(DoesNotFitError, match="1 x 20000 tokens"):
        adapted(input_ids=torch.ones(1, 20_000, dtype=torch.int64))


@torch.no_grad()
@pytest.mark.parametrize("way", ["static cache", "attentions", "encoder outputs", "positional"])
def test_what_makes_planned_tokens_take_more_is_seen(way, tmp_path):
    import transformers as t

    folder = make_checkpoint("t5" if way == "encoder outputs" else "llama", tmp_path)
    model = load(folder, max_memory=tight(folder))
    ids = torch.ones(1, 8, dtype=torch.int64)
    args, kwargs = {
        "static cache": lambda: ((ids,), {"past_key_values": t.StaticCache(model.config, max_cache_len=400_000)}),
        "attentions": lambda: ((ids.repeat(40, 250),), {"output_attentions": True}),
        "encoder outputs": lambda: (
            (),
            {
                "encoder_outputs": t.modeling_outputs.BaseModelOutput(torch.empty(1, 300_000, 32)),
                "decoder_input_ids": ids[:, :2],
            },
        ),
        "positional": lambda: ((ids.repeat(1, 2500),), {}),
    }[way]()
    with pytest.raises(DoesNotFitError):
        model(*args, **kwargs)
    if way != "encoder outputs":
        assert torch.equal(model(input_ids=ids).logits, resident(folder)(input_ids=ids).logits)
        small = t.StaticCache(model.config, max_cache_len=12)
        expected = resident(folder).generate(input_ids=ids, max_new_tokens=4, cache_implementation="static")
        model(input_ids=ids, past_key_values=small)
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, cache_implementation="static"), expected)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, inputs, repeat=1):
        x = inputs["x"][0].repeat(repeat, 1)
        for block in self.blocks:
            x = block(x).relu()
        return x


@torch.no_grad()
def test_inputs_in_containers_and_plain_values_count(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "nested.safetensors"
    save_file(Nested().state_dict(), path)
    model = load(path, model=Nested, max_memory=tight(path, model=Nested))
    model({"x": [torch.randn(3, 64)]})
    with pytest.raises(DoesNotFitError, match=r"inputs \[400000, 64\]"):
        model({"x": [torch.empty(400_000, 64)]})
    with pytest.raises(DoesNotFitError, match="repeat"):
        model({"x": [torch.randn(3, 64)]}, repeat=200_000)


class Remembering(nn.Module):
    """Keeps what it made, everywhere that a module can."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.nested, self.queue, self.count = {"seen": []}, deque(maxlen=3), 0
        self.method = self.times
        self.register_buffer("n", torch.zeros(1), persistent=False)

    def times(self, x):
        self.count += 1
        return x * self.count

    @lru_cache(maxsize=8)  # noqa: B019
    def table(self, size):
        return torch.arange(size).float()

    def forward(self, x):
        self.n.add_(1)
        self.nested["seen"].append(x.sum())
        self.queue.append(x.mean())
        noise = random.random() + np.random.rand()
        x = self.layer(self.method(x)) + self.n + noise + cached_table(x.shape[0])[:, None]
        return x + sum(self.nested["seen"]) + sum(self.queue) + self.table(x.shape[0])[:, None]


@lru_cache(maxsize=8)
def cached_table(size):
    return torch.ones(size)


@torch.no_grad()
def test_a_trial_leaves_no_trace_in_the_model_or_its_caches(tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "remembering.safetensors"
    reference = Remembering()
    save_file(reference.state_dict(), path)
    reference.load_state_dict(load_file(path), assign=True)
    reference.requires_grad_(False)
    cached_table.cache_clear()
    model = load(path, model=Remembering, max_memory={"cpu": "1GiB"})
    found = []
    for each in (model, reference):
        random.seed(0)
        np.random.seed(0)
        found.append([each(torch.ones(rows, 4)) for rows in (2, 2, 3, 5, 2)])
    for ours, theirs in zip(*found, strict=True):
        assert type(ours) is torch.Tensor
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_models_that_cache_what_they_compute_from_shapes(tmp_path):
    import transformers as t

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
             "image_size": 16, "patch_size": 8}  # fmt: skip
    for name, more in (("DINOv3ViT", {}), ("Beit", {"use_relative_position_bias": True})):
        torch.manual_seed(0)
        config = getattr(t, f"{name}Config")(**sizes, **more, architectures=[f"{name}Model"])
        reference = getattr(t, f"{name}Model")(config).eval()
        reference.save_pretrained(tmp_path / name)
        model = load(tmp_path / name)
        pixels = torch.randn(1, 3, 16, 16)
        ours = model(pixel_values=pixels).last_hidden_state  # first: nothing real is in any cache yet
        assert type(ours) is torch.Tensor
        reference = getattr(t, f"{name}Model").from_pretrained(tmp_path / name).eval().requires_grad_(False)
        assert torch.equal(ours, reference(pixel_values=pixels).last_hidden_state)


@torch.no_grad()
def test_an_interrupt_in_a_root_pass_does_not_stop_the_encoder(tmp_path):
    folder = make_checkpoint("t5", tmp_path)
    model, reference = load(folder, max_memory=tight(folder)), resident(folder)
    inputs = inputs_for("t5")

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.encoder.block[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=inputs["input_ids"][:1], decoder_input_ids=inputs["decoder_input_ids"][:1])
    handle.remove()
    with pytest.raises(DoesNotFitError):
        model.get_encoder()(input_ids=torch.ones(1, 3000, dtype=torch.int64))
    ids = inputs["input_ids"][:1, :8]
    expected = reference.generate(input_ids=ids, max_new_tokens=3)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=3), expected)


@torch.no_grad()
def test_a_root_called_inside_its_own_pass_is_part_of_it(tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    model, reference = load(folder), resident(folder)
    ids = torch.arange(3, 11).view(1, 8)
    inside = []

    def again(module, args, output):
        if not inside:
            inside.append(None)
            inside[0] = model(input_ids=ids).logits

    handle = model.model.layers[1].register_forward_hook(again)
    expected = reference(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert torch.equal(inside[0], expected)
    handle.remove()
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_read_at_rest_beyond_the_budget_is_refused_by_name(tmp_path):
    from safetensors.torch import save_file

    size = (
        4096  # 64 MiB as stored, 32 MiB more as it is cast: beyond the reserve, which is all that a tight limit leaves
    )
    state = {f"blocks.{i}.weight": torch.full((size, size), 1.5 + i) for i in range(2)}
    save_file(state, tmp_path / "large.safetensors")

    def build():
        return nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(2))})

    options = {"model": build, "dtype": "bfloat16"}
    roomy = load(tmp_path / "large.safetensors", **options)
    assert torch.equal(roomy["blocks"][1].weight.clone(), state["blocks.1.weight"].bfloat16())
    limit = bigmodel.make_plan(
        tmp_path / "large.safetensors", device_map={"": "disk"}, workload=SMALL, **options
    ).estimate.peak_bytes["cpu"]
    small = load(tmp_path / "large.safetensors", max_memory={"cpu": limit}, **options)
    with pytest.raises(
        WeightNotResidentError, match=r"blocks\.1\.weight is used outside .* takes 96\.0 MiB .* is left of"
    ):
        small["blocks"][1].weight.clone()
    x = torch.randn(2, size, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(small["blocks"][1](x), x @ state["blocks.1.weight"].bfloat16().T)


def test_rewritten_weights_count_against_the_disk_limit_before_they_are_written(tmp_path):
    state = {"weight": torch.randn(64, 32).t(), "bias": torch.randn(32)}  # a transposed view is no plain range
    torch.save(state, tmp_path / "w.bin")

    def build():
        return nn.Linear(64, 32)

    with pytest.raises(
        DoesNotFitError, match=r"w\.bin does not hold as plain ranges takes .* 1000 B may be used"
    ) as caught:
        load(tmp_path / "w.bin", model=build, offload_folder=tmp_path / "cache", max_memory={"disk": 1000})
    assert caught.value.tier == "disk"
    assert not (tmp_path / "cache").exists()
    model = load(tmp_path / "w.bin", model=build, offload_folder=tmp_path / "cache", max_memory={"disk": "1MiB"})
    assert torch.equal(model.weight.clone(), state["weight"])
