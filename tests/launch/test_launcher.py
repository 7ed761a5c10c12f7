"""Scripts in real processes: what they are given, how they end, and what is said about it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "bigmodel", "launch"]


def script(folder: Path, text: str) -> Path:
    file = folder / "script.py"
    file.write_text(textwrap.dedent(text))
    return file


def begin(*arguments: object, **variables: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "SLURM"))}
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | variables,
    )


def done(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    process = begin(*arguments, **variables)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_processes_know_each_other_and_run_as_python_runs_a_script(tmp_path):
    (tmp_path / "beside.py").write_text("NAME = 'beside'\n")
    file = script(
        tmp_path,
        """
        import beside, multiprocessing, os, pickle, sys
        import torch, torch.distributed as dist

        class Own:
            pass

        def doubled(value):
            return 2 * value

        if __name__ == "__main__":
            dist.init_process_group("gloo")
            total = torch.tensor([dist.get_rank() + 1])
            dist.all_reduce(total)
            assert type(pickle.loads(pickle.dumps(Own()))) is Own
            if dist.get_rank() == 0:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    assert pool.map(doubled, [21]) == [42]
            print(f"{dist.get_rank()} of {dist.get_world_size()}: {int(total)} {sys.argv[1:]} {beside.NAME}",
                  os.environ["OMP_NUM_THREADS"], __file__, flush=True)
            print("to stderr", file=sys.stderr)
            dist.barrier()
            dist.destroy_process_group()
        """,
    )
    found = done("-n", "2", "--threads", "3", file, "--epochs", "3", "-n", "5")
    assert found.returncode == 0, found.stderr
    expected = f"3 ['--epochs', '3', '-n', '5'] beside 3 {file}"
    assert sorted(found.stdout.splitlines()) == [f"0 of 2: {expected}", f"[rank 1] 1 of 2: {expected}"]
    assert sorted(found.stderr.splitlines()) == ["[rank 1] to stderr", "to stderr"]


def test_which_failed_first_is_told(tmp_path):
    file = script(
        tmp_path,
        """
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        dist.barrier()
        if dist.get_rank() == 1:
            raise ValueError("no such  sample:\\n17")
        dist.all_reduce(torch.ones(1))
        """,
    )
    found = done("-n", "2", file)
    assert found.returncode == 1
    last = found.stderr.splitlines()[-1]
    assert (
        last == "error: rank 1 failed: ValueError: no such sample: 17. 1 other process of this machine ended with it."
    )
    lines = [line.removeprefix("[rank 1] ") for line in found.stderr.splitlines() if line.startswith("[rank 1] ")]
    trace = [line.removeprefix("[rank1]: ") for line in lines]  # which torch writes before each, once there is a group
    assert trace[:2] == [
        "Traceback (most recent call last):",
        f'  File "{file}", line 6, in <module>',
    ]  # ours is not in it
    assert "torch.distributed.elastic" not in found.stderr


@pytest.mark.parametrize(
    ("text", "status", "told"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137, "rank 0 was killed by signal 9 (SIGKILL), "),
        ("import sys; sys.exit(7)", 7, "rank 0 failed: it ended with status 7."),
        ("import sys; sys.exit('no data')", 1, "rank 0 failed: no data."),
        ("def broken(:", 1, "rank 0 failed: SyntaxError: "),
        ("import ctypes; ctypes.string_at(0)", 139, "rank 0 was killed by signal 11 (SIGSEGV)"),
        ("import no_such_module", 1, "rank 0 failed: ModuleNotFoundError: No module named 'no_such_module'."),
    ],
)
def test_every_end_has_a_reason(tmp_path, text, status, told):
    found = done(script(tmp_path, text))
    assert found.returncode == status
    assert found.stderr.splitlines()[-1].startswith(f"error: {told}")


def test_all_are_started_again_where_that_is_asked_for(tmp_path):
    file = script(
        tmp_path,
        """
        import os, pathlib, signal, sys
        import torch, torch.distributed as dist
        attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        dist.init_process_group("gloo")
        dist.barrier()
        if attempt == 0 and dist.get_rank() == 0:
            raise ValueError("once")
        if attempt == 1 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))
        pathlib.Path(sys.argv[1], f"done {dist.get_rank()}").touch()
        dist.barrier()
        dist.destroy_process_group()
        """,
    )
    found = done("-n", "2", "--restarts", "2", "--logs", tmp_path / "logs", file, tmp_path)
    assert found.returncode == 0, found.stderr
    assert {each.name for each in tmp_path.glob("done *")} == {"done 0", "done 1"}
    told = [line for line in found.stderr.splitlines() if line.startswith(("rank", "starting"))]
    assert told[0] == "rank 0 failed: ValueError: once"
    assert told[1] == "starting again, 1 of 2"
    # Torch's launcher tells one exit code, which may be that of the process that lost its partner.
    assert told[2].startswith(
        ("rank 1 was killed by signal 9 (SIGKILL)", "rank 1 ended without a word, as what is killed does")
    )
    assert told[3] == "starting again, 2 of 2"
    kept = {f"{each.parent.name} {each.name}" for each in (tmp_path / "logs").rglob("*.log")}
    assert kept == {f"{rank} {name}.log" for rank in (0, 1) for name in ("stdout", "stderr")}
    again = done("--restarts", "1", script(tmp_path, "raise ValueError('always')"))
    assert again.stderr.splitlines()[-1] == "error: rank 0 failed: ValueError: always. It was started again 1 time."


def waiting(tmp_path: Path, *options: object) -> subprocess.Popen[str]:
    """Two processes that wait, and leave notes of the signals they were sent."""
    file = script(
        tmp_path,
        """
        import os, pathlib, signal, sys, time
        folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
        heard = []
        def hear(number, frame):
            heard.append(number)
            (folder / f"{signal.Signals(number).name} {rank}").touch()
        for each in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(each, hear)
        (folder / f"ready {rank} {os.getpid()}").touch()
        stubborn = sys.argv[2:] == ["stubborn"]
        while stubborn or not {signal.SIGTERM, signal.SIGINT} & set(heard):
            time.sleep(0.05)
        """,
    )
    process = begin("-n", "2", *options[:2], file, tmp_path, *options[2:])
    there(tmp_path, "ready *", 2)
    return process


def there(folder: Path, pattern: str, number: int) -> list[Path]:
    end = time.monotonic() + 60
    while len(found := list(folder.glob(pattern))) < number:
        assert time.monotonic() < end, pattern
        time.sleep(0.05)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_signals_reach_all_processes_and_nothing_is_left(tmp_path):
    process = waiting(tmp_path)
    pids = [int(each.name.split()[2]) for each in tmp_path.glob("ready *")]
    process.send_signal(signal.SIGUSR1)
    there(tmp_path, "SIGUSR1 *", 2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert err.splitlines()[-1] == "error: SIGTERM was sent to the launcher, and to all processes"
    assert len(list(tmp_path.glob("SIGTERM *"))) == 2
    assert not any(map(alive, pids))


def test_what_does_not_end_within_its_grace_is_ended(tmp_path):
    process = waiting(tmp_path, "--grace", "1", "stubborn")
    pids = [int(each.name.split()[2]) for each in tmp_path.glob("ready *")]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted"
    assert len(list(tmp_path.glob("SIGINT *"))) == 2
    assert not any(map(alive, pids))


def test_a_second_signal_ends_them_at_once(tmp_path):
    process = waiting(tmp_path, "--grace", "600", "stubborn")
    pids = [int(each.name.split()[2]) for each in tmp_path.glob("ready *")]
    process.send_signal(signal.SIGINT)
    there(tmp_path, "SIGINT *", 2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not any(map(alive, pids))


def test_machines_that_a_job_has_and_nobody_uses_are_told(tmp_path):
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3"}
    found = done(script(tmp_path, "print('hello')"), **job)
    assert found.stdout == "hello\n"
    assert found.stderr.startswith("this SLURM job has 2 machines more, and uses this one alone: srun")


def test_tasks_of_a_slurm_step_meet(tmp_path):
    """Both on this machine, under its name, as srun would start them."""
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost"}
    step |= {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2"}
    file = script(tmp_path, "import os; print(os.environ['WORLD_SIZE'], flush=True)")
    both = [begin(file, **step, SLURM_PROCID=str(number), SLURM_NODEID=str(number)) for number in (0, 1)]
    found = [process.communicate(timeout=120) for process in both]
    assert [out for out, _ in found] == ["2\n", "2\n"], found


def test_two_launchers_meet(tmp_path):
    file = script(
        tmp_path,
        """
        import os
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.tensor([dist.get_rank()])
        dist.all_reduce(total)
        print(f"rank {dist.get_rank()} of {dist.get_world_size()}, {os.environ['LOCAL_RANK']} here: {int(total)}", flush=True)
        dist.barrier()
        dist.destroy_process_group()
        """,
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    asked = ("-n", "1", "--nodes", "2", "--rdzv", f"localhost:{port}", file)
    first, second = begin(*asked), begin(*asked)
    found = [process.communicate(timeout=120) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), found
    assert sorted(out for out, _ in found) == [f"rank {rank} of 2, 0 here: 1\n" for rank in (0, 1)]
    assert all(f"2 machines meet at localhost:{port}, as 'bigmodel'" in err for _, err in found)


def test_what_cannot_be_started_is_refused(tmp_path):
    assert done(tmp_path / "none.py").stderr.startswith("error: There is no script")
    found = done("--module", "no_such_module_here")
    assert (found.returncode, found.stderr.splitlines()[-1][:39]) == (2, "error: There is no module 'no_such_modu")
    assert done("--nodes", "2", __file__).returncode == 2
