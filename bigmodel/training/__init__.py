"""Training: one facade over torch's engines. See README.md."""

from bigmodel.footprint import use_huge_pages
from bigmodel.launch.notebook import notebook_launcher
from bigmodel.training.config import TrainingConfig
from bigmodel.training.run import Evaluation, StepRecord, TrainingRun

__all__ = ["Evaluation", "StepRecord", "TrainingConfig", "TrainingRun", "notebook_launcher"]

use_huge_pages()  # before there is a tensor
