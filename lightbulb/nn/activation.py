"""The gated activation ``silu(gate) * up`` (SwiGLU, Shazeer 2020, arXiv:2002.05202) and the squared ReLU."""

from torch import Tensor
from torch.nn.functional import relu

from lightbulb.ops import swiglu

__all__ = ["squared_relu", "swiglu"]


def squared_relu(x: Tensor) -> Tensor:
    """``max(x, 0)^2``, elementwise (So et al. 2021, arXiv:2109.08668)."""
    return relu(x).square()
