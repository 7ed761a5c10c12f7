"""``bigmodel test``: whether every engine that can run here trains as one process does."""

from __future__ import annotations

from typing import Annotated

import typer

from bigmodel.cli.ending import say, told_in_a_sentence
from bigmodel.cli.options import WithTraceback

__all__ = ["check_up"]


def check_up(
    processes: Annotated[
        int | None,
        typer.Option("--processes", "-n", min=2, help="Of each engine.", show_default="accelerators, at most 4, or 2"),
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option("--engine", metavar="NAME", help="This one alone; may be repeated.")
    ] = None,
    with_traceback: WithTraceback = False,
) -> None:
    """Train a tiny model in every engine that can run here, and compare with one process: about two minutes."""
    with told_in_a_sentence(with_traceback):
        from bigmodel.training.checkup import check_engines

        failed = 0
        for verdict in check_engines(engine, num_processes=processes, tell=say):
            typer.echo(f"{verdict.engine + ':':<26} {verdict.told}")
            failed += verdict.is_failed
        if failed:
            say(f"error: {failed} of them did not train as one process does. bigmodel env says what is installed.")
            raise typer.Exit(1)
