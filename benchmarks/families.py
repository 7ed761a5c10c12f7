"""Models of many families, all of their weights on disk: does a step reach its bound whatever the architecture?

``python -m benchmarks.families``; benchmarks/README.md says what is held equal. Every model has about a gigabyte of random
weights, written when it is its turn and removed afterwards.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT, Figure, Report, disk_of, median
from bigmodel.bench.harness import Bench, Trial
from bigmodel.bench.measurement import Settings, measure
from bigmodel.bench.result import Case, Result
from bigmodel.cli.environment import describe_environment
from bigmodel.device_map.plan import Workload

__all__ = ["FAMILIES", "make"]

PROMPT_TOKENS, NEW_TOKENS = 64, 8
RESIDENT = "transformers, auto"
SIZES: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NAMES = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
COMMON = {name: SIZES[name] for name in NAMES}
EXPERTS = {"intermediate_size": 1408, "num_experts_per_tok": 2}

# Family -> the name of its configuration's class, of its model's class, and sizes.
FAMILIES: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", SIZES),
    "qwen3, tied": ("Qwen3Config", "Qwen3ForCausalLM", SIZES | {"tie_word_embeddings": True}),
    "gemma3, sliding windows": ("Gemma3TextConfig", "Gemma3ForCausalLM", SIZES | {"sliding_window": 32}),
    "mixtral, 8 experts": ("MixtralConfig", "MixtralForCausalLM", SIZES | EXPERTS | {"num_local_experts": 8}),
    "qwen3 moe, 16 experts": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        SIZES | {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 704},
    ),
    "gpt2, matrices as inputs x outputs": (
        "GPT2Config",
        "GPT2LMHeadModel",
        COMMON | {"n_embd": 2048, "n_layer": 8, "n_head": 16, "n_positions": 1024},
    ),
    "bloom": ("BloomConfig", "BloomForCausalLM", COMMON | {"hidden_size": 2048, "n_layer": 8, "n_head": 16}),
    "mamba": ("MambaConfig", "MambaForCausalLM", COMMON | {"hidden_size": 2048, "num_hidden_layers": 16}),
    "t5, encoder and decoder": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            **COMMON,
            "d_model": 1536,
            "d_kv": 64,
            "d_ff": 4096,
            "num_layers": 6,
            "num_heads": 24,
            "decoder_start_token_id": 0,
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(tempfile.gettempdir()) / "bm_ckpt"
    parser.add_argument("--out", type=Path, default=default, help="on the disk to measure (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=sorted(FAMILIES), action="append", default=[])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    configuration = {
        "passes": f"a prompt of {PROMPT_TOKENS}, {NEW_TOKENS} tokens after it, the first two not among the steps; batch 1",
        "where": f"all weights on {disk_of(arguments.out)}",
        "rounds": arguments.rounds,
    }
    report, machine = Report("families", configuration), None
    with Bench(balloon_bytes=0) as bench:
        for family in arguments.only or FAMILIES:
            folder = Path(tempfile.mkdtemp(prefix="family-", dir=arguments.out))
            try:
                made = bench.run(
                    Trial(
                        name=family,
                        call="benchmarks.families:make",
                        arguments={"family": family, "folder": str(folder)},
                    )
                )
                if made.error is not None:
                    bench.note(f"{family} could not be made: {made.error}")
                    continue
                result = _measured(folder, arguments.rounds, machine)
            finally:
                shutil.rmtree(folder)
            machine = result.machine
            _add_figures(report, family, result)
        print(report.markdown(bench))
        print(f"written: {report.write(bench, arguments.results)}", file=sys.stderr)


def make(family: str, folder: str) -> int:
    """Write a checkpoint of random weights, bfloat16; its number of parameters."""
    import torch
    import transformers

    config_class, model_class, sizes = FAMILIES[family]
    config = getattr(transformers, config_class)(**sizes)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    build: Callable[[Any], Any] = getattr(transformers, model_class)
    model = build(config)
    model.save_pretrained(folder, max_shard_size="400MB")
    return sum(weight.numel() for weight in model.parameters())


def _measured(folder: Path, num_rounds: int, machine: Mapping[str, Any] | None) -> Result:
    load = dict.fromkeys(("max_memory", "revision", "subfolder", "variant", "offload_folder"))
    load |= {"device_map": {"": "disk"}, "allow_cpu_compute": False, "dtype": "auto", "trust_remote_code": False}
    workload = Workload(batch_size=1, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS)
    return measure(
        Settings(
            path=str(folder),
            folder=folder,
            files=tuple(sorted(folder.glob("*.safetensors"))),
            load=load,
            cases=(Case(workload=workload, num_tokens=NEW_TOKENS),),
            tell=lambda line: print(line, file=sys.stderr, flush=True),
            num_rounds=num_rounds,
            peers=("transformers",),  # whole in memory, where nothing is limited
            machine=machine,
            environment=describe_environment(),
        )
    )


def _add_figures(report: Report, family: str, result: Result) -> None:
    step = next((figure for figure in result.figures if figure.name.startswith("step of")), None)
    if step is None:
        report.add(Figure(name=family, values=[], note="; ".join(result.failures().values())[:200]))
        return
    resident = next((row for row in result.compared() if row["title"] == RESIDENT), None)
    steps = [1 / value for value in ([] if resident is None else resident["ratio"])]
    at = None if resident is None else resident["differs_at"]
    tokens = "not compared" if resident is None else "equal tokens" if at is None else f"OTHER TOKENS from {at}"
    report.add(
        Figure(
            name=f"{family}: a step over its bound",
            values=[1 / value for value in step.fractions],
            limit=1.11,
            unit="x",
            note=f"{step.binds} binds, {median(step.measured):.3f} s; {tokens}",
        )
    )
    report.add(Figure(name=f"{family}: over the resident model's step", values=steps, unit="x"))
    predicted = step.predicted or float("nan")
    report.add(
        Figure(
            name=f"{family}: measured over predicted", values=[value / predicted for value in step.measured], unit="x"
        )
    )


if __name__ == "__main__":
    main()
