"""A model without its weights, and where the bytes of each weight come from."""

from bigmodel.models.adapters import (
    ADAPTER_FILES,
    adapt,
    adapter_config,
    adapter_nbytes,
    adapter_scales,
    adapter_tensors,
    is_adapted,
    load_adapter,
    lora_of,
    merge_adapter,
    trains_adapters_alone,
)
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
    "ADAPTER_FILES",
    "Skeleton",
    "adapt",
    "adapter_config",
    "adapter_nbytes",
    "adapter_scales",
    "adapter_tensors",
    "build_skeleton",
    "build_without_weights",
    "example_inputs",
    "import_libraries",
    "is_adapted",
    "leave_heads",
    "load_adapter",
    "load_generation_config",
    "lora_of",
    "merge_adapter",
    "owners_of",
    "revert_of",
    "trains_adapters_alone",
]
