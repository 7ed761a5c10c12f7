"""From a path to a plan, and from a plan to a model that runs."""

from bigmodel.loading.load import load_sharded
from bigmodel.loading.planning import make_plan

__all__ = ["load_sharded", "make_plan"]
