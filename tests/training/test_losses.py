"""What micro-batches weigh: whether a model divides by the count of labels or ignores it, the gradient is that of one batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from bigmodel.errors import InvalidArgumentError, TrainingError
from bigmodel.training import TrainingConfig, TrainingRun
from training.loops import Sentences, save_llama


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


def token_classifier():
    from transformers import BertConfig, BertForTokenClassification

    return BertForTokenClassification(
        BertConfig(**SIZES, num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )


def masked_model():
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
MODELS = {"llama": llama, "t5": t5, "token_classifier": token_classifier, "masked_model": masked_model}


class Samples(Dataset):
    """Of 8 tokens each, of which every sample predicts another number, the first one none."""

    def __init__(self, num_labels: int = 60) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, 60, (8, 8), generator=generator)
        self.labels = torch.randint(0, num_labels, (8, 8), generator=generator)
        for number in range(8):
            self.labels[number, number:] = -100

    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[number], "labels": self.labels[number]}


def gradients(make, micro_batch_size, **options):
    torch.manual_seed(0)
    run = TrainingRun(TrainingConfig(precision="fp32", global_batch_size=8, micro_batch_size=micro_batch_size))
    samples = Samples(5 if make is token_classifier else 60)
    model, _, loader = (
        run.prepare(make(), torch.optim.SGD, samples)
        if False
        else run.prepare(
            model=make(), optimizer=lambda params: torch.optim.SGD(params, lr=0.0), data=samples, **options
        )
    )
    for batch in loader:
        with run.accumulate():
            run.backward(run.loss(model(**batch), batch))
            if loader.is_last:
                found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
            run.step()
    return run, found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_accumulated_gradients_are_those_of_one_batch(name, micro_batch_size):
    one, expected = gradients(MODELS[name], 8)
    many, found = gradients(MODELS[name], micro_batch_size)
    assert one.last_step.num_tokens == many.last_step.num_tokens > 0
    assert many.last_step.loss == pytest.approx(one.last_step.loss, rel=1e-5)
    total = torch.cat([each.flatten() for each in expected.values()]).norm()
    difference = torch.cat([(found[name] - each).flatten() for name, each in expected.items()]).norm()
    assert difference <= 1e-6 * total


def test_whether_a_model_divides_is_found_by_trying():
    assert gradients(llama, 2)[0]._weighing.divides
    assert not gradients(t5, 2)[0]._weighing.divides
    assert not gradients(token_classifier, 2)[0]._weighing.divides


def test_a_causal_model_does_not_predict_the_first_label_and_others_do():
    labels = Samples().labels
    assert gradients(llama, 8)[0].last_step.num_tokens == int((labels[:, 1:] != -100).sum())
    assert gradients(t5, 8)[0].last_step.num_tokens == int((labels != -100).sum())


def test_a_loss_that_follows_the_count_in_another_way_is_refused():
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, input_ids, labels, num_items_in_batch=None):
            return {"loss": (self.weight * input_ids).sum() / num_items_in_batch.sqrt()}

    run = TrainingRun(TrainingConfig(precision="fp32"))
    _, loader = run.prepare(model=Strange(), data=Samples())
    with pytest.raises(InvalidArgumentError, match="neither divides by it nor ignores it"):
        next(iter(loader))


def test_the_user_may_count_and_give_the_sum():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, input_ids, labels):
            return (self.weight * input_ids).sum()

    run = TrainingRun(TrainingConfig(precision="fp32", global_batch_size=8, micro_batch_size=3))
    model, _, loader = run.prepare(
        model=Sum(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
        data=Samples(),
        count_items=lambda batch: batch["input_ids"].numel(),
    )
    for batch in loader:
        with run.accumulate():
            run.backward(run.loss(model(**batch), batch))
            run.step()
    assert run.last_step.num_tokens == 64
    assert run.last_step.loss == pytest.approx(float(Samples().ids.sum()) / 64)


def test_without_labels_samples_weigh_alike():
    run = TrainingRun(TrainingConfig(precision="fp32", global_batch_size=8, micro_batch_size=4))
    samples = [torch.full((2,), float(number)) for number in range(8)]
    model, _, loader = run.prepare(
        model=nn.Linear(2, 1), optimizer=lambda params: torch.optim.SGD(params, lr=0.0), data=samples
    )
    with torch.no_grad():
        expected = float(model(torch.stack(samples)).mean())
    for batch in loader:
        with run.accumulate():
            run.backward(run.loss(SimpleNamespace(loss=model(batch).mean()), {}))
            run.step()
    assert run.last_step.loss == pytest.approx(expected, rel=1e-5)
    assert run.last_step.num_tokens == 8


def test_a_plain_backward_of_the_models_own_loss_is_right_too():
    _, expected = gradients(t5, 8)
    torch.manual_seed(0)
    run = TrainingRun(TrainingConfig(precision="fp32", global_batch_size=8, micro_batch_size=2))
    model, _, loader = run.prepare(model=t5(), optimizer=lambda params: torch.optim.SGD(params, lr=0.0), data=Samples())
    for batch in loader:
        with run.accumulate():
            run.backward(model(**batch).loss)
            if loader.is_last:
                found = {name: each.grad.clone() for name, each in model.named_parameters()}
            run.step()
    assert max(float((found[name] - each).abs().max()) for name, each in expected.items()) < 1e-6


def test_labels_that_are_all_left_out_are_told():
    class Nothing(Samples):
        def __getitem__(self, number):
            return {**super().__getitem__(number), "labels": torch.full((8,), -100)}

    run = TrainingRun(TrainingConfig(precision="fp32"))
    _, loader = run.prepare(model=llama(), data=Nothing())
    with pytest.raises(TrainingError, match="no label that is predicted"):
        next(iter(loader))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_an_evaluation_is_the_mean_over_all_labels(name):
    torch.manual_seed(0)
    run = TrainingRun(TrainingConfig(precision="fp32", micro_batch_size=3))
    model = run.prepare(MODELS[name]())
    found = run.evaluate(run.prepare_eval(Samples()))
    batch = {"input_ids": Samples().ids, "labels": Samples().labels}
    with torch.no_grad():
        expected = float(model.eval()(**batch).loss)
    assert found.loss == pytest.approx(expected, rel=1e-5)
    assert model.training is False


def test_a_mean_over_no_label_does_no_harm():
    class MaskedMean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, input_ids, labels):
            counts = labels != -100
            return {"loss": (self.inner(input_ids.float()) * counts).sum() / counts.sum()}

    torch.manual_seed(0)
    run = TrainingRun(
        TrainingConfig(precision="fp32", global_batch_size=8, micro_batch_size=1)
    )  # one sample predicts nothing
    model, _, loader = run.prepare(
        model=MaskedMean(), optimizer=lambda params: torch.optim.SGD(params, lr=0.0), data=Samples()
    )
    for batch in loader:
        with run.accumulate():
            run.backward(run.loss(model(**batch), batch))
            run.step()
    assert not run.last_step.skipped


def test_a_model_that_was_not_told_the_count_is_weighed():
    _, expected = gradients(llama, 8)
    torch.manual_seed(0)
    run = TrainingRun(TrainingConfig(precision="fp32", global_batch_size=8, micro_batch_size=2))
    model, _, loader = run.prepare(
        model=llama(), optimizer=lambda params: torch.optim.SGD(params, lr=0.0), data=Samples()
    )
    for batch in loader:
        with run.accumulate():
            run.backward(model(input_ids=batch["input_ids"], labels=batch["labels"]).loss)
            if loader.is_last:
                found = {name: each.grad.clone() for name, each in model.named_parameters()}
            run.step()
    assert max(float((found[name] - each).abs().max()) for name, each in expected.items()) < 1e-6


def test_what_is_added_to_a_weighed_loss_stays_as_it_is():
    torch.manual_seed(0)
    run = TrainingRun(TrainingConfig(precision="fp32", global_batch_size=8, micro_batch_size=2))
    model, _, loader = run.prepare(model=t5(), optimizer=lambda params: torch.optim.SGD(params, lr=0.0), data=Samples())
    expected = gradients(t5, 2)[0].last_step.loss
    for batch in loader:
        with run.accumulate():
            run.backward(run.loss(model(**batch), batch) + 0.25)
            run.step()
    assert run.last_step.loss == pytest.approx(expected + 1.0, rel=1e-5)


@pytest.mark.parametrize("micro_batch_size", [8, 2])
def test_a_criterion_of_the_users_own_is_weighed_though_the_model_divides_its_own(tmp_path, micro_batch_size):
    def norm_of(way, micro_batch_size):
        save_llama(tmp_path / "llama")
        run = TrainingRun(TrainingConfig(precision="fp32", global_batch_size=8, micro_batch_size=micro_batch_size))
        model, _, loader = run.prepare(
            model=str(tmp_path / "llama"),
            optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
            data=Sentences(8),
            progress=False,
        )
        for batch in loader:
            with run.accumulate():
                outputs = model(**batch)
                run.backward(way(outputs, batch))
                run.step()
        return run.last_step

    def own(outputs, batch):
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100)

    expected = norm_of(lambda outputs, batch: outputs.loss, 8)
    for way in (own, lambda outputs, batch: outputs.loss, lambda outputs, batch: outputs.loss * 2 / 2 + 0.0):
        found = norm_of(way, micro_batch_size)
        assert abs(found.loss - expected.loss) < 1e-5
        assert abs(found.grad_norm - expected.grad_norm) < 1e-4
