"""The C++ rows, for float32 and bfloat16 on the CPU."""

import ctypes

import torch
from torch import Tensor

from lightbulb.kernels.native import INT, POINTER, function
from lightbulb.kernels.softmax.rows import row_stride

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_Places = ctypes.c_int64 * 8


def supports(*tensors: Tensor) -> bool:
    """Whether all are of one dtype that has rows here."""
    return tensors[0].dtype in _NAMES and all(t.dtype == tensors[0].dtype for t in tensors)


def forward(scores: Tensor, mask: Tensor | None, sink: Tensor | None, out: Tensor, share: Tensor | None) -> None:
    """Write the softmax to ``out`` and the sink's part of it to ``share``.

    Args:
        scores: ``[a, b, rows, keys]``, whose rows are at one distance from each other and keys side by side.
        mask: bool, expanded to scores' shape, keys side by side; None for every key.
        sink: ``[a, b, rows]`` in float32, expanded; None for none.
        out: as scores, and may be scores.
        share: ``[a, b, rows]`` in float32, contiguous; None where sink is None.
    """
    *_, middle, inner, keys = scores.shape
    rows = scores.shape[:3].numel()
    strides = [(0, 0, 0) if t is None else t.stride()[:3] for t in (mask, sink)]
    call = function(
        f"softmax_{_NAMES[scores.dtype]}", POINTER, INT, *[POINTER] * 4, INT, POINTER, INT, INT, INT,
    )  # fmt: skip
    call(
        scores.data_ptr(), row_stride(scores), _address(mask), _address(sink),
        _Places(middle, inner, *strides[0], *strides[1]), out.data_ptr(), row_stride(out), _address(share), rows, keys,
        torch.get_num_threads(),
    )  # fmt: skip


def backward(grad: Tensor, weights: Tensor, out: Tensor, dots: Tensor) -> None:
    """Write ``weights * (grad - dots)`` to ``out`` and ``sum(grad * weights)`` of each row to ``dots``.

    Args:
        grad: ``[a, b, rows, keys]``, whose rows are at one distance from each other and keys side by side.
        weights: as grad.
        out: as grad, and may be grad or weights.
        dots: ``[a, b, rows]`` in float32, contiguous.
    """
    call = function(f"softmax_grad_{_NAMES[grad.dtype]}", *[POINTER, INT] * 3, POINTER, INT, INT, INT)
    places = [number for t in (grad, weights, out) for number in (t.data_ptr(), row_stride(t))]
    call(*places, dots.data_ptr(), dots.numel(), grad.shape[3], torch.get_num_threads())


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
