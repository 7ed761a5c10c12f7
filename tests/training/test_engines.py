"""Every engine trains as one process in float32 does: loss, gradients, parameters."""

from __future__ import annotations

import itertools

import pytest
import torch

from training.loops import save_llama, train

ZERO = ("zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    save_llama(path)
    return path


@pytest.fixture(scope="module")
def alone(folder):
    return train(folder, strategy="single", precision="fp32", micro_batch_size=8, gradients=True)


def largest_difference(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in found)


@pytest.mark.parametrize(
    ("options", "micro_batch_size"),
    [
        *itertools.product([{"strategy": "ddp"}, {"strategy": "fsdp"}, {"strategy": "fsdp", "replicas": 2}], [4, 1]),
        *(({"strategy": each}, 2) for each in ZERO),
        *(pytest.param({"strategy": each}, size, marks=pytest.mark.slow) for each in ZERO for size in (4, 1)),
    ],
)
def test_float32_of_two_processes_is_that_of_one(two, folder, alone, options, micro_batch_size):
    asked = {"precision": "fp32", "micro_batch_size": micro_batch_size, "gradients": True, **options}
    for found in two.run("training.loops:train", path=str(folder), **asked):
        assert found["tokens"] == alone["tokens"]
        assert max(abs(a - b) for a, b in zip(found["losses"], alone["losses"], strict=True)) <= 5e-6
        assert largest_difference(found["parameters"], alone["parameters"]) <= 1e-5
        for name, gradient in found["gradients"].items():
            expected = alone["gradients"][name]
            assert (gradient - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(
    "strategy", ["ddp", "fsdp", *(pytest.param(each, marks=pytest.mark.slow) for each in ZERO[:2]), "zero3"]
)
def test_bfloat16_with_float32_masters_stays_near(two, folder, alone, strategy):
    for found in two.run(
        "training.loops:train", path=str(folder), precision="bf16", micro_batch_size=2, strategy=strategy
    ):
        assert all(parameter.dtype == torch.float32 for parameter in found["parameters"].values())
        assert max(abs(a - b) for a, b in zip(found["losses"], alone["losses"], strict=True)) <= 2e-3
        assert largest_difference(found["parameters"], alone["parameters"]) <= 1e-2


def test_one_process_in_bfloat16(folder, alone):
    found = train(folder, precision="bf16", micro_batch_size=4)
    assert max(abs(a - b) for a, b in zip(found["losses"], alone["losses"], strict=True)) <= 2e-3
    assert largest_difference(found["parameters"], alone["parameters"]) <= 1e-2


def test_without_a_loader_of_ours_gradients_are_the_mean_over_processes(two):
    found = two.run("training.loops:own_loader")
    assert found == [1.5, 1.5]
