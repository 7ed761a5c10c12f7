"""How a command speaks and ends: text on stdout, what is said on stderr, an error in a sentence with its exit status."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from bigmodel.errors import BigModelError, DoesNotFitError, InvalidArgumentError, LaunchError

__all__ = ["DOES_NOT_FIT", "INTERRUPTED", "on_command_line", "say", "say_nothing", "told_in_a_sentence", "write"]

DOES_NOT_FIT, INTERRUPTED, BROKEN_PIPE = 3, 130, 141


def on_command_line(context: typer.Context) -> set[str]:
    """Parameters that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


@contextmanager
def told_in_a_sentence(with_traceback: bool) -> Iterator[None]:
    """Ends the command with an error's exit status; its message goes to stderr, the traceback before it if wanted."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        if with_traceback:
            traceback.print_exc()
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # Who read the text has had enough. Python would complain once more when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(BROKEN_PIPE) from None
    except Exception as error:
        if with_traceback:
            traceback.print_exc()
        if isinstance(error, BigModelError):
            text = str(error)
        else:  # foreign: it says little without its type, and often runs over many lines
            text = f"{type(error).__name__}: {' '.join(str(error).split())} (--traceback shows where)"
        typer.echo(f"error: {text}", err=True)
        raise typer.Exit(_status_of(error)) from None


def _status_of(error: Exception) -> int:
    if isinstance(error, DoesNotFitError):
        return DOES_NOT_FIT
    if isinstance(error, LaunchError):
        return error.exit_code
    return 2 if isinstance(error, InvalidArgumentError) else 1


def say(text: str) -> None:
    typer.echo(text, err=True)


def say_nothing(text: str) -> None:
    pass


def write(text: str) -> None:
    """Text on its way to a person or a pipe: at once, and whatever stdout's encoding cannot show as a question mark."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
