"""Linear layers split over the tensor axis: the door through which every projection goes.

A column-parallel layer holds some rows of the output, a row-parallel layer some columns of the input (Megatron-LM,
Shoeybi et al. 2019). A mixer calls :func:`~lightbulb.nn.groups.enter_tensor_region` once on its input, any number of
column-parallel layers, and one row-parallel layer, whose result is summed over the axis: one all-reduce forward and
one backward per mixer. With one rank both are ``nn.Linear``. Layers with one matrix per expert are in
:mod:`lightbulb.nn.grouped`.

Modifiers fill two slots of a layer: a *quantizer* changes what is multiplied, an *adapter* adds to the product.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightbulb.nn.groups import SINGLE, Axis, exit_tensor_region, tensor_axis
from lightbulb.nn.parameter import Fill, Logical, constant, keeper_of, logical_of, make_parameter, values_of
from lightbulb.nn.precision import linear

Multiply = Callable[[Tensor, Tensor], Tensor]


class Quantizer(nn.Module, ABC):
    """What a layer multiplies instead of its input and its weight."""

    @abstractmethod
    def input(self, x: Tensor) -> Tensor:
        """``x [..., in_features / ranks]`` to the same shape."""

    @abstractmethod
    def matrix(self, weight: Tensor) -> Tensor:
        """``weight [..., out, in]``, each matrix of the last two dimensions for itself, to the same shape."""

    def product(self, x: Tensor, weight: Tensor, multiply: Multiply, counts: list[int] | None) -> Tensor:
        """``multiply(input, matrix)``, or its equal in one kernel; ``counts`` rows of each expert."""
        return multiply(self.input(x), self.matrix(weight))


class Adapter(nn.Module, ABC):
    """What is added to a layer's product, before a row-parallel layer's sum over ranks."""

    @abstractmethod
    def forward(self, x: Tensor, counts: list[int] | None = None) -> Tensor:
        """``x [..., in_features / ranks]`` to ``[..., out_features / ranks]``; ``counts`` rows of each expert when the
        layer has experts."""


class SplitLinear(nn.Module):
    """A weight split over a tensor axis, and the slots that modifiers fill.

    Attributes:
        weight: ``[out, in]``; with experts or several matrices in one ``[..., out, in]``.
        bias: ``[out]``, added to the whole product whatever modifiers make of it; None for none. Starts at zero.
        axis: the tensor axis.
        has_split_input: the input features are split (row-parallel), else the output features (column-parallel), or
            neither when the axis has one rank or the weight is whole.
        has_bounded_input: inputs lie in [0, 1] (the bases of a spline), so that a quantizer needs no scale of its own.
    """

    weight: nn.Parameter
    axis: Axis
    has_split_input: bool
    has_bounded_input: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.bias: nn.Parameter | None = None
        self.quantizer: Quantizer | None = None
        self.adapter: Adapter | None = None

    @property
    def logical(self) -> Logical:
        """The weight's place in its logical tensor."""
        return logical_of(self.weight)

    @property
    def is_plain(self) -> bool:
        """Whether no modifier changes this layer."""
        return self.quantizer is None and self.adapter is None

    def product(
        self, x: Tensor, multiply: Multiply, start_dim: int | None = None, counts: list[int] | None = None
    ) -> Tensor:
        """``multiply(input, weight)`` of what is to be multiplied, the weight's dimensions from ``start_dim`` to the
        outputs taken as one; ``counts`` rows of each expert when the layer has experts.

        A weight that a keeper holds is frozen: the backward reads it again, so that it is unpacked for no longer than
        a product takes.
        """

        def joined(weight: Tensor) -> Tensor:
            return weight if start_dim is None else weight.flatten(start_dim, -2)

        keeper, dtype = keeper_of(self.weight), self.weight.dtype
        if self.quantizer is not None:
            return self.quantizer.product(x, values_of(self.weight), lambda x, w: multiply(x, joined(w)), counts)
        if keeper is None:
            return multiply(x, joined(values_of(self.weight)))
        return _RebuiltProduct.apply(x, lambda: joined(keeper.read(dtype)), multiply)

    def multiply(self, x: Tensor) -> Tensor:
        """``x W^T`` of the local parts, with what modifiers add; without the bias."""
        product = self.product(x, linear)
        return product if self.adapter is None else product + self.adapter(x)


class ColumnParallelLinear(SplitLinear):
    """``y = x W^T + b`` with the output features split over the tensor axis.

    Args:
        in_features: size of the (replicated) input.
        out_features: size of the logical output.
        std: standard deviation of the initial weight.
        fill: other initial values, instead of ``std``.
        bias: there is a b.
    """

    has_split_input = False

    def __init__(
        self, in_features: int, out_features: int, std: float | None, fill: Fill | None = None, bias: bool = False
    ):
        super().__init__()
        self.axis = tensor_axis()
        self.weight = make_parameter(
            Logical((out_features, in_features), std, tensor_dim=0, tensor=self.axis, fill=fill)
        )
        if bias:
            self.bias = make_parameter(
                Logical((out_features,), None, tensor_dim=0, tensor=self.axis, fill=constant(0.0))
            )

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features]`` inside the tensor region to ``[..., out_features / axis size]``."""
        product = self.multiply(x)
        return product if self.bias is None else product + self.bias


class RowParallelLinear(SplitLinear):
    """``y = x W^T + b`` with the input features split over the tensor axis; the result is whole on every rank.

    Args:
        in_features: size of the logical input.
        out_features: size of the output.
        std: standard deviation of the initial weight.
        fill: other initial values, instead of ``std``.
        bias: there is a b.
    """

    has_split_input = True

    def __init__(
        self, in_features: int, out_features: int, std: float | None, fill: Fill | None = None, bias: bool = False
    ):
        super().__init__()
        self.axis = tensor_axis()
        self.weight = make_parameter(
            Logical((out_features, in_features), std, tensor_dim=1, tensor=self.axis, fill=fill)
        )
        if bias:
            self.bias = make_parameter(Logical((out_features,), None, fill=constant(0.0), by_position=True))

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features / axis size]`` to ``[..., out_features]``, leaving the tensor region."""
        return leave_region(self.multiply(x), self.axis, self.bias)


class WholeLinear(SplitLinear):
    """``y = x W^T`` with the whole weight on every tensor rank, used outside tensor regions.

    For results that all ranks need whole: each multiplies its own positions, and the caller takes the result into the
    region by :func:`~lightbulb.nn.groups.enter_tensor_region`.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        std: standard deviation of the initial weight.
    """

    has_split_input = False

    def __init__(self, in_features: int, out_features: int, std: float | None):
        super().__init__()
        self.axis = SINGLE
        self.weight = make_parameter(Logical((out_features, in_features), std, by_position=True))

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features]`` outside the tensor region to ``[..., out_features]``."""
        return self.multiply(x)


def leave_region(product: Tensor, axis: Axis, bias: Tensor | None) -> Tensor:
    """What a row-parallel layer makes of its partial products: their sum over the axis, and once the bias.

    Inside an expert, whose owner forms the sum, every rank adds its share of the bias. The gradient of the sum is whole
    on every rank, and so is the bias's: it is not divided.
    """
    product = exit_tensor_region(product, axis)
    if bias is None:
        return product
    if axis.inside:
        bias = bias.detach() / axis.size + (bias - bias.detach())
    return product + bias


class _RebuiltProduct(torch.autograd.Function):
    """A product with a weight without gradient, made twice instead of kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, read: Callable[[], Tensor], multiply: Multiply) -> Tensor:
        ctx.read, ctx.multiply = read, multiply
        return multiply(x, read())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.multiply(grad, ctx.read().transpose(-1, -2)), None, None
