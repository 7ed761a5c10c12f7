"""Adapters on weights that stream are trained as on weights that stay: the same losses and gradients, to the bit."""

import types
from dataclasses import replace

import pytest
import torch
from families import inputs_for, make_checkpoint, resident
from simulated import COMPILER, IS_FRESH, passes_afresh, simulated

import bigmodel
from bigmodel.device_map.counter import NotTriedError
from bigmodel.device_map.rehearsal import rehearse
from bigmodel.errors import DoesNotFitError, GradientRefusedError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning"
)  # peft asks by its old name
SMALL = bigmodel.Workload(batch_size=2, prompt_tokens=16, new_tokens=1)
FAMILIES = ["llama", "gpt2", "t5", "mixtral"]
FAST = (("llama", torch.float32), ("mixtral", torch.bfloat16))
TARGETS = {
    "LlamaForCausalLM": "all-linear",
    "GPT2LMHeadModel": ["c_attn", "c_fc"],
    "T5ForConditionalGeneration": ["q", "wo"],
    "MixtralForCausalLM": ["q_proj", "o_proj"],
}


@pytest.fixture
def devices():
    """Those that compute: the host, or afresh two accelerators whose weights rest in host memory."""
    if not IS_FRESH:
        yield []
        return
    with simulated(2):
        yield ["sim:0", "sim:1"]


@pytest.mark.slow
@pytest.mark.skipif(IS_FRESH or COMPILER is None, reason="simulated accelerators need a C++ compiler")
def test_all_of_it_holds_on_accelerators():
    passes_afresh(__file__)


def streamed(folder, devices, **options):
    """On the host everything streams from the disk, on accelerators all but the first unit from host memory."""
    where = {"": "disk"}
    if devices:
        units = bigmodel.make_plan(folder, device_map=where, workload=SMALL).placements
        where = {place.unit: "cpu" if number else devices[0] for number, place in enumerate(units)}
        options["max_memory"] = dict.fromkeys(devices, "1GiB") | {"cpu": "4GiB"}
    return bigmodel.load_sharded(folder, where, workload=SMALL, progress=False, **options)


def adapted(model, **options):
    torch.manual_seed(5)
    settings = {"r": 4, "target_modules": TARGETS[type(model).__name__], "init_lora_weights": False}
    settings["fan_in_fan_out"] = "GPT2" in type(model).__name__
    around = peft.get_peft_model(model, peft.LoraConfig(**(settings | options)))
    with torch.no_grad():
        for each in around.parameters():
            if each.requires_grad:
                each.copy_(torch.randn(each.shape) * 0.1)
    return around.train()


def inputs_of(family):
    inputs = inputs_for(family)
    return inputs | {"labels": inputs["decoder_input_ids" if family == "t5" else "input_ids"].contiguous()}


def passes(model, inputs, device="cpu", times=2):
    """Losses and gradients of passes, each with draws of its own; then of one without gradients."""
    losses = []
    for number in range(times):
        torch.manual_seed(number)
        loss = model(**{name: each.to(device) for name, each in inputs.items()}).loss
        loss.backward()
        losses.append(loss.detach().cpu())
    with torch.no_grad():
        losses.append(model.eval()(**{name: each.to(device) for name, each in inputs.items()}).loss.cpu())
    return losses, {name: each.grad.cpu() for name, each in model.named_parameters() if each.requires_grad}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param(family, dtype, marks=() if (family, dtype) in FAST else pytest.mark.slow)
        for family in FAMILIES
        for dtype in (torch.float32, torch.bfloat16)
    ],
)
def test_losses_and_gradients_are_those_of_weights_that_stay(family, dtype, devices, tmp_path):
    folder = make_checkpoint(family, tmp_path, dtype)
    dropout = {"lora_dropout": 0.0 if devices else 0.1}  # draws of an accelerator are its own
    whole = resident(folder).to(devices[0] if devices else "cpu")
    losses, gradients = passes(adapted(whole, **dropout), inputs_of(family), devices[0] if devices else "cpu")
    model = adapted(streamed(folder, devices), **dropout)
    before = bigmodel.stats_of(model)
    found, of_streamed = passes(model, inputs_of(family))
    moved = bigmodel.stats_of(model) - before
    assert (moved.copied_bytes if devices else moved.read_bytes) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, losses, strict=True))
    assert of_streamed.keys() == gradients.keys()
    assert [name for name, each in of_streamed.items() if not torch.equal(each, gradients[name])] == []


def test_weights_of_the_model_itself_are_not_trained(devices, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    model = streamed(folder, devices)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    with pytest.raises(
        GradientRefusedError, match=r"1 of the model's own parameters require grad, such as model\.layers\.1"
    ):
        model(**inputs_of("llama"))
    model.requires_grad_(False)
    model(**inputs_of("llama"))


def test_adapters_on_the_head(tmp_path):
    if IS_FRESH:
        pytest.skip("PEFT makes them beside the unit, on the host")
    folder = make_checkpoint("mixtral", tmp_path)
    found = [
        passes(adapted(model, target_modules=["v_proj", "lm_head"]), inputs_of("mixtral"))
        for model in (streamed(folder, []), resident(folder))
    ]
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert all(torch.equal(each, found[1][1][name]) for name, each in found[0][1].items())


def test_transformers_trainer_trains_them(tmp_path):
    if IS_FRESH:
        pytest.skip("Trainer moves what it trains")
    from transformers import Trainer, TrainingArguments

    folder = make_checkpoint("llama", tmp_path)
    inputs = inputs_of("llama")
    data = [{name: each[number] for name, each in inputs.items()} for number in range(2)] * 4
    found = []
    for number, model in enumerate((streamed(folder, []), resident(folder))):
        around = adapted(model)
        settings = TrainingArguments(
            str(tmp_path / str(number)), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
            use_cpu=True, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        Trainer(model=around, args=settings, train_dataset=data).train()
        found.append({name: each.detach() for name, each in around.named_parameters() if each.requires_grad})
    assert any("lora_B" in name and bool(each.any()) for name, each in found[0].items())
    assert [name for name, each in found[0].items() if not torch.equal(each, found[1][name])] == []


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # TRL asks by its old name
@pytest.mark.parametrize("recomputes", [False, True])
def test_trl_s_trainer_trains_them(tiny_llama, tmp_path, recomputes):
    if IS_FRESH:
        pytest.skip("its Trainer moves what it trains")
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    data = Dataset.from_list([{"text": f"Sentence {number} is about {number + 1} things."} for number in range(8)])
    found = []
    for where in ("disk", "cpu"):
        model = bigmodel.load_sharded(tiny_llama, {"": where}, workload=SMALL, progress=False)
        settings = trl.SFTConfig(
            str(tmp_path / where), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
            bf16=False, save_strategy="no", disable_tqdm=True, gradient_checkpointing=recomputes,
        )  # fmt: skip
        around = adapted(model)
        before = {name: each.detach().clone() for name, each in around.named_parameters() if each.requires_grad}
        trl.SFTTrainer(model=around, args=settings, train_dataset=data, processing_class=tokenizer).train()
        found.append({name: each.detach() for name, each in around.named_parameters() if each.requires_grad})
        assert not any(torch.equal(each, before[name]) for name, each in found[-1].items())
    assert [name for name, each in found[0].items() if not torch.equal(each, found[1][name])] == []


REACHED = {}


def _past_its_copy(self, *args, **kwargs):
    return type(self).forward(REACHED["model"], *args, **kwargs)


@pytest.mark.parametrize("way", ["closure", "global"])
def test_a_trial_leaves_no_gradients_in_a_model_whose_forward_was_replaced(tmp_path, way):
    model = resident(make_checkpoint("llama", tmp_path)).requires_grad_(True)
    own = model.forward
    if way == "closure":
        model.forward = lambda *args, **kwargs: own(*args, **kwargs)
        found = rehearse(model, lambda: ((), inputs_of("llama")), ())
        assert {each.name for each in found.moments} == {name for name, _ in model.named_parameters()}
    else:
        REACHED["model"] = model
        model.forward = types.MethodType(_past_its_copy, model)
        with pytest.raises(NotTriedError, match="reaches the model itself"):
            rehearse(model, lambda: ((), inputs_of("llama")), ())
    assert [name for name, each in model.named_parameters() if each.grad is not None] == []


def test_a_pass_whose_backward_does_not_fit_is_refused_before_it_begins(devices, tmp_path):
    if devices:
        pytest.skip("a limit of the host's")
    folder = make_checkpoint("llama", tmp_path)
    room = {"cpu": "58MiB"}  # of which all but a little is the reserve
    model = bigmodel.load_sharded(folder, {"": "disk"}, room, workload=SMALL, progress=False)
    around = adapted(model)
    ids = torch.ones(2, 16, dtype=torch.int64)
    for size in (1, 16):
        longer = ids.repeat(size, 1)
        if size == 1:
            around(input_ids=longer, labels=longer).loss.backward()
            continue
        with pytest.raises(
            DoesNotFitError, match=r"A pass of 32 x 16 tokens that is recorded needs .* with its backward"
        ) as error:
            around(input_ids=longer, labels=longer)
        assert "Workload(batch_size=32, prompt_tokens=16, trains=True)" in str(error.value)
    with torch.no_grad():
        around(input_ids=ids)
    trains = bigmodel.Workload(batch_size=32, prompt_tokens=16, new_tokens=1, trains=True)
    plan = bigmodel.make_plan(folder, device_map={"": "disk"}, workload=trains)
    other = bigmodel.make_plan(folder, device_map={"": "disk"}, workload=replace(trains, trains=False))
    assert plan.activation_bytes > other.activation_bytes
    assert bigmodel.Plan.from_json(plan.to_json()) == plan
    model = bigmodel.load_sharded(folder, plan, workload=trains, progress=False)
    adapted(model)(input_ids=ids.repeat(16, 1), labels=ids.repeat(16, 1)).loss.backward()
