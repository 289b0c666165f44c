"""The C++ rows, for float32 and bfloat16 on the CPU."""

import torch
from torch import Tensor

from lightbulb.kernels.native import FLOAT, INT, POINTER, function

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_MAX_BLOCKS = 64  # parts of the weight's gradient: enough for the threads of a socket
_MIN_ROWS = 16  # in a block, so that adding up the parts costs little


def supports(*tensors: Tensor) -> bool:
    """Whether all are of one dtype that has rows here."""
    return tensors[0].dtype in _NAMES and all(t.dtype == tensors[0].dtype for t in tensors)


def forward(x: Tensor, delta: Tensor | None, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised rows, the rows ``x + delta`` (x itself without delta) and what each was multiplied by.

    Args:
        x: ``[rows, dim]`` with columns side by side, as all here.
        delta: as x, or None.
        weight: ``[dim]`` in float32, or None.
        eps: added to the mean square.
    """
    (rows, dim), (y, total) = x.shape, (_like(x), x if delta is None else _like(x))
    scale = x.new_empty(rows, dtype=torch.float32)
    call = function(
        f"rms_norm_{_NAMES[x.dtype]}", *[POINTER, INT] * 2, *[POINTER] * 4, INT, INT, FLOAT, INT,
    )  # fmt: skip
    call(
        *_place(x), *_place(delta), _address(weight), _address(total), _address(y), _address(scale), rows, dim, eps,
        torch.get_num_threads(),
    )  # fmt: skip
    return y, total, scale


def backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor | None, scale: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the rows, to which ``grad_total`` is added, and of the weight in float32, if needed."""
    (rows, dim), grad_x = x.shape, _like(x)
    blocks = max(1, min(_MAX_BLOCKS, rows // _MIN_ROWS))
    partial = x.new_empty(blocks, dim, dtype=torch.float32) if needs_weight else None
    grad_weight = x.new_empty(dim, dtype=torch.float32) if needs_weight else None
    call = function(
        f"rms_norm_grad_{_NAMES[x.dtype]}", *[POINTER, INT] * 3, *[POINTER] * 5, *[INT] * 4,
    )  # fmt: skip
    call(
        *_place(grad), *_place(grad_total), *_place(x), _address(weight), _address(scale), _address(grad_x),
        _address(partial), _address(grad_weight), rows, dim, blocks, torch.get_num_threads(),
    )  # fmt: skip
    return grad_x, grad_weight


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _place(x: Tensor | None) -> tuple[int | None, int]:
    """Address and row stride."""
    return (None, 0) if x is None else (x.data_ptr(), x.stride(0))


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
