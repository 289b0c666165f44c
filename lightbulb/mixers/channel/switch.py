"""Mixture of experts behind a token-choice top-k router.

Switch Transformer (Fedus et al. 2021, arXiv:2101.03961) with the dropless default of MegaBlocks (Gale et al. 2022,
arXiv:2211.15841); a capacity is optional, and drops by position or by the gates (batch-prioritised routing, Riquelme et
al. 2021, arXiv:2106.05974). An expert is SwiGLU, or any other channel mixer. Experts are spread over the expert axis.
Each expert's hidden features are split over the expert tensor axis: the tensor axis, whose ranks then gather their
tokens, or one rank, in which case sequence-parallel tensor ranks send their own tokens to whole experts. Shared
experts, which every token passes, are computed while rows travel.
"""

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lightbulb.config import Cost, Registered
from lightbulb.mixers.base import ChannelMixer, ChannelMixerConfig, Context, DecodeState, Facts, check_split
from lightbulb.mixers.channel.mlp import MLPConfig, SwiGLUExperts
from lightbulb.mixers.route import route
from lightbulb.nn.groups import (
    enter_tensor_region,
    exit_tensor_region,
    expert_axis,
    expert_tensor_axis,
    gather_positions,
)
from lightbulb.nn.noise import RowDropout
from lightbulb.nn.parameter import Init
from lightbulb.registry import register
from lightbulb.routing.dispatch import Plan, capacity, carry, combine, dispatch
from lightbulb.routing.router import Router, RouterConfig


class RoutedConfig(ChannelMixerConfig):
    """What all mixtures of experts behind a router share."""

    spreads_experts: ClassVar[bool] = True
    num_experts: int = Field(ge=1)
    """Routed experts over all ranks."""
    hidden_dim: int | None = Field(None, ge=1)
    """Width of each expert's gated hidden layer: short for ``expert: {type: mlp, hidden_dim: ...}``."""
    expert: Annotated[ChannelMixerConfig, Registered("channel_mixer")] | None = None
    """What each expert is: any channel mixer without experts of its own."""
    router: RouterConfig = RouterConfig()
    """How tokens choose."""
    capacity_factor: float | None = Field(None, gt=0)
    """Rows an expert accepts per rank and micro-batch, as a multiple of an even share; None drops nothing."""
    drop: Literal["position", "probability"] = "position"
    """What goes first where the capacity ends: later tokens, or those of small gates. By probability a token's fate
    depends on later tokens and on other samples of its micro-batch: training is then no longer strictly causal."""
    expert_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of the hidden features of routed SwiGLU experts (Switch: 0.4 when fine-tuning)."""

    @model_validator(mode="after")
    def _one_kind_of_expert(self) -> "RoutedConfig":
        if (self.hidden_dim is None) == (self.expert is None):
            raise ValueError("set either hidden_dim (SwiGLU experts) or expert (any channel mixer)")
        if self.expert is not None and self.expert.routers():
            raise ValueError(f"expert.type {self.expert.type!r} has experts of its own; choose one without")
        if self.expert is not None and self.expert_dropout:
            raise ValueError(
                f"expert_dropout {self.expert_dropout} needs SwiGLU experts; give hidden_dim instead of expert, or set "
                "expert_dropout: 0"
            )
        if self.expert is not None and not self.expert.treats_tokens_alone:
            raise ValueError(f"expert.type {self.expert.type!r} mixes tokens of a sequence; choose one that does not")
        return self

    @model_validator(mode="after")
    def _enough_experts(self) -> "RoutedConfig":
        if self.router.top_k > self.num_experts:
            raise ValueError(f"router.top_k {self.router.top_k} exceeds num_experts {self.num_experts}; lower top_k")
        return self

    @model_validator(mode="after")
    def _drops_something(self) -> "RoutedConfig":
        if self.drop != "position" and self.capacity_factor is None:
            raise ValueError(f"drop {self.drop!r} has no effect without a capacity_factor; set one, or drop: position")
        return self

    @abstractmethod
    def shared(self) -> list[ChannelMixerConfig]:
        """The experts that every token passes besides those it chooses."""

    def each(self) -> ChannelMixerConfig:
        """One routed expert."""
        return self.expert or MLPConfig(hidden_dim=self.hidden_dim or 1)

    def build(self, dim: int, init: Init) -> "Switch":
        return Switch(self, dim, init)

    def cost(self, dim: int) -> Cost:
        expert, top_k, scores = self.each().cost(dim), self.router.top_k, self.num_experts * dim
        chosen = Cost(
            self.num_experts * expert.params + scores,
            top_k * expert.active_params + scores,
            top_k * expert.forward_flops + 2.0 * scores,
        )
        return sum((config.cost(dim) for config in self.shared()), chosen)

    def routers(self) -> dict[str, int]:
        return {"router": self.num_experts}

    def check_expert_parallel(self, expert: int, expert_tensor: int) -> None:
        if self.num_experts % expert:
            raise ValueError(
                f"num_experts {self.num_experts} cannot be split over parallel.expert {expert}; choose a divisor"
            )
        try:
            self.each().check_tensor_parallel(expert_tensor)
        except ValueError as error:
            raise ValueError(f"{'' if self.expert is None else 'expert.'}{error}") from None


@register("channel_mixer", "switch")
class SwitchConfig(RoutedConfig):
    """Top-k mixture of experts."""

    facts = Facts(
        "Switch Transformers, 2021, arXiv:2101.03961; MegaBlocks, 2022, arXiv:2211.15841",
        ("tensor", "sequence", "ulysses", "expert"),
        "none",
        "with a capacity, which tokens are dropped depends on the layout",
    )
    type: Literal["switch"] = "switch"
    shared_hidden_dim: int | None = Field(None, ge=1)
    """Width of an expert that every token passes besides those it chooses; None for none."""

    def shared(self) -> list[ChannelMixerConfig]:
        return [] if self.shared_hidden_dim is None else [MLPConfig(hidden_dim=self.shared_hidden_dim)]

    def check_tensor_parallel(self, degree: int) -> None:
        check_split("shared_hidden_dim", self.shared_hidden_dim or 0, degree)


class Switch(ChannelMixer):
    """Route, dispatch, compute, combine."""

    def __init__(self, config: RoutedConfig, dim: int, init: Init):
        super().__init__()
        self.config = config
        self.tensor = expert_tensor_axis()
        self.expert = expert_axis()
        self.router = Router(config.router, config.num_experts, dim, init)
        self.experts = config.each().build_experts(config.num_experts, dim, init)
        self.shared = nn.ModuleList(part.build(dim, init) for part in config.shared())

    def forward(
        self, x: Tensor, context: Context, state: DecodeState | None = None
    ) -> tuple[Tensor, DecodeState | None]:
        gates, experts = route(self.router, x, context)
        # Each expert tensor rank sees a part of every expert's hidden features, so the gradients of tokens and gates
        # are partial sums inside this region.
        tokens = enter_tensor_region(x.flatten(0, 1), self.tensor)
        gates = enter_tensor_region(gates, self.tensor)
        experts = gather_positions(experts, self.tensor)
        mix = self._dispatch(x, tokens, gates, experts, context)
        shared = [part(x, context.at(f"shared.{i}"))[0] for i, part in enumerate(self.shared)]
        return sum(shared, exit_tensor_region(mix(), self.tensor).view_as(x)), state

    def _dispatch(
        self, x: Tensor, tokens: Tensor, gates: Tensor, experts: Tensor, context: Context
    ) -> Callable[[], Tensor]:
        """Send the tokens to their experts; when the result is called, they are computed and come back."""
        limit = self._limit(len(tokens))
        stay = self.expert.group is None and limit is None and not self.config.expert_dropout
        if stay and isinstance(self.experts, SwiGLUExperts) and self.experts.is_plain:
            return partial(self.experts.mix, tokens, gates, experts)
        priority = gates.detach() if self.config.drop == "probability" else None
        receive, plan = dispatch(tokens, experts, self.config.num_experts, self.expert, limit, priority)
        dropout = self._dropout(x, context, plan)
        return lambda: combine(self.experts(receive(), plan.counts, context, *dropout), gates, plan)

    def _limit(self, tokens: int) -> int | None:
        factor = self.config.capacity_factor
        if factor is None or not (self.training and torch.is_grad_enabled()):
            return None
        return capacity(tokens, self.config.router.top_k, self.config.num_experts, factor)

    def _dropout(self, x: Tensor, context: Context, plan: Plan) -> tuple[RowDropout, ...]:
        """What SwiGLU experts take besides their rows: dropout by keys that follow the rows, if any."""
        top_k, probability = self.config.router.top_k, self.config.expert_dropout
        keys = context.at("experts").keys(x, top_k) if probability else None
        if keys is None:
            return ()
        return (RowDropout(carry(gather_positions(keys.flatten(0, 1), self.tensor), plan), probability),)
