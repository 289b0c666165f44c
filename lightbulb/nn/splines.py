"""Learnable one-dimensional functions on the edges of a layer, as one product with the values of fixed bases.

Each input feature is evaluated in ``count`` bases, the same bump at evenly spaced centres; a weight
``[out, in x count]`` (the bases of a feature side by side, so that a split of the inputs keeps them together) mixes
them. Gaussian bumps: FastKAN (Li 2024, arXiv:2405.06721). Cubic B-splines: KAN (Liu et al. 2024, arXiv:2404.19756).

The values are ``count`` times the size of the input and cheap to compute: they exist for some rows at a time, in the
forward and again in the backward.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.functional import linear

from lightbulb.nn.groups import Axis, sum_over
from lightbulb.nn.linear import SplitLinear
from lightbulb.nn.parameter import Logical, make_parameter, values_of
from lightbulb.nn.precision import product_dtype
from lightbulb.nn.recompute import recompute

_CPU_VALUES = 2**18  # basis values at a time: 1 MiB in float32, which stays in a core's cache
_GPU_VALUES = 2**26


@dataclass(frozen=True)
class Basis:
    """One bump at evenly spaced centres.

    Attributes:
        bump: takes offsets ``unit * (x - centre) / spacing`` to values, and to a function that gives the derivative by
            the offset, divided by ``slope`` (one factor for all is cheaper applied to their sum).
        first: the first centre.
        spacing: between centres.
        count: of centres.
        reach: inputs from -reach to reach are covered by the bases.
        unit: of the offsets.
        slope: see ``bump``.
    """

    bump: Callable[[Tensor], tuple[Tensor, Callable[[], Tensor]]]
    first: float
    spacing: float
    count: int
    reach: float
    unit: float
    slope: float

    def values(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., in, count]``, in the dtype of ``x``."""
        return self.bump(self._offsets(x))[0]

    def values_and_slopes(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """The values, and two factors of their derivatives by ``x``."""
        values, slopes = self.bump(self._offsets(x))
        return values, slopes(), self.slope * self.unit / self.spacing

    def _offsets(self, x: Tensor) -> Tensor:
        places = torch.arange(self.count, device=x.device, dtype=x.dtype) + self.first / self.spacing
        return (x * (self.unit / self.spacing))[..., None] - places * self.unit


_SIXTH = 6 ** (-1 / 3)  # a unit in which the cubes need no division by 6


def _gaussian(offset: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
    """``exp(-u^2)``."""
    values = offset.square().neg_().exp_()
    return values, lambda: offset * values


def _cubic(offset: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
    """The cardinal cubic B-spline: ``((2 - |u|)_+^3 - 4 (1 - |u|)_+^3) / 6``."""
    outer = (2 * _SIXTH - offset.abs()).clamp_(min=0.0)
    inner = (outer - _SIXTH).clamp_(min=0.0)
    values = outer.pow(3).sub_(inner.pow(3), alpha=4.0)
    return values, lambda: outer.square_().sub_(inner.square_(), alpha=4.0).mul_(offset.sign_())


def gaussian_basis() -> Basis:
    """FastKAN's: 8 centres on [-2, 2], as wide as they are apart."""
    return Basis(_gaussian, first=-2.0, spacing=4.0 / 7, count=8, reach=2.0, unit=1.0, slope=-2.0)


def cubic_basis() -> Basis:
    """KAN's: B-splines of order 3 on 5 intervals of [-1, 1], knots extended by 3 on each side."""
    return Basis(_cubic, first=-1.4, spacing=0.4, count=8, reach=1.0, unit=_SIXTH, slope=-3.0)


def standardise(x: Tensor, axis: Axis, eps: float = 1e-5) -> Tensor:
    """``(x - mean) / sqrt(variance + eps)`` over the last dimension, whose features are split over ``axis``; statistics
    in float32."""
    return _Standardise.apply(x, axis, eps)


def spline_linear(x: Tensor, weight: Tensor, basis: Basis) -> Tensor:
    """``y_o = sum_i sum_c weight[o, i x count + c] bump_c(x_i)``: ``[..., in]`` to ``[..., out]``; keeps ``x`` only."""
    return _SplineLinear.apply(x, weight, basis)


def bases_of(x: Tensor, basis: Basis) -> Tensor:
    """``x [..., in]`` to ``[..., in x count]``, the bases of a feature side by side."""
    return basis.values(_wide(x)).flatten(-2).to(x.dtype)


class SplineLinear(SplitLinear):
    """The local part of a sum of functions, one for each edge; partial when the inputs are split.

    Args:
        in_features: size of the logical input.
        out_features: size of the logical output.
        basis: of each input feature.
        std: standard deviation of the initial weight.
        axis: the tensor axis.
        has_split_input: it splits the input features, not the output features.
    """

    has_bounded_input = True

    def __init__(
        self, in_features: int, out_features: int, basis: Basis, std: float, axis: Axis, has_split_input: bool = False
    ):
        super().__init__()
        self.basis, self.axis, self.has_split_input = basis, axis, has_split_input
        shape = (out_features, in_features * basis.count)
        self.weight = make_parameter(Logical(shape, std, tensor_dim=int(has_split_input), tensor=axis))

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in / ranks or in]`` to ``[..., out or out / ranks]``, leaving no tensor region."""
        weight = values_of(self.weight)
        if self.quantizer is None:
            product = spline_linear(x, weight, self.basis)
        else:
            quantizer, weight = self.quantizer, self.quantizer.matrix(weight)
            product = recompute(lambda x: linear(quantizer.input(self._bases(x)), weight), x)
        return product if self.adapter is None else product + self._adapted(x)

    def _bases(self, x: Tensor) -> Tensor:
        return bases_of(x, self.basis)

    def _adapted(self, x: Tensor) -> Tensor:
        # The backward runs this again, when a bank of experts has taken this expert's parameters back: hold them.
        adapter, own = self.adapter, dict(self.adapter.named_parameters())  # type: ignore[union-attr]
        return recompute(lambda x: functional_call(adapter, own, (self._bases(x),)), x)  # type: ignore[arg-type]


class _SplineLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, basis: Basis) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.basis = basis
        matrix = weight.to(product_dtype(x))
        rows = x.reshape(-1, x.shape[-1])
        result = rows.new_empty(len(rows), len(weight), dtype=matrix.dtype)
        for part in _parts(rows, basis):
            values = basis.values(_wide(rows[part])).flatten(1)
            torch.mm(values.to(matrix.dtype), matrix.t(), out=result[part])
        return result.to(x.dtype).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        basis: Basis = ctx.basis
        matrix = weight.to(product_dtype(x))
        rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_rows, grad_matrix = torch.empty_like(rows), torch.zeros_like(matrix)
        for part in _parts(rows, basis):
            incoming = grad[part].to(matrix.dtype)
            values, slopes, factor = basis.values_and_slopes(_wide(rows[part]))
            grad_matrix.addmm_(incoming.t(), values.flatten(1).to(matrix.dtype), beta=int(part.start > 0))
            grad_rows[part] = slopes.mul_((incoming @ matrix).view_as(slopes)).sum(-1).mul_(factor)
        return grad_rows.view_as(x), grad_matrix.to(weight.dtype), None


class _Standardise(torch.autograd.Function):
    """Keeps its input and two numbers per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, eps: float) -> Tensor:
        wide, features = _wide(x), x.shape[-1] * axis.size
        mean = sum_over(wide.sum(-1, keepdim=True), axis) / features
        centred = wide - mean
        scale = (sum_over(centred.square().sum(-1, keepdim=True), axis) / features + eps).rsqrt_()
        ctx.save_for_backward(x, mean, scale)
        ctx.axis = axis
        return centred.mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale = ctx.saved_tensors
        unit, wide = (_wide(x) - mean).mul_(scale), _wide(grad)
        sums = torch.stack((wide.sum(-1), (wide * unit).sum(-1)), -1)
        level, along = (sum_over(sums, ctx.axis) / (x.shape[-1] * ctx.axis.size)).split(1, dim=-1)
        # What moves the mean or the length of a row is undone by the norm.
        return (wide - level).sub_(unit.mul_(along)).mul_(scale).to(x.dtype), None, None


def _parts(rows: Tensor, basis: Basis) -> Iterator[slice]:
    """Slices of rows with few enough basis values to compute at a time."""
    values = _CPU_VALUES if rows.device.type == "cpu" else _GPU_VALUES
    step = max(32, math.ceil(values / (rows.shape[1] * basis.count)))
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _wide(x: Tensor) -> Tensor:
    """``x`` in the dtype of statistics and bases: float32, or float64 when it is."""
    return x if x.dtype == torch.float64 else x.float()
