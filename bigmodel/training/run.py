"""A training run: the model, its optimizer and its data in the hands of an engine, and the loop's verbs."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from bigmodel.device_map.counter import NotTriedError
from bigmodel.device_map.machine import Machine
from bigmodel.errors import InvalidArgumentError, TrainingError
from bigmodel.footprint import bound_heap, trim_heap
from bigmodel.models import adapter_scales, is_adapted
from bigmodel.progress import progress_bar
from bigmodel.training.choice import CHOSEN, cluster_here, decide, engine_of, outlook_of, stays_open
from bigmodel.training.collectives import Collectives
from bigmodel.training.config import TrainingConfig
from bigmodel.training.data import GlobalLoader, Shard, data_of
from bigmodel.training.draws import mixed
from bigmodel.training.evaluation import Evaluation, generated, mean_loss, rows_of_all
from bigmodel.training.export import export_model
from bigmodel.training.given import kind_of, optimizer_of, scheduler_of
from bigmodel.training.job import unread
from bigmodel.training.losses import CountItems
from bigmodel.training.outlook import Outlook
from bigmodel.training.place import Cursor, Division
from bigmodel.training.prepared import PreparedOptimizer, PreparedScheduler
from bigmodel.training.processes import Processes
from bigmodel.training.quantized import Quantized
from bigmodel.training.recompute import compile_units, recompute
from bigmodel.training.saves import Hook, Saves
from bigmodel.training.shortage import note_shortage
from bigmodel.training.sources import Source
from bigmodel.training.strategy import Engine, Streamed
from bigmodel.training.track import Tracking, flops_per_position, num_multiplied, positions_of
from bigmodel.training.weighing import Weighing, loss_of, moved
from bigmodel.training.weights import Origin

__all__ = ["Evaluation", "StepRecord", "TrainingRun"]

logger = logging.getLogger("bigmodel.training")

Params = list[nn.Parameter]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """Of one optimizer step, the same in all processes.

    Attributes:
        step: its number, from 1.
        loss: mean over the predicted labels of the global batch (over its samples, where there are no labels).
        num_tokens: predicted labels, or samples.
        grad_norm: of all gradients, before they were clipped.
        lr: of the first parameter group, in this step.
        skipped: whether the step was left out because a gradient was not finite.
    """

    step: int
    loss: float
    num_tokens: int
    grad_norm: float
    lr: float
    skipped: bool = False


class TrainingRun(Collectives, Tracking):
    """The verbs of a training loop, the same for every engine.

    ::

        run = TrainingRun(TrainingConfig(strategy="fsdp", global_batch_size=16, micro_batch_size=2))
        model, optimizer, loader = run.prepare(
            model="path", optimizer=lambda params: torch.optim.AdamW(params, lr=2e-5), data=dataset)
        for batch in loader:
            with run.accumulate():
                run.backward(run.loss(model(**batch), batch))
                run.step()

    Args:
        config: what is asked for; if None what the file asks for that `bigmodel launch --config` was given, or the defaults.

    Attributes:
        config, processes: as they are.
        last_step: of the last optimizer step; None before the first.
    """

    def __init__(self, config: TrainingConfig | None = None) -> None:
        if config is not None and not isinstance(config, TrainingConfig):
            raise InvalidArgumentError(f"config is a {type(config).__name__}. Give a bigmodel.training.TrainingConfig.")
        self.config = config or TrainingConfig.read()
        self.processes = Processes.join()
        self._trims = self.processes.device.type == "cpu" and bound_heap()
        self._make_engine = engine_of(self.config, self.processes)
        self.last_step: StepRecord | None = None
        self._engine: Engine | None = None
        self._optimizer: Optimizer | None = None
        self._scheduler: LRScheduler | None = None
        self._loader: GlobalLoader | None = None
        self._weighing: Weighing | None = None
        self._lost: list[torch.Tensor] = []  # of the micro-batches of the global batch
        self._num_steps = 0
        self._origin: Origin | None = None
        self._saves = Saves(self.processes)
        self._is_weighed = False  # whether run.loss was called for this micro-batch
        self._is_inside = False
        self._is_stepping = False
        self._is_fresh = False  # whether the last micro-batch of the global batch had its backward
        self._most: float | None = None  # norm that the coming step is clipped to
        self._clipped: float | None = None  # norm before it was, where it is clipped already
        self._was_scheduled = True  # whether the last step stepped the scheduler
        self._wants_to_stop = self._stops = self._heeds_signals = False
        self._stream: Iterator[Any] | None = None
        self._loaders: list[GlobalLoader] = []
        self._outlook: Outlook | None = None
        self._look_out: Callable[[], Outlook] | None = None
        self._counts = (0, 0, 0.0)  # parameters that are trained, all, and those that a token is multiplied with
        self._begin_tracking()

    def prepare(
        self,
        *objects: Any,
        model: Any = None,
        optimizer: Callable[[Params], Optimizer] | Optimizer | None = None,
        data: Any = None,
        scheduler: Callable[[Optimizer], LRScheduler] | LRScheduler | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        shard: Shard | None = None,
        adapter: Any = None,
        count_items: CountItems | None = None,
        resumes: str | os.PathLike[str] | None = None,
        trust_remote_code: bool = False,
        progress: bool | None = None,
    ) -> Any:
        """Put what the loop needs into the hands of the engine.

        Args:
            objects: a model, an optimizer, a DataLoader or a dataset, and a scheduler that were built already, in any order and
                as many of them as there are; or the same by keyword. The first DataLoader is trained on; further ones are for
                evaluation, as `prepare_eval` makes them.
            model: folder, Hub repo id or module.
            optimizer: of the parameters that are trained, to the optimizer; or one that was built of the model's parameters
                and has not stepped: it is pointed at those that take their place, its groups kept.
            data: a map-style or iterable dataset, or a DataLoader, whose batch size is the micro-batch of a process.
            scheduler: of the optimizer, to its scheduler; or one of the optimizer that is given. Stepped once per optimizer step.
            collate_fn: samples -> batch, where `data` is a dataset.
            num_workers: processes that make samples, where `data` is a dataset.
            shard: of iterable data: None, where each process goes through all of it and keeps its samples, the same for any
                number of processes; or what makes its own part, which alone it reads: "node", as Hugging Face datasets divide
                files or samples over processes, or a function of dataset, rank and number of processes. A checkpoint is then
                gone on with by as many processes.
            adapter: a `peft.LoraConfig`, or the folder of an adapter that is gone on with: put around the model, and alone
                trained. The model keeps the dtype that it is stored in; a checkpoint of the run holds the adapter alone.
            count_items: of a micro-batch, what its loss is a sum over; its labels that are not -100 if None.
            resumes: the checkpoint, or the folder of checkpoints, that will be loaded: what its run chose (engine, recomputation,
                and with as many processes the micro-batch) is kept where the configuration leaves it open. Nothing is loaded, and
                a folder without a checkpoint is one that begins.
            trust_remote_code: whether code of the checkpoint may run.
            progress: bars while weights are read; where stderr is a terminal if None.

        Returns:
            What was given, in that order (by keyword: model, optimizer, loader, scheduler); one alone is not in a tuple.

        Raises:
            InvalidArgumentError: for what means nothing, or contradicts the configuration.
            DoesNotFitError: nothing that the configuration leaves open fits.
            As `load_sharded`, for a checkpoint.
        """
        if self._engine is not None:
            raise InvalidArgumentError("prepare was called before. Make another TrainingRun for another model.")
        named = {"model": model, "optimizer": optimizer, "loader": data, "scheduler": scheduler}
        order = [kind_of(each) for each in objects]
        evaluated: dict[str, Any] = {}  # DataLoaders after the first
        for place, each in enumerate(objects):
            kind = order[place]
            if isinstance(each, DataLoader) and "loader" in order[:place]:
                order[place] = kind = f"evaluated {place}"
                evaluated[kind] = each
                continue
            if named[kind] is not None:
                raise InvalidArgumentError(
                    f"Two of one kind were given: a second {kind} is a {type(each).__name__}. Give one."
                )
            named[kind] = each
        order += [kind for kind in named if named[kind] is not None and kind not in order]
        if resumes is not None and not isinstance(resumes, (str, os.PathLike)):
            raise InvalidArgumentError(f"resumes is a {type(resumes).__name__}. Give the folder of a checkpoint.")
        if named["model"] is None:
            raise InvalidArgumentError("There is no model to train. Give a folder, a Hub repo id or a module.")
        loaded, skips = None, self.config.skip_samples
        if named["loader"] is not None:
            loaded = data_of(
                named["loader"], collate_fn, num_workers, processes=self.processes, shard=shard, skips=skips
            )
        elif shard is not None:
            raise InvalidArgumentError("shard was given, and no data that it divides. Give both.")
        sources = {kind: data_of(each, None, 0, processes=self.processes) for kind, each in evaluated.items()}
        of_loader = None if loaded is None else loaded.batch_size
        _refuse_two_sizes(self.config, of_loader)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)  # weights that no checkpoint has are the same everywhere
            origin = Origin.of(
                named["model"],
                adapter=adapter,
                quantize_base=self.config.quantize_base,
                trust_remote_code=trust_remote_code,
            )
        if not origin.streams:
            here, asked = unread(origin), self.config
            self._look_out = lambda: outlook_of(
                asked if of_loader is None else replace(asked, micro_batch_size=of_loader),
                here,
                cluster_here(
                    Machine.probe(asked.nvme_folder),
                    self.processes,
                    nvme_folder=asked.nvme_folder,
                    swap=None if self._engine is None else self._engine.swap,
                ),
                source=loaded,
                optimizer=named["optimizer"],
            )
        opens = not origin.streams and stays_open(self.config, self.processes, of_loader)
        if len(set(self.processes.gathered((opens, self.config.strategy)))) > 1:
            raise InvalidArgumentError(
                "Processes were given different configurations: some leave the strategy or micro_batch_size open, others do not. "
                "Give all of them the same."
            )
        if opens:
            self.config, self._outlook = decide(
                self.config,
                origin,
                self.processes,
                source=loaded,
                optimizer=named["optimizer"],
                resumes=resumes,
            )
            if self._outlook is None and resumes is not None and self.config.strategy != asked.strategy:
                asked = self.config  # as another run chose
            self._make_engine = engine_of(self.config, self.processes)
        micro = self._micro_batch_size(of_loader)
        together = self.config.global_batch_size or micro * self.processes.size
        if shard is not None and together < self.processes.size:
            raise InvalidArgumentError(
                f"global_batch_size is {together}, and each of {self.processes.size} processes reads a part of its own: some "
                "would never be read. Give at least as many samples as processes."
            )
        if is_adapted(origin.module) and self.config.precision == "fp8":
            raise InvalidArgumentError('precision is "fp8", and adapters are not trained in it. Give precision="bf16".')
        if self.config.compile_blocks:
            if origin.streams:
                raise InvalidArgumentError(
                    "compile_blocks was given, and the model streams its weights: its units run as they are. Leave it out."
                )
            backend = self.config.compile_blocks if isinstance(self.config.compile_blocks, str) else "inductor"
            compile_units(origin.module, origin.groups(), backend, self.processes.device)
        if self.config.activation_checkpointing == "on" and not origin.streams:  # whose units are recomputed anyway
            recompute(origin.module, origin.groups())
        before = dict(origin.module.named_parameters())
        counts = [(each.numel(), each.requires_grad) for each in before.values()]
        trained = sum(number for number, is_trained in counts if is_trained), sum(number for number, _ in counts)
        multiplied = num_multiplied(origin.module)  # while names and shapes are the model's own
        with progress_bar(progress if self.is_main_process else False) as report:
            make = Streamed if origin.streams else self._make_engine
            engine: Engine = make(origin, self.config, self.processes, report)
            own = optimizer_of(named["optimizer"], before, engine)
            engine.take(own)
        _refuse_wrong_masters(engine)
        self._engine, self._origin, self._optimizer = engine, origin, own
        self._counts = (*trained, multiplied)
        self._seed_draws(0)  # dropout is another in each process
        if self.is_main_process:
            logger.info("%s", engine.describe())
            if is_adapted(origin.module):
                logger.info("adapters: %d of %d parameters are trained", *trained)
                packed = [each for each in origin.module.modules() if isinstance(each, Quantized)]
                if packed:
                    number = sum(each.in_features * each.out_features for each in packed)
                    told = len(packed), number / 1e6, trained[1] / 1e6
                    logger.info("in 4 bits: %d linear layers, %.1f of %.1f million parameters", *told)
        engine.model.register_forward_pre_hook(self._look, with_kwargs=True)
        engine.model.register_forward_hook(lambda module, args, outputs: self._weighed.saw(outputs))
        engine.model.register_forward_hook(self._note, always_call=True)  # also where it fails
        made: dict[str, Any] = {"model": engine.model}
        made |= {kind: self._evaluated(each) for kind, each in sources.items()}
        self._scheduler = scheduler_of(named["scheduler"], own)
        if own is not None:
            own.register_step_pre_hook(self._refuse_own_step)
            made["optimizer"] = PreparedOptimizer(own, self._step_if_due)
        if self._scheduler is not None:
            made["scheduler"] = PreparedScheduler(self._scheduler, self._is_scheduling_due)
        self._weighing = Weighing(engine.module, engine.model, self.processes, count_items)
        if loaded is not None:
            made["loader"] = self._loader = GlobalLoader(
                loaded,
                self._division(together, micro),
                Cursor(seed=self.config.seed),
                drop_last=self.config.drop_last,
                begin=self._weighing.begin,
            )
            self._loaders.append(self._loader)
        found = tuple(made[kind] for kind in order)
        return found[0] if len(found) == 1 else found

    def explain(self) -> str:
        """What each way that the configuration left open takes in memory and time, which one was taken, and why.

        Where nothing was left open it is tried now, without the weights, which takes some passes' Python.

        Raises:
            TrainingError: nothing was prepared, or it cannot be tried: the message says why.
        """
        engine = self._prepared()
        if self._look_out is None:
            return f"{engine.describe()}. Where its weights are: bigmodel.plan_of(model).explain()"
        if self._outlook is None:
            try:
                self._outlook = self._look_out()
            except NotTriedError as error:
                raise TrainingError(f"What a step takes could not be tried: {error}") from error
        return f"{engine.describe()}\n{self._outlook.explain()}"

    # --- The loop's verbs

    @contextlib.contextmanager
    def accumulate(self, *models: nn.Module) -> Iterator[None]:
        """Around forward, backward and step of one micro-batch: gradients are reduced in the last one of a global batch."""
        self._is_weighed = False
        if self._weighing is not None:
            self._weighing.forget()
        self._is_inside = True
        try:
            with self._prepared().syncing(self._is_last):
                yield
        finally:
            self._is_inside = False

    def loss(self, outputs: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        """A micro-batch's part of the mean over the global batch.

        Args:
            outputs: what the model returned, with a loss; or, with `count_items`, the sum of the losses itself, a scalar.
            batch: the micro-batch.

        Raises:
            TrainingError: there is no loss.
        """
        if isinstance(outputs, torch.Tensor):
            if not self._weighed.has_own_count:
                raise TrainingError(
                    "run.loss was given a tensor, and it is not known what it is a sum over. Give prepare(count_items=...), or "
                    "what the model returned."
                )
            part = outputs / max(1, self._weighed.total)
        else:
            loss = loss_of(outputs)
            if loss is None:
                raise TrainingError("The model returned no loss. Give it labels, or run.loss the sum of the losses.")
            part = self._part_of(loss)
        self._is_weighed = True
        return part

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of a loss, added to those of the global batch.

        Args:
            loss: what `run.loss` returned for this micro-batch, with whatever was added to it; or, where that was not called,
                the model's own loss.
        """
        engine = self._prepared()
        part = loss if self._is_weighed else self._part_of(loss)
        self._is_weighed = False
        self._weighed.forget()
        self._lost.append(part.detach())
        # The engine takes the mean over processes. Parts of a global batch add up; without a loader of ours there is none.
        times = engine.num_averaged if self._loader is not None else 1
        if self._loader is not None:
            self._loader.is_touched = True
        self._is_fresh = self._is_last
        try:
            engine.backward(part * times if times > 1 else part, self._is_last)
        except Exception:
            self._note(engine.model)
            raise

    def step(self) -> None:
        """After the last micro-batch of a global batch: clip, step and schedule; before it, nothing.

        Where a gradient is not finite the step is left out, and `last_step` says so.

        Raises:
            TrainingError: the global batch that the loader gave last is stepped already, or it gave none; or its last micro-batch
                had no backward.
        """
        if self._loader is not None and not self._loader.is_under_way and not self._is_fresh:
            raise TrainingError(
                "There is nothing to step: the loader gave no global batch since the last step. Call run.step() once per "
                "micro-batch, after run.backward(loss)."
            )
        self._step(schedules=True)

    def _step(self, *, schedules: bool) -> None:
        engine, optimizer = self._prepared(), self._optimizer
        if not self._is_last:
            return
        if optimizer is None:
            raise TrainingError("There is no optimizer. Give prepare one.")
        if not self._is_fresh:
            self._refuse_no_backward()
        lost = float(torch.stack(self._lost).sum()) if self._lost else 0.0
        if self._loader is None:  # gradients are the mean over processes
            lost /= self.processes.size
        lr = float(optimizer.param_groups[0]["lr"])
        most = self.config.grad_clip if self._most is None else self._most
        clipped, self._clipped = self._clipped, None
        self._is_stepping = True
        try:
            sums = [lost, float(self._wants_to_stop), float(self._num_positions)]
            norm, (lost, stopping, positions), has_stepped = engine.step(optimizer, most, sums)
        finally:
            self._is_stepping = self._is_fresh = False
        self._most, self._stops, self._was_scheduled = None, stopping > 0, schedules
        self._num_positions = 0
        if has_stepped:
            if schedules and self._scheduler is not None:
                self._scheduler.step()
            self._num_steps += 1
        self.last_step = StepRecord(
            step=self._num_steps,
            loss=lost,
            num_tokens=self._weighed.total,
            grad_norm=norm if clipped is None else clipped,
            lr=lr,
            skipped=not has_stepped,
        )
        self._lost = []
        if self._loader is not None:
            self._loader.stepped()
        if self._trims:
            trim_heap()
        self._tell(self.last_step, int(positions))

    def train_step(self) -> StepRecord:
        """Forward, backward and step for all micro-batches of the next global batch; after the last of an epoch, of the next.

        Returns:
            `last_step`.
        """
        engine, loader = self._prepared(), self._loader
        if loader is None:
            raise TrainingError("There is no data. Give prepare a dataset or a DataLoader.")
        if self._stream is None:
            self._stream = iter(loader)
        before = self.last_step
        while self.last_step is before:
            batch = next(self._stream, None)
            if batch is None:
                self._stream = iter(loader)
                batch = next(self._stream, None)
                if batch is None:
                    raise TrainingError(
                        f"An epoch has no global batch: drop_last is True, and there are {loader.cursor.num_samples} samples."
                    )
            with self.accumulate():
                self.backward(self.loss(engine.model(**batch), batch))
                self.step()
        assert self.last_step is not None
        return self.last_step

    def clip_grad_norm_(self, parameters: Any, max_norm: float) -> torch.Tensor | None:
        """Clip all gradients together to this norm; before the last micro-batch, nothing.

        `TrainingConfig(grad_clip=...)` says the same for all steps, and needs one sum over processes less.

        Args:
            parameters: all that are trained.
            max_norm: as in `torch.nn.utils.clip_grad_norm_`.

        Returns:
            The norm before, a scalar on the CPU; None before the last micro-batch, and with ZeRO, which clips in its step:
            `last_step` has it then.
        """
        given = {id(each) for each in ([parameters] if isinstance(parameters, torch.Tensor) else parameters)}
        trained = {id(each) for each in self.unwrap().parameters() if each.requires_grad}
        if not trained <= given:
            raise InvalidArgumentError(
                f"clip_grad_norm_ was given {len(trained & given)} of {len(trained)} parameters that are trained: a run clips "
                "the norm of all. Give model.parameters()."
            )
        if not max_norm > 0:
            raise InvalidArgumentError(f"max_norm is {max_norm}. Give a positive number.")
        if not self._is_last or self._optimizer is None:
            return None
        norm = self._prepared().clip(self._optimizer, float(max_norm))
        if norm is None:
            self._most = float(max_norm)
            return None
        self._clipped = norm
        return torch.tensor(norm)

    @property
    def sync_gradients(self) -> bool:
        """Whether the micro-batch that was given last ends its global batch."""
        return self._is_last

    def stop(self) -> None:
        """Ask all processes to stop: `should_stop` is True for all after the next optimizer step."""
        self._wants_to_stop = True

    @property
    def should_stop(self) -> bool:
        """Whether any process called `stop`, or was sent SIGTERM or SIGUSR1 (SLURM's ``--signal=USR1@300``) since this was first
        asked: as of the last optimizer step, so that all processes get the same answer. A loop that asks decides itself what
        they do."""
        if not self._heeds_signals:
            self._heeds_signals = True
            if threading.current_thread() is threading.main_thread():
                for each in (signal.SIGTERM, signal.SIGUSR1):
                    signal.signal(each, lambda *_: self.stop())
        return self._stops

    @contextlib.contextmanager
    def profile(self, folder: str | os.PathLike[str] | None = None, **options: Any) -> Iterator[Any]:
        """torch's profiler around what is inside.

        Args:
            folder: where each process writes ``rank-N.json``, which chrome://tracing and Perfetto show; None writes nothing.
            options: of `torch.profiler.profile`.

        Yields:
            The profiler.
        """
        from torch.profiler import profile

        with profile(**options) as profiler:
            yield profiler
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(Path(folder) / f"rank-{self.processes.rank}.json"))

    def gather_for_metrics(self, values: Any) -> Any:
        """Rows of all processes for the micro-batch that was given last, in the order of the data, without those that only fill
        places.

        Args:
            values: tensors ``[samples of the micro-batch, ...]``, in lists, tuples and mappings; or a list of one object for each
                sample.

        Returns:
            The same structure, tensors ``[samples, ...]``, in every process.
        """
        loader = max(self._loaders, key=lambda each: each.given_at, default=None)
        if loader is None or loader.given_at < 0:
            raise TrainingError("No micro-batch was given yet. Call gather_for_metrics inside a pass over the data.")
        return rows_of_all(values, loader, self)

    def save(self, folder: str | os.PathLike[str], *, keep: int | None = None, wait: bool = True) -> Path:
        """Write all that the run needs to go on: model, optimizer, scheduler, place in the data, random generators.

        Every process calls it, between two optimizer steps. It is put in its place whole: a kill at any moment leaves the last
        one.

        Args:
            folder: one checkpoint; replaced where it is one.
            keep: of this run's checkpoints beside it, the newest so many stay; None keeps all.
            wait: whether it is written before this returns. Otherwise tensors are copied in memory, a thread writes them while
                training goes on, and `wait_for_saving`, or the next save, load or export, raises what went wrong.

        Raises:
            InvalidArgumentError: the folder holds something else.
            TrainingError: not every process called it within five minutes.
        """
        engine, path = self._prepared(), Path(folder)
        if self._loader is not None:
            self._loader.refuse_inside("save a checkpoint")
        engine.rest()
        cursor = None if self._loader is None else self._loader.cursor.to_dict()

        def others() -> dict[str, Any]:
            return {
                "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
                "data": None if self._loader is None else self._loader.state(self.processes),
                "loss_scale": None if engine.loss_scale is None else engine.loss_scale.state_dict(),
            }

        chosen = {name: getattr(self.config, name) for name in CHOSEN}
        manifest = {
            "step": self._num_steps,
            "cursor": cursor,
            "adapter": self._scales(),
            "quantize_base": self.config.quantize_base,
            "chosen": chosen,
        }
        self._saves.write(path, engine, self._optimizer, manifest, others, keep=keep, wait=wait)
        return path

    def wait_for_saving(self) -> None:
        """For what `save(wait=False)` began to be written; raises what went wrong with it."""
        self._saves.finish()

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Go on where `save` was called, with any number of processes and any engine; every process calls it, after prepare.

        Raises:
            MissingFilesError: there is no complete checkpoint.
            TrainingError: it is of another model, optimizer or dataset.
        """
        engine, path = self._prepared(), Path(folder)
        self._saves.finish()
        engine.rest()

        def refuse(manifest: Mapping[str, Any], others: Mapping[str, Any]) -> None:
            saved, own = manifest.get("adapter"), self._scales()
            if saved != own:
                told = ", ".join(
                    f"{name} {(saved or {}).get(name)} there and {(own or {}).get(name)} here"
                    for name in sorted((saved or {}).keys() | (own or {}).keys())
                    if (saved or {}).get(name) != (own or {}).get(name)
                )
                raise TrainingError(f"{path} is of another adapter: {told}. Prepare the one that was saved.")
            base = manifest.get("quantize_base")
            if base != self.config.quantize_base:
                raise TrainingError(
                    f"The adapter of {path} was trained on a base {_told_base(base)}, and this one is "
                    f"{_told_base(self.config.quantize_base)}: its losses would be others. Give quantize_base={base!r}; or, to "
                    "change the base, run.export, and prepare with the exported folder as adapter."
                )
            if manifest["cursor"] is not None and self._loader is not None:
                self._loader.refuse_other(Cursor(**manifest["cursor"]), others.get("data"))

        manifest, others = self._saves.read(path, engine, self._optimizer, refuse)
        if manifest["num_processes"] != self.processes.size:  # whose generators were not saved
            self._seed_draws(manifest["step"])
        if manifest["cursor"] is not None and self._loader is not None:
            self._loader.resume(Cursor(**manifest["cursor"]), others.get("data"))
        if self._scheduler is not None and others["scheduler"] is not None:
            self._scheduler.load_state_dict(others["scheduler"])
        if engine.loss_scale is not None and others.get("loss_scale") is not None:
            engine.loss_scale.load_state_dict(others["loss_scale"])
        self._num_steps, self._stream = manifest["step"], None
        self._lost, self._is_fresh, self._most, self._clipped = [], False, None, None
        if self._optimizer is not None:
            engine.forget(self._optimizer)
        self._saves.loaded(path)

    def load_last(self, folder: str | os.PathLike[str]) -> Path | None:
        """Load the newest complete checkpoint inside a folder; its path, or None where there is none."""
        newest = self._saves.newest(Path(folder))
        if newest is not None:
            self.load(newest)
        return newest

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Save and load these too: objects with `state_dict` and `load_state_dict`, of plain values and tensors."""
        self._saves.register(objects)

    def register_checkpoint_hooks(self, *, on_save: Hook | None = None, on_load: Hook | None = None) -> None:
        """Files of your own in each checkpoint: written before it is put in its place, so they are there whenever it is.

        Args:
            on_save: called in every process with the folder that is being written, before anything else is; after
                `save(wait=False)` in its thread, where it must not talk to other processes. Names that a checkpoint has itself
                are refused: `manifest.json`, `state.pt`, `random-*.pt`, `*.distcp`, `.metadata`.
            on_load: called in every process with the folder of the checkpoint, when all else was read.
        """
        self._saves.add_hooks(on_save, on_load)

    def export(
        self, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB", merge: bool = False
    ) -> list[Path]:
        """Write the model as `load_sharded` and `from_pretrained` read it: in the dtype that it came in, tied weights once, with
        configuration and tokenizer; of a model with adapters these alone, as PEFT reads them. Every process calls it.

        Args:
            folder: made if it is not there.
            max_shard_size: of a file of the model.
            merge: of a model with adapters: whether the model is written, with the adapters added to its weights.

        Returns:
            The files; in other processes than the main one, none.

        Raises:
            As `bigmodel.save`.
            InvalidArgumentError: there are no adapters to merge, or the folder of adapters holds a model.
        """
        self._saves.finish()
        self._prepared().rest()
        assert self._origin is not None
        return export_model(Path(folder), self._prepared(), self._origin, self.processes, max_shard_size, merge=merge)

    def prepare_eval(
        self, data: Any, *, collate_fn: Callable[[list[Any]], Any] | None = None, num_workers: int = 0
    ) -> GlobalLoader:
        """What `evaluate` goes through: a dataset or DataLoader, in its own order; it moves no place in the training data.

        Args:
            data, collate_fn, num_workers: as in `prepare`.
        """
        return self._evaluated(data_of(data, collate_fn, num_workers, processes=self.processes))

    def evaluate(self, loader: GlobalLoader) -> Evaluation:
        """The mean loss over all predicted labels of all processes; every process calls it.

        Args:
            loader: what `prepare_eval` returned, or the second DataLoader that `prepare` did.

        Raises:
            TrainingError: no label is predicted, or the model returns no loss.
        """
        return mean_loss(loader, self._prepared(), self._weighed)

    def generate(self, *inputs: Any, **options: Any) -> Any:
        """transformers' `generate` with the weights as they are now, in evaluation mode, in every engine.

        Every process calls it, each with prompts of its own: `split_between_processes` divides them, `gather_objects` and
        `pad_across_processes` with `gather` bring the answers together.

        Args:
            inputs, options: of the model's `generate`; tensors are moved to the device.

        Returns:
            What it does, such as ids ``[prompts, length]``.

        Raises:
            InvalidArgumentError: the model has no generate.
        """
        return generated(self._prepared(), inputs, options)

    def engine_arguments(self) -> dict[str, Any]:
        """What the engine's library was given, as JSON would have it: DeepSpeed's settings, or FSDP2's groups and policy."""
        return self._prepared().arguments()

    def unwrap(self, model: nn.Module | None = None) -> nn.Module:
        """The user's module, with the user's names; its parameters are the masters, or this process's parts of them;
        with ZeRO they are what computes, and `export` has the masters."""
        engine = self._prepared()
        if not self._is_inside:
            engine.rest()
        return engine.module

    # --- How

    @property
    def _is_last(self) -> bool:
        return self._loader is None or self._loader.is_last

    def _scales(self) -> dict[str, Any] | None:
        module = self._prepared().module
        return adapter_scales(module) if is_adapted(module) else None

    @property
    def _is_begun(self) -> bool:
        """Whether a micro-batch of the global batch had its backward."""
        return self._loader is not None and self._loader.is_touched

    def _refuse_no_backward(self) -> None:
        if self._is_begun:
            raise TrainingError(
                "The last micro-batch of this global batch had no backward, in which gradients are summed over processes. Call "
                "run.backward for each; one that should add nothing gets run.backward(loss * 0)."
            )
        if self._prepared().needs_gradients:
            raise TrainingError(
                "There is nothing to step: there was no backward since the last step. Call run.backward(loss) before run.step()."
            )

    def _prepared(self) -> Engine:
        if self._engine is None:
            raise TrainingError("Nothing was prepared. Call run.prepare first.")
        return self._engine

    def _division(self, together: int, micro: int) -> Division:
        processes = self.processes
        return Division(
            global_batch_size=together, micro_batch_size=micro, rank=processes.rank, num_processes=processes.size
        )

    def _evaluated(self, source: Source) -> GlobalLoader:
        source.shuffles = False
        micro = source.batch_size or self._micro_batch_size(None)
        division = self._division(micro * self.processes.size, micro)
        loader = GlobalLoader(source, division, Cursor(seed=self.config.seed), drop_last=False, begin=self._moved)
        self._loaders.append(loader)
        return loader

    def _micro_batch_size(self, of_loader: int | None) -> int:
        stated = self.config.micro_batch_size
        if stated == "auto":
            if of_loader is None and self.is_main_process:
                logger.info("micro_batch_size is 1: it was not stated")
            return of_loader or 1
        assert isinstance(stated, int)
        return stated

    def _tracked_name(self) -> str:
        return self._saves.run_id[:8]

    def _last_number(self) -> int:
        return self._num_steps

    def _hyperparameters(self) -> dict[str, Any]:
        engine = self._prepared()
        return {
            **{each.name: getattr(self.config, each.name) for each in fields(self.config)},
            "num_processes": self.processes.size,
            "model": type(engine.module).__name__,
            "num_parameters": self._counts[1],
            "num_trained": self._counts[0],
            "optimizer": None if self._optimizer is None else type(self._optimizer).__name__,
        }

    def _flops_per_position(self) -> float:
        return flops_per_position(*self._counts)

    @property
    def _weighed(self) -> Weighing:
        self._prepared()
        assert self._weighing is not None
        return self._weighing

    def _part_of(self, loss: torch.Tensor) -> torch.Tensor:
        return loss if self._loader is None else self._weighed.weighed(loss, self._loader.number)

    def _look(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if module.training and torch.is_grad_enabled():
            self._num_positions += positions_of(args, kwargs)
        return self._weighed.look(None if self._loader is None else self._loader.number, args, kwargs)

    def _note(self, model: nn.Module, *of_forward: Any) -> None:
        if self._loader is not None:
            is_host = self.processes.device.type == "cpu"
            note_shortage(self.config, self._loader.division, is_training=model.training, is_host=is_host)

    def _seed_draws(self, step: int) -> None:
        torch.manual_seed(mixed(self.config.seed, step, self.processes.rank))

    def _moved(self, batches: list[Any]) -> list[Any]:
        return [moved(each, self.processes.device) for each in batches]

    def _step_if_due(self) -> None:
        if self._is_last and (self._is_fresh or self._is_begun):
            self._step(schedules=False)

    def _is_scheduling_due(self) -> bool:
        """Whether the loop, which steps the prepared optimizer, steps the scheduler now."""
        record = self.last_step
        return self._is_last and not self._was_scheduled and record is not None and not record.skipped

    def _refuse_own_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._is_stepping:
            raise TrainingError(
                "The optimizer that prepare was given was stepped. Step the one that it returned, or call run.step: they clip, "
                "step and schedule after the last micro-batch of a global batch, and clear the gradients."
            )


def _refuse_two_sizes(config: TrainingConfig, of_loader: int | None) -> None:
    stated = config.micro_batch_size
    if stated != "auto" and of_loader is not None and of_loader != stated:
        raise InvalidArgumentError(
            f"micro_batch_size is {stated}, and the DataLoader's batch_size is {of_loader}. Both are the samples of one "
            "pass of one process: give one of them."
        )


def _told_base(quantization: str | None) -> str:
    return "as it is stored" if quantization is None else f"in {quantization}"


def _refuse_wrong_masters(engine: Engine) -> None:
    masters = engine.masters()
    wrong = [
        f"{name} ({masters[name].dtype})"
        for name, parameter in engine.trained().items()
        if parameter.is_floating_point() and masters[name].dtype != torch.float32
    ]
    if wrong:
        raise TrainingError(f"{len(wrong)} parameters that are trained are not float32, such as {wrong[0]}.")
