"""Global batches are the same samples whoever takes them, also after an interruption."""

from __future__ import annotations

import datasets
import pytest
import torch

from bigmodel.errors import InvalidArgumentError, TrainingError
from bigmodel.training import TrainingConfig, TrainingRun
from training.loops import Flow, Numbers, hugging, numbers


@pytest.fixture(scope="module")
def alone():
    return [sorted(batch) for batch in numbers()]


def together(found):
    """The global batches of all processes."""
    return [sorted(sample for each in batches for sample in each) for batches in zip(*found, strict=True)]


def test_every_sample_comes_once_an_epoch_in_another_order(alone):
    assert [len(batch) for batch in alone] == [8, 8, 8, 8, 5] * 2
    first, second = ([sample for batch in alone[part] for sample, _ in batch] for part in (slice(5), slice(5, 10)))
    assert sorted(first) == sorted(second) == list(range(37))
    assert first != second


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("micro", [1, 3])
def test_two_processes_take_the_same_samples_and_these_draw_the_same(two, alone, num_workers, micro):
    found = two.run("training.loops:numbers", num_workers=num_workers, micro=micro)
    assert together(found) == alone


@pytest.mark.parametrize(("workers_before", "workers_after"), [(0, 2), (2, 0)])
def test_an_interruption_repeats_nothing_and_misses_nothing(two, alone, tmp_path, workers_before, workers_after):
    for name, before, after in (("a", two.run, None), ("b", None, two.run)):
        place = str(tmp_path / name)

        def take(run, **asked):
            if run is None:
                return [sorted(batch) for batch in numbers(**asked)]
            return together(run("training.loops:numbers", **asked))

        first = take(before, skip=3, folder=place, num_workers=workers_before)
        rest = take(after, skip=-1, folder=place, num_workers=workers_after)
        assert first + rest == alone


def test_samples_that_fill_no_global_batch_are_counted():
    from bigmodel.training.data import GlobalLoader, data_of
    from bigmodel.training.place import Cursor, Division
    from bigmodel.training.processes import Processes

    loaded = data_of(Numbers(), None, 0, processes=Processes.join())
    for size, micro, ranks in ((8, 2, 1), (8, 3, 2), (5, 1, 4), (37, 4, 3), (40, 7, 2)):
        lengths = set()
        for rank in range(ranks):
            division = Division(global_batch_size=size, micro_batch_size=micro, rank=rank, num_processes=ranks)
            loader = GlobalLoader(loaded, division, Cursor(seed=0), drop_last=False, begin=lambda batches: batches)
            assert len(list(loader)) == len(loader)
            lengths.add(len(loader))
        assert len(lengths) == 1


def started(**options):
    run = TrainingRun(TrainingConfig(global_batch_size=4, micro_batch_size=2, precision="fp32", seed=3))
    model, _, loader = run.prepare(
        model=torch.nn.Linear(2, 1), optimizer=lambda params: torch.optim.SGD(params, lr=0.0), data=Numbers(), **options
    )
    return run, model, loader


def trained(run, model, loader, batch):
    with run.accumulate():
        run.backward(model(batch["labels"].float()).mean())
        run.step()
    return batch["number"].tolist()


def test_what_was_looked_at_and_not_trained_on_comes_again(tmp_path):
    run, model, loader = started()
    looked = next(iter(loader))["number"].tolist()
    seen = []
    for batch in loader:
        if len(seen) == 8:  # at the top of a loop, before the batch is used
            run.save(tmp_path / "1")
            break
        seen += trained(run, model, loader, batch)
    assert seen[:2] == looked
    again, model, loader = started()
    again.load(tmp_path / "1")
    for batch in loader:
        seen += trained(again, model, loader, batch)
    assert sorted(seen) == list(range(37))


def test_a_pass_that_another_one_replaced_is_over(tmp_path):
    run, model, loader = started()
    run.save(tmp_path / "1")
    old = iter(loader)
    trained(run, model, loader, next(old))
    with pytest.raises(TrainingError, match="must be stepped"):
        iter(loader).__next__()
    trained(run, model, loader, next(old))
    run.load(tmp_path / "1")
    with pytest.raises(TrainingError, match="is over"):
        next(old)
    assert loader.cursor.num_consumed == 0


def test_collators_draw_what_follows_from_their_samples():
    def collate(samples):
        return {"labels": torch.rand(len(samples), 2), "number": torch.tensor([each["number"] for each in samples])}

    epochs = []
    for num_workers in (0, 1):
        _, _, loader = started(collate_fn=collate, num_workers=num_workers)
        epochs.append([batch["labels"] for _ in range(2) for batch in loader])
    assert all(torch.equal(one, other) for one, other in zip(*epochs, strict=True))
    half = len(epochs[0]) // 2
    assert not torch.equal(epochs[0][0], epochs[0][half])


def test_other_data_is_refused(tmp_path):
    run, _, _ = started()
    run.save(tmp_path / "1")
    shorter = TrainingRun(TrainingConfig(precision="fp32"))
    shorter.prepare(model=torch.nn.Linear(2, 1), data=[torch.zeros(2)] * 3)
    with pytest.raises(TrainingError, match="37 samples, and this has 3"):
        shorter.load(tmp_path / "1")
    unshuffled = TrainingRun(TrainingConfig(precision="fp32"))
    unshuffled.prepare(torch.nn.Linear(2, 1), torch.utils.data.DataLoader(Numbers(), batch_size=2))
    with pytest.raises(TrainingError, match="a random order"):
        unshuffled.load(tmp_path / "1")


def test_batches_without_labels_that_do_not_divide_are_refused_everywhere(two):
    assert two.run("training.loops:uneven") == ["InvalidArgumentError"] * 2


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_gone_through_comes_once_and_in_order_whoever_takes_it(two, tmp_path, stateful, ranks):
    def take(**asked):
        asked = {"stateful": stateful, "iterable": True, **asked}
        if ranks == 1:
            return [sorted(batch) for batch in numbers(**asked)]
        return together(two.run("training.loops:numbers", **asked))

    whole = [sorted(batch) for batch in numbers(iterable=True, stateful=stateful)]
    assert [number for batch in whole for number, _ in batch] == [*range(37), *range(37)]
    drawn = [draw for batch in whole for _, draw in batch]
    assert len(set(drawn)) == 74  # each sample its own, another in each epoch
    first = take(skip=3, folder=str(tmp_path / "3"))
    rest = take(skip=-1, folder=str(tmp_path / "3"))
    assert first + rest == whole


def test_a_dataset_that_knows_its_place_is_not_gone_through_again(tmp_path):
    numbers(skip=3, folder=str(tmp_path / "3"), iterable=True, stateful=True)
    read = []
    numbers(skip=-1, folder=str(tmp_path / "3"), iterable=True, stateful=True, epochs=1, read=read)
    assert read == [*range(24, 37)]
    read = []
    numbers(skip=-1, folder=str(tmp_path / "3"), iterable=True, epochs=1, read=read)  # no state: it is skipped
    assert read == [*range(37)]


def test_what_was_only_looked_at_comes_again(tmp_path):
    def prepared():
        run = TrainingRun(TrainingConfig(precision="fp32", global_batch_size=4, micro_batch_size=4))
        return run, run.prepare(model=torch.nn.Linear(2, 2), data=Flow(stateful=True))[1]

    run, loader = prepared()
    stream = iter(loader)
    assert next(stream)["number"].tolist() == [0, 1, 2, 3]
    assert next(stream)["number"].tolist() == [4, 5, 6, 7]  # the first is consumed, this one was looked at
    run.save(tmp_path / "1")
    assert next(iter(loader))["number"].tolist() == [4, 5, 6, 7]
    run, loader = prepared()
    run.load(tmp_path / "1")
    assert next(iter(loader))["number"].tolist() == [4, 5, 6, 7]
    assert next(iter(loader))["number"].tolist() == [4, 5, 6, 7]


def test_data_that_cannot_be_gone_through_twice_is_refused():
    def prepared(**data):
        TrainingRun(TrainingConfig(precision="fp32")).prepare(model=torch.nn.Linear(2, 2), **data)

    with pytest.raises(InvalidArgumentError, match="generator, which cannot be gone through more than once"):
        prepared(data=(each for each in range(3)))
    with pytest.raises(InvalidArgumentError, match="num_workers is 2, and the data is iterable"):
        prepared(data=Flow(), num_workers=2)
    with pytest.raises(TypeError, match="not known before its end"):
        len(TrainingRun(TrainingConfig(precision="fp32")).prepare(model=torch.nn.Linear(2, 2), data=Flow())[1])


def test_an_order_that_is_drawn_as_it_goes_is_the_same_after_an_interruption_and_for_all(two, tmp_path):
    whole = numbers(shuffled=True)
    flat = [number for batch in whole for number, _ in batch]
    assert sorted(flat[:37]) == sorted(flat[37:]) == list(range(37))
    assert flat[:37] != flat[37:]
    together_ = together(two.run("training.loops:numbers", shuffled=True))
    assert together_ == [sorted(batch) for batch in whole]
    first = numbers(skip=3, folder=str(tmp_path / "3"), shuffled=True)
    assert first + numbers(skip=-1, folder=str(tmp_path / "3"), shuffled=True) == whole


def test_a_place_that_was_loaded_and_saved_again_is_the_same(tmp_path):
    def prepared():
        run = TrainingRun(TrainingConfig(precision="fp32", global_batch_size=4, micro_batch_size=4))
        return run, run.prepare(model=torch.nn.Linear(2, 2), data=Flow(stateful=True))[1]

    run, loader = prepared()
    for _, _batch in zip(range(3), loader, strict=False):
        pass
    run.save(tmp_path / "1")
    place = loader.cursor.num_consumed
    assert place in (8, 12)
    run, loader = prepared()
    run.load(tmp_path / "1")
    loader.set_epoch(0)  # the one under way
    run.save(tmp_path / "2")
    run, loader = prepared()
    run.load(tmp_path / "2")
    assert next(iter(loader))["number"].tolist() == list(range(place, place + 4))


@pytest.mark.parametrize("ends", [3, 4])  # after four of them one part has ended
def test_parts_are_read_each_by_its_own_process_and_gone_on_with(two, tmp_path, ends):
    folder = str(tmp_path / "there")
    found = two.run("training.loops:divided", folder=folder, ends=ends)
    assert [len(each["read"]) for each in found] == [2 * 19, 2 * 18]  # two epochs, of a part of its own each
    assert sorted(found[0]["read"][:19] + found[1]["read"][:18]) == list(range(37))
    whole = together([each["found"] for each in found])
    flat = [number for batch in whole for number in batch]
    assert sorted(flat[:37]) == sorted(flat[37:]) == list(range(37))
    assert [len(batch) for batch in whole] == [9, 9, 9, 8, 2] * 2  # one part ends before the other
    assert found[0]["metrics"] == found[1]["metrics"]
    assert sorted(number for each in found[0]["metrics"] for number in each) == sorted(flat)
    rest = two.run("training.loops:divided", folder=folder, ends=ends, resumes=True)
    assert together([each["found"] for each in rest]) == whole[ends:]
    with pytest.raises(AssertionError, match=r"(?s)skip_samples=False refuses.*skip_samples=False refuses"):  # in both
        two.run("training.loops:divided", folder=folder, ends=ends, resumes=True, skip_samples=False)


def test_parts_of_other_lengths_are_gone_through_to_their_ends(two, tmp_path):
    asked = {"folder": str(tmp_path / "there"), "ends": 99, "short": 2}
    lengths = [len(batch) for batch in together([each["found"] for each in two.run("training.loops:divided", **asked)])]
    assert lengths == [7, 5, 5, 4] * 2
    dropped = two.run("training.loops:divided", drop_last=True, **asked)  # the last one alone, in which all have ended
    assert [len(batch) for batch in together([each["found"] for each in dropped])] == [7, 5, 5] * 2


def test_nobody_waits_for_a_part_that_fails_or_is_empty(two, tmp_path):
    asked = {"folder": str(tmp_path / "there"), "ends": 99}
    with pytest.raises(AssertionError, match=r"(?s)In another process the data raised.*a file that cannot be read"):
        two.run("training.loops:divided", short=6, fails=True, **asked)
    with pytest.raises(AssertionError, match=r"global_batch_size is 1, and each of 2 processes reads a part"):
        two.run("training.loops:divided", global_batch_size=1, **asked)
    empty = together([each["found"] for each in two.run("training.loops:divided", short=0, **asked)])
    assert [len(batch) for batch in empty] == [5, 5, 5, 4] * 2


def test_parts_of_two_processes_are_not_gone_on_with_by_one(two, tmp_path):
    folder = str(tmp_path / "3")
    two.run("training.loops:divided", folder=folder, ends=3)
    for shard, words in (
        (None, "divided over 2 processes, each of which"),
        (lambda data, rank, size: data, r"divided over 2 processes, and there are 1"),
    ):
        run = TrainingRun(TrainingConfig(global_batch_size=9, micro_batch_size=2, precision="fp32", seed=3))
        run.prepare(
            model=torch.nn.Linear(2, 2),
            optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
            data=Flow(),
            shard=shard,
        )
        with pytest.raises(TrainingError, match=words):
            run.load(folder)


def test_skipping_can_be_refused(tmp_path):
    numbers(skip=3, folder=str(tmp_path / "3"), iterable=True)
    run = TrainingRun(TrainingConfig(global_batch_size=8, precision="fp32", seed=3, skip_samples=False))
    run.prepare(model=torch.nn.Linear(2, 2), optimizer=lambda params: torch.optim.SGD(params, lr=0.1), data=Flow())
    with pytest.raises(
        TrainingError, match="24 samples from the beginning of epoch 0, and a Flow comes there by reading"
    ):
        run.load(tmp_path / "3")


def test_a_shard_of_what_cannot_be_divided_is_refused():
    for data, shard, words in (
        (Numbers(), "node", "the data is map-style"),
        (Flow(), "node", "the data is a Flow"),
        (Flow(), "file", "shard is 'file'"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            TrainingRun(TrainingConfig(precision="fp32")).prepare(model=torch.nn.Linear(2, 2), data=data, shard=shard)


@pytest.mark.parametrize(
    ("kind", "shuffles", "shard"),
    [
        ("listed", True, None),
        ("iterable", False, None),
        ("iterable", True, None),
        ("mixed", True, None),
        ("interleaved", True, None),
        ("iterable", True, "node"),
    ],
)
def test_hugging_faces_datasets_go_on_where_they_were(two, tmp_path, kind, shuffles, shard):
    def take(**asked):
        return together(two.run("training.loops:hugging", kind=kind, shuffles=shuffles, shard=shard, **asked))

    whole = take()
    flat = [number for batch in whole for number in batch]
    assert sorted(flat[:37]) == sorted(flat[37:]) == list(range(37))
    if shard is None:
        assert [sorted(each) for each in hugging(kind=kind, shuffles=shuffles)] == whole
    first = take(skip=3, folder=str(tmp_path / "3"))
    assert first + take(skip=-1, folder=str(tmp_path / "3")) == whole


def test_a_place_at_the_beginning_is_come_to_after_another(tmp_path):
    def batches(run, loader, count):
        found = []
        for batch, _ in zip(loader, range(count), strict=False):
            found.append(batch["number"].tolist())
            run.step()
        return found

    run = TrainingRun(TrainingConfig(precision="fp32", global_batch_size=4, micro_batch_size=4))
    _, _, loader = run.prepare(
        model=torch.nn.Linear(2, 2),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        data=datasets.IterableDataset.from_generator(lambda: ({"number": each} for each in range(37))),
        collate_fn=lambda samples: {
            "number": torch.tensor([each["number"] for each in samples]),
            "labels": torch.zeros(len(samples), 1),
        },
    )
    run.save(tmp_path / "0")
    assert batches(run, loader, 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    run.save(tmp_path / "2")
    for folder, first in (("2", 8), ("0", 0), ("2", 8)):
        run.load(tmp_path / folder)
        assert batches(run, loader, 1) == [[*range(first, first + 4)]]


def test_a_state_is_saved_after_a_look_at_what_comes(tmp_path):
    read = []
    config = TrainingConfig(precision="fp32", global_batch_size=4, micro_batch_size=4, skip_samples=False)

    def prepared(read):
        run = TrainingRun(config)
        return run, run.prepare(model=torch.nn.Linear(2, 2), data=Flow(stateful=True, read=read))[1]

    run, loader = prepared([])
    stream = iter(loader)
    for _ in range(3):
        next(stream)
    run.save(tmp_path / "2")  # the third was looked at
    run, loader = prepared(read)
    run.load(tmp_path / "2")
    assert next(iter(loader))["number"].tolist() == [8, 9, 10, 11]
    assert read == [8, 9, 10, 11]


def test_a_dataset_without_a_state_before_its_first_pass_goes_on_but_not_back(tmp_path):
    class Late(Flow):
        def state_dict(self):
            return self._state  # there from the first sample on

        def load_state_dict(self, state):
            self._start = state["at"]

        def __iter__(self):
            start, self._start = self._start, 0
            for number in range(start, 37):
                self._state = {"at": number + 1}
                yield Numbers()[number]

    config = TrainingConfig(precision="fp32", global_batch_size=4, micro_batch_size=4, skip_samples=False)
    run = TrainingRun(config)
    loader = run.prepare(model=torch.nn.Linear(2, 2), data=Late())[1]
    run.save(tmp_path / "0")
    for _, _batch in zip(range(3), loader, strict=False):
        pass
    run.save(tmp_path / "2")
    run.load(tmp_path / "2")
    assert next(iter(loader))["number"].tolist()[0] in (8, 12)
    run.load(tmp_path / "0")
    with pytest.raises(TrainingError, match="cannot go back to its beginning"):
        next(iter(loader))


def test_generators_of_the_host_go_on_where_they_were():
    import random

    import numpy as np

    from bigmodel.draws import draws_kept

    def drawn(inside):
        np.random.seed(0)
        random.seed(0)
        torch.manual_seed(0)
        first = np.random.randn()  # the second of a pair waits
        inside()
        return first, np.random.randn(), np.random.randn(), random.random(), float(torch.rand(()))

    def kept():
        with draws_kept():
            np.random.seed(5)
            np.random.randn()
            random.seed(5)
            with draws_kept():
                np.random.seed(6)
            torch.rand(3)

    assert drawn(kept) == drawn(lambda: None)


def test_a_second_loader_is_for_evaluation():
    from torch.utils.data import DataLoader

    run = TrainingRun(TrainingConfig(precision="fp32", global_batch_size=4))
    _, trained, evaluated = run.prepare(
        torch.nn.Linear(2, 2), DataLoader(Numbers(), batch_size=2, shuffle=True), DataLoader(Numbers(), batch_size=3)
    )
    assert len(next(iter(trained))["number"]) == 2
    before = trained.cursor
    seen = [run.gather_for_metrics(batch["number"]).tolist() for batch in evaluated]
    assert seen[0] == [0, 1, 2]
    assert [number for batch in seen for number in batch] == list(range(37))
    assert trained.cursor == before


def test_a_loader_for_evaluation_is_refused_before_anything_is_made():
    from torch.utils.data import DataLoader

    run = TrainingRun(TrainingConfig(precision="fp32", global_batch_size=4))
    model, good = torch.nn.Linear(2, 2), DataLoader(Numbers(), batch_size=2)
    with pytest.raises(InvalidArgumentError, match="drop_last"):
        run.prepare(model, good, DataLoader(Numbers(), batch_size=2, drop_last=True))
    with pytest.raises(InvalidArgumentError, match="Two of one kind"):
        run.prepare(model, good, data=Numbers())
    with pytest.raises(InvalidArgumentError, match="shard was given, and no data"):
        run.prepare(model, shard="node")
    evaluated, _, same, other = run.prepare(good, torch.optim.SGD(model.parameters()), model, good)
    assert same is model
    assert len(evaluated) == 19
    assert len(other) == 19


@pytest.mark.parametrize("length", [1, 2, 3, 37, 64, 1000, 4097])
def test_an_order_has_every_number_once_and_any_place_of_it_is_found_alone(length):
    import numpy as np

    from bigmodel.training.draws import permuted

    orders = [permuted(np.arange(length), length, seed) for seed in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(length))
    last = permuted(np.arange(length)[-1:], length, 1)
    assert last.tolist() == orders[1][-1:].tolist()
    if length > 30:
        assert len({tuple(order) for order in orders}) == 3
        assert sum(int(order[0]) == 0 for order in orders) < 3
    assert permuted(np.array([3, 1 << 39]), 1 << 40, 0).max() < 1 << 40
