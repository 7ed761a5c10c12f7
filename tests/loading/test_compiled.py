"""torch.compile on models whose weights stream: a graph takes weights as they are in each pass, not as when it was made."""

import contextlib

import pytest
import torch
from families import inputs_for, make_checkpoint, resident
from simulated import COMPILER, simulated
from torch._dynamo.utils import counters

import bigmodel
from bigmodel.device_map.demand import CONTEXT_BYTES
from bigmodel.errors import DoesNotFitError

SMALL = bigmodel.Workload(batch_size=2, prompt_tokens=16, new_tokens=8)
WHOLE_LAYERS = ["LlamaDecoderLayer"]
RESIDENT, STREAMED = "model.layers.1", "model.layers.2"

pytestmark = pytest.mark.skipif(
    COMPILER is None, reason="simulated accelerators, and torch's compiler, need a C++ compiler"
)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["accelerator", pytest.param("host", marks=pytest.mark.slow)])
def place(request):
    with simulated(1) if request.param == "accelerator" else contextlib.nullcontext():
        yield request.param


def load(folder, place):
    """One layer stays; the others take turns in one slot, so that each finds another's bytes in it."""
    tier, limits = ("cpu", {}) if place == "host" else ("sim:0", {"cpu": "4GiB"})
    homes = {"": "disk", RESIDENT: tier}
    too_little = limits | {tier: (16 << 10) + (0 if place == "host" else CONTEXT_BYTES)}
    with pytest.raises(DoesNotFitError) as refused:
        bigmodel.make_plan(folder, None, SMALL, too_little, homes, no_split_module_classes=WHOLE_LAYERS)
    limits |= {tier: refused.value.needed_bytes}
    model = bigmodel.load_sharded(folder, homes, limits, workload=SMALL, progress=False)
    (group,) = (group for group in bigmodel.plan_of(model).slots if STREAMED in group.units)
    assert (group.num_slots, len(group.units)) == (1, 3)
    return model


def passes(model, number=3):
    """Logits of so many passes, of two lengths in turns."""
    ids = inputs_for("llama")["input_ids"]
    return [model(input_ids=each).logits for _ in range(number) for each in (ids, ids[:, :5])]


@pytest.mark.parametrize(
    "name",
    [
        STREAMED,
        *(pytest.param(each, marks=pytest.mark.slow) for each in (RESIDENT, f"{RESIDENT}.mlp", f"{STREAMED}.mlp")),
    ],
)
@torch.no_grad()
def test_a_compiled_block_gives_the_bits_of_the_whole_model_and_is_compiled_once(name, place, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    expected = passes(resident(folder), 1)
    model = load(folder, place)
    model.get_submodule(name).compile(backend="eager")
    found = passes(model)
    assert all(torch.equal(each, wanted) for each, wanted in zip(found, expected * 3, strict=True))
    assert counters["stats"]["unique_graphs"] == 2  # for one length, and for any


@pytest.mark.slow
@pytest.mark.parametrize("name", [RESIDENT, STREAMED])
@torch.no_grad()
def test_a_block_that_is_replaced_by_its_compiled_self_streams_on(name, place, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    expected = passes(resident(folder), 1)
    model = load(folder, place)
    model.set_submodule(name, torch.compile(model.get_submodule(name), backend="aot_eager"))
    assert all(torch.equal(each, wanted) for each, wanted in zip(passes(model), expected * 3, strict=True))
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's compiler imports what torch deprecates
@pytest.mark.parametrize("name", [RESIDENT, STREAMED])
@torch.no_grad()
def test_machine_code_gives_the_bits_of_the_whole_model_with_the_same_block_compiled(name, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    whole = resident(folder)
    whole.get_submodule(name).compile()
    expected = passes(whole)
    torch._dynamo.reset()
    model = load(folder, "host")
    model.get_submodule(name).compile()
    assert all(torch.equal(each, wanted) for each, wanted in zip(passes(model), expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "place"),
    [
        ("eager", "accelerator"),
        ("aot_eager", "host"),
        pytest.param("eager", "host", marks=pytest.mark.long),
        pytest.param("aot_eager", "accelerator", marks=pytest.mark.long),
    ],
    indirect=["place"],
)
@torch.no_grad()
def test_a_model_compiled_whole_is_compiled_in_pieces_and_right(backend, place, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    expected = passes(resident(folder), 1)
    model = load(folder, place)
    model.compile(backend=backend)
    assert all(torch.equal(each, wanted) for each, wanted in zip(passes(model), expected * 3, strict=True))
    assert counters["stats"]["unique_graphs"] > 4


@pytest.mark.slow
@torch.no_grad()
def test_a_single_graph_of_a_model_that_streams_is_refused(tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    model = load(folder, "host")
    model.compile(backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="_begin_pass"):
        passes(model, 1)


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@torch.no_grad()
def test_generate_with_a_static_cache_compiles_only_when_it_is_told_to(is_compiled, place, tmp_path):
    from transformers import CompileConfig, GenerationConfig

    folder = make_checkpoint("llama", tmp_path)
    ids = inputs_for("llama")["input_ids"]
    expected = resident(folder).generate(ids, max_new_tokens=6, do_sample=False)
    compiling = CompileConfig(backend="eager", fullgraph=False, mode=None)
    compiling._compile_all_devices = True  # here too, and not only on those that generate knows
    settings = GenerationConfig(
        cache_implementation="static",
        compile_config=compiling,
        do_sample=False,
        max_new_tokens=6,
        pad_token_id=0,
        eos_token_id=2,
        **({"disable_compile": False} if is_compiled else {}),
    )
    model = load(folder, place)
    for _ in range(2):
        assert torch.equal(model.generate(ids, generation_config=settings), expected)
    assert bool(counters["stats"]["unique_graphs"]) is is_compiled
