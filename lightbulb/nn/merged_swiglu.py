"""A SwiGLU with matrices merged for each piece of a sequence, in one go (see :mod:`lightbulb.nn.merged`)."""

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightbulb.nn.merged import inner_products, merged_linear
from lightbulb.nn.precision import product_dtype
from lightbulb.ops import swiglu, swiglu_, swiglu_grad_

_NUMBERS = 2**23  # of merged matrices at a time

Matrices = tuple[Tensor, Tensor, Tensor]
"""Gate and up ``[E, hidden, dim]``, down ``[E, dim, hidden]``."""


def merged_swiglu(rows: Tensor, shares: Tensor, matrices: Matrices, counts: list[int]) -> Tensor:
    """``y[r] = down @ (silu(gate @ rows[r]) * (up @ rows[r]))``, with the matrices of r's piece.

    Args:
        rows: ``[R, dim]``, piece after piece.
        shares: ``[P, E]``: what each expert contributes to the matrices of a piece.
        matrices: of the experts.
        counts: rows of each piece, none of them zero; the sum is R.

    Returns:
        ``[R, dim]``.
    """
    if rows.device.type == "cpu":
        return _MergedSwiGLU.apply(rows, shares, *matrices, counts)
    gate, up, down = matrices
    hidden = swiglu(merged_linear(rows, shares, gate, counts), merged_linear(rows, shares, up, counts))
    return merged_linear(hidden, shares, down, counts)


class _MergedSwiGLU(torch.autograd.Function):
    """Piece by piece through all products, so that a piece's activations are still in cache for the next step.

    Keeps the rows and the inputs of the activation. The merged matrices exist for some pieces at a time; in the
    backward their gradients take their place.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, shares: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: list[int]
    ) -> Tensor:
        dtype = product_dtype(rows)
        inputs, matrices = rows.to(dtype), [matrix.to(dtype) for matrix in (gate, up, down)]
        inner = inputs.new_empty(len(rows), 2 * gate.shape[1])
        result = torch.empty_like(inputs)
        for pieces, parts in _chunks(counts, gate):
            gate_up, to_result = _merge(shares[pieces].to(dtype), matrices)
            for part, to_inner, back in zip(parts, gate_up.flatten(1, 2), to_result, strict=True):
                gated, upped = torch.mm(inputs[part], to_inner.t(), out=inner[part]).chunk(2, dim=-1)
                hidden = swiglu_(gated, upped, torch.empty_like(upped))
                torch.mm(hidden, back.t(), out=result[part])
        ctx.save_for_backward(rows, shares, gate, up, down, inner)
        ctx.counts = counts
        return result.to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, shares, *weights, inner = ctx.saved_tensors
        dtype = inner.dtype
        inputs, grad, matrices = rows.to(dtype), grad.to(dtype), [matrix.to(dtype) for matrix in weights]
        grad_rows, grad_shares = torch.empty_like(inputs), torch.empty_like(shares)
        grad_weights = [torch.empty_like(matrix) for matrix in matrices]
        for pieces, parts in _chunks(ctx.counts, matrices[0]):
            mix = shares[pieces].to(dtype)
            gate_up, down = _merge(mix, matrices)
            for part, *own in zip(parts, gate_up.flatten(1, 2), down, strict=True):
                _backward_(inputs[part], inner[part], grad[part], own, grad_rows[part])
            grad_shares[pieces] = 0.0
            for found, matrix, grad_weight in zip(
                (gate_up[:, 0], gate_up[:, 1], down), matrices, grad_weights, strict=True
            ):
                grad_shares[pieces] += inner_products(found, matrix)
                grad_weight.flatten(1).addmm_(mix.t(), found.flatten(1), beta=int(pieces.start > 0))
        grads = (grad_weight.to(rows.dtype) for grad_weight in grad_weights)
        return grad_rows.to(rows.dtype), grad_shares, *grads, None


def _backward_(rows: Tensor, inner: Tensor, grad: Tensor, matrices: list[Tensor], grad_rows: Tensor) -> None:
    """Write the gradient of one piece's rows to ``grad_rows``, those of its matrices over the matrices."""
    gate_up, down = matrices
    gated, upped = inner.chunk(2, dim=-1)
    hidden, grad_inner = grad @ down, torch.empty_like(inner)
    grad_gated, grad_upped = grad_inner.chunk(2, dim=-1)
    swiglu_grad_(hidden, gated, upped, (grad_gated, grad_upped), hidden)
    torch.mm(grad.t(), hidden, out=down)
    torch.mm(grad_inner, gate_up, out=grad_rows)
    torch.mm(grad_inner.t(), rows, out=gate_up)


def _chunks(counts: list[int], gate: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Some pieces at a time, and the rows of each."""
    size, start = max(1, _NUMBERS // (3 * gate[0].numel())), 0
    for first in range(0, len(counts), size):
        parts = []
        for count in counts[first : first + size]:
            parts.append(slice(start, start + count))
            start += count
        yield slice(first, first + len(parts)), parts


class _Scratch(threading.local):
    """Memory that stays: the page faults of a fresh buffer cost more than writing the merged matrices to it."""

    buffer: Tensor | None = None


_scratch = _Scratch()


def _merge(mix: Tensor, matrices: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Gate and up ``[P, 2, hidden, dim]`` and down ``[P, dim, hidden]``, valid until the next call."""
    pieces, size = len(mix), matrices[0][0].numel()
    buffer = _scratch.buffer
    if buffer is None or buffer.dtype != mix.dtype or len(buffer) < 3 * pieces * size:
        buffer = _scratch.buffer = mix.new_empty(3 * pieces * size)
    gate_up = buffer[: 2 * pieces * size].view(pieces, 2, *matrices[0].shape[1:])
    down = buffer[2 * pieces * size : 3 * pieces * size].view(pieces, *matrices[2].shape[1:])
    for place, matrix in zip((gate_up[:, 0], gate_up[:, 1], down), matrices, strict=True):
        torch.mm(mix, matrix.flatten(1), out=place.flatten(1))
    return gate_up, down
