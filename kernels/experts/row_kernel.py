"""The Triton kernels of gathered rows: one program per row and block of columns, or per row where it is summed up."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def sum_kernel(rows, index, weights, out, dim, TOP_K: tl.constexpr, HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr):
    """As :func:`sum_rows`."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(index + token * TOP_K + k).to(tl.int64)
        part = tl.load(rows + row * dim + column, mask=column < dim, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            part *= tl.load(weights + token * TOP_K + k).to(tl.float32)
        total += part
    tl.store(out + token * dim + column, total.to(out.dtype.element_ty), mask=column < dim)


@triton.jit
def sum_grad_kernel(grad, rows, order, gates, grad_rows, grad_gates, dim, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """As :func:`sum_rows_grad`."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.load(order + row).to(tl.int64)
    gate = tl.load(gates + pair).to(tl.float32)
    column = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, dim, BLOCK):
        inside = first + column < dim
        d = tl.load(grad + pair // TOP_K * dim + first + column, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(rows + row * dim + first + column, mask=inside, other=0.0).to(tl.float32)
        total += d * value
        tl.store(grad_rows + row * dim + first + column, (gate * d).to(grad_rows.dtype.element_ty), mask=inside)
    tl.store(grad_gates + pair, tl.sum(total, 0).to(grad_gates.dtype.element_ty))


def sum_rows(rows: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
    """``y[t] = sum_k weights[t, k] * rows[index[t, k]]``: contiguous ``rows [R, dim]``, ``index [T, k]``, and
    ``weights [T, k]`` or None for ones."""
    (tokens, top_k), dim = index.shape, rows.shape[1]
    out = rows.new_empty(tokens, dim)
    if tokens:
        grid = tokens, triton.cdiv(dim, _BLOCK)
        has_weights = weights is not None
        sum_kernel[grid](rows, index, weights, out, dim, TOP_K=top_k, HAS_WEIGHTS=has_weights, BLOCK=_BLOCK)
    return out


def sum_rows_grad(grad: Tensor, rows: Tensor, order: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the rows, and of ``gates [T, k]``: zero for pairs that ``order [R]`` does not name."""
    grad_rows, grad_gates = torch.empty_like(rows), torch.zeros_like(gates)
    if len(rows):
        sum_grad_kernel[(len(rows),)](
            grad, rows, order, gates, grad_rows, grad_gates, rows.shape[1], TOP_K=gates.shape[1], BLOCK=_BLOCK
        )
    return grad_rows, grad_gates
