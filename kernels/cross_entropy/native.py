"""The C++ rows, for float32 and bfloat16 logits on the CPU."""

import torch
from torch import Tensor

from lightbulb.kernels.native import FLOAT, INT, POINTER, function

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
DTYPES = tuple(_NAMES)
_TYPES = (POINTER, INT, POINTER, INT, POINTER, POINTER, FLOAT, *[INT] * 5)


def run(
    logits: Tensor, labels: Tensor, first: int, lse: Tensor, target: Tensor, z_loss: float, measures: bool, writes: bool
) -> None:
    """What :func:`~lightbulb.kernels.cross_entropy.rows.run` says, of logits with columns side by side."""
    call = function(f"cross_entropy_{_NAMES[logits.dtype]}", *_TYPES)
    places = (logits.data_ptr(), logits.stride(0), labels.data_ptr(), first, lse.data_ptr(), target.data_ptr())
    call(*places, z_loss, *logits.shape, measures, writes, torch.get_num_threads())
