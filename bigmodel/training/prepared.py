"""An optimizer and a scheduler in the hands of a run, for loops that call them: they wait for the end of the global batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bigmodel.errors import TrainingError

__all__ = ["PreparedOptimizer", "PreparedScheduler"]


class PreparedOptimizer(Optimizer):
    """The user's optimizer: `step` is the run's, after the last micro-batch of a global batch, and nothing before it.

    Everything else is the optimizer's own.

    Args:
        optimizer: the user's.
        step: called for each `step`.
    """

    def __init__(self, optimizer: Optimizer, step: Callable[[], None]) -> None:
        self.__dict__.update(optimizer=optimizer, _run_step=step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["optimizer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("state", "param_groups", "defaults"):
            setattr(self.optimizer, name, value)
        else:
            self.__dict__[name] = value

    def __repr__(self) -> str:
        return repr(self.optimizer)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Clip, step and schedule, once for each global batch.

        Raises:
            TrainingError: there is a closure.
        """
        if closure is not None:
            raise TrainingError(
                "A closure would compute the loss again, which the run does not. Call step without one."
            )
        self._run_step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: a step clears the gradients, and those of a global batch add up until then."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """TrainingError: the engine has divided what there was."""
        raise TrainingError("Parameters cannot be added after prepare. Give the optimizer all of them before.")

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's own: this process's part. `run.save` writes it in a form that every engine reads."""
        return self.optimizer.state_dict()  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: Any) -> None:
        """The optimizer's own."""
        self.optimizer.load_state_dict(state_dict)


class PreparedScheduler(LRScheduler):
    """The user's scheduler. `run.step` steps it; where the loop steps the prepared optimizer, the loop's own calls do.

    Args:
        scheduler: the user's.
        may_step: asked at each `step`.
    """

    def __init__(self, scheduler: LRScheduler, may_step: Callable[[], bool]) -> None:
        self.__dict__.update(scheduler=scheduler, _may_step=may_step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["scheduler"], name)

    def step(self, epoch: Any = None) -> None:
        """One step after the last micro-batch of a global batch, if that step was not left out; nothing before it, and where
        the run steps the scheduler."""
        if self._may_step():
            self.scheduler.step()

    def get_last_lr(self) -> list[Any]:
        """Of each parameter group."""
        return self.scheduler.get_last_lr()  # type: ignore[no-any-return]

    def get_lr(self) -> list[Any]:
        """As the scheduler computes it."""
        return self.scheduler.get_lr()  # type: ignore[no-any-return]

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's own."""
        return self.scheduler.state_dict()  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The scheduler's own."""
        self.scheduler.load_state_dict(state_dict)
