"""Mixture of attention heads: which query heads attend is chosen per token; keys and values are computed once for all.

MoA (Zhang et al. 2022, arXiv:2210.05144) and its form in JetMoE (Shen et al. 2024, arXiv:2404.07413). An expert e holds
``num_kv_heads`` query heads and their part of the output projection; expert and key/value head h share keys and values:

    q = W_q[e] x        o[e] = softmax(q K^T / sqrt(width)) V        y = sum over chosen e: g_e W_o[e] o[e]

- JetMoE (the default): several key/value heads; gates are a softmax over the chosen experts.
- Original: ``num_kv_heads: 1``, so that an expert is one head, and ``router: {normalizer_gradient: false}``: softmax
  over all experts, the chosen ones divided by their sum, through which no gradient flows.

Experts are not spread over ranks: a token would travel four times. Instead the heads of every expert are split over the
tensor axis with the key/value heads, and over the Ulysses axis inside the attention.
"""

from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lightbulb.config import Cost
from lightbulb.mixers.base import Context, DecodeState, Facts, TokenMixer, TokenMixerConfig
from lightbulb.mixers.route import route
from lightbulb.mixers.token.heads import check_heads
from lightbulb.mixers.token.visibility import of_cache, of_whole
from lightbulb.nn.attention import attend
from lightbulb.nn.attention_backend import whole_attention
from lightbulb.nn.attention_mask import Rule
from lightbulb.nn.grouped import GroupedLinear
from lightbulb.nn.groups import (
    SINGLE,
    enter_tensor_region,
    exit_tensor_region,
    gather_positions,
    share_in_tensor_region,
    tensor_axis,
    ulysses_axis,
)
from lightbulb.nn.kv_cache import empty_cache, write
from lightbulb.nn.linear import ColumnParallelLinear
from lightbulb.nn.norm import RMSNorm
from lightbulb.nn.parameter import Init
from lightbulb.nn.recompute import recompute
from lightbulb.nn.rope import rotary_angles, rotate
from lightbulb.nn.ulysses import gather_heads, scatter_heads
from lightbulb.registry import register
from lightbulb.routing.dispatch import combine, dispatch, sort_by_expert, sort_by_token
from lightbulb.routing.router import Router, RouterConfig


@register("token_mixer", "moa")
class MoAConfig(TokenMixerConfig):
    """Mixture of attention heads."""

    facts = Facts(
        "Mixture of Attention Heads, 2022, arXiv:2210.05144; JetMoE, 2024, arXiv:2404.07413",
        ("tensor", "sequence", "ulysses"),
        "2 x num_kv_heads x head_dim per token",
        "experts are not spread over ranks",
    )
    keeps_gaps: ClassVar[bool] = True
    masks_gists: ClassVar[bool] = True
    type: Literal["moa"] = "moa"
    num_experts: int = Field(ge=1)
    """Experts, each with a query and an output matrix."""
    num_kv_heads: int = Field(ge=1)
    """Key/value heads, and query heads of each expert: a token has ``router.top_k x num_kv_heads`` query heads."""
    head_dim: int = Field(ge=2)
    """Width of a head."""
    router: RouterConfig = RouterConfig()
    """How tokens choose."""
    qk_norm: bool = False
    """Normalise queries and keys per head before the rotation."""
    rope_theta: float = Field(10_000.0, gt=0)
    """Base of the rotary frequencies."""
    norm_eps: float = Field(1e-6, gt=0)
    """Epsilon of the query/key norms."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> "MoAConfig":
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions need an even width")
        if self.router.top_k > self.num_experts:
            raise ValueError(f"router.top_k {self.router.top_k} exceeds num_experts {self.num_experts}; lower top_k")
        return self

    def build(self, dim: int, context_length: int, init: Init) -> "MoA":
        return MoA(self, dim, init)

    def cost(self, dim: int, context_length: int) -> Cost:
        matrix, top_k = dim * self.num_kv_heads * self.head_dim, self.router.top_k
        scores = self.num_experts * dim
        norms = 2 * self.head_dim if self.qk_norm else 0
        active = 2 * (top_k + 1) * matrix + scores
        # A token attends to (context_length + 1) / 2 tokens on average: scores and weighted values.
        attended = 4.0 * top_k * self.num_kv_heads * self.head_dim * (context_length + 1) / 2
        params = 2 * (self.num_experts + 1) * matrix + scores + norms
        return Cost(params, active + norms, 2.0 * active + attended)

    def routers(self) -> dict[str, int]:
        return {"router": self.num_experts}

    def check_tensor_parallel(self, degree: int) -> None:
        check_heads({"num_kv_heads": self.num_kv_heads}, degree)

    def check_ulysses(self, tensor: int, ulysses: int) -> None:
        check_heads({"num_kv_heads": self.num_kv_heads}, tensor, ulysses)


class MoA(TokenMixer):
    """Map tokens to the queries of their experts, attend, reduce; heads local to the tensor rank."""

    def __init__(self, config: MoAConfig, dim: int, init: Init):
        super().__init__()
        self.config = config
        self.axis = tensor_axis()
        self.ulysses = ulysses_axis()
        self.kv_heads = config.num_kv_heads // self.axis.size
        experts, width = config.num_experts, config.num_kv_heads * config.head_dim
        self.router = Router(config.router, experts, dim, init)
        self.query = GroupedLinear(experts, dim, width, init.std, self.axis, SINGLE)
        self.key = ColumnParallelLinear(dim, width, init.std)
        self.value = ColumnParallelLinear(dim, width, init.std)
        self.output = GroupedLinear(experts, width, dim, init.output_std, self.axis, SINGLE, has_split_input=True)
        if config.qk_norm:
            self.query_norm = RMSNorm(config.head_dim, config.norm_eps, by_position=False)
            self.key_norm = RMSNorm(config.head_dim, config.norm_eps, by_position=False)

    def forward(
        self, x: Tensor, context: Context, state: DecodeState | None = None
    ) -> tuple[Tensor, DecodeState | None]:
        gates, experts = route(self.router, x, context)
        # Inside the region a rank has its heads of every expert: gradients of gates are partial sums, as those of x.
        x = enter_tensor_region(x, self.axis)
        gates = enter_tensor_region(gates, self.axis)
        experts = gather_positions(experts, self.axis)
        receive, plan = dispatch(x.flatten(0, 1), experts, self.config.num_experts, SINGLE, None)
        query = sort_by_token(self.query(receive(), plan.counts), plan)
        mixed, state = self._attend(x, query, context, state)
        result = combine(self.output(sort_by_expert(mixed, plan), plan.counts), gates, plan)
        return exit_tensor_region(result.view_as(x), self.axis), state

    def init_state(self, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype) -> DecodeState:
        return empty_cache(batch_size, self.kv_heads, max_length, self.config.head_dim, device, dtype)

    def _attend(
        self, x: Tensor, query: Tensor, context: Context, state: DecodeState | None
    ) -> tuple[Tensor, DecodeState | None]:
        """``x [length, batch, dim]`` and queries ``[length x batch x k, heads x width]`` to what each of these attends
        to, of the same shape."""
        width, top_k = self.config.head_dim, self.config.router.top_k
        # A key/value head serves consecutive query heads, so a token's experts go last: [..., heads x k, width]. Ranks
        # that split these heads then split the key/value heads alike.
        query = query.view(*x.shape[:2], top_k, -1, width).transpose(2, 3).flatten(2, 3)
        heads = [query, *(part(x).unflatten(-1, (-1, width)) for part in (self.key, self.value))]
        query, key, value = scatter_heads(heads, self.ulysses)
        if self.config.qk_norm:
            query = self.query_norm(query, share_in_tensor_region(self.query_norm.weight, self.axis))
            key = self.key_norm(key, share_in_tensor_region(self.key_norm.weight, self.axis))
        cos, sin = rotary_angles(context.positions, width, self.config.rope_theta)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if state is None:
            core = partial(whole_attention, seen=of_whole(Rule(), context), sink=None, backend="auto")
            core = partial(recompute, core) if context.recompute == "selective" else core
        else:
            state = write(state, key, value, context.positions, context.present)
            key, value, seen = of_cache(Rule(), context, state)
            core = partial(attend, mask=seen.dense())
        mixed = core(query, key, value)
        if context.present is not None:
            mixed = mixed.masked_fill(~context.present[:, None, :, None], 0.0)
        mixed = gather_heads(mixed.permute(2, 0, 1, 3), self.ulysses)
        return mixed.unflatten(2, (-1, top_k)).transpose(2, 3).flatten(3).flatten(0, 2), state
