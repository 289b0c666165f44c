"""The C++ rows, for float32 and bfloat16 on the CPU."""

import torch
from torch import Tensor

from lightbulb.kernels.native import INT, POINTER, function

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
DTYPES = tuple(_NAMES)


def sum_rows(rows: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
    """``y[t] = sum_k weights[t, k] * rows[index[t, k]]``: contiguous ``rows [R, dim]``, int64 ``index [T, k]``,
    float32 ``weights [T, k]`` or None for ones."""
    out = rows.new_empty(len(index), rows.shape[1])
    call = function(f"experts_sum_{_NAMES[rows.dtype]}", *[POINTER] * 4, *[INT] * 4)
    places = rows.data_ptr(), index.data_ptr(), None if weights is None else weights.data_ptr(), out.data_ptr()
    call(*places, *index.shape, rows.shape[1], torch.get_num_threads())
    return out


def sum_rows_grad(grad: Tensor, rows: Tensor, order: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the rows, and of the float32 ``gates [T, k]``: zero for pairs that ``order [R]`` does not name."""
    grad_rows, grad_gates = torch.empty_like(rows), torch.zeros_like(gates)
    call = function(f"experts_sum_grad_{_NAMES[rows.dtype]}", *[POINTER] * 6, *[INT] * 4)
    places = [t.data_ptr() for t in (grad, rows, order, gates, grad_rows, grad_gates)]
    call(*places, len(rows), gates.shape[1], rows.shape[1], torch.get_num_threads())
    return grad_rows, grad_gates
