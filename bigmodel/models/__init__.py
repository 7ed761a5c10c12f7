"""A model without its weights, and where the bytes of each weight come from."""

from bigmodel.models.heads import leave_heads
from bigmodel.models.inputs import example_inputs
from bigmodel.models.meta import owners_of
from bigmodel.models.pretrained import (
    build_skeleton,
    build_without_weights,
    import_libraries,
    load_generation_config,
    revert_of,
)
from bigmodel.models.skeleton import Skeleton

__all__ = [
    "Skeleton",
    "build_skeleton",
    "build_without_weights",
    "example_inputs",
    "import_libraries",
    "leave_heads",
    "load_generation_config",
    "owners_of",
    "revert_of",
]
