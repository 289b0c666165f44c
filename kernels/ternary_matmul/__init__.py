"""Products of 8-bit inputs with packed ternary weights (BitNet b1.58, Ma et al. 2024, arXiv:2402.17764).

Inputs and weights are codes, whole numbers, so that sums of their products are exact in int32; scales come after.
"""

import torch
from torch import Tensor

from lightbulb.kernels.choice import is_reference
from lightbulb.kernels.ternary_matmul import reference
from lightbulb.kernels.ternary_matmul.packing import TernaryWeight

__all__ = ["TernaryWeight", "ternary_matmul"]

_UNPACKED = 1 << 20  # codes that are unpacked at a time
_EXACT = 1 << 24  # whole numbers up to this are exact in float32


def ternary_matmul(
    codes: Tensor, token_scale: Tensor | float, weight: TernaryWeight, counts: list[int] | None = None
) -> Tensor:
    """``y[r, o] = (codes[r] . W[o]) * weight_scale[o] * token_scale[r]``, in this order.

    Args:
        codes: ``[rows, in]`` int8, -127 to 127; or any values in float32 or float64 (what is not quantised).
        token_scale: ``[rows, 1]``, or one number for all.
        weight: one matrix, or with ``counts`` one per expert.
        counts: rows of each expert, sorted by expert; zeros are fine, the sum is the number of rows.

    Returns:
        ``[rows, out]`` in the dtype of the weight's scale: float32 or float64. The sum of an int8 row is exact up to
        2^23 inputs.
    """
    if is_reference():
        return reference.ternary_matmul(codes, token_scale, weight, counts)
    return _by_parts(codes, token_scale, weight, counts)


def _by_parts(codes: Tensor, token_scale: Tensor | float, weight: TernaryWeight, counts: list[int] | None) -> Tensor:
    """Plain torch, a part of the matrix unpacked at a time."""
    is_wide = weight.scale.dtype == torch.float64 or 127 * weight.in_features >= _EXACT
    rows = codes.to(torch.float64 if is_wide else torch.float32)
    products = []
    for matrix, own in zip(weight.matrices(), [rows] if counts is None else rows.split(counts), strict=True):
        step = max(1, _UNPACKED // weight.in_features)
        parts = [own @ matrix.unpacked(begin, begin + step, rows.dtype).t() for begin in range(0, matrix.out, step)]
        products.append(torch.cat(parts, -1).mul_(matrix.scales()))
    return torch.cat(products).mul_(token_scale).to(weight.scale.dtype)
