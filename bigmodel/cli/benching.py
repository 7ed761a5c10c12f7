"""A benchmark as a command line asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigmodel.bench.measurement import Settings, measure
from bigmodel.bench.peers import PEERS
from bigmodel.bench.result import Case, Result
from bigmodel.checkpoint.checkpoint import open_checkpoint
from bigmodel.checkpoint.resolve import locate, read_config
from bigmodel.cli.arguments import parse_batch_size
from bigmodel.cli.environment import describe_environment
from bigmodel.device_map.plan import Plan, Workload
from bigmodel.errors import InvalidArgumentError, shown
from bigmodel.generation.text import encode_prompt, load_tokenizer
from bigmodel.units import parse_bytes

__all__ = ["Asked", "measured"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What stands on the command line; `load` is what `load_sharded` takes."""

    path: str
    load: Mapping[str, Any]
    ram: str | None
    prompt_tokens: str
    batch_sizes: str
    new_tokens: int
    prompt: str | None
    against: str | None
    lookup: bool
    draft: str | None
    rounds: int
    scratch: str | None
    records: bool


def measured(asked: Asked, tell: Callable[[str], None]) -> Result:
    """Measure what was asked for.

    Raises:
        InvalidArgumentError: for a word on the command line that means nothing.
        As `measure`, and as `load_sharded` for the checkpoint.
    """
    if isinstance(asked.load["device_map"], Plan):
        raise InvalidArgumentError(
            "--device-map is a plan, which is for one workload. Give its map, or let each workload be planned."
        )
    lengths = [_count(text, "--prompt-tokens") for text in asked.prompt_tokens.split(",")]
    sizes = [parse_batch_size(text.strip()) for text in asked.batch_sizes.split(",")]
    peers = _peers(asked.against)
    is_other = asked.load["dtype"] != "auto" or asked.load["variant"] is not None or Path(asked.path).is_file()
    if peers and is_other:
        raise InvalidArgumentError(
            "--against runs others on a folder's own weights in their own dtype. Leave --dtype and --variant out, and give the "
            "folder."
        )
    if asked.draft is not None:
        locate(asked.draft)
    ram_bytes = None if asked.ram is None else parse_bytes(asked.ram)
    options = {name: asked.load[name] for name in ("revision", "subfolder", "variant")}
    place = locate(asked.path, **options)
    open_checkpoint(asked.path, **options)  # what cannot be read is told before minutes of measuring
    prompt = None
    if asked.prompt is not None:
        options = {"subfolder": asked.load["subfolder"], "trust_remote_code": asked.load["trust_remote_code"]}
        tokenizer = load_tokenizer(place.folder, **options)
        prompt = tuple(encode_prompt(tokenizer, asked.prompt)["input_ids"][0].tolist())
        lengths = [len(prompt)]
    guesses = tuple(name for name in ("lookup", "draft") if getattr(asked, name))
    guessed_tokens = max(64, asked.new_tokens)
    most_new = guessed_tokens if guesses else asked.new_tokens
    settings = Settings(
        path=asked.path,
        folder=Path(place.folder),
        files=tuple(map(Path, place.files)),
        load=asked.load,
        cases=_cases(_short_enough(lengths, most_new, place.folder, tell), sizes, asked.new_tokens),
        tell=tell,
        num_rounds=asked.rounds,
        ram_bytes=ram_bytes,
        peers=peers,
        prompt=prompt,
        guesses=guesses,
        draft=asked.draft,
        records=asked.records,
        guessed_tokens=guessed_tokens,
        scratch=None if asked.scratch is None else Path(asked.scratch),
        environment=describe_environment(),
    )
    return measure(settings)


def _cases(lengths: list[int], sizes: list[int | str], new_tokens: int) -> tuple[Case, ...]:
    """Batches of the first length, and first tokens after the others."""
    cases = [Case(workload=_workload(size, lengths[0], new_tokens), num_tokens=new_tokens) for size in sizes]
    cases += [Case(workload=_workload(1, length, new_tokens), num_tokens=1) for length in lengths[1:]]
    # The first is also that of loads and peers, which answer one prompt.
    one = Case(workload=_workload(1, lengths[0], new_tokens), num_tokens=new_tokens)
    return tuple(dict.fromkeys((one, *cases)))


def _workload(size: int | str, prompt_tokens: int, new_tokens: int) -> Workload:
    return Workload(batch_size=size, prompt_tokens=prompt_tokens, new_tokens=new_tokens)


def _short_enough(lengths: list[int], new_tokens: int, folder: str, tell: Callable[[str], None]) -> list[int]:
    """Without the prompts that the model has no positions for."""
    config = read_config(folder) or {}
    parts = [config, config.get("text_config") or {}]
    stated = [part.get(name) for part in parts for name in ("max_position_embeddings", "n_positions")]
    longest = next((each for each in stated if isinstance(each, int)), None)
    if longest is None:
        return lengths
    kept = [length for length in lengths if length + new_tokens <= longest]
    if not kept:
        raise InvalidArgumentError(
            f"Prompts of {min(lengths)} tokens and {new_tokens} new ones are more than the model's {longest} positions. "
            "Give fewer with --prompt-tokens or --new-tokens."
        )
    for length in lengths:
        if length not in kept:
            tell(f"a prompt of {length} tokens is left out: the model has {longest} positions")
    return kept


def _peers(text: str | None) -> tuple[str, ...]:
    names = [] if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PEERS:
            raise InvalidArgumentError(
                f"--against {shown(name)} is nobody that is known. There are: {', '.join(PEERS)}."
            )
    return tuple(dict.fromkeys(names))


def _count(text: str, option: str) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdigit() and 1 <= len(text) <= 9 and int(text) >= 1):
        raise InvalidArgumentError(f"{option} has {shown(text)} in it. Give numbers from 1 on, such as 128,512.")
    return int(text)
