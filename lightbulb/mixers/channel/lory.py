"""Mixture of experts merged in parameter space, one merged SwiGLU for each segment of a sequence.

Lory (Zhong et al. 2024, arXiv:2405.03133). Tokens of segment k pass an FFN whose three matrices are
``sum_i e_i theta_i``, with ``e = softmax(R(mean of the inputs in segment k - 1))``: fully differentiable, no tokens
travel, no auxiliary loss. Every tensor rank holds the same slice of all experts' hidden features, so merging is local
(expert-wise model parallelism).

Documents. A segment that holds several documents is several pieces, each with its own merged FFN. The tokens of a
document in segment k are routed by the mean over the *same* document's tokens in segment k - 1; where there are none,
it is a first piece.

First pieces. ``own_mean`` (the paper's) routes them by their own mean, without gradient: their tokens see each
other through the routing, later ones included. ``uniform`` gives every expert the same share: strictly causal.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import linear

from lightbulb.config import Cost
from lightbulb.mixers.base import ChannelMixer, ChannelMixerConfig, Context, DecodeState, Facts, check_split
from lightbulb.nn.activation import swiglu
from lightbulb.nn.groups import enter_tensor_region, exit_tensor_region, share_in_tensor_region, tensor_axis
from lightbulb.nn.merged import MergedLinear, merged_swiglu
from lightbulb.nn.parameter import Init, Logical, make_parameter
from lightbulb.registry import register
from lightbulb.routing.segments import NOWHERE, Pieces, fill, find_pieces, sum_pieces


@register("channel_mixer", "lory")
class LoryConfig(ChannelMixerConfig):
    """Experts merged per segment."""

    treats_tokens_alone: ClassVar[bool] = False
    facts = Facts(
        "Lory: Fully Differentiable MoE for Autoregressive LM Pre-training, 2024, arXiv:2405.03133",
        ("tensor", "sequence"),
        "dim + num_experts + 2, and one merged FFN of 3 x dim x hidden_dim",
        "no Ulysses; first_segment own_mean lets tokens of a document's first piece see later ones of that piece",
    )
    type: Literal["lory"] = "lory"
    num_experts: int = Field(ge=1)
    """Experts; each rank holds a part of every one."""
    hidden_dim: int = Field(ge=1)
    """Width of an expert's gated hidden layer, and of the merged one's."""
    segment_length: int = Field(256, ge=1)
    """Tokens that share a merged FFN."""
    first_segment: Literal["own_mean", "uniform"] = "own_mean"
    """How a document's first piece is routed: by its own mean, without gradient (as published; not causal within the
    piece; in decoding by the mean of the tokens given first), or all experts alike."""

    def build(self, dim: int, init: Init) -> "Lory":
        return Lory(self, dim, init)

    def cost(self, dim: int) -> Cost:
        expert, router = 3 * dim * self.hidden_dim, self.num_experts * dim
        # Merging and routing are once per segment.
        shared = 2.0 * (self.num_experts * expert + router) / self.segment_length
        return Cost(self.num_experts * expert + router, expert + router, 2.0 * expert + shared)

    def check_tensor_parallel(self, degree: int) -> None:
        check_split("hidden_dim", self.hidden_dim, degree)

    def check_ulysses(self, tensor: int, ulysses: int) -> None:
        if ulysses > 1:
            raise ValueError(
                f"type {self.type!r} takes means over segments, which parallel.ulysses {ulysses} would cut; "
                "set parallel.ulysses: 1 (parallel.sequence works)"
            )


class Lory(ChannelMixer):
    """Route each piece, merge, compute."""

    def __init__(self, config: LoryConfig, dim: int, init: Init):
        super().__init__()
        self.config = config
        self.axis = tensor_axis()
        experts, hidden = config.num_experts, config.hidden_dim
        # Random, not zero: with equal shares identical experts would stay identical.
        self.router = make_parameter(Logical((experts, dim), init.std, keep_fp32=True))
        self.gate = MergedLinear(experts, dim, hidden, init.std, self.axis)
        self.up = MergedLinear(experts, dim, hidden, init.std, self.axis)
        self.down = MergedLinear(experts, hidden, dim, init.output_std, self.axis, has_split_input=True)

    def forward(
        self, x: Tensor, context: Context, state: DecodeState | None = None
    ) -> tuple[Tensor, DecodeState | None]:
        x = enter_tensor_region(x, self.axis).transpose(0, 1)
        known = self._nothing_known(len(x), x.device, x.dtype) if state is None else state
        pieces = self._pieces(context, len(x), known["segment"])
        rows = x.reshape(-1, x.shape[-1])
        shares, routing = self._route(rows, pieces, context.present, known)
        if state is not None and len(shares) == len(x) and bool(pieces.continues.all()):
            hidden = swiglu(
                *(getattr(self, name).multiply_merged(rows, state[name], shares) for name in ("gate", "up"))
            )
            mixed, state = self.down.multiply_merged(hidden, state["down"], shares), state | routing
        else:
            mixed = self._merged(rows, shares, pieces.counts)
            state = None if state is None else routing | self._merge(routing["shares"])
        return exit_tensor_region(mixed.view_as(x).transpose(0, 1), self.axis), state

    def _merged(self, rows: Tensor, shares: Tensor, counts: list[int]) -> Tensor:
        parts = (self.gate, self.up, self.down)
        if all(part.is_plain for part in parts):
            return merged_swiglu(rows, shares, (self.gate.weight, self.up.weight, self.down.weight), counts)
        hidden = swiglu(self.gate(rows, shares, counts), self.up(rows, shares, counts))
        return self.down(hidden, shares, counts)

    def init_state(self, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype) -> DecodeState:
        known = self._nothing_known(batch_size, device, dtype)
        return known | {name: merged.to(dtype) for name, merged in self._merge(known["shares"]).items()}

    def _nothing_known(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> DecodeState:
        """What routing carries: of the current segment its number, its shares, and the sum and count of its inputs."""
        wide = dtype if dtype == torch.float64 else torch.float32
        experts, dim = self.router.shape
        return {
            "segment": torch.full((batch_size,), NOWHERE, device=device),
            "shares": torch.full((batch_size, experts), 1.0 / experts, device=device, dtype=wide),
            "sum": torch.zeros(batch_size, dim, device=device, dtype=wide),
            "count": torch.zeros(batch_size, device=device, dtype=wide),
        }

    @torch.no_grad()
    def _merge(self, shares: Tensor) -> DecodeState:
        """The merged matrices of each sample, kept while its segment lasts."""
        return {name: getattr(self, name).merge(shares) for name in ("gate", "up", "down")}

    def _pieces(self, context: Context, batch: int, before: Tensor) -> Pieces:
        segment = context.positions.t() // self.config.segment_length
        segment = segment.expand(batch, -1)
        document = context.document_ids
        if context.present is not None:
            segment = fill(segment, context.present, before)
            nothing = torch.full_like(before, NOWHERE)
            document = None if document is None else fill(document, context.present, nothing)
        return find_pieces(segment, document, before)

    def _route(
        self, rows: Tensor, pieces: Pieces, present: Tensor | None, known: DecodeState
    ) -> tuple[Tensor, DecodeState]:
        """Shares ``[P, E]`` of each piece, and what later tokens need to know."""
        sums, counts = _sums(rows, pieces, present, known)
        means = sums / counts.clamp(min=1.0)[:, None]
        before = (known["sum"] / known["count"].clamp(min=1.0)[:, None])[pieces.sample]
        before = torch.where(pieces.leads[:, None], before, means.roll(1, 0))
        follows, continues = pieces.follows[:, None], pieces.continues[:, None]
        # Inside the tensor region: each rank's gradient covers its part of the merged features.
        router = share_in_tensor_region(self.router, self.axis)
        shares = linear(torch.where(follows, before, means.detach()).to(router.dtype), router).softmax(-1)
        uniform = self.config.first_segment == "uniform"
        first = torch.full_like(shares, 1.0 / shares.shape[1]) if uniform else shares.detach()
        shares = torch.where(follows, shares, first)
        shares = torch.where(continues, known["shares"][pieces.sample].to(shares.dtype), shares)
        last = pieces.index[:, -1]
        after = {"segment": pieces.segment[last], "shares": shares[last], "sum": sums[last], "count": counts[last]}
        return shares, after


def _sums(rows: Tensor, pieces: Pieces, present: Tensor | None, known: DecodeState) -> tuple[Tensor, Tensor]:
    """Sum ``[P, dim]`` and count ``[P]`` of the inputs of each piece, with what is known of a piece that continues."""
    tokens, weight = rows.to(known["sum"].dtype), torch.ones_like(rows[:, 0], dtype=known["sum"].dtype)
    if present is not None:
        weight = present.flatten().to(tokens.dtype)
        tokens = tokens * weight[:, None]
    continues = pieces.continues.to(tokens.dtype)
    sums = known["sum"][pieces.sample] * continues[:, None] + sum_pieces(tokens, pieces.counts)
    counts = known["count"][pieces.sample] * continues + sum_pieces(weight, pieces.counts)
    return sums, counts
