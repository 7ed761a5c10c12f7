"""The machines of a SLURM step, as its environment names them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from bigmodel.errors import InvalidArgumentError, shown

__all__ = ["SlurmNodes", "hosts_of", "nodes_of_slurm", "num_unused"]

# Above what systems give to connections that go out (32768 on) there is none; jobs of one machine differ by their number.
_FIRST_PORT, _NUM_PORTS = 20_000, 10_000
_MOST_HOSTS = 100_000


@dataclass(frozen=True, kw_only=True)
class SlurmNodes:
    """Attributes:
    num_nodes: of the step.
    is_first: whether this is the machine that the others meet at.
    endpoint: HOST:PORT there, the same for all.
    job: number of the job and the step.
    """

    num_nodes: int
    is_first: bool
    endpoint: str
    job: str


def nodes_of_slurm(environment: Mapping[str, str]) -> SlurmNodes | None:
    """The step that this process is a task of; None outside of one, and in a job's own script, which runs on one machine.

    Raises:
        InvalidArgumentError: it has several tasks on a machine, of which each would start a launcher.
    """
    # In a batch script or an allocation's shell there is a job and no step yet; SLURM calls them step "batch", number 2**32 - 5.
    if (
        "SLURM_STEP_NODELIST" not in environment
        or "SLURM_JOB_ID" not in environment
        or "SLURM_PROCID" not in environment
    ):
        return None
    number = _whole(environment, "SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    tasks = _whole(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if tasks > number:
        raise InvalidArgumentError(
            f"The SLURM step has {tasks} tasks on {number} machines, and one launcher starts all processes of a machine. Give "
            "srun --ntasks-per-node=1."
        )
    job = environment["SLURM_JOB_ID"]
    digits = re.sub(r"\D", "", job) or "0"
    hosts = hosts_of(environment["SLURM_STEP_NODELIST"])
    return SlurmNodes(
        num_nodes=number,
        is_first=_whole(environment, "SLURM_NODEID", "SLURM_PROCID") == 0,
        endpoint=f"{hosts[0]}:{_FIRST_PORT + int(digits) % _NUM_PORTS}",
        job=f"slurm-{job}.{environment.get('SLURM_STEP_ID', '0')}",
    )


def num_unused(environment: Mapping[str, str]) -> int:
    """Machines of a job beside this one, where its own script, outside of a step, starts a launcher."""
    number = environment.get("SLURM_JOB_NUM_NODES", environment.get("SLURM_NNODES", ""))
    is_outside = "SLURM_JOB_ID" in environment and "SLURM_STEP_NODELIST" not in environment
    return int(number) - 1 if is_outside and number.isdecimal() and int(number) > 1 else 0


def hosts_of(nodelist: str) -> list[str]:
    """Names in SLURM's short form: ``gpu[01-03,7],login`` is gpu01, gpu02, gpu03, gpu7 and login.

    Source: "hostlist expressions" of SLURM's scontrol; several brackets in a name multiply.
    """
    found: list[str] = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", nodelist):
        names = [""]
        for text, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", part):
            ends = [text] if text else [each for piece in ranges.split(",") for each in _range(piece, nodelist)]
            if len(names) * len(ends) > _MOST_HOSTS:
                raise InvalidArgumentError(f"SLURM_STEP_NODELIST is {shown(nodelist)}, which are too many machines.")
            names = [name + end for name in names for end in ends]
        found += names
    if not found:
        raise InvalidArgumentError(f"SLURM_STEP_NODELIST is {shown(nodelist)}, and names no machine.")
    return found


def _range(piece: str, nodelist: str) -> list[str]:
    first, dash, last = piece.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) - int(first) >= _MOST_HOSTS):
        raise InvalidArgumentError(f"SLURM_STEP_NODELIST is {shown(nodelist)}: {shown(piece)} is no range of numbers.")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]


def _whole(environment: Mapping[str, str], *names: str) -> int:
    for name in names:
        text = environment.get(name, "")
        if text.isdecimal():
            return int(text)
    raise InvalidArgumentError(
        f"None of {' and '.join(names)} is a number, in a SLURM step. Start the launcher with srun."
    )
