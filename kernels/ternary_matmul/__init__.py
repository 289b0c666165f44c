"""Products of 8-bit inputs with packed ternary weights (BitNet b1.58, Ma et al. 2024, arXiv:2402.17764).

Inputs and weights are codes, whole numbers, so that sums of their products are exact in int32; scales come after.
The CPU multiplies both formats, interleaved; Triton multiplies rows of the 2-bit one, as training packs them too.
"""

import torch
from torch import Tensor

from lightbulb.kernels.choice import HAS_TRITON, is_reference, takes_triton
from lightbulb.kernels.native import takes_native
from lightbulb.kernels.ternary_matmul import native, reference
from lightbulb.kernels.ternary_matmul.packing import TernaryWeight, as_rows, interleave, result_dtype
from lightbulb.kernels.ternary_matmul.quantise import Quantisation, token_codes
from lightbulb.kernels.ternary_matmul.training import ends_of

if HAS_TRITON:
    from lightbulb.kernels.ternary_matmul import kernel

__all__ = ["Quantisation", "TernaryWeight", "made_ready", "ternary_linear", "ternary_matmul"]

_UNPACKED = 1 << 20  # codes that are unpacked at a time
_EXACT = 1 << 24  # whole numbers up to this are exact in float32


def made_ready(weight: TernaryWeight) -> TernaryWeight:
    """The weight in the form that multiplies fastest where it is; to be done once, not per product."""
    wants_blocks = takes_native(weight.codes) and weight.scale.dtype == torch.float32
    if wants_blocks == bool(weight.interleaved):
        return weight
    return interleave(weight) if wants_blocks else as_rows(weight)


def ternary_matmul(
    codes: Tensor, token_scale: Tensor | float, weight: TernaryWeight, counts: list[int] | None = None
) -> Tensor:
    """``y[r, o] = (codes[r] . W[o]) * weight_scale[o] * token_scale[r]``, in this order.

    Args:
        codes: ``[rows, in]`` int8, -127 to 127; or any values in float32 or float64 (what is not quantised).
        token_scale: ``[rows, 1]``, or one for all.
        weight: one matrix, or with ``counts`` one per expert; best :func:`made_ready`.
        counts: rows of each expert, sorted by expert; zeros are fine, the sum is the number of rows.

    Returns:
        ``[rows, out]`` in float32, or float64 if the weight's scale is. Sums of int8 rows are exact up to 2^23 inputs.
    """
    if is_reference():
        return reference.ternary_matmul(codes, token_scale, as_rows(weight), counts)
    if codes.dtype == torch.int8 and _takes_native(codes, weight):
        return native.product(_columns(codes), _tensor(token_scale, weight).float(), weight, counts, torch.float32)
    if codes.dtype == torch.int8 and _takes_triton(codes, weight):
        return _multiply(kernel.arrange(codes, _tensor(token_scale, weight)), weight, counts, torch.float32)
    return _by_parts(codes, token_scale, as_rows(weight), counts)


def ternary_linear(x: Tensor, how: Quantisation, weight: TernaryWeight, counts: list[int] | None = None) -> Tensor:
    """:func:`ternary_matmul` of inputs that are quantised first, ``x [rows, in]`` to ``[rows, out]`` in x's dtype.

    A token with an input that is not finite gives a row that is not a number; of bounded inputs infinity is a bound.
    """
    if is_reference():
        codes, token_scale = token_codes(x, how)
        return reference.ternary_matmul(codes, token_scale, as_rows(weight), counts).to(x.dtype)
    if x.dtype in native.DTYPES and _takes_native(x, weight):
        return native.product(_columns(x), how, weight, counts, x.dtype)
    if _takes_triton(x, weight) and not how.is_bounded:
        return _multiply(kernel.quantise(_columns(x), *how[:4]), weight, counts, x.dtype)
    codes, token_scale = token_codes(x, how)
    if _takes_triton(x, weight):
        scale = token_scale + 0 * codes.sum(-1, keepdim=True)  # int8 has no NaN: the scale tells of it
        return _multiply(kernel.arrange(codes.to(torch.int8), scale), weight, counts, x.dtype)
    return _by_parts(codes, token_scale, as_rows(weight), counts).to(x.dtype)


def _takes_native(x: Tensor, weight: TernaryWeight) -> bool:
    return bool(weight.interleaved) and weight.scale.dtype == torch.float32 and takes_native(x)


def _takes_triton(x: Tensor, weight: TernaryWeight) -> bool:
    is_rows = weight.form == "2bit" and not weight.interleaved
    return is_rows and takes_triton(x, weight.codes, weight.scale)


def _multiply(tokens: "kernel.Tokens", weight: TernaryWeight, counts: list[int] | None, dtype: torch.dtype) -> Tensor:
    """Triton's product."""
    ends = None if counts is None else ends_of(counts, weight.codes.device)
    return kernel.multiply(tokens, weight.codes.contiguous(), weight.scale, dtype, ends)


def _tensor(token_scale: Tensor | float, weight: TernaryWeight) -> Tensor:
    return token_scale if isinstance(token_scale, Tensor) else weight.scale.new_full((1, 1), token_scale)


def _by_parts(codes: Tensor, token_scale: Tensor | float, weight: TernaryWeight, counts: list[int] | None) -> Tensor:
    """Plain torch, a part of the matrix unpacked at a time."""
    is_wide = weight.scale.dtype == torch.float64 or 127 * weight.in_features >= _EXACT
    rows = codes.to(torch.float64 if is_wide else torch.float32)
    products = []
    for matrix, own in zip(weight.matrices(), [rows] if counts is None else rows.split(counts), strict=True):
        step = max(1, _UNPACKED // weight.in_features)
        parts = [own @ matrix.unpacked(begin, begin + step, rows.dtype).t() for begin in range(0, matrix.out, step)]
        products.append(torch.cat(parts, -1).mul_(matrix.scales()))
    return torch.cat(products).mul_(token_scale).to(result_dtype(weight))


def _columns(x: Tensor) -> Tensor:
    """``x [rows, in]`` with columns side by side."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
