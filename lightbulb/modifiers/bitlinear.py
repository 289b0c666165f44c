"""BitLinear: linear layers that multiply ternary or binary weights with 8-bit inputs.

"BitNet: Scaling 1-bit Transformers for Large Language Models", 2023, arXiv:2310.11453 (binary weights), and "The Era of
1-bit LLMs: All Large Language Models are in 1.58 Bits", 2024, arXiv:2402.17764 (ternary). Training keeps the weights in
full precision, quantises them in every forward pass and sends gradients straight through. Inputs are normalised without
a weight, right in front of their quantisation, and quantised token by token.

Scales are those of the whole matrix and of all features, however tensor parallelism splits them. Of several matrices in
one weight (experts; gate and up) each has its own. Departures: largest codes of +-127 also for the inputs of ternary
weights, where the authors' code reaches -128, which no input takes that is scaled by its largest magnitude; scale of
inputs by token also for binary weights, where the paper's is by tensor.
"""

from typing import Literal

from pydantic import Field, field_validator
from torch import Tensor, nn

from lightbulb.config import Cost
from lightbulb.mixers.base import Facts
from lightbulb.models.modifier import ModifierConfig
from lightbulb.modifiers.matching import check_match, matching_linears
from lightbulb.nn.groups import SINGLE
from lightbulb.nn.linear import Multiply, Quantizer, SplitLinear
from lightbulb.nn.lowbit import (
    bounded_codes,
    quantisation,
    quantise_bounded,
    quantise_tokens,
    quantise_weight,
    ternary_scale,
    token_codes,
    weight_codes,
)
from lightbulb.ops import Quantisation, takes_ternary_training, ternary_training_linear
from lightbulb.registry import register

FULL = 16
"""Bits of an input that is not quantised."""


@register("modifier", "bitlinear")
class BitLinearConfig(ModifierConfig):
    """Ternary or binary weights and 8-bit inputs in the linear layers of all blocks."""

    facts = Facts(
        "BitNet, 2023, arXiv:2310.11453; BitNet b1.58, 2024, arXiv:2402.17764",
        ("tensor", "sequence", "ulysses", "pipeline", "expert"),
        "none",
        "rounding is a step: where layouts round an input differently, its code may differ by one",
    )
    type: Literal["bitlinear"] = "bitlinear"
    weights: Literal["ternary", "binary", "full"] = "ternary"
    """Values of a weight: -1, 0, 1; or -1, 1; or any."""
    act_bits: int = Field(8, ge=2, le=FULL)
    """Bits of an input; 16 leaves inputs as they are, and does not normalise them."""
    norm: bool = True
    """Divide inputs by their root mean square before they are quantised."""
    norm_eps: float = Field(1e-6, gt=0)
    """Epsilon of that norm."""
    match: str = "blocks.*"
    """Names of the layers, ``*`` standing for any characters."""

    @field_validator("act_bits")
    @classmethod
    def _known_bits(cls, bits: int) -> int:
        if 8 < bits < FULL:
            raise ValueError(f"inputs have 2 to 8 bits, or {FULL} for no quantisation")
        return bits

    def convert(self, model: nn.Module) -> None:
        for _, layer in matching_linears(model, self.match):
            layer.quantizer = BitQuantizer(self, layer)

    def converted_cost(self, plain: nn.Module) -> Cost:
        check_match(plain, self.match)
        return Cost.zero()


class BitQuantizer(Quantizer):
    """What one layer multiplies.

    Args:
        config: how it is quantised.
        layer: how it is split.
    """

    def __init__(self, config: BitLinearConfig, layer: SplitLinear):
        super().__init__()
        self.config = config
        self.is_bounded = layer.has_bounded_input
        split = layer.logical.tensor_dim
        is_matrix_split = split is not None and split >= len(layer.logical.shape) - 2
        self.matrix_axis = layer.axis if is_matrix_split else SINGLE
        self.input_axis = layer.axis if layer.has_split_input else SINGLE

    @property
    def norm_eps(self) -> float | None:
        """Epsilon of the norm; None for no norm."""
        return self.config.norm_eps if self.config.norm else None

    def input(self, x: Tensor) -> Tensor:
        if self.config.act_bits == FULL:
            return x
        if self.is_bounded:
            return quantise_bounded(x, self.config.act_bits)
        return quantise_tokens(x, self.config.act_bits, self.input_axis, self.norm_eps)

    def matrix(self, weight: Tensor) -> Tensor:
        if self.config.weights == "full":
            return weight
        return quantise_weight(weight, self.config.weights, self.matrix_axis)

    def product(self, x: Tensor, weight: Tensor, multiply: Multiply, counts: list[int] | None) -> Tensor:
        is_ternary = self.config.weights == "ternary" and self.config.act_bits != FULL and not self.is_bounded
        if not is_ternary or self.input_axis.size > 1 or not takes_ternary_training(x, weight):
            return super().product(x, weight, multiply, counts)
        rule = quantisation(self.config.act_bits, self.norm_eps, is_bounded=False)[:4]
        return ternary_training_linear(x, weight, ternary_scale(weight, self.matrix_axis), rule, counts)

    def input_codes(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """Codes and scales, ``[..., 1]`` or one for all, whose product is :meth:`input`."""
        if self.config.act_bits == FULL:
            return x, 1.0
        if self.is_bounded:
            return bounded_codes(x, self.config.act_bits)
        return token_codes(x, self.config.act_bits, self.input_axis, self.norm_eps)[:2]

    @property
    def quantisation(self) -> Quantisation | None:
        """What :meth:`input_codes` does, where it needs this rank's part of a token only; else None."""
        bits = self.config.act_bits
        if bits == FULL or (self.input_axis.size > 1 and not self.is_bounded):
            return None
        return quantisation(bits, self.norm_eps, self.is_bounded)

    def matrix_codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales ``[..., 1, 1]``, whose product is :meth:`matrix`."""
        assert self.config.weights != "full"
        return weight_codes(weight, self.config.weights, self.matrix_axis)
