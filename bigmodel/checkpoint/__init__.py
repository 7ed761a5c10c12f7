"""What a checkpoint holds and where its bytes are: opened, checked, not read."""

from bigmodel.checkpoint.checkpoint import Checkpoint, open_checkpoint, refuse_prequantised
from bigmodel.checkpoint.header import encode_header, read_header
from bigmodel.checkpoint.spec import Conversion, Extent, Source, TensorSpec
from bigmodel.checkpoint.unread import open_unread

__all__ = [
    "Checkpoint",
    "Conversion",
    "Extent",
    "Source",
    "TensorSpec",
    "encode_header",
    "open_checkpoint",
    "open_unread",
    "read_header",
    "refuse_prequantised",
]
