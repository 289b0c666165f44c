"""Root-mean-square layer normalisation (Zhang and Sennrich, 2019, arXiv:1910.07467)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm

from lightbulb.nn.groups import sum_over, tensor_axis
from lightbulb.nn.parameter import Logical, make_parameter


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
        return weighted_rms(x, self.weight if weight is None else weight, self.eps)


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
            return weighted_rms(x, self.weight, self.eps)
        if self.local_groups:
            return unit_rms(x.unflatten(-1, (self.local_groups, -1)), self.eps).flatten(-2) * self.weight
        wide = _wide(x)
        mean = sum_over(wide.square().sum(-1, keepdim=True), self.axis) / self.dim
        return (wide * (mean + self.eps).rsqrt()).to(x.dtype) * self.weight


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)`` over the last dimension, statistics in float32."""
    return weighted_rms(x, x.new_ones(x.shape[-1]), eps)


def weighted_rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension, statistics in float32."""
    if x.device.type == "cpu":
        return _RMSNorm.apply(x, weight, eps)
    return rms_norm(x, weight.shape, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """On CPU ``rms_norm`` is a chain of operators with a copy each; this is a third of their passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = _wide(x).reshape(-1, x.shape[-1])
        norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        scale = (norm.square_() / rows.shape[1] + eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (rows * scale).mul_(_wide(weight)).to(x.dtype).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        dim = x.shape[-1]
        unit = _wide(x).reshape(-1, dim) * scale
        grad = _wide(grad).reshape(-1, dim)
        product = grad * unit
        grad_weight = product.sum(0).to(weight.dtype)
        # The part of the gradient along the row changes only its length, which the norm removes.
        along = (product @ _wide(weight)).div_(dim)[:, None]
        grad_x = torch.mul(grad, _wide(weight), out=product).addcmul_(unit, along, value=-1).mul_(scale)
        return grad_x.to(x.dtype).view(x.shape), grad_weight, None


def _wide(x: Tensor) -> Tensor:
    """``x`` in the dtype of the statistics: float32, or float64 when it is."""
    return x if x.dtype == torch.float64 else x.float()
