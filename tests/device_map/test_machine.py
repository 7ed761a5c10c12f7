"""What a machine has: control groups of both versions, real ones too, machine files, and this machine itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from bigmodel.device_map.machine import Machine
from bigmodel.errors import InvalidArgumentError

GIB = 1 << 30
MIB = 1 << 20


def write(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def test_this_machine_without_control_groups(tmp_path):
    machine = Machine.probe(tmp_path, root=tmp_path / "empty")
    assert 0 < machine.host_bytes <= psutil.virtual_memory().total
    assert machine.num_processors == len(os.sched_getaffinity(0))
    assert machine.disk_bytes <= psutil.disk_usage(str(tmp_path)).total
    assert (len(machine.accelerators) > 0) == torch.accelerator.is_available()
    # A folder that is not there yet lies on the file system of the nearest one that is.
    assert Machine.probe(tmp_path / "not" / "yet").disk_bytes > 0


def test_version_2_limits_of_the_group_and_of_those_above_it(tmp_path):
    files = {
        "proc/self/cgroup": "0::/user/job",
        "sys/fs/cgroup/memory.stat": "",
        "sys/fs/cgroup/user/memory.max": 600 * MIB,
        "sys/fs/cgroup/user/memory.current": 500 * MIB,
        "sys/fs/cgroup/user/memory.stat": f"anon {100 * MIB}\nactive_file {150 * MIB}\ninactive_file {100 * MIB}",
        "sys/fs/cgroup/user/cpu.max": "max 100000",
        "sys/fs/cgroup/user/job/memory.max": "max",
        "sys/fs/cgroup/user/job/memory.current": 10 * MIB,
        "sys/fs/cgroup/user/job/cpu.max": "100000 100000",
    }
    machine = Machine.probe(root=write(tmp_path, files))
    # 600 - 500 + the 250 of page cache that the kernel can drop
    assert machine.host_bytes == 350 * MIB
    assert machine.num_processors == 1


def test_version_1_limits_count_the_whole_tree(tmp_path):
    memory = "sys/fs/cgroup/memory"
    files = {
        "proc/self/cgroup": "7:cpu,cpuacct:/job\n4:memory:/job/step\n0::/",
        f"{memory}/memory.limit_in_bytes": 9223372036854771712,
        f"{memory}/job/memory.limit_in_bytes": 400 * MIB,
        f"{memory}/job/memory.usage_in_bytes": 390 * MIB,
        f"{memory}/job/memory.stat": f"inactive_file 0\ntotal_inactive_file {40 * MIB}\ntotal_active_file {20 * MIB}",
        f"{memory}/job/step/memory.limit_in_bytes": 300 * MIB,
        f"{memory}/job/step/memory.usage_in_bytes": 100 * MIB,
        "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": 50000,
        "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": 100000,
    }
    machine = Machine.probe(root=write(tmp_path, files))
    assert machine.host_bytes == 70 * MIB
    assert machine.num_processors == 1  # half of one is still one


def test_a_group_whose_path_is_another_namespaces(tmp_path):
    # In a container the path is the host's, and the mount shows the container's own group as its root.
    files = {
        "proc/self/cgroup": "0::/docker/0123456789",
        "sys/fs/cgroup/memory.max": 64 * MIB,
        "sys/fs/cgroup/memory.current": 16 * MIB,
    }
    assert Machine.probe(root=write(tmp_path, files)).host_bytes == 48 * MIB


def test_a_full_group_leaves_nothing(tmp_path):
    files = {
        "proc/self/cgroup": "0::/",
        "sys/fs/cgroup/memory.max": 64 * MIB,
        "sys/fs/cgroup/memory.current": 65 * MIB,
    }
    assert Machine.probe(root=write(tmp_path, files)).host_bytes == 0


PROBE = "from bigmodel.device_map.machine import Machine; print(Machine.probe().host_bytes)"


@pytest.mark.root
def test_a_real_memory_group():
    """A process in a real group of 1 GiB sees about that, page cache of its own files not counted as used."""
    base = Path("/sys/fs/cgroup/memory" if Path("/sys/fs/cgroup/memory").is_dir() else "/sys/fs/cgroup")
    limit_file = "memory.limit_in_bytes" if (base / "memory.limit_in_bytes").exists() else "memory.max"
    group = base / f"bigmodel-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit_file).write_text(str(GIB))
    except OSError as error:
        pytest.skip(f"no memory group can be made here: {error}")
    try:
        joined = f"open({str(group / 'cgroup.procs')!r}, 'w').write(str(__import__('os').getpid())); {PROBE}"
        done = subprocess.run([sys.executable, "-c", joined], stdout=subprocess.PIPE, text=True, check=True)
    finally:
        group.rmdir()
    assert GIB // 4 < int(done.stdout) <= GIB


def test_a_machine_file(tmp_path):
    described = {
        "name": "box",
        "accelerators": [{"name": "RTX 4090", "memory": "24GiB", "memory_bytes_per_s": 1.008e12}],
        "host": {"memory": "64GiB"},
        "disk": {"free": 10**12},
    }
    file = tmp_path / "box.json"
    file.write_text(json.dumps(described))
    machine = Machine.load(file)
    assert machine.host_bytes == 64 * GIB
    assert machine.disk_bytes == 10**12
    assert [(each.device, each.name, each.memory_bytes) for each in machine.accelerators] == [
        ("cuda:0", "RTX 4090", 24 * GIB)
    ]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"host": {}}', '{"host": {"memory": "much"}}', '{"host": 3}'])
def test_files_that_describe_no_machine(tmp_path, text):
    file = tmp_path / "box.json"
    file.write_text(text)
    with pytest.raises(InvalidArgumentError):
        Machine.load(file)
    with pytest.raises(InvalidArgumentError, match="missing"):
        Machine.load(tmp_path / "missing.json")


def test_what_was_probed_can_be_loaded_elsewhere(tmp_path):
    machine = Machine.probe(tmp_path)
    file = tmp_path / "here.json"
    file.write_text(machine.to_json())
    assert Machine.load(file) == machine
