"""Grouped linear: one matrix per expert over rows sorted by expert."""

from typing import Any

import torch
from torch import Tensor


def grouped_linear(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """``y[r] = weight[expert of r] @ rows[r]``.

    Args:
        rows: ``[R, in]``, sorted by expert.
        weight: ``[E, out, in]``.
        counts: rows of each expert; zeros are fine, the sum is R.

    Returns:
        ``[R, out]``. The gradient of an expert without rows is zero, not missing.
    """
    return _GroupedLinear.apply(rows, weight, counts)


class _GroupedLinear(torch.autograd.Function):
    """A loop of matrix products written straight into preallocated results: no concatenation, no copies."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        result = rows.new_empty(len(rows), weight.shape[1])
        for expert, part in _parts(counts):
            torch.mm(rows[part], weight[expert].t(), out=result[part])
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows = torch.empty_like(rows)
        grad_weight = torch.empty_like(weight)
        for expert, count in enumerate(ctx.counts):
            if count == 0:
                grad_weight[expert].zero_()
        for expert, part in _parts(ctx.counts):
            torch.mm(grad[part], weight[expert], out=grad_rows[part])
            torch.mm(grad[part].t(), rows[part], out=grad_weight[expert])
        return grad_rows, grad_weight, None


def _parts(counts: list[int]) -> list[tuple[int, slice]]:
    """The experts that have rows, each with its slice."""
    parts, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            parts.append((expert, slice(start, start + count)))
        start += count
    return parts
