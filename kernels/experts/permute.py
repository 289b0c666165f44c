"""Tokens to rows sorted by expert, and rows to weighted sums: gathers in both directions, never a scatter-add."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from lightbulb.kernels.choice import HAS_TRITON, is_reference, takes_triton
from lightbulb.kernels.experts import native, reference
from lightbulb.kernels.native import takes_native

if HAS_TRITON:
    from lightbulb.kernels.experts import row_kernel


def spread(x: Tensor, order: Tensor, inverse: Tensor, kept: Tensor | None, top_k: int) -> Tensor:
    """Each token to the rows of its choices.

    Args:
        x: ``[T, dim]``.
        order: ``[R]`` int64 flat (token, choice) index of each row; dropped pairs are not in it.
        inverse: ``[T * top_k]`` int64 row of each pair; any row for dropped pairs.
        kept: ``[T, top_k]`` bool, or None when nothing was dropped.
        top_k: choices of a token.

    Returns:
        ``[R, dim]``. The gradient of a token is the sum of its rows' gradients.
    """
    if is_reference():
        return reference.spread(x, order, top_k)
    return _Spread.apply(x, order, inverse, kept, top_k)


def weighted_sum(rows: Tensor, gates: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """``y[t] = sum_k gates[t, k] * rows[inverse[t, k]]``, in the rows' dtype.

    Args:
        rows: ``[R, dim]``.
        gates: ``[T, k]``; zero for dropped pairs.
        order: as in :func:`spread`.
        inverse: as in :func:`spread`.

    Returns:
        ``[T, dim]``. The gradient of a dropped pair's gate is zero.
    """
    if is_reference():
        return reference.weighted_sum(rows, gates, order)
    return _WeightedSum.apply(rows, gates, order, inverse)


def sort_pairs(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows for ``experts [T, k]``, sorted by expert and within an expert by time; the host does not wait.

    Returns:
        ``[T * k]`` flat (token, choice) index of each row; ``[T * k]`` row of each pair; ``[E]`` where each expert's
        rows end.
    """
    pairs, order = experts.flatten().sort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    ends = torch.searchsorted(pairs, torch.arange(num_experts, device=pairs.device), right=True)
    return order, inverse, ends


def sum_rows(rows: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
    """``y[t] = sum_k weights[t, k] * rows[index[t, k]]`` in one pass, without the gathered rows (no gradient)."""
    if len(rows) == 0:
        return rows.new_zeros(len(index), rows.shape[1])
    rows, index = rows.contiguous(), index.contiguous()
    weights = None if weights is None else weights.contiguous()
    if takes_triton(rows):
        return row_kernel.sum_rows(rows, index, weights)
    if takes_native(rows) and rows.dtype in native.DTYPES:
        return native.sum_rows(rows, index, None if weights is None else weights.float())
    return embedding_bag(
        index, rows, mode="sum", per_sample_weights=None if weights is None else weights.to(rows.dtype)
    )


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, kept: Tensor | None, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse, kept)
        ctx.top_k = top_k
        return x.index_select(0, order // top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inverse, kept = ctx.saved_tensors
        return sum_rows(grad, inverse.view(-1, ctx.top_k), kept), None, None, None, None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, gates: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(rows, gates, order)
        return sum_rows(rows, inverse.view(gates.shape), gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, gates, order = ctx.saved_tensors
        grad, rows = grad.contiguous(), rows.contiguous()
        if takes_triton(rows):
            grads = row_kernel.sum_rows_grad(grad, rows, order, gates.contiguous())
        elif takes_native(rows) and rows.dtype in native.DTYPES:
            grad_rows, grad_gates = native.sum_rows_grad(grad, rows, order, gates.contiguous().float())
            grads = grad_rows, grad_gates.to(gates.dtype)
        else:
            grads = _sum_rows_grad(grad, rows, order, gates)
        return *grads, None, None


def _sum_rows_grad(grad: Tensor, rows: Tensor, order: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    of_rows = grad.index_select(0, order // gates.shape[1])
    grad_gates = torch.zeros_like(gates).flatten()
    grad_gates[order] = (rows * of_rows).sum(-1, dtype=gates.dtype)
    weights = gates.flatten().index_select(0, order).to(rows.dtype)
    return of_rows.mul_(weights[:, None]), grad_gates.view_as(gates)
