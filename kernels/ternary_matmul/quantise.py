"""Inputs to codes, token by token; numbers, so that it is decided elsewhere what they are.

The rule itself is :func:`lightbulb.nn.lowbit.token_codes`, which works on features split over ranks and decides the
numbers. This is its plain form for one rank, where no kernel applies; the C++ and Triton kernels quantise on their way
to a product, so that codes never go to memory as floats. Tests hold all four to the same codes, bit for bit.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Quantisation(NamedTuple):
    """How inputs become codes.

    Attributes:
        levels: the largest code, at most 127.
        factor: what a token's largest magnitude becomes before it is rounded; ``levels``, or a little less.
        least: no largest magnitude is below.
        norm_eps: scales are divided by ``sqrt(mean(x^2) + norm_eps)``; None: they are not.
        is_bounded: inputs lie in [0, 1], where 1 becomes the largest code: the other numbers are not used.
    """

    levels: int
    factor: float = 0.0
    least: float = 0.0
    norm_eps: float | None = None
    is_bounded: bool = False


def token_codes(x: Tensor, how: Quantisation) -> tuple[Tensor, Tensor | float]:
    """Codes ``[rows, in]`` and scales, ``[rows, 1]`` or one for all, in float32 (of float64 in float64).

    Args:
        x: ``[rows, in]``.
        how: to quantise it.
    """
    x = x if x.dtype == torch.float64 else x.float()
    if how.is_bounded:
        return (x * how.levels).round_().clamp_(0, how.levels), 1 / how.levels
    largest = x.abs().amax(-1, keepdim=True).clamp_min(how.least)
    scale = largest / how.levels
    if how.norm_eps is not None:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale = scale * (squares / x.shape[-1] + how.norm_eps).rsqrt_()
    return (x * (how.factor / largest)).round_(), scale
