"""A SwiGLU with matrices merged for each piece of a sequence, in one go (see :mod:`lightbulb.nn.merged`)."""

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from lightbulb.nn.activation import swiglu, swiglu_grad_
from lightbulb.nn.merged import inner_products, merged_linear
from lightbulb.nn.precision import product_dtype

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
        inner = [inputs.new_empty(len(rows), gate.shape[1]) for _ in range(2)]
        result = torch.empty_like(inputs)
        for pieces, parts in _chunks(counts, gate):
            merged = _merge(shares[pieces].to(dtype), matrices)
            for part, to_gate, to_up, to_result in zip(parts, *merged, strict=True):
                gated = torch.mm(inputs[part], to_gate.t(), out=inner[0][part])
                torch.mm(inputs[part], to_up.t(), out=inner[1][part])
                torch.mm(silu(gated).mul_(inner[1][part]), to_result.t(), out=result[part])
        ctx.save_for_backward(rows, shares, gate, up, down, *inner)
        ctx.counts = counts
        return result.to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, shares, *weights, gated, upped = ctx.saved_tensors
        dtype = gated.dtype
        inputs, grad, matrices = rows.to(dtype), grad.to(dtype), [matrix.to(dtype) for matrix in weights]
        grad_rows, grad_shares = torch.empty_like(inputs), torch.empty_like(shares)
        grad_weights = [torch.empty_like(matrix) for matrix in matrices]
        for pieces, parts in _chunks(ctx.counts, matrices[0]):
            mix = shares[pieces].to(dtype)
            merged = _merge(mix, matrices)
            for part, *own in zip(parts, *merged, strict=True):
                _backward_(inputs[part], gated[part], upped[part], grad[part], own, grad_rows[part])
            products = zip(merged, matrices, strict=True)
            grad_shares[pieces] = sum(inner_products(found, matrix) for found, matrix in products)  # type: ignore[assignment]
            for found, grad_weight in zip(merged, grad_weights, strict=True):
                grad_weight.flatten(1).addmm_(mix.t(), found.flatten(1), beta=int(pieces.start > 0))
        grads = (grad_weight.to(rows.dtype) for grad_weight in grad_weights)
        return grad_rows.to(rows.dtype), grad_shares, *grads, None


def _backward_(
    rows: Tensor, gated: Tensor, upped: Tensor, grad: Tensor, matrices: list[Tensor], grad_rows: Tensor
) -> None:
    """Write the gradient of one piece's rows to ``grad_rows``, those of its matrices over the matrices."""
    gate, up, down = matrices
    activated, grad_hidden = silu(gated), grad @ down
    torch.mm(grad.t(), activated * upped, out=down)
    grad_gated, grad_upped = torch.empty_like(gated), torch.empty_like(upped)
    swiglu_grad_(gated, activated, upped, grad_hidden, (grad_gated, grad_upped))
    torch.mm(grad_gated, gate, out=grad_rows).addmm_(grad_upped, up)
    torch.mm(grad_gated.t(), rows, out=gate)
    torch.mm(grad_upped.t(), rows, out=up)


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


def _merge(mix: Tensor, matrices: list[Tensor]) -> list[Tensor]:
    """``[P, out, in]`` of each matrix, valid until the next call."""
    sizes = [len(mix) * matrix[0].numel() for matrix in matrices]
    buffer = _scratch.buffer
    if buffer is None or buffer.dtype != mix.dtype or len(buffer) < sum(sizes):
        buffer = _scratch.buffer = mix.new_empty(sum(sizes))
    places = [
        part.view(-1, *matrix.shape[1:])
        for part, matrix in zip(buffer[: sum(sizes)].split(sizes), matrices, strict=True)
    ]
    for place, matrix in zip(places, matrices, strict=True):
        torch.mm(mix, matrix.flatten(1), out=place.flatten(1))
    return places
