"""Layer normalisation: by the root mean square (Zhang and Sennrich, 2019, arXiv:1910.07467), or by mean and variance
(Ba et al., 2016, arXiv:1607.06450)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from lightbulb.nn.groups import sum_over, tensor_axis
from lightbulb.nn.parameter import Logical, constant, make_parameter
from lightbulb.ops import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """``y = g * x / sqrt(mean(x^2) + eps)`` over the last dimension, statistics in float32.

    The weight is replicated over the tensor axis. A norm inside a tensor region (over heads, say) is built with
    ``by_position=False``, and its caller passes the weight in by
    :func:`~lightbulb.nn.groups.share_in_tensor_region`, so that its gradient is summed.
    """

    def __init__(self, dim: int, eps: float, by_position: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = make_parameter(Logical((dim,), None, by_position=by_position))

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Normalise ``x [..., dim]``."""
        return rms_norm(x, self.weight if weight is None else weight, self.eps)

    def add(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised ``x + delta``, and ``x + delta`` itself: the step from one part of a block to the next."""
        return add_rms_norm(x, delta, self.weight, self.eps)


class LayerNorm(nn.Module):
    """``y = g * (x - mean(x)) / sqrt(var(x) + eps) + b`` over the last dimension, statistics in float32; between tensor
    regions."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = make_parameter(Logical((dim,), None, by_position=True))
        self.bias = make_parameter(Logical((dim,), None, fill=constant(0.0), by_position=True))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x [..., dim]``."""
        return layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`RMSNorm.add`."""
        total = x + delta
        return self(total), total


@dataclass(frozen=True)
class Norms:
    """What the norms of a residual stream are.

    Attributes:
        kind: ``rms`` (:class:`RMSNorm`) or ``layer`` (:class:`LayerNorm`).
        eps: under the root.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6

    def build(self, dim: int) -> RMSNorm | LayerNorm:
        """One of them, for ``dim`` features."""
        return RMSNorm(dim, self.eps) if self.kind == "rms" else LayerNorm(dim, self.eps)

    def params(self, dim: int) -> int:
        """Parameters of one."""
        return dim if self.kind == "rms" else 2 * dim


class SplitRMSNorm(nn.Module):
    """:class:`RMSNorm` over each of ``groups`` equal parts of features that are split over the tensor axis.

    A rank holds whole groups, or a share of the only one, whose sum of squares then goes over the axis: the same
    function on every layout.
    """

    def __init__(self, dim: int, groups: int, eps: float):
        super().__init__()
        self.axis = tensor_axis()
        self.local_groups, rest = divmod(groups, self.axis.size)
        if groups > 1 and rest:
            raise ValueError(
                f"{groups} groups cannot be split over {self.axis.size} ranks; choose a divisor of {groups}"
            )
        self.dim = dim
        self.eps = eps
        self.weight = make_parameter(Logical((dim,), None, tensor_dim=0, tensor=self.axis))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x [..., dim / ranks]`` inside the tensor region."""
        if self.local_groups == 1:
            return rms_norm(x, self.weight, self.eps)
        if self.local_groups:
            return unit_rms(x.unflatten(-1, (self.local_groups, -1)), self.eps).flatten(-2) * self.weight
        wide = _wide(x)
        mean = sum_over(wide.square().sum(-1, keepdim=True), self.axis) / self.dim
        return (wide * (mean + self.eps).rsqrt()).to(x.dtype) * self.weight


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)`` over the last dimension, statistics in float32."""
    return rms_norm(x, None, eps)


def _wide(x: Tensor) -> Tensor:
    """``x`` in the dtype of the statistics: float32, or float64 when it is."""
    return x if x.dtype == torch.float64 else x.float()
