"""Whether every engine that can run here trains as one process does: a tiny model, a few steps, in processes of its own.

``python -m bigmodel.training.checkup FOLDER ENGINE`` is what each of those processes runs.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigmodel.errors import InvalidArgumentError, LaunchError, shown
from bigmodel.launch.launcher import launch
from bigmodel.launch.settings import Detected, LaunchSettings
from bigmodel.progress import progress_bar

__all__ = ["ENGINES", "Verdict", "check_engines"]

ENGINES: dict[str, dict[str, Any]] = {
    "single": {},
    "ddp": {},
    "fsdp": {},
    "fsdp, offloaded": {"offload_params": "cpu", "offload_optimizer": "cpu"},
    "zero1": {},
    "zero2": {},
    "zero2, optimizer offloaded": {"offload_optimizer": "cpu"},
    "zero3": {},
}
_NUM_STEPS, _NUM_TOKENS, _BATCH = 4, 32, 8
_MOST_PROCESSES = 4
# Of a loss near 6, float32: what sums in another order differ by is a hundredth of it. Products on accelerators round earlier.
_LOSS_DIFFERS, _LOSS_DIFFERS_ON_DEVICES = 2e-5, 5e-3
_LOSSES = "losses.json"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Of one engine.

    Attributes:
        engine: its name.
        told: the verdict, in a line.
        is_failed: whether it could not train, or trained otherwise.
    """

    engine: str
    told: str
    is_failed: bool = False


def check_engines(
    engines: Sequence[str] | None = None,
    *,
    num_processes: int | None = None,
    tell: Callable[[str], None],
    progress: bool | None = None,
) -> Iterator[Verdict]:
    """Try them one after the other; one process is the first, which the others are compared with.

    Args:
        engines: names of `ENGINES`; all of them if None.
        num_processes: of each but "single"; the accelerators (4 at most), or 2, if None.
        tell: called with what processes that failed had to say.
        progress: a bar; where stderr is a terminal if None.

    Raises:
        InvalidArgumentError: there is no such engine.
    """
    for each in engines or ():
        if each not in ENGINES:
            raise InvalidArgumentError(f"There is no engine {shown(each)}. They are: {', '.join(ENGINES)}.")
    tried = [each for each in ENGINES if engines is None or each in engines or each == "single"]
    num_devices = Detected.here().num_devices
    number = num_processes or min(_MOST_PROCESSES, max(2, num_devices))
    allowed = _LOSS_DIFFERS_ON_DEVICES if num_devices else _LOSS_DIFFERS
    folder = Path(tempfile.mkdtemp(prefix="bigmodel-test-"))
    expected: list[float] | None = None
    try:
        _save_model(folder / "model")
        with progress_bar(progress) as report:
            for place, engine in enumerate(tried):
                report("trying engines", place, len(tried))
                verdict, losses = _tried(
                    engine, folder, 1 if engine == "single" else number, num_devices, tell, expected, allowed
                )
                expected = expected or losses
                yield verdict
            report("trying engines", len(ENGINES), len(tried))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tried(
    engine: str,
    folder: Path,
    number: int,
    num_devices: int,
    tell: Callable[[str], None],
    expected: list[float] | None,
    allowed: float,
) -> tuple[Verdict, list[float] | None]:
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        told = 'left out: DeepSpeed is not installed (pip install "bigmodel[training]")'
        return Verdict(engine=engine, told=told), None
    if 0 < num_devices < number:
        told = f"left out: {num_devices} accelerator{'s' if num_devices > 1 else ''}, and it takes {number}"
        return Verdict(engine=engine, told=told), None
    losses = folder / _LOSSES
    losses.unlink(missing_ok=True)
    begin_s = time.perf_counter()
    said = folder / "said"
    try:
        settings = LaunchSettings(num_processes=number, logs=said)
        launch(settings, __name__, [str(folder), engine], kind="module", shows="nothing")
        found = json.loads(losses.read_text())
    except (LaunchError, OSError, ValueError) as error:
        for file in sorted(said.rglob("stderr.log")):
            tell(file.read_text(errors="replace").rstrip())
        return Verdict(engine=engine, told=f"FAILED: {error}", is_failed=True), None
    finally:
        shutil.rmtree(said, ignore_errors=True)
    seconds = time.perf_counter() - begin_s
    told = f"loss {found[0]:.4f} to {found[-1]:.4f} in {_NUM_STEPS} steps"
    if number > 1:
        told += f", {number} processes"
    told += f", {seconds:.0f} s"
    if expected is not None:
        most = max(abs(one - other) for one, other in zip(found, expected, strict=True))
        if not most <= allowed:
            return Verdict(
                engine=engine,
                told=f"FAILED: {told}; its losses differ from one process's by {most:.2g}",
                is_failed=True,
            ), found
        told += f", within {max(most, 1e-8):.0e} of one process"
    return Verdict(engine=engine, told=f"ok: {told}"), found


def _save_model(folder: Path) -> None:
    """A random llama whose layers divide over the processes, also in unequal parts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "vocab_size": 307}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=_NUM_TOKENS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)


def _train(folder: Path, engine: str) -> None:
    """In one of the processes: a few steps; the main one leaves their losses."""
    import torch

    from bigmodel.training import TrainingConfig, TrainingRun

    class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return _NUM_STEPS * _BATCH

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ids = torch.arange(_NUM_TOKENS) * (index % 13 + 2) % 307
            return {"input_ids": ids, "labels": ids}

    strategy = engine.partition(",")[0]
    run = TrainingRun(
        TrainingConfig(
            strategy=strategy,
            precision="fp32",
            global_batch_size=_BATCH,
            micro_batch_size=1,
            grad_clip=1.0,
            activation_checkpointing="off",
            **ENGINES[engine],
        )
    )
    model, loader = run.prepare(
        model=str(folder / "model"),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
        data=Tokens(),
        progress=False,
    )[::2]
    losses = []
    for batch in loader:
        with run.accumulate():
            run.backward(run.loss(model(**batch), batch))
            run.step()
        if run.sync_gradients and run.last_step is not None:
            losses.append(run.last_step.loss)
    if run.is_main_process:
        (folder / _LOSSES).write_text(json.dumps(losses))


if __name__ == "__main__":
    _train(Path(sys.argv[1]), sys.argv[2])
