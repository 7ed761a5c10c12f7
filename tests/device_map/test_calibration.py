"""What is measured is kept for this machine, and plans are made with it."""

import dataclasses
import json
import logging
import os
import threading
import time

import pytest
import torch
from simulated import COMPILER, simulated

import bigmodel.device_map.machine as module_of_machines
from bigmodel.device_map import calibration, measuring
from bigmodel.device_map.machine import DEFAULT_RATES, Machine
from bigmodel.device_map.rates import Rates
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
    assert {each.name for each in own_cache.iterdir()} == {file.name, ".calibration.lock"}
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


def _of_disks(**disks):
    return calibration.Calibration(
        date="2026-01-01T00:00:00+00:00", versions={}, host=Rates.roofline(1e9, {"float32": 1e9}, 1e-6), disks=disks
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("version", "host", "disks", "date", "accelerators", "versions") for value in (None, 3, [])),
        ("host", {}),
        ("host", {"memory_bytes_per_s": 1e9, "products": {}, "op_s": 0}),
        ("host", {"memory_bytes_per_s": 1e9, "products": {"float32": [[2, 1e9], [1, 1e9]]}, "op_s": 0}),
        ("host", {"memory_bytes_per_s": 1e9, "products": {"float32": [1, 2]}, "op_s": 0}),
        *(("disks", {"a": value}) for value in ("1", -1, 0, True, float("nan"), 10**400, None)),
        *((name, value) for name in ("h2d_bytes_per_s_all", "d2d_bytes_per_s") for value in (0, -1, "1", float("inf"))),
        ("accelerators", {"cuda:0": {}}),
        ("more", 1),
    ],
    ids=lambda each: str(each)[:40],
)  # fmt: skip
def test_a_damaged_calibration_counts_as_none_and_is_told(own_cache, caplog, name, value):
    file = calibration.keep(_of_disks(a=1e9))
    assert calibration.kept() is not None
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    _assert_told_once(caplog, file)


@pytest.mark.parametrize("text", ["", "3", "[" * 100_000, "\0", "\udcff", None])
def test_a_calibration_that_is_no_json_counts_as_none_and_is_told(own_cache, caplog, text):
    file = calibration.keep(_of_disks(a=1e9))
    file.unlink()
    if text is None:
        os.mkfifo(file)  # nobody writes into it
    else:
        file.write_bytes(text.encode(errors="surrogateescape"))
    _assert_told_once(caplog, file)
    assert calibration.keep(_of_disks(b=1e9)) == file
    assert calibration.kept().disks == {"b": 1e9}


def _assert_told_once(caplog, file):
    with caplog.at_level(logging.WARNING, "bigmodel"):
        assert Machine.probe().rates_from == Machine.probe().rates_from == DEFAULT_RATES
    (record,) = caplog.records
    assert str(file) in record.getMessage()


def test_rates_that_could_not_be_kept_are_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(module_of_machines, "measure", lambda *_, **__: pytest.fail("it measured"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InvalidArgumentError, match=r"file/bigmodel, which cannot be written: .*XDG_CACHE_HOME"):
        Machine.calibrate(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calibration._file(None).mkdir(parents=True)
    with pytest.raises(InvalidArgumentError, match=r"bigmodel, which cannot be written: .* is a folder"):
        Machine.calibrate(tmp_path)


def test_who_keeps_rates_at_the_same_time_loses_no_disks_of_others(own_cache, monkeypatch):
    write = calibration._write
    monkeypatch.setattr(calibration, "_write", lambda *given: (time.sleep(0.01), write(*given)))
    names = [f"disk{number}" for number in range(8)]
    threads = [threading.Thread(target=calibration.keep, args=[_of_disks(**{name: 1e9})]) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calibration.kept().disks == dict.fromkeys(names, 1e9)


def test_a_write_that_fails_leaves_what_was_there(own_cache, monkeypatch):
    file = calibration.keep(_of_disks(a=1e9))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(InvalidArgumentError, match="No space left"):
            calibration.keep(_of_disks(b=1e9))
    assert {each.name for each in own_cache.iterdir()} == {file.name, ".calibration.lock"}
    assert calibration.kept().disks == {"a": 1e9}


@pytest.mark.skipif(COMPILER is None, reason="simulated accelerators need a C++ compiler")
@torch.no_grad()
def test_links_are_measured_alone_and_together():
    with simulated(2, link_bytes_per_s=2e9):
        devices = [torch.device("sim:0"), torch.device("sim:1")]
        alone, together = measuring._links_rate(devices[:1]), measuring._all_links(devices)
    # The links sleep: nothing is faster than they are.
    assert 0 < alone <= 2e9
    assert 0 < together <= 4e9
