"""LoRA: frozen weights, each with a trained update of low rank; optionally frozen in four bits (QLoRA).

"LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685: ``y = W x + s B A x`` with
``A [rank, in]`` random, ``B [out, rank]`` zero at the start and ``s = alpha / rank``; with ``s = alpha / sqrt(rank)``,
rsLoRA, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023, arXiv:2312.03732. "QLoRA: Efficient
Finetuning of Quantized LLMs", 2023, arXiv:2305.14314, keeps W in NF4 (:mod:`lightbulb.nn.nf4`) and unpacks it for each
product; checkpoints hold the unpacked values, which give the same codes when they are read. Every matrix has its own
pair, in experts too (there gate and up one each).

Everything but A and B is frozen: embedding, norms and routers too. Along a split dimension A and B are split like W;
what they keep whole is used by each rank for its part, so its gradients are summed. On a BitLinear layer the update
stays beside the quantised product and sees its unquantised input.
"""

import math
from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor, cat, nn, no_grad
from torch.nn.functional import linear

from lightbulb.config import ConfigError, Cost
from lightbulb.mixers.base import Facts
from lightbulb.models.modifier import ModifierConfig
from lightbulb.models.trainable import active_share
from lightbulb.modifiers.matching import check_match, matching_linears
from lightbulb.nn.groups import share_in_tensor_region
from lightbulb.nn.linear import Adapter, SplitLinear
from lightbulb.nn.nf4 import BLOCK, NF4
from lightbulb.nn.parameter import constant, make_parameter, set_values, stored_values, values_of
from lightbulb.ops import grouped_linear
from lightbulb.registry import register


@register("modifier", "lora")
class LoRAConfig(ModifierConfig):
    """Frozen weights with trained low-rank updates."""

    facts = Facts(
        "LoRA, 2021, arXiv:2106.09685; QLoRA, 2023, arXiv:2305.14314",
        ("tensor", "sequence", "ulysses", "pipeline", "expert"),
        "none",
        "no dropout on the updates' inputs; NF4 needs a multiple of 64 inputs on every rank; what other modifiers add "
        "(depth routers, averages) is frozen too: start from a run that has it",
    )
    type: Literal["lora"] = "lora"
    rank: int = Field(8, ge=1)
    """Rank of the updates."""
    alpha: float = Field(16.0, gt=0)
    """Weight of the updates, see ``scaling``."""
    scaling: Literal["alpha/r", "rslora"] = "alpha/r"
    """Updates are multiplied by alpha / rank, or by alpha / sqrt(rank)."""
    quantize: Literal["nf4"] | None = None
    """Keep the frozen weights beside updates in four bits."""
    match: str = "blocks.*"
    """Names of the layers, ``*`` standing for any characters."""

    @property
    def scale(self) -> float:
        """What updates are multiplied by."""
        return self.alpha / (self.rank if self.scaling == "alpha/r" else math.sqrt(self.rank))

    def convert(self, model: nn.Module) -> None:
        model.requires_grad_(False)
        for name, layer in matching_linears(model, self.match):
            layer.adapter = LowRank(layer, self.rank, self.scale)
            if self.quantize is not None:
                _keep_in_four_bits(name, layer)

    def converted_cost(self, plain: nn.Module) -> Cost:
        check_match(plain, self.match)
        params, active = 0, 0.0
        for name, layer in matching_linears(plain, self.match):
            *lead, outputs, inputs = layer.logical.shape
            pair = math.prod(lead) * self.rank * (outputs + inputs)
            params, active = params + pair, active + pair * active_share(plain, name, layer.logical)
        return Cost(params, round(active), 2.0 * active)


class LowRank(Adapter):
    """``s B A x``: ``a [..., rank, in]`` and ``b [..., out, rank]``, with the leading dimensions of the weight.

    Args:
        layer: whose product it adds to; results are partial sums where that layer's are.
        rank: of the update.
        scale: s.
    """

    def __init__(self, layer: SplitLinear, rank: int, scale: float):
        super().__init__()
        self.scale = scale
        weight = layer.logical
        *lead, outputs, inputs = weight.shape
        leading = weight.tensor_dim is not None and weight.tensor_dim < len(lead)  # then ranks hold whole pairs
        plain = replace(weight, fill=None, keep_fp32=False)
        a_dim = weight.tensor_dim if leading or layer.has_split_input else None
        b_dim = weight.tensor_dim if leading or not layer.has_split_input else None
        self.a = make_parameter(
            replace(plain, shape=(*lead, rank, inputs), std=1 / math.sqrt(inputs), tensor_dim=a_dim)
        )
        self.b = make_parameter(replace(plain, shape=(*lead, outputs, rank), fill=constant(0.0), tensor_dim=b_dim))
        self.axis = weight.tensor
        self.shares_a, self.shares_b = (dim is None and not weight.by_position for dim in (a_dim, b_dim))

    def forward(self, x: Tensor, counts: list[int] | None = None) -> Tensor:
        a = share_in_tensor_region(self.a, self.axis) if self.shares_a else self.a
        b = share_in_tensor_region(self.b, self.axis) if self.shares_b else self.b
        if counts is None:
            return linear(linear(x, a), b) * self.scale
        inner = grouped_linear(x, a.flatten(1, -2), counts)
        if b.dim() == 3:
            return grouped_linear(inner, b, counts) * self.scale
        parts = zip(inner.chunk(b.shape[1], -1), b.unbind(1), strict=True)
        return cat([grouped_linear(part.contiguous(), each, counts) for part, each in parts], -1) * self.scale

    def delta(self) -> Tensor:
        """``s B A``: what is added to the weight."""
        return self.b @ self.a * self.scale


@no_grad()
def merge(model: nn.Module) -> None:
    """Add every update to its weight and remove it. Weights in four bits are unpacked first.

    Raises:
        ValueError: a layer quantises its weight, which would round the update away.
    """
    for name, layer in matching_linears(model, "*"):
        if not isinstance(layer.adapter, LowRank):
            continue
        if layer.quantizer is not None:
            raise ValueError(f"{name}: its weight is quantised in every product: leave the update beside it")
        merged = values_of(layer.weight) + layer.adapter.delta().to(layer.weight.dtype)
        if hasattr(layer.weight, "keeper"):
            del layer.weight.keeper, layer.keeper
            layer._state_dict_hooks.clear()
            layer._load_state_dict_pre_hooks.clear()
        layer.weight.data = merged
        layer.adapter = None


def _keep_in_four_bits(name: str, layer: SplitLinear) -> None:
    inputs = layer.weight.shape[-1]
    if inputs % BLOCK:
        raise ConfigError(
            f"model.modifiers: lora: quantize nf4: {name} has {inputs} inputs on each rank, no multiple of {BLOCK}; "
            "widen the layer, lower parallel.tensor, or leave it out of match"
        )
    layer.keeper = NF4(layer.has_split_input)
    layer.weight.keeper = layer.keeper  # type: ignore[attr-defined]
    layer.register_state_dict_post_hook(_put_values)
    layer.register_load_state_dict_pre_hook(_take_values)


def _put_values(layer: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """A state dictionary holds the values, as checkpoints do."""
    state[prefix + "weight"] = stored_values(layer.weight)  # type: ignore[arg-type]


def _take_values(layer: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    if prefix + "weight" in state:
        set_values(layer.weight, state[prefix + "weight"])  # type: ignore[arg-type]
        state[prefix + "weight"] = layer.weight.detach()  # type: ignore[operator]
