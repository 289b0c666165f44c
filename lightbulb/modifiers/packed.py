"""BitLinear layers for inference: ternary or binary codes packed in bytes instead of weights.

The product is exact: codes of inputs and weights are whole numbers, and sums of their products stay below 2^24 in
float32 up to 132,000 inputs (in float64 beyond). Scales come after. They are stored, not computed again: the mean
magnitude of quantised weights is smaller than the scale by the share of codes that are not 0.
"""

from torch import Tensor, cat, float32, float64, nn
from torch.nn.functional import linear

from lightbulb.modifiers.bitlinear import BitQuantizer
from lightbulb.nn.grouped import GroupedLinear
from lightbulb.nn.groups import exit_tensor_region
from lightbulb.nn.linear import ColumnParallelLinear, RowParallelLinear, SplitLinear
from lightbulb.nn.parameter import values_of
from lightbulb.ops import PackFormat, pack_codes, unpack_codes

UNPACKED = 1 << 20
"""Codes that are unpacked at a time."""


class PackedLinear(nn.Module):
    """Does what a :class:`~lightbulb.nn.linear.SplitLinear` with a :class:`BitQuantizer` does, without gradients.

    Attributes:
        codes: ``[..., out, bytes]`` uint8.
        scale: ``[..., 1]`` of each matrix, float32 (float64 of a model in that).

    (Parameters, so that a bank of experts hands each expert its own.)

    Args:
        layer: what it replaces.
        form: how codes are packed.
    """

    is_plain = False

    def __init__(self, layer: SplitLinear, form: PackFormat):
        super().__init__()
        assert isinstance(layer.quantizer, BitQuantizer)
        self.quantizer, self.adapter, self.axis = layer.quantizer, layer.adapter, layer.axis
        self.form, self.leaves_region = form, isinstance(layer, RowParallelLinear)
        weight = values_of(layer.weight)
        codes, scale = self.quantizer.matrix_codes(weight)
        self.in_features = weight.shape[-1]
        self.codes = nn.Parameter(pack_codes(codes, form), requires_grad=False)
        self.scale = nn.Parameter(scale[..., 0], requires_grad=False)

    def forward(self, x: Tensor, counts: list[int] | None = None) -> Tensor:
        """As the layer: ``x [..., in]``, with ``counts`` rows of each expert when the weight has experts."""
        product = self.multiply(x, counts)
        return exit_tensor_region(product, self.axis) if self.leaves_region else product

    def multiply(self, x: Tensor, counts: list[int] | None = None) -> Tensor:
        """The product of the local parts."""
        codes, token_scale = self.quantizer.input_codes(x)
        if counts is None:
            product = self._product(codes, self.codes, self.scale)
        else:
            experts = zip(codes.split(counts), self.codes, self.scale, strict=True)
            product = cat([self._product(rows, packed, scale) for rows, packed, scale in experts])
        product = product.mul_(token_scale).to(x.dtype)
        return product if self.adapter is None else product + self.adapter(x, counts)

    def _product(self, x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        """``x [..., in]`` with one matrix ``[out, bytes]``, or several ``[parts, out, bytes]`` side by side."""
        is_large = self.in_features * 127 >= 1 << 24
        wide = float64 if is_large or x.dtype == float64 else float32
        x, scale = x.to(wide), scale.expand(*packed.shape[:-1]).flatten()
        if not x.numel():
            return x.new_empty(*x.shape[:-1], len(scale))
        rows = packed.flatten(0, -2).split(max(1, UNPACKED // self.in_features))
        parts = [linear(x, unpack_codes(part, self.in_features, self.form, wide)) for part in rows]
        return (cat(parts, -1) if len(parts) > 1 else parts[0]).mul_(scale)


def pack(model: nn.Module, form: PackFormat = "2bit") -> list[str]:
    """Replace the quantised linear layers of a model by packed ones, whose weights are freed; their names.

    Left as they are: layers whose weights have any value, and kinds of layers that multiply in a way of their own.
    """
    packed = []
    for name, layer in list(model.named_modules()):
        if is_packable(layer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, PackedLinear(layer, form))
            packed.append(name)
    return packed


def is_packable(layer: nn.Module) -> bool:
    """Whether a layer is a plain product with quantised weights."""
    return (
        isinstance(layer, ColumnParallelLinear | RowParallelLinear | GroupedLinear)
        and isinstance(layer.quantizer, BitQuantizer)
        and layer.quantizer.config.weights != "full"
    )
