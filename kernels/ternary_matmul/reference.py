"""The naive twin."""

import torch
from torch import Tensor

from lightbulb.kernels.ternary_matmul.packing import TernaryWeight


def ternary_matmul(
    codes: Tensor, token_scale: Tensor | float, weight: TernaryWeight, counts: list[int] | None = None
) -> Tensor:
    """Unpack every matrix, multiply in float64, scale."""
    rows = codes.double().split([len(codes)] if counts is None else counts)
    parts = [
        own @ matrix.unpacked(0, matrix.out, torch.float64).t() * matrix.scales()
        for own, matrix in zip(rows, weight.matrices(), strict=True)
    ]
    return (torch.cat(parts) * token_scale).to(weight.scale.dtype)
