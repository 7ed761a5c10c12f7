"""``bigmodel config``: a few questions, and a file of the answers; or what a file says, ours or another library's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from bigmodel.cli.ending import say, told_in_a_sentence
from bigmodel.cli.options import WithTraceback
from bigmodel.errors import InvalidArgumentError, reason

__all__ = ["CONFIG_EXAMPLES", "config"]

CONFIG_EXAMPLES = """[bold]Examples[/bold]

bigmodel config                                      (asks, and writes bigmodel.yaml)

bigmodel config --yes --output cluster.yaml          (what is detected, without asking)

bigmodel config --check bigmodel.yaml

bigmodel config --check default_config.yaml --output bigmodel.yaml    (Accelerate's, or a DeepSpeed JSON, converted)"""

_FILE = "bigmodel.yaml"


def config(
    check: Annotated[
        str | None,
        typer.Option(
            "--check",
            metavar="FILE",
            help="Say what a file means that is there: of bigmodel, Accelerate (YAML) or DeepSpeed (JSON). The latter are "
            "converted where --output is given.",
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Where it is written.", show_default=_FILE)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: take what is detected.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    with_traceback: WithTraceback = False,
) -> None:
    """Ask how scripts are launched and trained here and write a commented file of it, or check one that is there."""
    with told_in_a_sentence(with_traceback):
        if check is not None:
            _check(check, output, force=force)
            return
        place = Path(output or _FILE)
        _refuse_taken(place, force)
        from bigmodel.training.configuration import Configuration

        made = Configuration(**_answers(_taken if yes else _asked))
        made.launching()
        made.config()
        _write(place, made.written())
        say(f"{place} is written. Next: bigmodel launch --config {place} SCRIPT")


def _check(file: str, output: str | None, *, force: bool) -> None:
    from bigmodel.launch.settings import Detected, LaunchSettings
    from bigmodel.training.configuration import convert

    number = LaunchSettings().where(Detected.here(), {}).num_processes
    found = convert(file, number)
    if output is not None and found.kind == "bigmodel":
        raise InvalidArgumentError(
            f"{file} is of bigmodel already, and --output is for what is converted. Leave it out."
        )
    if found.kind == "bigmodel":
        made = found.configuration
        typer.echo(f"{file} is right")
        for section, stated in (("launch", made.launch), ("training", made.training)):
            for name, value in stated.items():
                typer.echo(f"  {section}.{name}: {json.dumps(value, default=str)}")
        return
    typer.echo(f"{file} is {found.kind}'s, and means:")
    width = max((len(f"{path}: {_shown(value)}") for path, value, _ in found.said), default=0)
    for path, value, decided in found.said:
        means = (
            ", ".join(f"{name}: {_shown(each)}" for name, each in decided.items())
            or "nothing: it is the default, or not needed"
        )
        typer.echo(f"  {f'{path}: {_shown(value)}':<{min(width, 60)}}  {means}")
    if output is not None:
        place = Path(output)
        _refuse_taken(place, force)
        _write(place, found.configuration.written())
        say(f"{place} is written. Next: bigmodel launch --config {place} SCRIPT")


Ask = Callable[..., Any]


def _answers(ask: Ask) -> dict[str, dict[str, Any]]:
    """Fields of a `Configuration`; what is detected is offered, and what is not asked keeps its default."""
    import os

    from bigmodel.launch.settings import Detected, LaunchSettings
    from bigmodel.launch.slurm import nodes_of_slurm
    from bigmodel.training.config import PRECISIONS, STRATEGIES

    detected = Detected.here()
    launch: dict[str, Any] = {}
    slurm = nodes_of_slurm(os.environ)
    nodes = ask("Machines that train together", 1 if slurm is None else slurm.num_nodes, kind=int)
    if nodes > 1:
        launch["num_nodes"] = nodes
        if slurm is None:
            launch["endpoint"] = ask("One of them, where they meet: HOST or HOST:PORT", None)
    default = LaunchSettings().where(detected, {}).num_processes
    launch["num_processes"] = ask(f"Processes on each ({detected} here)", default, kind=int)
    launch["num_restarts"] = ask("Times that all are started again after one failed", 0, kind=int)
    training: dict[str, Any] = {}
    training["strategy"] = ask("Strategy; auto is the fastest that fits", "auto", choices=STRATEGIES)
    training["precision"] = ask(
        "Precision of passes", "bf16" if detected.num_devices or _has_bf16() else "fp32", choices=PRECISIONS
    )
    total = ask("Samples of an optimizer step, of all processes; 0: one pass of each", 0, kind=int)
    if total:
        training["global_batch_size"] = total
    clip = ask("Largest norm of the gradients; 0: no limit", 1.0, kind=float)
    if clip:
        training["grad_clip"] = clip
    return {"launch": launch, "training": training}


def _has_bf16() -> bool:
    """Whether the processors multiply bfloat16 themselves."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return any(name in flags for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _asked(question: str, default: Any, *, kind: type = str, choices: Mapping[str, Any] | tuple[str, ...] = ()) -> Any:
    text = f"{question} [{', '.join(choices)}]" if choices else question
    while True:
        answer = typer.prompt(text, default=default, type=kind, err=True)
        if not choices or answer in choices:
            return answer
        say(f"{answer!r} is none of them")


def _taken(question: str, default: Any, **_: Any) -> Any:
    if default is None:
        raise InvalidArgumentError(f"--yes takes what is detected, and nothing is: {question}. Leave --yes out.")
    return default


def _refuse_taken(place: Path, force: bool) -> None:
    if place.exists() and not force:
        raise InvalidArgumentError(f"{place} is there already. Give another --output, or --force to write over it.")


def _write(place: Path, text: str) -> None:
    try:
        place.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(f"{place} cannot be written: {reason(error)}.") from error


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
