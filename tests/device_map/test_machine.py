"""What is free, within the limits of control groups."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigmodel.device_map.machine import Machine
from bigmodel.device_map.maps import resolve_limits
from bigmodel.errors import InvalidArgumentError

GIB = 1 << 30


def tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_v2_group_and_those_above_it_limit_what_is_free(tmp_path):
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/memory.max": str(2 * GIB),
            "sys/fs/cgroup/a/memory.current": str(GIB),
            "sys/fs/cgroup/a/memory.stat": f"anon 5\nactive_file {GIB // 4}\ninactive_file {GIB // 4}\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/b/memory.current": "7",
            "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
        },
    )
    machine = Machine.probe(tmp_path, root=root)
    # Page cache can be dropped: half a GiB of the one that is used.
    assert machine.host_bytes == 2 * GIB - GIB // 2
    assert machine.num_processors == 1


def test_a_v1_group_limits_what_is_free(tmp_path):
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/x\n1:cpu,cpuacct:/x\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/memory/x/memory.limit_in_bytes": str(GIB),
            "sys/fs/cgroup/memory/x/memory.usage_in_bytes": str(GIB // 2),
            "sys/fs/cgroup/memory/x/memory.stat": "total_inactive_file 1024\ntotal_active_file 0\n",
            "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1",
        },
    )
    assert Machine.probe(tmp_path, root=root).host_bytes == GIB // 2 + 1024


def test_a_group_of_another_namespace_is_looked_up_at_the_mount(tmp_path):
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/docker/abcdef\n",
            "sys/fs/cgroup/memory.max": str(GIB),
            "sys/fs/cgroup/memory.current": "0",
        },
    )
    assert Machine.probe(tmp_path, root=root).host_bytes == GIB


def test_without_limits_it_is_what_the_system_says(tmp_path):
    machine = Machine.probe(tmp_path, root=tmp_path)
    assert GIB // 8 < machine.host_bytes < 1 << 50
    assert 1 <= machine.num_processors <= (os.cpu_count() or 1)
    assert machine.disk_bytes > 0


@pytest.mark.root
@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists(),
    reason="makes a memory control group (version 1)",
)
def test_a_real_group_limits_what_is_free():
    group = Path("/sys/fs/cgroup/memory/bigmodel-test-machine")
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(GIB))
        code = "from bigmodel.device_map.machine import Machine; print(Machine.probe().host_bytes)"
        child = subprocess.run(
            [sys.executable, "-c", f"open('{group}/cgroup.procs', 'w').write('0')\n{code}"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert GIB // 4 < int(child.stdout) < GIB
    finally:
        group.rmdir()


def test_unstated_limits_leave_a_reserve_and_are_shared(monkeypatch):
    machine = Machine(name="m", host_bytes=100 * GIB, num_processors=1, disk_bytes=10 * GIB)
    assert resolve_limits(None, machine) == {"cpu": 95 * GIB, "disk": 9 * GIB}
    stated = {"cpu": "3GiB"}
    assert resolve_limits(stated, machine) == {"cpu": 3 * GIB, "disk": 9 * GIB}
    assert stated == {"cpu": "3GiB"}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert Machine.probe().num_sharing == 4
    shared = Machine(name="m", host_bytes=100 * GIB, num_processors=1, disk_bytes=10 * GIB, num_sharing=5)
    assert resolve_limits(None, shared)["cpu"] == 19 * GIB


def test_a_machine_that_is_somewhere_else(tmp_path):
    file = tmp_path / "m.json"
    described = {
        "name": "workstation",
        "accelerators": [{"name": "card", "memory": "24GiB"}],
        "host": {"memory": "64GiB"},
        "disk": {"free": "1TB"},
    }
    file.write_text(json.dumps(described))
    machine = Machine.load(file)
    assert machine.accelerators[0].memory_bytes == 24 * GIB
    assert machine.accelerators[0].device == "cuda:0"
    assert (machine.host_bytes, machine.disk_bytes) == (64 * GIB, 10**12)
    assert resolve_limits({0: "8GiB"}, machine)["cuda:0"] == 8 * GIB
    for text in ("[]", "{", '{"host": {"memory": "12 x"}}', "{}"):
        file.write_text(text)
        with pytest.raises(InvalidArgumentError):
            Machine.load(file)


HUGE = 10**400
NO_RATES = (0, -1, 1, 1e19, HUGE, float("nan"), float("inf"), "1e9", True, None, [])
NO_COUNTS = (0, -1, 1.5, True, "2", None, HUGE)
HOSTS = [
    *(("memory_bytes_per_s", value) for value in NO_RATES),
    *(("fresh_bytes_per_s", value) for value in NO_RATES),
    *(("flops_per_s", {"float32": value}) for value in NO_RATES),
    *(("flops_per_s", value) for value in ({}, 3, None)),
    *(("products", {"float32": value}) for value in ([], 3, [[1]], [[0, 1e9]], [[1, 0]], [[1, 1e9], [1, 2e9]], [["1", 1e9]])),
    *(("op_s", value) for value in (-1e-6, 2, float("nan"), "0", True, HUGE)),
    *(("processors", value) for value in NO_COUNTS),
    *(("memory", value) for value in (2**60, HUGE, "99999999TiB", -1, 1.5, "1" * 5000 + "GiB")),
    ("memroy", 1),
]  # fmt: skip
CARDS = [
    *(("h2d_bytes_per_s", value) for value in NO_RATES),
    *(("unified", value) for value in (0, 1, "false", None)),
    *(("device", value) for value in ("cpu", "nonsense", 0, None, "cuda:300", "meta")),
    *(("name", value) for value in (3, None, [])),
]
FILES = [
    *((name, value) for name in ("d2d_bytes_per_s", "h2d_bytes_per_s_all") for value in NO_RATES if value is not None),
    *(("processes", value) for value in NO_COUNTS),
    *((name, value) for name in ("name", "rates_from") for value in (3, None, [])),
    *(("disk", {"read_bytes_per_s": value}) for value in NO_RATES),
    *(("disk", {"measured": value}) for value in (3, {"a": 0}, {"a": "1"})),
    *(("disk", {"free": value}) for value in (2**60, None, "1 x")),
    *(("accelerators", value) for value in (3, [3], [{}], {"a": 1})),
    *(("host", value) for value in (3, None, {})),
    *(("accelerators", [{"memory": "1GiB", "device": first}, {"memory": "1GiB", "device": second}])
      for first in ("cuda", "cuda:0") for second in ("cuda", "cuda:0")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *((name, {"host": {"memory": "1GiB", name: value}}) for name, value in HOSTS),
        *((name, {"accelerators": [{"memory": "1GiB", name: value}]}) for name, value in CARDS),
        *((name, {name: value}) for name, value in FILES),
    ],
    ids=lambda each: str(each)[:60],
)
def test_machine_files_that_mean_nothing_are_refused_by_name(tmp_path, name, wrong):
    file = tmp_path / "m.json"
    file.write_text(json.dumps({"host": {"memory": "1GiB"}} | wrong))
    with pytest.raises(InvalidArgumentError, match=r"m\.json: ") as told:
        Machine.load(file)
    assert name in str(told.value)
    assert len(str(told.value)) < 1000


@pytest.mark.parametrize("file", [3, None, b"m", "x" * 10_000, "a\0b", "/", "nested"])
def test_what_is_no_machine_file(tmp_path, file):
    if file == "nested":
        file = tmp_path / "m.json"
        file.write_text("[" * 100_000)
    with pytest.raises(InvalidArgumentError) as told:
        Machine.load(file)
    assert len(str(told.value)) < 1000


def test_the_first_accelerator_has_one_name(tmp_path):
    file = tmp_path / "m.json"
    cards = [{"memory": "2GiB", "device": "cuda", "unified": True, "fresh_bytes_per_s": 1e9}]
    file.write_text(json.dumps({"host": {"memory": "1GiB"}, "accelerators": cards}))
    machine = Machine.load(file)
    assert resolve_limits({"cuda:0": GIB}, machine)["cuda:0"] == GIB
    assert machine.accelerators[0].rates.fresh_bytes_per_s == 1e9
