"""The naive twin."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension."""
    wide = x if x.dtype == torch.float64 else x.float()
    unit = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return (unit if weight is None else unit * weight.to(wide.dtype)).to(x.dtype)
