"""Training: one facade over torch's engines. See README.md."""

from bigmodel.training.config import TrainingConfig
from bigmodel.training.run import Evaluation, StepRecord, TrainingRun

__all__ = ["Evaluation", "StepRecord", "TrainingConfig", "TrainingRun"]
