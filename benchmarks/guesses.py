"""More tokens for each byte that is read: guesses that one pass checks, and many sequences at once.

``python -m benchmarks.guesses``; benchmarks/README.md says what is held equal.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT, Figure, Report
from benchmarks.settings import Settings, parse_settings
from bigmodel.bench.harness import Bench, Outcome, Trial

__all__ = ["run_batch", "run_guesses"]

PARTS = ("lookup", "batch")
# A text that is to be copied, as in an edit; the answer is 92 tokens of the real model.
TEXT = (
    "The harbour at Lindau was built in 1856. It has a lighthouse, thirty-three metres high, and a marble lion that looks out "
    "over the lake. Ships from Bregenz, Konstanz and Rorschach land there in summer. The lighthouse can be climbed, and from its "
    "top one sees the mountains of three countries. In winter the harbour is quiet, and fog lies over the water until noon."
)
PROMPT = f"Repeat the following text exactly, word for word, and nothing else.\n\n{TEXT}"
NEW_TOKENS = 120
# Of the batch part: the host may hold so much of the checkpoint.
SHARE, BATCH_PROMPT_TOKENS, BATCH_NEW_TOKENS = 0.5, 64, 9


def main() -> None:
    settings = parse_settings(__doc__ or "", PARTS)
    report = Report("-".join(["guesses", settings.shape, *sorted(settings.only)]), settings.configuration)
    with Bench(balloon_bytes=0) as bench:
        if settings.runs("lookup"):
            _lookup(bench, report, settings)
        if settings.runs("batch"):
            _batch(bench, report, settings)
        print(report.markdown(bench))
        if settings.results is not None:
            print(f"written: {report.write(bench, settings.results)}", file=sys.stderr)


def _lookup(bench: Bench, report: Report, settings: Settings) -> None:
    made = subprocess.run([sys.executable, ROOT / "examples" / "make_smollm2.py"], stdout=-1, text=True, check=True)
    folder = Path(made.stdout.strip())
    outcomes = bench.interleaved(
        [
            Trial(
                name=name,
                call="benchmarks.guesses:run_guesses",
                arguments={"path": str(folder), "with_lookup": name == "lookup"},
                files=sorted(folder.glob("*.safetensors")),
            )
            for name in ("plain", "lookup")
        ],
        settings.num_rounds,
    )
    report.keep(outcomes)
    plain, guessed = _good(outcomes["plain"]), _good(outcomes["lookup"])
    note = ""
    if guessed:
        note = f"{guessed[0]['tokens_per_pass']:.1f} tokens a pass, {guessed[0]['num_guesses']} guesses"
    report.add(
        Figure(
            name="a repeated text, all on disk: time per token with lookup over without",
            values=[mine["seconds"] / other["seconds"] for mine, other in zip(guessed, plain, strict=False)],
            limit=1 / 2.5,
            unit="x",
            note=note,
        )
    )
    equal = len({each["digest"] for each in (*plain, *guessed)}) == 1
    report.add(Figure(name="the same tokens", values=[0.0 if equal else 1.0], limit=0.0, is_promise=True))


def _batch(bench: Bench, report: Report, settings: Settings) -> None:
    outcomes = bench.interleaved(
        [
            Trial(
                name=name,
                call="benchmarks.guesses:run_batch",
                arguments={
                    "path": str(settings.path),
                    "limit_bytes": int(SHARE * settings.num_bytes) + (512 << 20),
                    "batch_size": size,
                },
                files=settings.files,
            )
            for name, size in (("one", 1), ("as many as are fastest", "auto"))
        ],
        settings.num_rounds,
    )
    report.keep(outcomes)
    one, many = _good(outcomes["one"]), _good(outcomes["as many as are fastest"])
    sizes = sorted({each["batch_size"] for each in many})
    report.add(
        Figure(
            name="batch that the plan chose: step over (a step of one sequence x 1 / 0.8)",
            values=[0.8 * mine["seconds"] / other["seconds"] for mine, other in zip(many, one, strict=False)],
            limit=1.0,
            unit="x",
            note=f"{', '.join(map(str, sizes))} sequences; predicted to bind: {many[0]['binds'] if many else '?'}",
        )
    )
    report.add(
        Figure(
            name="tokens/s of the batch over tokens/s of one sequence",
            values=[
                mine["batch_size"] * other["seconds"] / mine["seconds"] for mine, other in zip(many, one, strict=False)
            ],
            unit="x",
        )
    )
    report.add(
        Figure(
            name="step of the batch over predicted",
            values=[each["seconds"] / each["predicted_s"] for each in many],
            unit="x",
        )
    )


def _good(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    return [each.result for each in outcomes if each.error is None]


def run_guesses(path: str, with_lookup: bool) -> dict[str, Any]:
    """Answer `PROMPT` with the real model, all of it on disk.

    Returns:
        ``seconds`` per token after the first, ``tokens_per_pass``, ``num_guesses`` of a pass, ``digest`` of the tokens.
    """
    import hashlib

    import torch

    import bigmodel
    from bigmodel.generation.drafts import MOST_GUESSES, lookup_options
    from bigmodel.generation.text import TextStream, encode_prompt, load_tokenizer

    tokenizer = load_tokenizer(path)
    inputs = encode_prompt(tokenizer, PROMPT, chat=True)
    workload = bigmodel.Workload(
        prompt_tokens=inputs["input_ids"].shape[1] + MOST_GUESSES, new_tokens=NEW_TOKENS + MOST_GUESSES
    )
    model = bigmodel.load_sharded(path, device_map={"": "disk"}, workload=workload, progress=False)
    options = lookup_options(bigmodel.plan_of(model)) if with_lookup else {}
    stream = TextStream(tokenizer, lambda text: None)
    with torch.no_grad():
        found = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, streamer=stream, **options)
    assert stream.first_token_s is not None
    assert stream.last_token_s is not None
    return {
        "seconds": (stream.last_token_s - stream.first_token_s) / (stream.num_tokens - stream.num_first),
        "tokens_per_pass": stream.num_tokens / bigmodel.stats_of(model).num_passes,
        "num_guesses": options.get("prompt_lookup_num_tokens", 0),
        "digest": hashlib.sha256(found.numpy().tobytes()).hexdigest()[:16],
    }


def run_batch(path: str, limit_bytes: int, batch_size: int | str) -> dict[str, Any]:
    """Steps of so many sequences, of as many as the plan finds fastest if "auto".

    Returns:
        ``seconds``, the median of the steps; ``predicted_s``; ``batch_size``; ``binds``, what the plan says binds.
    """
    import torch

    import bigmodel

    workload = bigmodel.Workload(batch_size=batch_size, prompt_tokens=BATCH_PROMPT_TOKENS, new_tokens=BATCH_NEW_TOKENS)
    model = bigmodel.load_sharded(path, max_memory={"cpu": limit_bytes}, workload=workload, progress=False)
    plan = bigmodel.plan_of(model)
    size = plan.workload.num_sequences
    ids = torch.randint(0, 1000, (size, BATCH_PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    times = []
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        for _ in range(BATCH_NEW_TOKENS - 1):
            cache, started_s = output.past_key_values, time.perf_counter()
            output = model(input_ids=output.logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True)
            times.append(time.perf_counter() - started_s)
    return {
        "seconds": statistics.median(times[1:]),
        "predicted_s": plan.estimate.time_per_token_s,
        "batch_size": size,
        "binds": plan.estimate.binds.get("decode", ""),
    }


if __name__ == "__main__":
    main()
