"""The ``bigmodel`` command: run, plan, bench, calibrate, launch and env.

What was asked for goes to stdout: the generated text, the plan, the list of versions. What is said about it goes to
stderr: the plan of a run, progress, figures, errors. So ``bigmodel run ... > answer.txt`` writes the answer alone.

Exit status: 0 done; 1 an error, told in a sentence; 2 wrong usage; 3 it does not fit; 130 interrupted; that of launch is the
failed process's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

import bigmodel
from bigmodel.cli.arguments import (
    check_guesses,
    check_sampling,
    check_training,
    parse_batch_size,
    parse_device_map,
    parse_limits,
    read_prompt,
    write_page,
)
from bigmodel.cli.checking import check_up
from bigmodel.cli.configuring import CONFIG_EXAMPLES, config
from bigmodel.cli.ending import DOES_NOT_FIT, INTERRUPTED, on_command_line, say, say_nothing, told_in_a_sentence, write
from bigmodel.cli.launching import LAUNCH_EXAMPLES, launch
from bigmodel.cli.options import (
    AllowCpuCompute,
    DeviceMap,
    Dtype,
    MaxMemory,
    OffloadFolder,
    PathArgument,
    Revision,
    Subfolder,
    TrustRemoteCode,
    Variant,
    WithTraceback,
)
from bigmodel.cli.prompts import read_prompts

__all__ = ["app", "main"]

app = typer.Typer(
    name="bigmodel",
    help="Load and run models that are larger than memory, exactly and within a budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the ``bigmodel`` script; ends the process with its exit status."""
    app(prog_name="bigmodel")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bigmodel {bigmodel.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="""[bold]Examples[/bold]

bigmodel run ./model --chat --prompt "What is the capital of France?"

bigmodel run ./model --prompt-file question.txt --max-memory cpu=8GiB > answer.txt

bigmodel run org/name --prompt "Once" --sample --temperature 0.8 --seed 1

bigmodel run ./model --prompts questions.jsonl --output answers.jsonl

The text goes to stdout; the plan, progress and figures go to stderr."""
)
def run(
    path: PathArgument,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The text to continue or to answer.")] = None,
    prompt_file: Annotated[
        str | None, typer.Option("--prompt-file", metavar="FILE", help="A file that holds it; - reads stdin.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            rich_help_panel="Many prompts",
            help='Answer each line of a file, an object such as {"prompt": "..."}, as many at once as is fastest; - reads stdin.',
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            metavar="FILE",
            rich_help_panel="Many prompts",
            help="Where the answers go, a line each. The same command goes on where it was interrupted. Default: stdout.",
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Generate at most this many tokens.")
    ] = 128,
    max_memory: MaxMemory = None,
    device_map: DeviceMap = "auto",
    allow_cpu_compute: AllowCpuCompute = False,
    dtype: Dtype = "auto",
    lookup: Annotated[
        bool,
        typer.Option(
            "--lookup",
            rich_help_panel="Guesses",
            help="Guess tokens from what followed the same ones earlier in the text, and check many in one pass: "
            "faster where text is repeated, as in summaries and edits.",
        ),
    ] = False,
    draft: Annotated[
        str | None,
        typer.Option(
            "--draft",
            metavar="PATH",
            rich_help_panel="Guesses",
            help="A smaller model, kept in memory, whose guesses are checked many in one pass.",
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter",
            metavar="DIR",
            help="An adapter that PEFT saved: added to the weights where they stay in memory, else computed beside them.",
        ),
    ] = None,
    sample: Annotated[
        bool,
        typer.Option("--sample", rich_help_panel="Sampling", help="Draw tokens at random instead of the likeliest."),
    ] = False,
    temperature: Annotated[
        float | None, typer.Option("--temperature", rich_help_panel="Sampling", help="With --sample: > 0.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", rich_help_panel="Sampling", help="With --sample: 0 to 1.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, rich_help_panel="Sampling", help="With --sample.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", rich_help_panel="Sampling", help="With --sample: makes the draw repeatable.")
    ] = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    variant: Variant = None,
    offload_folder: OffloadFolder = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="The text only: no plan, no bars, no figures.")] = False,
    with_traceback: WithTraceback = False,
) -> None:
    """Load a model, stream the text that it generates, and tell what it took."""
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    with told_in_a_sentence(with_traceback):
        check_sampling(sample, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        check_guesses(lookup=lookup, draft=draft, prompts=prompts, output=output)
        text = None if prompts is not None else read_prompt(prompt, prompt_file)
        lines = [] if prompts is None else read_prompts(prompts, prompt or prompt_file)
        load = {
            "device_map": parse_device_map(device_map),
            "allow_cpu_compute": allow_cpu_compute,
            "dtype": dtype,
            "revision": revision,
            "subfolder": subfolder,
            "variant": variant,
            "offload_folder": offload_folder,
            "trust_remote_code": trust_remote_code,
        }
        limits = parse_limits(max_memory)

        from bigmodel.cli.running import Settings, answer, answer_all

        settings = Settings(
            path=path,
            load=load,
            limits=limits,
            chat=chat,
            max_new_tokens=max_new_tokens,
            lookup=lookup,
            draft=draft,
            adapter=adapter,
            sampling=sampling if sample else None,
            seed=seed,
            tell=say_nothing if quiet else say,
            is_quiet=quiet,
        )
        if text is not None:
            answer(settings, text, write)
        else:
            answer_all(settings, lines, output)


@app.command(
    epilog="""[bold]Examples[/bold]

bigmodel plan ./model --max-memory cpu=8GiB

bigmodel plan org/name --machine desktop-24gb --prompt-tokens 4096 --html plan.html

bigmodel plan ./model --batch-size 4 --json > plan.json && bigmodel run ./model --device-map plan.json --prompt "Once"

Only headers are read: of the weight files here, or of a Hub repo's, or config.json alone. Machines that come with
bigmodel: desktop-24gb, desktop-2x24gb, laptop-16gb, server-80gb, server-141gb, server-8x80gb, unified-64gb."""
)
def plan(
    context: typer.Context,
    path: PathArgument,
    max_memory: MaxMemory = None,
    device_map: DeviceMap = "auto",
    dtype: Dtype = "auto",
    batch_size: Annotated[
        str | None,
        typer.Option(
            "--batch-size",
            metavar="N",
            help="Sequences at once; auto: as many as are fastest.",
            show_default="1, or a saved plan's",
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option("--prompt-tokens", min=1, help="Tokens of each prompt.", show_default="512, or a saved plan's"),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option("--new-tokens", min=0, help="Tokens generated after it.", show_default="128, or a saved plan's"),
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option("--machine", metavar="FILE", help="A machine file, or the name of one that comes with bigmodel."),
    ] = None,
    allow_cpu_compute: AllowCpuCompute = False,
    train: Annotated[
        bool,
        typer.Option(
            "--train",
            rich_help_panel="Training",
            help="What each way to fine-tune it takes, with AdamW: memory by kind, tokens/s, and which is the fastest that fits.",
        ),
    ] = False,
    nodes: Annotated[
        int,
        typer.Option("--nodes", min=1, rich_help_panel="Training", help="Machines like this one, or like --machine."),
    ] = 1,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus",
            min=1,
            rich_help_panel="Training",
            help="Processes of each: one for each accelerator, or on the host's processors.",
            show_default="all accelerators, or 1",
        ),
    ] = None,
    seq: Annotated[int, typer.Option("--seq", min=1, rich_help_panel="Training", help="Tokens of a sample.")] = 1024,
    global_batch: Annotated[
        int | None,
        typer.Option(
            "--global-batch",
            min=1,
            rich_help_panel="Training",
            help="Samples of an optimizer step.",
            show_default="8 of each process",
        ),
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            "--micro-batch",
            min=1,
            rich_help_panel="Training",
            help="Samples of a pass of a process.",
            show_default="the fastest that fits",
        ),
    ] = None,
    strategy: Annotated[
        str, typer.Option("--strategy", rich_help_panel="Training", help="As in TrainingConfig.")
    ] = "auto",
    precision: Annotated[
        str, typer.Option("--precision", rich_help_panel="Training", help="As in TrainingConfig.")
    ] = "bf16",
    lora: Annotated[
        int | None,
        typer.Option(
            "--lora",
            min=1,
            metavar="RANK",
            rich_help_panel="Training",
            help="Adapters of this rank on all linear layers, instead of all weights.",
        ),
    ] = None,
    quantize_base: Annotated[
        str | None,
        typer.Option(
            "--quantize-base",
            metavar="KIND",
            rich_help_panel="Training",
            help="Of --lora: the model in 4 bits (nf4, fp4).",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole plan as JSON, as --device-map reads it.")] = False,
    html_file: Annotated[
        str | None,
        typer.Option("--html", metavar="FILE", help="Draw memory and predicted timeline as one page, for a browser."),
    ] = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    variant: Variant = None,
    offload_folder: OffloadFolder = None,
    trust_remote_code: TrustRemoteCode = False,
    with_traceback: WithTraceback = False,
) -> None:
    """Show where every weight would rest, each tier's peak and the predicted speed, without loading anything."""
    with told_in_a_sentence(with_traceback):
        check_training(train, on_command_line(context))
        limits = parse_limits(max_memory)
        if train:
            from bigmodel.cli.training import plan_training

            outlook = plan_training(
                path,
                machine=machine,
                limits=limits,
                num_nodes=nodes,
                num_per_node=gpus,
                num_tokens=seq,
                global_batch_size=global_batch,
                micro_batch_size=micro_batch,
                strategy=strategy,
                precision=precision,
                lora_rank=lora,
                quantize_base=quantize_base,
                trust_remote_code=trust_remote_code,
            )
            typer.echo(outlook.to_json() if as_json else outlook.explain())
            if outlook.chosen is None:
                raise typer.Exit(DOES_NOT_FIT)
            return
        where = parse_device_map(device_map)
        stated: dict[str, Any] = {
            "batch_size": None if batch_size is None else parse_batch_size(batch_size),
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
        }
        from bigmodel.loading.planning import make_plan_and_timeline, workload_of

        workload = replace(
            workload_of(where) or bigmodel.Workload(),
            **{name: value for name, value in stated.items() if value is not None},
        )

        made, timeline = make_plan_and_timeline(
            path,
            machine=bigmodel.Machine.load(machine) if machine is not None else None,
            device_map=where,
            max_memory=limits,
            allow_cpu_compute=allow_cpu_compute,
            dtype=dtype,
            workload=workload,
            revision=revision,
            subfolder=subfolder,
            variant=variant,
            offload_folder=offload_folder,
            trust_remote_code=trust_remote_code,
        )
        if html_file is not None:
            from bigmodel.device_map.picture import draw

            write_page(html_file, draw(made, timeline(), title=path))
        typer.echo(made.to_json() if as_json else made.explain())


@app.command(
    epilog="""[bold]Examples[/bold]

bigmodel bench ./model --ram 4GiB --against transformers,accelerate,llama.cpp

bigmodel bench ./model --max-memory cpu=8GiB --prompt-tokens 512,4096 --batch-sizes 1,auto --html bench.html

bigmodel bench ./model --prompt-file article.txt --lookup --new-tokens 64

It takes minutes: everything runs in processes of its own, in turn, in five rounds; --rounds 1 is a first look. Let the machine
be idle meanwhile."""
)
def bench(
    path: PathArgument,
    max_memory: MaxMemory = None,
    ram: Annotated[
        str | None,
        typer.Option(
            "--ram",
            metavar="SIZE",
            help="Run everything inside so much memory, page cache included: a control group, where that is allowed.",
        ),
    ] = None,
    device_map: DeviceMap = "auto",
    allow_cpu_compute: AllowCpuCompute = False,
    dtype: Dtype = "auto",
    prompt_tokens: Annotated[
        str, typer.Option("--prompt-tokens", metavar="N,N", help="Lengths of prompts, for one sequence.")
    ] = "128,512,2048",
    batch_sizes: Annotated[
        str,
        typer.Option(
            "--batch-sizes", metavar="N,N", help="Sequences at once, of the first length; auto: as many as are fastest."
        ),
    ] = "1,4,auto",
    new_tokens: Annotated[
        int,
        typer.Option(
            "--new-tokens", "-n", min=3, help="Tokens after the prompt; the first two are not timed as steps."
        ),
    ] = 8,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="A text to continue; without it made-up tokens.")
    ] = None,
    prompt_file: Annotated[
        str | None, typer.Option("--prompt-file", metavar="FILE", help="A file that holds it; - reads stdin.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="NAMES",
            help="Other libraries, in the same memory: transformers, accelerate, llama.cpp, deepspeed, airllm.",
        ),
    ] = None,
    lookup: Annotated[
        bool,
        typer.Option("--lookup", rich_help_panel="Guesses", help="Generate with guesses from the text, and without."),
    ] = False,
    draft: Annotated[
        str | None,
        typer.Option(
            "--draft", metavar="PATH", rich_help_panel="Guesses", help="Likewise with a smaller model's guesses."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How often everything runs.")] = 5,
    scratch: Annotated[
        str | None,
        typer.Option(
            "--scratch",
            metavar="FOLDER",
            help="Where the others' files go, and stay; without it beside the checkpoint, and removed.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Every sample as JSON, instead of the table.")] = False,
    html_file: Annotated[
        str | None,
        typer.Option("--html", metavar="FILE", help="Draw what happened beside what was predicted, for a browser."),
    ] = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    variant: Variant = None,
    offload_folder: OffloadFolder = None,
    trust_remote_code: TrustRemoteCode = False,
    with_traceback: WithTraceback = False,
) -> None:
    """Measure what a model takes here, beside the plan's prediction and the machine's bounds, and against other libraries."""
    with told_in_a_sentence(with_traceback):
        from bigmodel.cli.benching import Asked, measured

        asked = Asked(
            path=path,
            load={
                "device_map": parse_device_map(device_map),
                "max_memory": parse_limits(max_memory),
                "allow_cpu_compute": allow_cpu_compute,
                "dtype": dtype,
                "revision": revision,
                "subfolder": subfolder,
                "variant": variant,
                "offload_folder": offload_folder,
                "trust_remote_code": trust_remote_code,
            },
            ram=ram,
            prompt_tokens=prompt_tokens,
            batch_sizes=batch_sizes,
            new_tokens=new_tokens,
            prompt=read_prompt(prompt, prompt_file) if prompt is not None or prompt_file is not None else None,
            against=against,
            lookup=lookup,
            draft=draft,
            rounds=rounds,
            scratch=scratch,
            records=html_file is not None,
        )
        if html_file is not None:
            write_page(html_file, None)  # one that cannot be written is told now, not after the rounds
        found = measured(asked, say)
        typer.echo(found.to_json() if as_json else found.table())
        if html_file is not None:
            write_page(html_file, found.page())
        if found.was_interrupted:
            raise typer.Exit(INTERRUPTED)


@app.command(
    epilog="""[bold]Examples[/bold]

bigmodel calibrate ./model

The rates are kept in the user's cache folder for this machine; plans use them from then on. Let it be idle meanwhile."""
)
def calibrate(
    folder: Annotated[
        str | None,
        typer.Argument(
            metavar="FOLDER", help="That holds checkpoints: its disk is measured. Default: the cache folder."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The machine as a machine file, with its rates.")] = False,
    with_traceback: WithTraceback = False,
) -> None:
    """Measure this machine's disk, memory, arithmetic and links once, in about half a minute."""
    with told_in_a_sentence(with_traceback):
        machine = bigmodel.Machine.calibrate(folder)
        if as_json:
            typer.echo(machine.to_json())
            return
        from bigmodel.cli.environment import describe_rates

        for name, value in describe_rates(machine).items():
            typer.echo(f"{name + ':':<17} {value}")


app.command(
    epilog=LAUNCH_EXAMPLES,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)(launch)
app.command(epilog=CONFIG_EXAMPLES)(config)
app.command(name="test")(check_up)


@app.command()
def env(with_traceback: WithTraceback = False) -> None:
    """List versions and hardware, for a bug report."""
    with told_in_a_sentence(with_traceback):
        from bigmodel.cli.environment import describe_environment

        for name, value in describe_environment().items():
            typer.echo(f"{name + ':':<17} {value}")
