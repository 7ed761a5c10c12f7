"""Fine-tune a real model on a text, and see the loss fall.

    python examples/train_smollm2.py CHECKPOINT
    bigmodel launch --processes 2 examples/train_smollm2.py CHECKPOINT --strategy fsdp

CHECKPOINT: what ``python examples/make_smollm2.py`` wrote, or any causal language model with its tokenizer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer

from bigmodel.training import TrainingConfig, TrainingRun

SAMPLE_TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--text", type=Path, default=Path(__file__).resolve().parent.parent / "README.md")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", help="folder for the model that was trained")
    arguments = parser.parse_args()

    ids = torch.tensor(AutoTokenizer.from_pretrained(arguments.checkpoint)(arguments.text.read_text())["input_ids"])
    samples = [{"input_ids": each, "labels": each} for each in ids.split(SAMPLE_TOKENS) if len(each) == SAMPLE_TOKENS]
    run = TrainingRun(
        TrainingConfig(strategy=arguments.strategy, global_batch_size=8, micro_batch_size=4, grad_clip=1.0)
    )
    model, _, loader = run.prepare(
        model=arguments.checkpoint, optimizer=lambda params: torch.optim.AdamW(params, lr=5e-5), data=samples
    )
    step = 0
    while step < arguments.steps:
        for batch in loader:
            with run.accumulate():
                run.backward(run.loss(model(**batch), batch))
                run.step()
            if loader.is_last:
                step = run.last_step.step
                if run.is_main_process:
                    print(
                        f"step {step}: loss {run.last_step.loss:.3f}, gradient norm {run.last_step.grad_norm:.2f}",
                        flush=True,
                    )
                if step == arguments.steps:
                    break
    if arguments.out:
        run.export(arguments.out)


if __name__ == "__main__":
    main()
