"""What is measured is kept for this machine, and plans are made with it."""

import dataclasses
import os

import pytest
import torch

from bigmodel.device_map import calibration
from bigmodel.device_map.machine import DEFAULT_RATES, Machine
from bigmodel.device_map.processors import _PASSES
from bigmodel.errors import InvalidArgumentError


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bigmodel"


def test_without_a_calibration_there_are_defaults(own_cache):
    before = _rates(Machine.probe())
    assert before["rates_from"] == DEFAULT_RATES
    assert calibration.kept() is None
    own_cache.mkdir(parents=True)
    calibration._file(None).write_text("{")  # a damaged one is none
    assert _rates(Machine.probe()) == before


def _rates(machine):
    """What a calibration decides; how much is free changes from one moment to the next."""
    names = ("host_rates", "disk_read_bytes_per_s", "disks", "h2d_bytes_per_s_all", "d2d_bytes_per_s", "rates_from")
    links = [(each.device, each.rates, each.h2d_bytes_per_s) for each in machine.accelerators]
    return {name: getattr(machine, name) for name in names} | {"accelerators": links}


@pytest.mark.slow
def test_this_machine_is_measured_once_and_found_again(own_cache, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "weights.bin").write_bytes(os.urandom(80 << 20))
    phases = []
    machine = Machine.calibrate(checkpoint, progress=lambda phase, done, total: phases.append(phase))
    assert machine.rates_from.startswith("measured 20")
    assert {phase.split()[0] for phase in phases} == {"measuring"}
    assert [file.name for file in checkpoint.iterdir()] == ["weights.bin"]
    assert 1e7 < machine.disk_read_bytes_per_s < 1e12
    assert 1e8 < machine.host_rates.memory_bytes_per_s < 1e13
    assert 1e-8 < machine.host_rates.op_s < 1e-2
    curve = machine.host_rates.products["float32"]
    assert len(curve) == len(_PASSES)
    # One row reads the weight from memory; many rows compute.
    assert curve[-1][1] > curve[0][1]
    again = Machine.probe()
    assert (again.host_rates, again.disks) == (machine.host_rates, machine.disks)
    assert again.reading_from(checkpoint / "weights.bin").disk_read_bytes_per_s == machine.disk_read_bytes_per_s
    assert Machine.load(_written(tmp_path, machine)) == machine
    torch_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(torch_threads + 1)
        assert Machine.probe().rates_from == DEFAULT_RATES  # measured with other threads
    finally:
        torch.set_num_threads(torch_threads)


def _written(folder, machine):
    (folder / "machine.json").write_text(machine.to_json())
    return folder / "machine.json"


def test_disks_of_earlier_measurements_stay(own_cache):
    rates = Machine.probe().host_rates
    first = calibration.Calibration(date="2026-01-01T00:00:00+00:00", versions={}, host=rates, disks={"a": 1e9})
    file = calibration.keep(first)
    second = dataclasses.replace(first, date="2026-02-01T00:00:00+00:00", disks={"b": 2e9})
    assert calibration.keep(second) == file
    assert calibration.kept() == dataclasses.replace(second, disks={"a": 1e9, "b": 2e9})
    assert [each.name for each in own_cache.iterdir()] == [file.name]
    machine = Machine.probe()
    assert (machine.rates_from, machine.disk_read_bytes_per_s) == ("measured 2026-02-01", 1e9)


def test_a_disk_that_was_not_measured_is_told(own_cache, tmp_path):
    disk = calibration.file_system_of(tmp_path)
    machine = Machine.probe()
    assert machine.reading_from(tmp_path).rates_from == DEFAULT_RATES
    measured = calibration.Calibration(
        date="2026-01-01T00:00:00+00:00", versions={}, host=machine.host_rates, disks={"another": 1e9}
    )
    calibration.keep(measured)
    other = Machine.probe().reading_from(tmp_path)
    assert other.rates_from == "measured 2026-01-01, the disk's rate is another disk's"
    assert other.reading_from(tmp_path) == other
    assert Machine.load(_written(tmp_path, other)).reading_from(tmp_path) == other
    calibration.keep(dataclasses.replace(measured, disks={disk: 3e9}))
    own = Machine.probe().reading_from(tmp_path)
    assert (own.rates_from, own.disk_read_bytes_per_s) == ("measured 2026-01-01", 3e9)
    assert dataclasses.replace(other, disks=own.disks).reading_from(tmp_path).rates_from == own.rates_from


def test_what_was_measured_with_another_torch_is_not_used(own_cache, monkeypatch):
    measured = calibration.Calibration(
        date="2026-01-01T00:00:00+00:00", versions={}, host=Machine.probe().host_rates, disks={"a": 1e9}
    )
    calibration.keep(measured)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "1.0")
        assert calibration.kept() is None
        assert Machine.probe().rates_from == DEFAULT_RATES
    assert calibration.kept() == measured


def test_a_folder_that_is_none_is_refused(own_cache, tmp_path):
    with pytest.raises(InvalidArgumentError, match="is no folder"):
        Machine.calibrate(tmp_path / "none")
