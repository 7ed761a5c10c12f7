"""On a machine with an accelerator, this version computes on the CPU, exactly, and says what it leaves unused."""

import logging

import pytest
import torch
from families import inputs_for, make_checkpoint, resident

import bigmodel
from bigmodel.errors import DeviceMapError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator here"),
]


@torch.no_grad()
def test_a_model_beside_an_accelerator_is_exact_and_says_that_it_is_unused(tmp_path, caplog):
    folder = make_checkpoint("llama", tmp_path)
    inputs = inputs_for("llama")
    expected = resident(folder)(**inputs).logits
    for device_map in ("auto", "cpu", {"": "disk"}):
        with caplog.at_level(logging.WARNING, logger="bigmodel.loading"):
            model = bigmodel.load_sharded(folder, device_map, progress=False)
        assert "is not used" in caplog.text
        assert model.device.type == "cpu"
        assert torch.equal(model(**inputs).logits, expected)


def test_cuda_and_homes_on_accelerators_are_refused(tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    for device_map in ("cuda", {"": 0}, {"": "disk", "lm_head": torch.accelerator.current_accelerator().type}):
        with pytest.raises(DeviceMapError):
            bigmodel.load_sharded(folder, device_map)


def test_limits_of_accelerators_are_accepted(tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    model = bigmodel.load_sharded(folder, "auto", max_memory={0: "1GiB", "cpu": "2GiB"}, progress=False)
    assert all(placement.run_on == "cpu" for placement in bigmodel.plan_of(model).placements)


def test_materialize_puts_all_weights_on_the_accelerator(tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    device = torch.accelerator.current_accelerator()
    model = bigmodel.materialize(bigmodel.load_sharded(folder, {"": "disk"}, progress=False), device)
    assert {parameter.device.type for parameter in model.parameters()} == {device.type}
    with torch.no_grad():
        expected = resident(folder).to(device)(**{k: v.to(device) for k, v in inputs_for("llama").items()}).logits
        found = model(**{name: tensor.to(device) for name, tensor in inputs_for("llama").items()}).logits
    assert torch.equal(found, expected)
