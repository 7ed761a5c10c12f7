"""All ways to train something somewhere: what each takes, which is taken, and why."""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bigmodel.device_map.counter import NotTriedError
from bigmodel.errors import DoesNotFitError
from bigmodel.training.cluster import Cluster
from bigmodel.training.config import TrainingConfig
from bigmodel.training.forecast import KINDS, Forecast, Way, forecast
from bigmodel.training.job import Job
from bigmodel.units import format_bytes

__all__ = ["Outlook", "has_deepspeed", "look_out"]

# One way is not preferred to a simpler one for less.
_WORTH = 0.02
# Samples of a pass up to which each number is tried.
_SMALL = 8
_SIMPLEST = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What each way would take, fastest first among those that fit without offloading, then with it, then by what they need.

    Attributes:
        forecasts: at least one.
        cluster, job: of which.
        near: the first of them, if nothing were offloaded; None where nothing is.
    """

    forecasts: tuple[Forecast, ...]
    cluster: Cluster
    job: Job
    near: Forecast | None = None

    @property
    def chosen(self) -> Forecast | None:
        """The fastest that fits; None where none does."""
        return self.forecasts[0] if self.forecasts[0].fits else None

    def best_of(self, strategy: str) -> Forecast | None:
        """The fastest of a strategy that fits."""
        return next((each for each in self.forecasts if each.way.strategy == strategy and each.fits), None)

    def take(self) -> Forecast:
        """The chosen one.

        Raises:
            DoesNotFitError: none fits; the message says which needs least.
        """
        if self.chosen is not None:
            return self.chosen
        least = min(self.forecasts, key=lambda each: each.peak_bytes / max(1, each.limit_bytes))
        raise DoesNotFitError(
            f"No way to train it fits: {least.way.title} needs least, {format_bytes(least.peak_bytes)} in each process with "
            f"micro_batch_size={least.way.micro_batch_size}, and a process has {format_bytes(least.limit_bytes)}. Take more "
            "processes, shorter samples or an adapter; or state the strategy and the micro_batch_size to try it all the same.",
            tier="cpu" if self.cluster.is_host else "accelerator",
            needed_bytes=least.peak_bytes,
            available_bytes=least.limit_bytes,
        )

    @property
    def slowdown(self) -> float | None:
        """How many times as long a step of the first way takes as if nothing of it were offloaded; None where nothing is."""
        return None if self.near is None else self.forecasts[0].step_s / self.near.step_s

    def explain(self) -> str:
        """A table of all strategies, each at its best, the choice and the reason."""
        cluster, job = self.cluster, self.job
        shown = self._best_of_each()
        nodes = f"{cluster.num_nodes} x " if cluster.num_nodes > 1 else ""
        lines = [
            f"{_count(job.num_trained)} parameters trained"
            + (f" beside {format_bytes(job.frozen_bytes)} that are not" if job.frozen_bytes else "")
            + f", steps of {job.global_batch_size} samples of {job.tokens_per_sample} tokens, on "
            f"{nodes}{cluster.num_per_node} process{'es' if cluster.num_per_node > 1 else ''}"
            f"{' of ' + cluster.name if cluster.name else ''}, {format_bytes(cluster.limit_bytes)} each"
        ]
        if cluster.wasted_bytes:
            lines.append(
                f"devices are unequal: equal parts leave {format_bytes(cluster.wasted_bytes)} of the larger ones unused"
            )
        heads = ["", "strategy", "recompute", "micro", *KINDS, "peak", "on host", "on disk", "step", "tokens/s", ""]
        rows = [heads]
        for each in shown:
            rows.append(
                [
                    ">" if each is self.chosen else "",
                    each.way.title,
                    "yes" if each.way.checkpoints else "no",
                    str(each.way.micro_batch_size),
                    *(format_bytes(each.bytes_by_kind[kind]) for kind in KINDS),
                    format_bytes(each.peak_bytes),
                    format_bytes(each.host_bytes) if each.host_bytes else "",
                    format_bytes(each.disk_bytes) if each.disk_bytes else "",
                    f"{each.step_s:.3g} s",
                    f"{each.tokens_per_s:,.0f}",
                    "" if each.fits else "does not fit",
                ]
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
        for row in rows:
            cells = [
                cell.ljust(width) if column < 3 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row[:-1], widths[:-1], strict=True))
            ]
            lines.append("  ".join([*cells, row[-1]]).rstrip())
        lines.append(self._reason())
        return "\n".join(lines)

    def to_json(self) -> str:
        """All of it, sizes in bytes and times in seconds."""
        return json.dumps(
            {
                "num_nodes": self.cluster.num_nodes,
                "num_per_node": self.cluster.num_per_node,
                "machine": self.cluster.name,
                "wasted_bytes": self.cluster.wasted_bytes,
                "num_trained": self.job.num_trained,
                "frozen_bytes": self.job.frozen_bytes,
                "tokens_per_sample": self.job.tokens_per_sample,
                "global_batch_size": self.job.global_batch_size,
                "chosen": None if self.chosen is None else _described(self.chosen),
                "offloading_slows_by": self.slowdown,
                "ways": [_described(each) for each in self._best_of_each()],
            },
            indent=1,
        )

    def _best_of_each(self) -> list[Forecast]:
        seen: set[str] = set()
        found = []
        for each in self.forecasts:
            if each.way.title not in seen:
                seen.add(each.way.title)
                found.append(each)
        return found

    def _reason(self) -> str:
        chosen = self.chosen
        if chosen is None:
            least = min(each.peak_bytes / max(1, each.limit_bytes) for each in self.forecasts)
            return f"none fits: the least needs {least:.2f} times what there is{self._slowness()}"
        others = [each for each in self._best_of_each() if each is not chosen]
        text = f"{chosen.way.title} is the fastest that fits"
        faster = [each for each in others if not each.fits and each.tokens_per_s > chosen.tokens_per_s]
        if faster:
            best = max(faster, key=lambda each: each.tokens_per_s)
            text += f"; {best.way.title} would be faster, and lacks {format_bytes(best.peak_bytes - best.limit_bytes)}"
        slower = [each for each in others if each.fits]
        if slower:
            times = chosen.tokens_per_s / slower[0].tokens_per_s
            text += (
                f"; the next, {slower[0].way.title}, has {1 / times:.0%} of its tokens/s"
                if times >= 1
                else f"; {slower[0].way.title} is no more than {1 / times - 1:.0%} faster, and less simple"
            )
        binding = max(chosen.seconds_by_kind.items(), key=lambda each: each[1])
        return f"{text}; most of a step is {binding[0]}{self._slowness()}"

    def _slowness(self) -> str:
        if self.near is None:
            return ""
        first, near = self.forecasts[0], self.near
        return (
            f"\noffloading makes a step of {first.way.title} take {self.slowdown:.2g} times as long ({first.step_s:.3g} s for "
            f"{near.step_s:.3g} s), and a process hold {format_bytes(first.peak_bytes)} for {format_bytes(near.peak_bytes)}"
        )


def look_out(job: Job, cluster: Cluster, config: TrainingConfig, *, deepspeed: bool | None = None) -> Outlook:
    """Forecasts of the ways that a configuration leaves open.

    Args:
        job, cluster: of which.
        config: what it states is kept; what is "auto" is tried.
        deepspeed: whether ZeRO can be had; whether it is installed here if None.

    Raises:
        NotTriedError: no way is left, or the model cannot be tried.
    """
    is_there = has_deepspeed() if deepspeed is None else deepspeed
    found = [forecast(job, cluster, way) for way in _ways(job, cluster, config, is_there)]
    if not found:
        raise NotTriedError(
            "of the engines that the configuration leaves open none takes this model (parameters without a dimension, or "
            "without a gradient)"
        )
    # What is offloaded is for what does not fit otherwise: that all of it hides behind passes is hoped for, not known.
    fitting = sorted(
        (each for each in found if each.fits), key=lambda each: (each.way.is_offloaded, -each.tokens_per_s)
    )
    if fitting:  # the simplest of those that are about as fast
        best = fitting[0]
        close = [
            each
            for each in fitting
            if each.tokens_per_s >= best.tokens_per_s / (1 + _WORTH) and each.way.is_offloaded == best.way.is_offloaded
        ]
        first = min(close, key=_complexity)
        fitting.remove(first)
        fitting.insert(0, first)
    rest = sorted(
        (each for each in found if not each.fits), key=lambda each: each.peak_bytes / max(1, each.limit_bytes)
    )
    ordered = (*fitting, *rest)
    near = None
    if ordered[0].way.is_offloaded:
        near = forecast(job, cluster, replace(ordered[0].way, offload_optimizer="none", offload_params="none"))
    return Outlook(forecasts=ordered, cluster=cluster, job=job, near=near)


def has_deepspeed() -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec("deepspeed") is not None


def _ways(job: Job, cluster: Cluster, config: TrainingConfig, deepspeed: bool) -> list[Way]:
    size = cluster.num_processes
    is_auto = config.strategy == "auto"
    strategies: Sequence[str] = [config.strategy]
    if is_auto:
        strategies = ["single"] if size == 1 else ["ddp", "fsdp"]
        zero = ["zero1", "zero2", "zero3"] if size > 1 else []
        if size == 1 and not cluster.is_host:
            strategies, zero = ["single", "fsdp"], ["zero2", "zero3"]  # for their offloading
        elif size == 1 and cluster.disk_limit_bytes:
            zero = ["zero3"]
        if config.compile_blocks:
            zero = [each for each in zero if each != "zero3"]
        if config.precision == "fp8":
            strategies, zero = ["fsdp"], []
        elif deepspeed and not (config.precision == "fp16" and cluster.is_host):
            strategies = [*strategies, *zero]
    if is_auto and _is_about_parts(config, cluster):
        strategies = ["fsdp"]
    if is_auto and config.quantize_base is not None:
        strategies = ["single" if size == 1 else "ddp"]
    if is_auto and not _is_whole(job, config):
        strategies = [each for each in strategies if each != "ddp"]  # it waits for every gradient
    if is_auto and job.has_scalars:
        strategies = [each for each in strategies if each in ("single", "ddp", "zero3")]
    recomputes = {"on": [True], "off": [False], "auto": [False, True]}[config.activation_checkpointing]
    options = dict(config.engine_options.get("zero_optimization", {}))
    found = []
    for strategy, checkpoints, micro in itertools.product(
        strategies, recomputes, _micro_batch_sizes(job, size, config)
    ):
        for shape in _shapes(strategy, cluster, config, is_auto):
            found.append(
                Way(strategy=strategy, checkpoints=checkpoints, micro_batch_size=micro, options=options, **shape)
            )
    return found


def _shapes(strategy: str, cluster: Cluster, config: TrainingConfig, is_auto: bool) -> list[dict[str, Any]]:
    """What else a strategy leaves open."""
    if not is_auto or _is_about_parts(config, cluster):
        fields = ("reshard_after_forward", "replicas", "offload_optimizer", "offload_params")
        return [{name: getattr(config, name) for name in fields}]
    size, offloads = cluster.num_processes, not cluster.is_host
    both = {"offload_optimizer": "cpu", "offload_params": "cpu"}
    found: list[dict[str, Any]] = []
    if strategy == "fsdp":
        if size > 1:
            found += [{}, {"reshard_after_forward": False}]
            if cluster.num_nodes > 1 and cluster.num_per_node > 1:
                found += [{"replicas": cluster.num_nodes}]
        return (found + ([both] if offloads else [])) or [{}]
    if strategy.startswith("zero"):
        found += [{}] if size > 1 else []
        found += [{"offload_optimizer": "cpu"}] if offloads else []
        if strategy == "zero3":
            found += [both] if offloads else []
            if cluster.disk_limit_bytes:
                found += [{"offload_optimizer": "nvme"}, {"offload_optimizer": "nvme", "offload_params": "nvme"}]
                found += [{"offload_optimizer": "nvme", "offload_params": "cpu"}] if offloads else []
        return found
    return [{}]


def _is_about_parts(config: TrainingConfig, cluster: Cluster) -> bool:
    """Whether it states what only FSDP2 has."""
    if cluster.num_processes == 1 and cluster.is_host:
        return False
    return config.replicas > 1 or not config.reshard_after_forward or config.reduce_dtype is not None


def _is_whole(job: Job, config: TrainingConfig) -> bool:
    """Whether backward gives every parameter that is trained its gradient."""
    rehearsal = job.rehearsed(1, config.activation_checkpointing == "on", False)
    return {moment.name for moment in rehearsal.moments} == set(job.sizes)


def _micro_batch_sizes(job: Job, size: int, config: TrainingConfig) -> list[int]:
    if isinstance(config.micro_batch_size, int):
        return [config.micro_batch_size]
    each = -(-job.global_batch_size // size)
    # Of sizes that give as many passes the smallest does; of large ones about every other.
    sizes = sorted({-(-each // number) for number in range(1, min(each, 4096) + 1)} | {1})
    found: list[int] = []
    for size in sizes:
        if size <= _SMALL or size == sizes[-1] or size >= 1.5 * found[-1]:
            found.append(size)
    return found


def _complexity(each: Forecast) -> tuple[bool, int, bool, bool, int]:
    way = each.way
    return (
        way.is_offloaded,
        _SIMPLEST.index(way.strategy),
        way.replicas > 1 or not way.reshard_after_forward,
        way.checkpoints,
        way.micro_batch_size,
    )


def _described(each: Forecast) -> dict[str, Any]:
    way = {name: value for name, value in asdict(each.way).items() if name != "options"}
    return way | {
        "bytes_by_kind": dict(each.bytes_by_kind),
        "peak_bytes": each.peak_bytes,
        "host_bytes": each.host_bytes,
        "disk_bytes": each.disk_bytes,
        "limit_bytes": each.limit_bytes,
        "disk_limit_bytes": each.disk_limit_bytes,
        "seconds_by_kind": dict(each.seconds_by_kind),
        "hidden_s": each.hidden_s,
        "step_s": each.step_s,
        "tokens_per_s": each.tokens_per_s,
        "fits": each.fits,
    }


def _count(number: int) -> str:
    for factor, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return str(number)
