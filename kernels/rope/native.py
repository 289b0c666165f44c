"""The C++ rows, for float32 and bfloat16 on the CPU."""

import ctypes

import torch
from torch import Tensor

from lightbulb.kernels.native import FLOAT, INT, POINTER, function

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_Sizes, _Strides = ctypes.c_int64 * 4, ctypes.c_int64 * 9


def supports(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether there are rows for these dtypes."""
    return x.dtype in _NAMES and cos.dtype == sin.dtype == torch.float32


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, backwards: bool) -> None:
    """Write the rotated ``x`` to ``out``; backwards, by the negative angles.

    Args:
        x: ``[length, batch, heads, width]`` in any order, the features side by side.
        cos: ``[length, batch, heads, width / 2]`` in float32, expanded; the features side by side.
        sin: as cos, with the same strides.
        out: as x.
        backwards: the transposed rotation, which takes gradients back.
    """
    length, batch, heads, width = x.shape
    strides = _Strides(*x.stride()[:3], *out.stride()[:3], *cos.stride()[:3])
    call = function(f"rope_{_NAMES[x.dtype]}", *[POINTER] * 6, FLOAT, INT)
    call(
        x.data_ptr(), out.data_ptr(), cos.data_ptr(), sin.data_ptr(), strides, _Sizes(length, batch, heads, width // 2),
        -1.0 if backwards else 1.0, torch.get_num_threads(),
    )  # fmt: skip
