"""Causal softmax attention with grouped key/value heads, rotary positions and optional query/key norms.

Attention (Vaswani et al. 2017), grouped queries (Ainslie et al. 2023, arXiv:2305.13245), query/key normalisation
(Henry et al. 2020, arXiv:2010.04245; per head, before the rotation). Heads are split over the tensor axis, and again
over the Ulysses axis.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lightbulb.config import Cost
from lightbulb.mixers.base import Context, DecodeState, Facts, TokenMixer, TokenMixerConfig
from lightbulb.nn.attention import attend, causal_attention
from lightbulb.nn.groups import enter_tensor_region, share_in_tensor_region, tensor_axis, ulysses_axis
from lightbulb.nn.linear import ColumnParallelLinear, RowParallelLinear
from lightbulb.nn.norm import RMSNorm
from lightbulb.nn.parameter import Init
from lightbulb.nn.recompute import recompute
from lightbulb.nn.rope import rotary_angles, rotate
from lightbulb.nn.ulysses import gather_heads, scatter_heads
from lightbulb.registry import register


@register("token_mixer", "attention")
class AttentionConfig(TokenMixerConfig):
    """Causal self-attention."""

    facts = Facts(
        "Attention Is All You Need, 2017, arXiv:1706.03762; GQA, 2023, arXiv:2305.13245",
        ("tensor", "sequence", "ulysses"),
        "2 x num_kv_heads x head_dim per token",
    )
    type: Literal["attention"] = "attention"
    num_heads: int = Field(ge=1)
    """Query heads."""
    num_kv_heads: int | None = Field(None, ge=1)
    """Key/value heads, each shared by ``num_heads / num_kv_heads`` query heads; None for one per query head."""
    head_dim: int | None = Field(None, ge=2)
    """Width of a head; None for ``dim / num_heads``."""
    qk_norm: bool = False
    """Normalise queries and keys per head before the rotation."""
    rope_theta: float = Field(10_000.0, gt=0)
    """Base of the rotary frequencies."""
    norm_eps: float = Field(1e-6, gt=0)
    """Epsilon of the query/key norms."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "AttentionConfig":
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}; choose a divisor"
            )
        if self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions need an even width")
        return self

    @property
    def kv_heads(self) -> int:
        """Key/value heads, the default resolved."""
        return self.num_kv_heads or self.num_heads

    def width(self, dim: int) -> int:
        """Width of one head for a model width.

        Raises:
            ValueError: ``dim`` does not divide into an even head width.
        """
        if self.head_dim is not None:
            return self.head_dim
        if dim % (2 * self.num_heads):
            raise ValueError(
                f"dim {dim} does not divide into num_heads {self.num_heads} heads of even width; "
                f"set head_dim or choose a dim that is a multiple of {2 * self.num_heads}"
            )
        return dim // self.num_heads

    def build(self, dim: int, context_length: int, init: Init) -> "Attention":
        return Attention(self, dim, init)

    def cost(self, dim: int, context_length: int) -> Cost:
        width = self.width(dim)
        matrices = dim * width * (2 * self.num_heads + 2 * self.kv_heads)
        norms = 2 * width if self.qk_norm else 0
        # A token attends to (context_length + 1) / 2 tokens on average: scores and weighted values.
        attended = 4.0 * self.num_heads * width * (context_length + 1) / 2
        return Cost(matrices + norms, matrices + norms, 2.0 * matrices + attended)

    def check_tensor_parallel(self, degree: int) -> None:
        for field, heads in (("num_heads", self.num_heads), ("num_kv_heads", self.kv_heads)):
            if heads % degree:
                raise ValueError(f"{field} {heads} cannot be split over parallel.tensor {degree}; choose a divisor")

    def check_ulysses(self, tensor: int, ulysses: int) -> None:
        for field, heads in (("num_heads", self.num_heads), ("num_kv_heads", self.kv_heads)):
            if heads % (tensor * ulysses):
                raise ValueError(
                    f"{field} {heads} cannot be split over parallel.tensor {tensor} x parallel.ulysses {ulysses}; "
                    f"choose a multiple of {tensor * ulysses}"
                )


class Attention(TokenMixer):
    """``softmax(q k^T / sqrt(width)) v`` over the past, heads local to the tensor rank."""

    def __init__(self, config: AttentionConfig, dim: int, init: Init):
        super().__init__()
        self.config = config
        self.axis = tensor_axis()
        self.ulysses = ulysses_axis()
        self.width = config.width(dim)
        self.kv_heads = config.kv_heads // self.axis.size
        self.query = ColumnParallelLinear(dim, config.num_heads * self.width, init.std)
        self.key = ColumnParallelLinear(dim, config.kv_heads * self.width, init.std)
        self.value = ColumnParallelLinear(dim, config.kv_heads * self.width, init.std)
        self.output = RowParallelLinear(config.num_heads * self.width, dim, init.output_std)
        if config.qk_norm:
            self.query_norm = RMSNorm(self.width, config.norm_eps, by_position=False)
            self.key_norm = RMSNorm(self.width, config.norm_eps, by_position=False)

    def forward(
        self, x: Tensor, context: Context, state: DecodeState | None = None
    ) -> tuple[Tensor, DecodeState | None]:
        x = enter_tensor_region(x, self.axis)
        heads = [self.query(x), self.key(x), self.value(x)]
        query, key, value = scatter_heads([part.unflatten(-1, (-1, self.width)) for part in heads], self.ulysses)
        if self.config.qk_norm:
            query = self.query_norm(query, share_in_tensor_region(self.query_norm.weight, self.axis))
            key = self.key_norm(key, share_in_tensor_region(self.key_norm.weight, self.axis))
        cos, sin = rotary_angles(context.positions, self.width, self.config.rope_theta)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if state is not None:
            mixed, state = self._attend_with_past(query, key, value, context, state)
        elif context.recompute == "selective":
            mixed = recompute(causal_attention, query, key, value, _document_mask(context))
        else:
            mixed = causal_attention(query, key, value, _document_mask(context))
        return self.output(gather_heads(mixed.permute(2, 0, 1, 3), self.ulysses).flatten(2)), state

    def init_state(self, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype) -> DecodeState:
        shape = (batch_size, self.kv_heads, max_length, self.width)
        return {name: torch.zeros(shape, device=device, dtype=dtype) for name in ("key", "value")}

    def _attend_with_past(
        self, query: Tensor, key: Tensor, value: Tensor, context: Context, state: DecodeState
    ) -> tuple[Tensor, DecodeState]:
        """Write the new keys and values at their positions, then attend to everything up to them."""
        state = {"key": state["key"].clone(), "value": state["value"].clone()} if torch.is_grad_enabled() else state
        state["key"].index_copy_(2, context.positions, key)
        state["value"].index_copy_(2, context.positions, value)
        known = int(context.positions[-1]) + 1
        mask = torch.arange(known, device=query.device) <= context.positions[:, None]
        return attend(query, state["key"][:, :, :known], state["value"][:, :, :known], mask), state


def _document_mask(context: Context) -> Tensor | None:
    """``[batch, 1, length, length]`` bool: causal and within one document; None when documents do not matter."""
    if context.document_ids is None:
        return None
    ids = context.document_ids
    causal = context.positions[:, None] >= context.positions
    return (causal & (ids[:, :, None] == ids[:, None, :]))[:, None]
