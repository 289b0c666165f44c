"""Mixture of experts behind a token-choice top-k router.

Switch Transformer (Fedus et al. 2021, arXiv:2101.03961) with the dropless default of MegaBlocks (Gale et al. 2022,
arXiv:2211.15841); a capacity is optional. An expert is SwiGLU, or any other channel mixer. Experts are spread over the
expert axis. Each expert's hidden features are split over the expert tensor axis: the tensor axis, whose ranks then
gather their tokens, or one rank, in which case sequence-parallel tensor ranks send their own tokens to whole experts. A
shared expert, which every token passes, is computed while rows travel.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lightbulb.config import Cost, Registered
from lightbulb.mixers.base import ChannelMixer, ChannelMixerConfig, Context, DecodeState, Facts
from lightbulb.mixers.channel.mlp import MLPConfig
from lightbulb.nn.groups import (
    enter_tensor_region,
    exit_tensor_region,
    expert_axis,
    expert_tensor_axis,
    gather_positions,
)
from lightbulb.nn.parameter import Init
from lightbulb.registry import register
from lightbulb.routing.dispatch import capacity, combine, dispatch
from lightbulb.routing.router import Router, RouterConfig


@register("channel_mixer", "switch")
class SwitchConfig(ChannelMixerConfig):
    """Top-k mixture of experts."""

    spreads_experts: ClassVar[bool] = True
    facts = Facts(
        "Switch Transformers, 2021, arXiv:2101.03961; MegaBlocks, 2022, arXiv:2211.15841",
        ("tensor", "sequence", "ulysses", "expert"),
        "none",
        "with a capacity, which tokens are dropped depends on the layout",
    )
    type: Literal["switch"] = "switch"
    num_experts: int = Field(ge=1)
    """Experts over all ranks."""
    hidden_dim: int | None = Field(None, ge=1)
    """Width of each expert's gated hidden layer: short for ``expert: {type: mlp, hidden_dim: ...}``."""
    expert: Annotated[ChannelMixerConfig, Registered("channel_mixer")] | None = None
    """What each expert is: any channel mixer without experts of its own."""
    shared_hidden_dim: int | None = Field(None, ge=1)
    """Width of an expert that every token passes besides those it chooses (DeepSeekMoE); None for none."""
    router: RouterConfig = RouterConfig()
    """How tokens choose."""
    capacity_factor: float | None = Field(None, gt=0)
    """Rows an expert accepts per rank and micro-batch, as a multiple of an even share; None drops nothing."""

    @model_validator(mode="after")
    def _one_kind_of_expert(self) -> "SwitchConfig":
        if (self.hidden_dim is None) == (self.expert is None):
            raise ValueError("set either hidden_dim (SwiGLU experts) or expert (any channel mixer)")
        if self.expert is not None and self.expert.routers():
            raise ValueError(f"expert.type {self.expert.type!r} has experts of its own; choose one without")
        if self.expert is not None and not self.expert.treats_tokens_alone:
            raise ValueError(f"expert.type {self.expert.type!r} mixes tokens of a sequence; choose one that does not")
        return self

    @model_validator(mode="after")
    def _enough_experts(self) -> "SwitchConfig":
        if self.router.top_k > self.num_experts:
            raise ValueError(f"router.top_k {self.router.top_k} exceeds num_experts {self.num_experts}; lower top_k")
        return self

    def each(self) -> ChannelMixerConfig:
        """One expert."""
        return self.expert or MLPConfig(hidden_dim=self.hidden_dim or 1)

    def build(self, dim: int, init: Init) -> "Switch":
        return Switch(self, dim, init)

    def cost(self, dim: int) -> Cost:
        expert = self.each().cost(dim)
        always = self.num_experts * dim + 3 * dim * (self.shared_hidden_dim or 0)
        top_k = self.router.top_k
        flops = top_k * expert.forward_flops + 2.0 * always
        return Cost(self.num_experts * expert.params + always, top_k * expert.active_params + always, flops)

    def routers(self) -> dict[str, int]:
        return {"router": self.num_experts}

    def check_tensor_parallel(self, degree: int) -> None:
        if (self.shared_hidden_dim or 0) % degree:
            raise ValueError(
                f"shared_hidden_dim {self.shared_hidden_dim} cannot be split over parallel.tensor {degree}; "
                f"choose a multiple of {degree}"
            )

    def check_expert_parallel(self, expert: int, expert_tensor: int) -> None:
        if self.num_experts % expert:
            raise ValueError(
                f"num_experts {self.num_experts} cannot be split over parallel.expert {expert}; choose a divisor"
            )
        self.each().check_tensor_parallel(expert_tensor)


class Switch(ChannelMixer):
    """Route, dispatch, compute, combine."""

    def __init__(self, config: SwitchConfig, dim: int, init: Init):
        super().__init__()
        self.config = config
        self.tensor = expert_tensor_axis()
        self.expert = expert_axis()
        self.router = Router(config.router, config.num_experts, dim, init)
        self.experts = config.each().build_experts(config.num_experts, dim, init)
        if config.shared_hidden_dim is not None:
            self.shared = MLPConfig(hidden_dim=config.shared_hidden_dim).build(dim, init)

    def forward(
        self, x: Tensor, context: Context, state: DecodeState | None = None
    ) -> tuple[Tensor, DecodeState | None]:
        tokens = x.reshape(-1, x.shape[-1])
        noise = context.at("router").uniform(x) if self.config.router.jitter else None
        gates, experts = self.router(tokens, None if noise is None else noise.flatten(0, 1))
        # Each expert tensor rank sees a part of every expert's hidden features, so the gradients of tokens and gates
        # are partial sums inside this region.
        tokens = enter_tensor_region(tokens, self.tensor)
        gates = enter_tensor_region(gates, self.tensor)
        experts = gather_positions(experts, self.tensor)
        receive, plan = dispatch(tokens, experts, self.config.num_experts, self.expert, self._limit(len(tokens)))
        shared = self.shared(x, context)[0] if self.config.shared_hidden_dim is not None else None
        mixed = combine(self.experts(receive(), plan.counts, context), gates, plan)
        mixed = exit_tensor_region(mixed, self.tensor).view_as(x)
        return mixed if shared is None else mixed + shared, state

    def _limit(self, tokens: int) -> int | None:
        factor = self.config.capacity_factor
        if factor is None or not (self.training and torch.is_grad_enabled()):
            return None
        return capacity(tokens, self.config.router.top_k, self.config.num_experts, factor)
