"""What a launch is asked for: what is detected, what is refused, and which processors a process gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigmodel.device_map.machine import Machine
from bigmodel.errors import InvalidArgumentError
from bigmodel.launch.binding import _device_nodes, _nodes, share_of
from bigmodel.launch.failures import Ended, first_of
from bigmodel.launch.settings import Detected, LaunchSettings
from bigmodel.launch.slurm import hosts_of, nodes_of_slurm, num_unused

HOST = Detected(num_devices=0, num_processors=8)
EIGHT = Detected(num_devices=8, num_processors=96)
STEP = {
    "SLURM_JOB_ID": "81234",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
}


def test_processes_are_detected():
    assert Detected.here().num_processors == Machine.probe().num_processors
    assert (str(HOST), str(EIGHT)) == ("no accelerator, 8 processors", "8 accelerators")
    assert LaunchSettings().where(HOST, {}).num_processes == 1
    assert LaunchSettings().where(HOST, {}).num_threads == 8
    found = LaunchSettings().where(EIGHT, {})
    assert (found.num_processes, found.num_threads, found.num_nodes, found.endpoint) == (8, 12, 1, "")
    assert LaunchSettings(num_processes=3).where(HOST, {}).num_threads == 2
    assert LaunchSettings(num_processes=3).where(HOST, {"OMP_NUM_THREADS": "5"}).num_threads == 5
    assert LaunchSettings(num_processes=3, num_threads=1).where(HOST, {"OMP_NUM_THREADS": "5"}).num_threads == 1
    with pytest.raises(InvalidArgumentError, match="9 processes are asked for, and there are 8 accelerators"):
        LaunchSettings(num_processes=9).where(EIGHT, {})
    with pytest.raises(InvalidArgumentError, match="process 1 of 2 of a launcher already"):
        LaunchSettings().where(HOST, {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_processes": 0}, "num_processes is 0"),
        ({"num_restarts": -1}, "num_restarts is -1"),
        ({"endpoint": "node0:none"}, "Give HOST or HOST:PORT"),
        ({"endpoint": "fe80::1"}, "in brackets"),
        ({"endpoint": ":29400"}, "Give HOST or HOST:PORT"),
        ({"endpoint": "node0:70000"}, "Give HOST or HOST:PORT"),
        ({"job": "a/b"}, "job is 'a/b'"),
        ({"logs": __file__}, "which is a file"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, told):
    with pytest.raises(InvalidArgumentError, match=told):
        LaunchSettings(**options)


def test_machines_meet_where_it_is_stated():
    with pytest.raises(InvalidArgumentError, match="There are 2 machines, and nothing says where they meet"):
        LaunchSettings(num_nodes=2).where(HOST, {})
    assert LaunchSettings(num_nodes=2, endpoint="node0").where(HOST, {}).endpoint == "node0:29400"
    found = LaunchSettings(num_nodes=2, endpoint="[fe80::1]:1234", job="mine").where(HOST, STEP)
    assert (found.endpoint, found.job, found.is_host) == ("[fe80::1]:1234", "mine", None)


def test_the_machines_of_a_slurm_step():
    second = LaunchSettings().where(HOST, STEP)
    assert (second.num_nodes, second.endpoint, second.is_host, second.job) == (2, "gpu07:21234", False, "slurm-81234.2")
    first = LaunchSettings().where(HOST, STEP | {"SLURM_NODEID": "0", "SLURM_PROCID": "0"})
    assert (first.endpoint, first.is_host, first.job) == (second.endpoint, True, second.job)
    with pytest.raises(InvalidArgumentError, match=r"16 tasks on 2 machines.*--ntasks-per-node=1"):
        LaunchSettings().where(HOST, STEP | {"SLURM_STEP_NUM_TASKS": "16"})
    batch = {"SLURM_JOB_ID": "81234", "SLURM_NNODES": "2", "SLURM_NODELIST": "gpu[07-08]"}
    assert nodes_of_slurm(batch) is None  # the script of a job, before srun
    assert LaunchSettings().where(HOST, batch).num_nodes == 1
    assert (num_unused(batch), num_unused(STEP), num_unused({})) == (1, 0, 0)


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("gpu1", ["gpu1"]),
        ("gpu[01-03,7],login", ["gpu01", "gpu02", "gpu03", "gpu7", "login"]),
        ("r[1-2]n[08-10]", ["r1n08", "r1n09", "r1n10", "r2n08", "r2n09", "r2n10"]),
        ("a[9-11]-ib", ["a9-ib", "a10-ib", "a11-ib"]),
    ],
)
def test_names_of_machines_in_short(nodelist, hosts):
    assert hosts_of(nodelist) == hosts


@pytest.mark.parametrize("nodelist", ["", "gpu[1-x]", "gpu[0-9999999]", "a[0-9999]b[0-9999]"])
def test_lists_of_machines_that_name_none_are_refused(nodelist):
    with pytest.raises(InvalidArgumentError, match="SLURM_STEP_NODELIST"):
        hosts_of(nodelist)


NODES = {0: {0, 1, 2, 3, 8, 9}, 1: {4, 5, 6, 7}}


def test_a_process_is_next_to_its_memory_and_its_device():
    everything = range(10)
    assert share_of(everything, {0: set(everything)}, 0, 2) == set()  # all are equally near
    assert [share_of(everything, NODES, rank, 4) for rank in range(4)] == [NODES[0], NODES[0], NODES[1], NODES[1]]
    assert share_of(everything, NODES, 0, 1) == set(everything)
    assert share_of({0, 1, 4}, NODES, 1, 2) == {4}
    assert share_of({0, 1}, NODES, 1, 2) == set()
    assert share_of(everything, NODES, 0, 2, [1, 0]) == NODES[1]
    assert share_of(everything, NODES, 2, 3, [1, 0]) == NODES[1]  # fewer devices than processes say nothing


def test_where_devices_are_is_read_from_the_system(tmp_path):
    for number, text in ((0, "0-3,8-9\n"), (1, "4-7\n")):
        folder = tmp_path / f"sys/devices/system/node/node{number}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(text)
    cards = {"0000:81:00.0": ("0x10de", "0x030200", "1"), "0000:01:00.0": ("0x10de", "0x030200", "0")}
    cards |= {"0000:02:00.0": ("0x10de", "0x040300", "0"), "0000:03:00.0": ("0x8086", "0x030000", "0")}
    for bus, values in cards.items():
        folder = tmp_path / "sys/bus/pci/devices" / bus
        folder.mkdir(parents=True)
        for name, value in zip(("vendor", "class", "numa_node"), values, strict=True):
            (folder / name).write_text(value + "\n")
    assert _nodes(tmp_path) == NODES
    assert _device_nodes(tmp_path, {}) == [0, 1]
    assert _device_nodes(tmp_path, {"CUDA_VISIBLE_DEVICES": "1,0"}) == [1, 0]
    assert _device_nodes(tmp_path, {"CUDA_VISIBLE_DEVICES": "GPU-1234"}) == []
    assert _nodes(tmp_path / "nowhere") == {}


def ended(rank: int, exit_code: int = 1, at_s: float = 10.0, why: str = "", errors: Path | None = None) -> Ended:
    return Ended(rank=rank, exit_code=exit_code, at_s=at_s, why=why, errors=errors)


@pytest.mark.parametrize(
    ("all_ended", "first"),
    [
        (
            [
                ended(0, at_s=10.2, why="RuntimeError: Connection closed by peer"),
                ended(1, at_s=10.1, why="ValueError: x"),
            ],
            1,
        ),
        (
            [
                ended(0, at_s=10.0, why="RuntimeError: Connection reset by peer"),
                ended(1, at_s=10.1, why="ValueError: x"),
            ],
            1,
        ),
        ([ended(0, at_s=10.0, why="RuntimeError: Connection closed by peer"), ended(1, -9, 10.4)], 1),
        ([ended(0, -15, 10.0), ended(1, at_s=10.0, why="ValueError: x")], 1),
        ([ended(0, at_s=10.0, why="ValueError: x"), ended(1, -9, 40.1)], 0),  # which the launcher ended after its grace
        ([ended(0, -6, 10.0), ended(1, at_s=10.1, why="ValueError: x")], 1),
        ([ended(0, -11, 10.1), ended(1, -6, 10.0)], 0),
        ([ended(0, 3), ended(1, -15)], 0),
        ([ended(0, at_s=10.2, why="ValueError: y"), ended(1, at_s=10.1, why="ValueError: x")], 1),
    ],
)
def test_the_first_failure_is_the_one_that_others_follow(all_ended, first):
    assert first_of(all_ended).rank == first


def test_what_became_of_a_process_is_told(tmp_path):
    assert ended(1, why="ValueError: x").told() == "failed: ValueError: x"
    assert ended(1, 3).told() == "failed: it ended with status 3"
    assert ended(1, -9).told() == "was killed by signal 9 (SIGKILL), as systems do that are out of memory"
    assert ended(1, -9).told(is_out_of_memory=True).endswith("by the system, which was out of memory")
    assert ended(1, -11).told() == "was killed by signal 11 (SIGSEGV)"
    errors = tmp_path / "stderr.log"
    errors.write_text(
        "Traceback (most recent call last):\n  File\nKeyError: 'a'\n\nDuring handling, another exception occurred:\n\n"
        "Traceback (most recent call last):\n  File\n    ~~~\nValueError: bad\n more\nwarning: leaked\n"
    )
    assert ended(1, errors=errors).told() == "failed: ValueError: bad"
    errors.write_text("usage: x\nx: error: no\n")
    assert ended(1, 2, errors=errors).told() == "failed: x: error: no"
