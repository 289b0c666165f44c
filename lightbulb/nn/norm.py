"""Root-mean-square layer normalisation (Zhang and Sennrich, 2019, arXiv:1910.07467)."""

from torch import Tensor, nn
from torch.nn.functional import rms_norm

from lightbulb.nn.parameter import Logical, make_parameter


class RMSNorm(nn.Module):
    """``y = g * x / sqrt(mean(x^2) + eps)`` over the last dimension, statistics in float32.

    The weight is replicated over the tensor axis; a caller whose input differs between tensor ranks (heads) passes
    the weight through the tensor region itself, so that its gradient is summed.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = make_parameter(Logical((dim,), None))

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Normalise ``x [..., dim]``."""
        return rms_norm(x, self.weight.shape, self.weight if weight is None else weight, self.eps)
