"""Functions of a notebook in several processes: a real kernel runs the cells."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest

from bigmodel.errors import InvalidArgumentError, LaunchError
from bigmodel.launch.notebook import notebook_launcher, surroundings

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

CELLS = [
    """
    import torch, torch.distributed as dist
    from bigmodel.training import notebook_launcher
    torch.ones(512, 512) @ torch.ones(512, 512)  # threads that a copy of this process would wait for
    OFFSET = 40

    class Pair:
        def __init__(self, rank):
            self.rank = rank

    def work(factor):
        dist.init_process_group("gloo")
        total = torch.tensor([dist.get_rank() + 1])
        dist.all_reduce(total)
        torch.ones(512, 512) @ torch.ones(512, 512)
        print(f"{type(Pair(1)).__name__} {dist.get_rank()}: {factor * int(total) + OFFSET}")
        dist.barrier()
        dist.destroy_process_group()
        return {"rank": dist.get_rank() if dist.is_initialized() else None, "value": factor * int(total) + OFFSET}
    """,
    """
    found = notebook_launcher(work, (2,), num_processes=2)
    found
    """,
    """
    def broken():
        import os
        if os.environ["RANK"] == "1":
            raise KeyError("what is not there")

    try:
        notebook_launcher(broken, num_processes=2)
    except Exception as error:
        print("raised", type(error).__name__, error)
    """,
    """
    def no_way_back():
        return lambda: 1

    try:
        notebook_launcher(no_way_back)
    except Exception as error:
        print("raised", type(error).__name__, error)
    """,
]


def run(cells: list[str], folder: Path) -> list[str]:
    """What each cell wrote, errors and results included."""
    import textwrap

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(textwrap.dedent(each)) for each in cells])
    return texts(notebook, folder)


def texts(notebook, folder: Path, **variables: str) -> list[str]:
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env={**os.environ, **variables})
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            parts = [each.get("text", "") or str(each.get("data", {}).get("text/plain", "")) for each in cell.outputs]
            found.append("".join(parts))
    return found


def test_a_function_of_a_notebook_runs_in_two_processes(tmp_path):
    _, worked, broke, kept = run(CELLS, tmp_path)
    assert "2 processes (Jupyter, " in worked
    assert "[rank 0] Pair 0: 46" in worked
    assert "[rank 1] Pair 1: 46" in worked
    assert "[{'rank': None, 'value': 46}, {'rank': None, 'value': 46}]" in worked
    assert "[rank 1] KeyError: 'what is not there'" in broke
    assert 'raise KeyError("what is not there")' in broke  # the cell's own line
    assert "raised LaunchError rank 1 failed: KeyError: 'what is not there'." in broke
    assert (
        "raised LaunchError rank 0 failed: TypeError: What no_way_back returns, a function, cannot be sent back" in kept
    )


def test_where_a_notebook_runs_is_known():
    assert surroundings({}, {}) == "Python"
    assert surroundings({"google.colab": None}, {}) == "Colab"
    assert surroundings({}, {"COLAB_RELEASE_TAG": "r1"}) == "Colab"
    assert surroundings({}, {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}) == "Kaggle"
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    assert surroundings({"IPython": types.SimpleNamespace(get_ipython=lambda: shell)}, {}) == "Jupyter"
    shell.config = {}
    assert surroundings({"IPython": types.SimpleNamespace(get_ipython=lambda: shell)}, {}) == "IPython"
    assert surroundings({"IPython": types.SimpleNamespace(get_ipython=lambda: None)}, {}) == "Python"


def test_what_cannot_be_launched_is_refused(monkeypatch):
    with pytest.raises(InvalidArgumentError, match="fn is a int"):
        notebook_launcher(3)
    with pytest.raises(InvalidArgumentError, match="args is a int"):
        notebook_launcher(print, 3)
    with pytest.raises(InvalidArgumentError, match="num_processes is 0"):
        notebook_launcher(print, (), 0)
    with pytest.raises(
        InvalidArgumentError, match=r"cannot be sent to another process.*Make it inside of the function"
    ):
        notebook_launcher(print, (sys._getframe(),))
    monkeypatch.setenv("TPU_NAME", "local")
    with pytest.raises(InvalidArgumentError, match="has a TPU here, and XLA is not supported"):
        notebook_launcher(print)


def test_an_accelerator_that_is_initialised_is_refused(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 1 << 20)
    with pytest.raises(
        InvalidArgumentError, match=r"has initialised CUDA and holds memory of cuda:0.*Restart the kernel"
    ):
        notebook_launcher(print)


def test_from_a_script_it_is_the_same(capsys):
    def doubled(value):
        return 2 * value

    assert notebook_launcher(doubled, (21,)) == [42]
    with pytest.raises(LaunchError, match="rank 0 failed: ZeroDivisionError"):
        notebook_launcher(lambda: 1 / 0)
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.slow  # a real model is trained, and generates
def test_the_example_runs(smollm2, tmp_path):
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    found = texts(notebook, tmp_path, CHECKPOINT=str(smollm2))
    assert "Paris" in found[-1]
    assert "[rank 1]" in found[2] or "fell from" in found[2]
