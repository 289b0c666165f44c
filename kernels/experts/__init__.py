"""Mixtures of experts: products with one matrix per expert over rows sorted by expert, and the way there and back.

On a GPU, in 16 bits, a product for all experts is one Triton launch. Where no rows travel between ranks,
:func:`mixture_swiglu` does everything behind the router without the host ever waiting for the counts (MegaBlocks, Gale
et al. 2022, arXiv:2211.15841; ScatterMoE, Tan et al. 2024, arXiv:2403.08245). Elsewhere each expert's products follow
one another while its activations are in cache.
"""

import torch
from torch import Tensor

from lightbulb.kernels.choice import HAS_TRITON, is_reference, takes_triton
from lightbulb.kernels.experts import grouped, merged, reference
from lightbulb.kernels.experts.merged import Matrices
from lightbulb.kernels.experts.permute import sort_pairs, spread, weighted_sum
from lightbulb.kernels.swiglu import swiglu

if HAS_TRITON:
    from lightbulb.kernels.experts import fused

__all__ = [
    "Matrices",
    "grouped_linear",
    "grouped_swiglu",
    "merged_linear",
    "merged_swiglu",
    "mixture_swiglu",
    "spread",
    "weighted_sum",
]


def grouped_linear(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """``y[r] = weight[expert of r] @ rows[r]``.

    Args:
        rows: ``[R, in]``, sorted by expert.
        weight: ``[E, out, in]``.
        counts: rows of each expert; zeros are fine, the sum is R.

    Returns:
        ``[R, out]``. The gradient of an expert without rows is zero, not missing.
    """
    if is_reference():
        return reference.grouped_linear(rows, weight, counts)
    return (fused if _takes_triton(rows) else grouped).GroupedLinear.apply(rows, weight, counts)


def grouped_swiglu(
    rows: Tensor, gate_up: Tensor, down: Tensor, counts: list[int], dtype: torch.dtype | None = None
) -> Tensor:
    """``y[r] = down[e] @ (silu(gate[e] @ rows[r]) * (up[e] @ rows[r]))`` with ``e`` the expert of r.

    Args:
        rows: ``[R, dim]``, sorted by expert.
        gate_up: ``[E, 2, hidden, dim]``: each expert's gate, then its up matrix.
        down: ``[E, dim, hidden]``.
        counts: rows of each expert; zeros are fine, the sum is R.
        dtype: to multiply in on a CPU; None for that of the rows.

    Returns:
        ``[R, dim]``. The gradient of an expert without rows is zero, not missing.
    """
    if is_reference():
        return reference.grouped_swiglu(rows, gate_up, down, counts)
    if _takes_triton(rows):
        return fused.GroupedSwiGLU.apply(rows, gate_up.flatten(1, 2), down, counts)
    keep = torch.is_grad_enabled()
    return grouped.GroupedSwiGLU.apply(rows, gate_up.flatten(1, 2), down, counts, dtype or rows.dtype, keep)


def mixture_swiglu(
    x: Tensor, gates: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """``y[t] = sum_k gates[t, k] * SwiGLU of expert experts[t, k] (x[t])``, all of whose experts are here.

    Args:
        x: ``[T, dim]``.
        gates: ``[T, k]``.
        experts: ``[T, k]`` int64, no expert twice for a token.
        gate_up: as in :func:`grouped_swiglu`.
        down: as in :func:`grouped_swiglu`.
        dtype: as in :func:`grouped_swiglu`.

    Returns:
        ``[T, dim]`` in x's dtype.
    """
    if is_reference():
        return reference.mixture_swiglu(x, gates, experts, gate_up, down)
    if _takes_triton(x):
        return fused.MixtureSwiGLU.apply(x, gates, experts, gate_up.flatten(1, 2), down)
    order, inverse, ends = sort_pairs(experts, len(gate_up))
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    rows = spread(x, order, inverse, None, experts.shape[1])
    return weighted_sum(grouped_swiglu(rows, gate_up, down, counts, dtype), gates, order, inverse)


def merged_linear(
    rows: Tensor, shares: Tensor, weight: Tensor, counts: list[int], dtype: torch.dtype | None = None
) -> Tensor:
    """``y[r] = (sum_i shares[p, i] weight[i]) @ rows[r]`` with p the piece of r.

    Args:
        rows: ``[R, in]``, piece after piece.
        shares: ``[P, E]``.
        weight: ``[E, out, in]``.
        counts: rows of each piece, none of them zero; the sum is R.
        dtype: to merge and multiply in; None for that of the rows.

    Returns:
        ``[R, out]``.
    """
    if is_reference():
        return reference.merged_linear(rows, shares, weight, counts)
    return merged.MergedLinear.apply(rows, shares, weight, counts, dtype or rows.dtype)


def merged_swiglu(
    rows: Tensor, shares: Tensor, matrices: Matrices, counts: list[int], dtype: torch.dtype | None = None
) -> Tensor:
    """``y[r] = down @ (silu(gate @ rows[r]) * (up @ rows[r]))``, with the matrices of r's piece.

    Args:
        rows: ``[R, dim]``, piece after piece.
        shares: ``[P, E]``: what each expert contributes to the matrices of a piece.
        matrices: of the experts.
        counts: rows of each piece, none of them zero; the sum is R.
        dtype: as in :func:`merged_linear`.

    Returns:
        ``[R, dim]``.
    """
    if is_reference():
        return reference.merged_swiglu(rows, shares, matrices, counts)
    dtype = dtype or rows.dtype
    if rows.is_cpu:
        return merged.MergedSwiGLU.apply(rows, shares, *matrices, counts, dtype)
    gate, up, down = matrices
    hidden = swiglu(merged_linear(rows, shares, gate, counts, dtype), merged_linear(rows, shares, up, counts, dtype))
    return merged_linear(hidden, shares, down, counts, dtype)


def _takes_triton(rows: Tensor) -> bool:
    """In float32 the matrix products of the vendor's library are faster than Triton's."""
    return takes_triton(rows) and rows.dtype in (torch.bfloat16, torch.float16)
