"""A model in half of its own size: a decode step against the peers and the machine's bounds.

``python -m benchmarks.peers``; it is `bigmodel bench` with targets. benchmarks/README.md says what is held equal.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.report import Figure, Report, median
from benchmarks.settings import parse_settings
from bigmodel.bench.measurement import Settings as Measurement
from bigmodel.bench.measurement import measure
from bigmodel.bench.peers import PEERS
from bigmodel.bench.result import Case, Result
from bigmodel.cli.environment import describe_environment
from bigmodel.device_map.plan import Workload

__all__: list[str] = []

MIB = 1 << 20
# Below it no interpreter with torch runs.
LEAST_GROUP_BYTES = 800 * MIB
PROMPT_TOKENS, NEW_TOKENS = 128, 8
# Against whom a step is held, and how many times faster it is to be.
GROUPS = {
    "the best of transformers, Accelerate and AirLLM": (("transformers", "accelerate", "airllm"), 3.0),
    "the faster of llama.cpp's files": (("llama.cpp",), 2.5),
    "DeepSpeed ZeRO-3 with parameters in files": (("deepspeed",), 3.0),
}
# Where the bound is too near for that, this part of what it leaves; DeepSpeed is held to its figure anyway.
OF_THE_BOUND = 0.9


def main() -> None:
    settings = parse_settings(__doc__ or "", tuple(PEERS))
    ram_bytes = max(LEAST_GROUP_BYTES, settings.num_bytes // 2)
    cases = tuple(
        Case(workload=Workload(batch_size=1, prompt_tokens=tokens, new_tokens=NEW_TOKENS), num_tokens=number)
        for tokens, number in ((PROMPT_TOKENS, NEW_TOKENS), (512, 1))
    )
    load = dict.fromkeys(("max_memory", "revision", "subfolder", "variant", "offload_folder"))
    load |= {"device_map": "auto", "allow_cpu_compute": False, "dtype": "auto", "trust_remote_code": False}
    configuration = settings.configuration | {
        "passes": f"a prompt of {PROMPT_TOKENS}, {NEW_TOKENS} tokens after it, the first two not among the steps; batch 1",
        "cgroup": f"{ram_bytes // MIB} MiB, process and page cache",
    }
    # Made before the runs, because it notes how busy the machine is.
    report = Report("-".join(["peers", settings.shape, *sorted(settings.only)]), configuration)
    result = measure(
        Measurement(
            path=str(settings.path),
            folder=settings.path,
            files=settings.files,
            load=load,
            cases=cases,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
            num_rounds=settings.num_rounds,
            ram_bytes=ram_bytes,
            peers=tuple(name for name in PEERS if settings.runs(name)),
            scratch=settings.scratch / "peers",
            environment=describe_environment(),
        )
    )
    print(result.table())
    _fill(report, result)
    if settings.results is not None:
        print(f"written: {report.write(result, settings.results)}", file=sys.stderr)


def _fill(report: Report, result: Result) -> None:
    rows = {row["title"]: row for row in result.compared()}
    step = next(figure for figure in result.figures if figure.name.startswith("step of"))
    report.add(
        Figure(name="fraction of the bound that a step reaches", values=step.fractions, limit=0.9, is_upper=False)
    )
    for name, (peers, target) in GROUPS.items():
        titles = [title for peer in peers for title in PEERS[peer] if title in rows]
        if titles:
            row = rows[min(titles, key=lambda title: median(rows[title]["step_s"]))]
            report.add(_figure(name, row, target))
    for row in rows.values():
        differs = row["differs_at"]
        report.add(
            Figure(
                name=f"{row['title']}: its step over ours",
                values=row["ratio"],
                unit="x",
                note="equal tokens" if differs is None else f"OTHER TOKENS from number {differs}",
            )
        )
    report.result = result


def _figure(name: str, row: dict[str, Any], target: float) -> Figure:
    bound = median(row["bound_ratio"])
    allowed = target if row["title"] in PEERS["deepspeed"] else OF_THE_BOUND * bound
    note = f"{row['title']}; nothing could be more than {bound:.2f}x"
    return Figure(
        name=f"decode step, times faster than {name}",
        values=row["ratio"],
        limit=min(target, allowed),
        is_upper=False,
        unit="x",
        note=note,
    )


if __name__ == "__main__":
    main()
