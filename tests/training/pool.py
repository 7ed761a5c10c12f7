"""Two processes that torch's launcher started, kept for a whole test run: functions are sent to them by name."""

from __future__ import annotations

import importlib
import io
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).resolve().parent.parent
TIMEOUT_S = 240


class Pool:
    """Runs ``module:function`` in every process at once."""

    def __init__(self, connections: list[Connection]) -> None:
        self._connections = connections
        self.size = len(connections)

    def run(self, call: str, **arguments: Any) -> list[Any]:
        """What each process returned, by rank; an error of any is raised with its traceback."""
        for connection in self._connections:
            connection.send((call, arguments))
        answers = []
        for rank, connection in enumerate(self._connections):
            assert connection.poll(TIMEOUT_S), f"rank {rank} did not answer {call}"
            answers.append(torch.load(io.BytesIO(connection.recv_bytes()), weights_only=False))
        failed = [f"rank {rank}:\n{text}" for rank, (is_right, text) in enumerate(answers) if not is_right]
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]


@contextmanager
def started(size: int) -> Iterator[Pool]:
    """A pool of so many processes."""
    with tempfile.TemporaryDirectory() as folder, Listener(str(Path(folder) / "socket")) as listener:
        environment = dict(os.environ) | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), *sys.path]),
        }
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        process = subprocess.Popen([*launcher, *rendezvous, __file__, str(Path(folder) / "socket")], env=environment)
        try:
            by_rank = {}
            for _ in range(size):
                connection = listener.accept()
                by_rank[connection.recv()] = connection
            yield Pool([by_rank[rank] for rank in range(size)])
            for connection in by_rank.values():
                connection.send(None)
            assert process.wait(60) == 0
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(30)


def _serve(address: str) -> None:
    import bigmodel.training  # noqa: F401

    torch.set_num_threads(1)
    with Client(address) as connection:
        connection.send(int(os.environ["RANK"]))
        while (wanted := connection.recv()) is not None:
            call, arguments = wanted
            module, _, function = call.partition(":")
            try:
                answer = True, getattr(importlib.import_module(module), function)(**arguments)
            except BaseException:
                answer = False, traceback.format_exc()
            data = io.BytesIO()  # by value: tensors that are sent as such stay with the process that made them
            torch.save(answer, data)
            connection.send_bytes(data.getvalue())


if __name__ == "__main__":
    _serve(sys.argv[1])
