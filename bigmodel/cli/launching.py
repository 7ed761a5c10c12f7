"""``bigmodel launch``: a script in several processes, on this machine or on several."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bigmodel.cli.ending import on_command_line, say, told_in_a_sentence
from bigmodel.cli.options import WithTraceback

__all__ = ["LAUNCH_EXAMPLES", "launch"]

LAUNCH_EXAMPLES = """[bold]Examples[/bold]

bigmodel launch train.py --epochs 3

bigmodel launch --processes 2 --restarts 3 train.py

bigmodel launch --config bigmodel.yaml train.py      (which bigmodel config writes)

bigmodel launch --nodes 2 --rdzv node0 train.py      (the same on both machines)

srun --ntasks-per-node=1 bigmodel launch train.py    (in a SLURM job)

bigmodel launch --module bigmodel run ./model --prompts questions.jsonl --output answers.jsonl

What stands after the script is its own. Without options there is a process for each accelerator, or one."""


def launch(
    context: typer.Context,
    script: Annotated[str, typer.Argument(metavar="SCRIPT", help="A Python file, or with --module a module.")],
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes", "-n", min=1, help="On this machine.", show_default="one for each accelerator, or 1"
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="What bigmodel config wrote: options that are not given here, and the TrainingConfig of a TrainingRun() that is "
            "given none.",
        ),
    ] = None,
    module: Annotated[
        bool, typer.Option("--module", "-m", help="SCRIPT is the name of a module, as for python -m.")
    ] = False,
    nodes: Annotated[
        int | None,
        typer.Option(
            "--nodes",
            min=1,
            rich_help_panel="Several machines",
            help="Machines, with this command on each.",
            show_default="those of the SLURM step, or 1",
        ),
    ] = None,
    rdzv: Annotated[
        str | None,
        typer.Option(
            "--rdzv", metavar="HOST[:PORT]", rich_help_panel="Several machines", help="One of them, where they meet."
        ),
    ] = None,
    job: Annotated[
        str | None,
        typer.Option(
            "--job",
            metavar="NAME",
            rich_help_panel="Several machines",
            help="Tells it from other jobs that meet there.",
        ),
    ] = None,
    restarts: Annotated[
        int, typer.Option("--restarts", min=0, help="Start all processes again after one failed, at most so often.")
    ] = 0,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="Of each process.", show_default="its share of the processors"),
    ] = None,
    binding: Annotated[
        bool,
        typer.Option(
            "--binding/--no-binding",
            help="Keep each process to the processors next to its memory and device, where there are several such groups.",
        ),
    ] = True,
    grace: Annotated[
        int,
        typer.Option(
            "--grace",
            min=0,
            metavar="SECONDS",
            help="That processes have to end by themselves when this command is stopped.",
        ),
    ] = 30,
    logs: Annotated[
        str | None, typer.Option("--logs", metavar="FOLDER", help="Keep what each process writes in files there.")
    ] = None,
    with_traceback: WithTraceback = False,
) -> None:
    """Run a script in processes that work together, and say which failed first and why, if one does."""
    with told_in_a_sentence(with_traceback):
        from bigmodel.launch.launcher import launch as start
        from bigmodel.launch.settings import LaunchSettings

        for stream in (sys.stdout, sys.stderr):  # lines of other processes come through here: none of them waits
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(line_buffering=True)
        asked: dict[str, tuple[str, Any]] = {
            "processes": ("num_processes", processes),
            "nodes": ("num_nodes", nodes),
            "rdzv": ("endpoint", rdzv),
            "job": ("job", job),
            "restarts": ("num_restarts", restarts),
            "threads": ("num_threads", threads),
            "binding": ("binds", binding),
            "grace": ("grace_s", grace),
            "logs": ("logs", logs),
        }
        given = on_command_line(context)
        stated = {field: value for option, (field, value) in asked.items() if option in given}
        variables = {}
        if config is not None:
            from bigmodel.training.config import CONFIGURATION
            from bigmodel.training.configuration import Configuration

            stated = {**Configuration.read(config).launch, **stated}
            variables[CONFIGURATION] = str(Path(config).resolve())
        start(
            LaunchSettings(**stated),
            script,
            context.args,
            kind="module" if module else "file",
            variables=variables,
            tell=say,
        )
