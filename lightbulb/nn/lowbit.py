"""Weights of one or three values and inputs of 8 bits: codes and scales, with straight-through gradients.

BitNet (Wang et al. 2023, arXiv:2310.11453) and BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764). Values are given as
code x scale, codes whole numbers in a floating-point tensor. What is split over ranks is quantised as the whole is:
scales of weights are means over the whole matrix, scales of inputs maxima over all features.

A straight-through gradient is that of the identity (Bengio et al. 2013, arXiv:1308.3432); scales have none.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightbulb.nn.groups import Axis, max_over, sum_over
from lightbulb.ops import Quantisation

WeightCodes = Literal["ternary", "binary"]

MIN_SCALE = 1e-5
UNTIE = 1 - 2**-14
"""Products of codes are whole multiples of one number, and where nothing mixes them (a token that attends to itself
only), often one is half of the largest: halfway between two codes, and noise would choose. This chooses the smaller."""


@torch.no_grad()
def weight_codes(weight: Tensor, kind: WeightCodes, axis: Axis) -> tuple[Tensor, Tensor]:
    """Codes ``[..., out, in]`` and scale ``[..., 1, 1]`` of each matrix of the last two dimensions, at least float32.

    Ternary: the nearest of -1, 0 and 1 to ``W / mean|W|``. Binary: 1 above the mean of W, else -1.

    Args:
        weight: ``[..., out, in]``, this rank's part of each matrix.
        kind: the codes.
        axis: over which each matrix is split; one rank when it is whole.
    """
    weight = _wide(weight)
    if kind == "ternary":
        scale = ternary_scale(weight, axis)
        return (weight / scale).round_().clamp_(-1, 1), scale
    sums = torch.stack([_magnitude(weight), weight.sum((-2, -1), keepdim=True, dtype=torch.float64)])
    scale, mean = (sum_over(sums, axis) / _count(weight, axis)).to(weight.dtype).unbind(0)
    return (weight > mean).to(weight.dtype).mul_(2).sub_(1), scale


@torch.no_grad()
def ternary_scale(weight: Tensor, axis: Axis) -> Tensor:
    """The scale of :func:`weight_codes` for ternary codes: the mean magnitude of each whole matrix."""
    mean = sum_over(_magnitude(weight), axis) / _count(weight, axis)
    return mean.clamp_min(MIN_SCALE).to(_wide_dtype(weight))


def quantise_weight(weight: Tensor, kind: WeightCodes, axis: Axis) -> Tensor:
    """:func:`weight_codes`, multiplied out, in the weight's dtype."""
    return _QuantisedWeight.apply(weight, kind, axis)


@torch.no_grad()
def token_codes(x: Tensor, bits: int, axis: Axis, norm_eps: float | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes of each token, from ``-(2^(bits-1) - 1)`` to its negative, so that the largest feature has the largest.

    Args:
        x: ``[..., features]``, this rank's part.
        bits: of a code.
        axis: over which the features are split; one rank when they are whole.
        norm_eps: quantise ``x / sqrt(mean(x^2) + norm_eps)``; None for x itself.

    Returns:
        codes ``[..., features]``, scales ``[..., 1]`` and the inverse root ``[..., 1]`` that normalises, all at least
        float32.
    """
    x = _wide(x)
    largest, inverse_root = max_over(x.abs().amax(-1, keepdim=True), axis), None
    least = MIN_SCALE
    if norm_eps is not None:
        squares = sum_over(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_(), axis)
        inverse_root = (squares / (x.shape[-1] * axis.size) + norm_eps).rsqrt_()
        least *= math.sqrt(norm_eps)
    largest = largest.clamp_min(least)
    levels = 2 ** (bits - 1) - 1
    # The norm cancels out of the codes: taken from x they do not feel its rounding.
    codes = (x * (levels * UNTIE / largest)).round_()
    scale = largest / levels
    return codes, scale if inverse_root is None else scale * inverse_root, inverse_root


def quantisation(bits: int, norm_eps: float | None, is_bounded: bool) -> Quantisation:
    """What :func:`token_codes` on one rank, or :func:`bounded_codes`, does, for a kernel that does it itself."""
    levels = 2 ** (bits - 1) - 1
    least = MIN_SCALE if norm_eps is None else MIN_SCALE * math.sqrt(norm_eps)
    return Quantisation(levels, levels * UNTIE, least, norm_eps, is_bounded)


def quantise_tokens(x: Tensor, bits: int, axis: Axis, norm_eps: float | None) -> Tensor:
    """:func:`token_codes`, multiplied out, in the dtype of x; its gradient is that of the norm alone."""
    return _QuantisedTokens.apply(x, bits, axis, norm_eps)


def bounded_codes(x: Tensor, bits: int) -> tuple[Tensor, float]:
    """Codes and the fixed scale of ``x`` in [0, 1]."""
    levels = 2 ** (bits - 1) - 1
    return (_wide(x.detach()) * levels).round_().clamp_(0, levels), 1 / levels


def quantise_bounded(x: Tensor, bits: int) -> Tensor:
    """:func:`bounded_codes`, multiplied out, in the dtype of x."""
    return _QuantisedBounded.apply(x, bits)


class _QuantisedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, kind: WeightCodes, axis: Axis) -> Tensor:
        codes, scale = weight_codes(weight, kind, axis)
        return codes.mul_(scale).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None


class _QuantisedTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, axis: Axis, norm_eps: float | None) -> Tensor:
        codes, scale, inverse_root = token_codes(x, bits, axis, norm_eps)
        ctx.axis, ctx.has_norm = axis, inverse_root is not None
        if inverse_root is not None:
            ctx.save_for_backward(x, inverse_root)
        return codes.mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.has_norm:
            return grad, None, None, None
        x, inverse_root = ctx.saved_tensors
        unit, wide = _wide(x) * inverse_root, _wide(grad)
        # The part of the gradient along the token changes only its length, which the norm removes.
        along = sum_over((wide * unit).sum(-1, keepdim=True), ctx.axis) / (x.shape[-1] * ctx.axis.size)
        return torch.addcmul(wide, unit, along, value=-1).mul_(inverse_root).to(x.dtype), None, None, None


class _QuantisedBounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        codes, scale = bounded_codes(x, bits)
        return codes.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


def _magnitude(weight: Tensor) -> Tensor:
    """Sum of magnitudes of each local part; in float64: however a matrix is split, its scale rounds to the same float32
    number."""
    return torch.linalg.vector_norm(weight, 1, dim=(-2, -1), keepdim=True, dtype=torch.float64)


def _count(weight: Tensor, axis: Axis) -> int:
    """Weights of one whole matrix."""
    return weight.shape[-1] * weight.shape[-2] * axis.size


def _wide(x: Tensor) -> Tensor:
    """``x`` in the dtype of codes and scales."""
    return x.to(_wide_dtype(x))


def _wide_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 when x is."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
