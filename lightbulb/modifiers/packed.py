"""BitLinear layers for inference: ternary or binary codes packed in bytes instead of weights.

The product is exact: codes of inputs and weights are whole numbers, which :func:`~lightbulb.ops.ternary_matmul` adds up
without rounding. Scales come after. They are stored, not computed again: the mean magnitude of quantised weights is
smaller than the scale by the share of codes that are not 0.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lightbulb.modifiers.bitlinear import FULL, BitQuantizer
from lightbulb.nn.grouped import GroupedLinear
from lightbulb.nn.linear import ColumnParallelLinear, RowParallelLinear, SplitLinear, leave_region
from lightbulb.nn.parameter import logical_of, values_of
from lightbulb.nn.splines import SplineLinear, bases_of
from lightbulb.ops import (
    PER_BYTE,
    PackFormat,
    TernaryWeight,
    as_rows,
    made_ready,
    pack_codes,
    ternary_linear,
    ternary_matmul,
)


class PackedLinear(nn.Module):
    """Does what a :class:`~lightbulb.nn.linear.SplitLinear` with a :class:`BitQuantizer` does, without gradients.

    Attributes:
        codes: ``[..., out, bytes]`` uint8, or the form that :meth:`make_ready` chose.
        scale: ``[..., parts]`` of each matrix, float32 (float64 of a model in that).
        bias: the layer's, as it is.

    (Parameters, so that a bank of experts hands each expert its own.)

    Args:
        layer: what it replaces.
        form: how codes are packed.
        codes: ``[..., out, bytes]`` of the layer's weight, where they are known.
        scale: ``[..., parts]`` likewise.
    """

    is_plain = False

    def __init__(self, layer: SplitLinear, form: PackFormat, codes: Tensor | None = None, scale: Tensor | None = None):
        super().__init__()
        assert isinstance(layer.quantizer, BitQuantizer)
        self.quantizer, self.adapter, self.axis = layer.quantizer, layer.adapter, layer.axis
        self.form, self.leaves_region = form, isinstance(layer, RowParallelLinear)
        self.in_features, self.interleaved = layer.weight.shape[-1], 0
        if codes is None or scale is None:
            codes, scale = packed_values(layer, form)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = layer.bias

    @property
    def weight(self) -> TernaryWeight:
        """Codes and scale as a product takes them."""
        return TernaryWeight(self.codes, self.scale, self.in_features, self.form, self.interleaved)

    def make_ready(self) -> None:
        """Rearrange the codes for the device they are on."""
        weight = made_ready(self.weight)
        if weight.interleaved != self.interleaved:
            self.codes, self.interleaved = nn.Parameter(weight.codes, requires_grad=False), weight.interleaved

    def rows(self) -> Tensor:
        """``[..., out, bytes]``, as files hold the codes."""
        return as_rows(self.weight).codes

    def forward(self, x: Tensor, counts: list[int] | None = None) -> Tensor:
        """As the layer: ``x [..., in]``, with ``counts`` rows of each expert when the weight has experts."""
        product = self.multiply(x, counts)
        if self.leaves_region:
            return leave_region(product, self.axis, self.bias)
        return product if self.bias is None else product + self.bias

    def exactly(self, x: Tensor, counts: list[int] | None = None) -> Tensor:
        """:meth:`multiply` in float64, of the codes that training takes."""
        codes, token_scale = self.quantizer.input_codes(x.flatten(0, -2))
        weight = as_rows(self.weight)._replace(scale=self.scale.double())
        product = ternary_matmul(codes.double(), token_scale, weight, counts).view(*x.shape[:-1], weight.out)
        return product if self.adapter is None else product + self.adapter(x, counts)

    def multiply(self, x: Tensor, counts: list[int] | None = None) -> Tensor:
        """The product of the local parts."""
        rows, how = x.flatten(0, -2), self.quantizer.quantisation
        if how is not None:
            product = ternary_linear(rows, how, self.weight, counts)
        else:
            codes, token_scale = self.quantizer.input_codes(rows)
            if self.quantizer.config.act_bits != FULL and codes.dtype == torch.float32:
                codes = codes.to(torch.int8)
            product = ternary_matmul(codes, token_scale, self.weight, counts).to(x.dtype)
        product = product.view(*x.shape[:-1], product.shape[-1])
        return product if self.adapter is None else product + self.adapter(x, counts)


class PackedSpline(PackedLinear):
    """The same of a :class:`~lightbulb.nn.splines.SplineLinear`, which multiplies the bases of its inputs."""

    def __init__(self, layer: SplineLinear, form: PackFormat, codes: Tensor | None = None, scale: Tensor | None = None):
        super().__init__(layer, form, codes, scale)
        self.basis = layer.basis

    def exactly(self, x: Tensor, counts: list[int] | None = None) -> Tensor:
        return super().exactly(bases_of(x, self.basis), counts)

    def multiply(self, x: Tensor, counts: list[int] | None = None) -> Tensor:
        return super().multiply(bases_of(x, self.basis), counts)


def packed(layer: nn.Module, form: PackFormat, *values: Tensor) -> PackedLinear:
    """A layer that :func:`is_packable`, packed; ``values`` are its codes and scale where they are known."""
    if isinstance(layer, SplineLinear):
        return PackedSpline(layer, form, *values)
    assert isinstance(layer, SplitLinear)
    return PackedLinear(layer, form, *values)


def packed_values(layer: SplitLinear, form: PackFormat) -> tuple[Tensor, Tensor]:
    """Packed codes ``[..., out, bytes]`` and scales ``[..., parts]`` of a layer's weight, an expert's matrices side by
    side."""
    assert isinstance(layer.quantizer, BitQuantizer)
    codes, scale = layer.quantizer.matrix_codes(values_of(layer.weight))
    packed, scale = pack_codes(codes, form), scale[..., 0]
    return (packed.flatten(1, -2), scale.flatten(1)) if isinstance(layer, GroupedLinear) else (packed, scale)


def packed_shapes(layer: nn.Module, form: PackFormat) -> dict[str, tuple[int, ...]]:
    """Shapes of the codes and scale of :func:`packed_values`.

    Raises:
        AttributeError: the layer cannot be packed.
    """
    if not is_packable(layer):
        raise AttributeError(f"{type(layer).__name__} is no layer that can be packed")
    assert isinstance(layer, SplitLinear)
    *lead, outputs, inputs = logical_of(layer.weight).local_shape()
    size = -(-inputs // PER_BYTE[form])
    if isinstance(layer, GroupedLinear):
        experts, parts = lead[0], math.prod(lead[1:])
        return {"codes": (experts, parts * outputs, size), "scale": (experts, parts)}
    return {"codes": (*lead, outputs, size), "scale": (*lead, 1)}


def pack(model: nn.Module, form: PackFormat = "2bit") -> list[str]:
    """Replace the quantised linear layers of a model by packed ones, whose weights are freed; their names.

    Left as they are: layers whose weights have any value, and kinds of layers that multiply in a way of their own.
    """
    names = []
    for name, layer in list(model.named_modules()):
        if is_packable(layer):
            put(model, name, packed(layer, form))
            names.append(name)
    make_ready(model)
    return names


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Make a layer the one of this name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def make_ready(model: nn.Module) -> None:
    """Rearrange all packed codes for the device they are on; again when they have moved."""
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            layer.make_ready()


@torch.no_grad()
def rounding(model: nn.Module, tokens: Tensor) -> float:
    """How far products of packed layers are from exact ones of the same inputs: the greatest difference in any layer,
    in standard deviations of what it gives for these tokens.

    Layers are compared one by one, because differences do not stay rounding on the way through a model: beside the edge
    between two codes they become a whole code.
    """
    worst = 0.0

    def watched(
        multiply: Callable[..., Tensor], exactly: Callable[..., Tensor], x: Tensor, counts: list[int] | None = None
    ) -> Tensor:
        nonlocal worst
        product, exact = multiply(x, counts), exactly(x, counts)
        if exact.numel():
            difference = float((product - exact).abs().max() / exact.std(correction=0).clamp_min(1e-30))
            worst = difference if math.isnan(difference) else max(worst, difference)
        return product

    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    for layer in layers:
        layer.multiply = partial(watched, layer.multiply, layer.exactly)  # type: ignore[method-assign]
    try:
        model(tokens)
    finally:
        for layer in layers:
            del layer.multiply
    return worst


def is_packable(layer: nn.Module) -> bool:
    """Whether a layer is a plain product with quantised weights, of its inputs or their bases."""
    return (
        isinstance(layer, ColumnParallelLinear | RowParallelLinear | GroupedLinear | SplineLinear)
        and isinstance(layer.quantizer, BitQuantizer)
        and layer.quantizer.config.weights != "full"
    )
