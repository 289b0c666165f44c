"""Infini-attention: causal attention inside a segment, and a compressive memory of all segments before it.

Leave No Context Behind (Munkhdalai et al. 2024, arXiv:2404.07143). For each head ``g * memory + (1 - g) * local`` with
``g = sigmoid(gate)``, one learned number per query head. A segment reads the memory before it is written. The memory
works on queries and keys without rotation, the local attention on rotated ones. Segments are counted from the start of
the context; what documents in one context may read is said in :class:`lightbulb.nn.compressive_memory.Reset`.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from lightbulb.config import Cost
from lightbulb.mixers.base import Context, DecodeState, Facts
from lightbulb.mixers.token.heads import HeadsConfig, HeadsMixer
from lightbulb.nn.attention import attend, self_attention
from lightbulb.nn.compressive_memory import delta_memories, features, linear_memories, read, resets, write
from lightbulb.nn.documents import run_starts
from lightbulb.nn.parameter import Init, Logical, constant, make_parameter
from lightbulb.nn.recompute import recompute
from lightbulb.nn.rope import rotary_angles, rotate
from lightbulb.nn.ulysses import gather_heads, my_heads
from lightbulb.registry import register

Update = Literal["linear", "delta"]


@register("token_mixer", "infini")
class InfiniConfig(HeadsConfig):
    """Local attention and a compressive memory, mixed by a gate per head."""

    facts = Facts(
        "Leave No Context Behind (Infini-attention), 2024, arXiv:2404.07143",
        ("tensor", "sequence", "ulysses"),
        "2 x num_kv_heads x head_dim x (segment_length + head_dim + 1)",
        "a document that starts inside a segment reads no memory in that segment",
    )
    type: Literal["infini"] = "infini"
    segment_length: int = Field(ge=1)
    """Positions of a segment."""
    update: Update = "linear"
    """How a segment is written: its values added up, or (delta) only what the memory does not give already; the delta
    rule goes through the segments one by one."""

    def build(self, dim: int, context_length: int, init: Init) -> "Infini":
        return Infini(self, dim, init)

    def cost(self, dim: int, context_length: int) -> Cost:
        width = self.width(dim)
        matrices = dim * width * (2 * self.num_heads + 2 * self.kv_heads)
        local = 4.0 * self.num_heads * width * _past_in_segment(self.segment_length, context_length)
        table = 2.0 * width * (width + 1)  # one token reads, or writes, one memory
        reads_and_writes = table * (self.num_heads + self.kv_heads * (2 if self.update == "delta" else 1))
        params = matrices + self.num_heads
        return Cost(params, params, 2.0 * matrices + local + reads_and_writes)


def _past_in_segment(segment: int, length: int) -> float:
    """Positions of its segment up to a token's own, averaged over a context."""
    whole, rest = divmod(length, segment)
    return (whole * segment * (segment + 1) + rest * (rest + 1)) / 2 / length


class Infini(HeadsMixer):
    """Heads local to the tensor rank, each with a memory of its own key/value head."""

    def __init__(self, config: InfiniConfig, dim: int, init: Init):
        super().__init__(config, dim, init)
        self.config = config
        self.gate = make_parameter(
            Logical((config.num_heads,), None, tensor_dim=0, tensor=self.axis, fill=constant(0.0))
        )

    def forward(
        self, x: Tensor, context: Context, state: DecodeState | None = None
    ) -> tuple[Tensor, DecodeState | None]:
        heads = self.project(x)
        turned = heads[:2]
        if self.config.rope_theta is not None:
            cos, sin = rotary_angles(context.positions, self.width, self.config.rope_theta)
            turned = [rotate(part, cos, sin) for part in turned]
        parts = [part.permute(1, 2, 0, 3) for part in (*heads, *turned)]
        if state is not None:
            mixed, state = self._continue(parts, context.positions, state)
        else:
            start = None if context.document_ids is None else run_starts(context.document_ids)
            core: Callable[..., Tensor] = infini_attention
            if context.recompute == "selective":
                core = partial(recompute, infini_attention)
            mixed = core(*parts, self._gate(), start, self.config.segment_length, self.config.update)
        return self.output(gather_heads(mixed.permute(2, 0, 1, 3), self.ulysses).flatten(2)), state

    def init_state(self, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype) -> DecodeState:
        """The memory before the current segment, the same with what the segment has written so far, and the segment's
        keys (rotated) and values."""
        heads, exact = (batch_size, self.kv_heads), torch.promote_types(dtype, torch.float32)
        shapes = dict.fromkeys(("memory", "written"), (*heads, self.width, self.width + 1))
        state = {name: torch.zeros(shape, device=device, dtype=exact) for name, shape in shapes.items()}
        local = (*heads, min(self.config.segment_length, max_length), self.width)
        return state | {name: torch.zeros(local, device=device, dtype=dtype) for name in ("key", "value")}

    def _gate(self) -> Tensor:
        """``[heads, 1, 1]``: the share of the memory, for the heads this rank mixes."""
        mine = my_heads(self.gate, self.ulysses)
        return mine.to(torch.promote_types(mine.dtype, torch.float32)).sigmoid()[:, None, None]

    def _continue(self, parts: list[Tensor], positions: Tensor, state: DecodeState) -> tuple[Tensor, DecodeState]:
        """The new tokens up to the end of the segment, then segment by segment."""
        if torch.is_grad_enabled():
            state = {name: tensor.clone() for name, tensor in state.items()}
        segment, mixed = self.config.segment_length, []
        begin, end = int(positions[0]), int(positions[-1]) + 1
        cuts = [begin, *range(begin - begin % segment + segment, end, segment), end]
        for first, last in zip(cuts, cuts[1:], strict=False):
            mixed.append(self._in_segment([p[:, :, first - begin : last - begin] for p in parts], first, state))
        return torch.cat(mixed, dim=2), state

    def _in_segment(self, parts: list[Tensor], first: int, state: DecodeState) -> Tensor:
        """New tokens of one segment from position ``first`` on; the state is changed in place."""
        query, key, value, turned_query, turned_key = parts
        segment = self.config.segment_length
        at, known = first % segment, first % segment + query.shape[2]
        state["key"][:, :, at:known], state["value"][:, :, at:known] = turned_key, value
        memory, past = state["memory"], torch.arange(known, device=query.device)
        local = attend(turned_query, state["key"][:, :, :known], state["value"][:, :, :known], past <= past[at:, None])
        mixed = _mixed(_read_all(features(query), memory), local, self._gate())
        state["written"] += write(features(key), value, memory if self.config.update == "delta" else None)
        if known == segment:
            memory.copy_(state["written"])
        return mixed


def infini_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    turned_query: Tensor,
    turned_key: Tensor,
    gate: Tensor,
    document_start: Tensor | None,
    segment_length: int,
    update: Update,
) -> Tensor:
    """Whole sequences, from empty memories.

    Args:
        query: ``[batch, heads, length, width]``, for the memory.
        key: ``[batch, kv_heads, length, width]``, for the memory.
        value: as key.
        turned_query: query, rotated, for the segment.
        turned_key: key, rotated.
        gate: ``[heads, 1, 1]``, the memory's share.
        document_start: ``[batch, length]`` first position of each position's document; None for one document.
        segment_length: positions of a segment.
        update: rule of the memory.

    Returns:
        ``[batch, heads, length, width]``.
    """
    length = query.shape[2]
    segment = min(segment_length, length)
    missing = -length % segment
    query, key, value, turned_query, turned_key = (
        pad(part, (0, 0, 0, missing)).unflatten(2, (-1, segment))
        for part in (query, key, value, turned_query, turned_key)
    )
    reset = mask = None
    if document_start is not None:
        # What fills the last segment counts as its last document: nobody reads what that segment writes.
        start = torch.cat((document_start, document_start[:, -1:].expand(-1, missing)), dim=1)
        reset = resets(start, segment)
        mask = _segment_mask(start.unflatten(1, (-1, segment)))
    memories = (delta_memories if update == "delta" else linear_memories)(features(key), value, reset)
    remembered = _read_all(features(query), memories)
    if reset is not None:
        remembered = remembered.masked_fill(~reset.reads[:, None, ..., None], 0.0)
    queries, keys, values = (part.transpose(1, 2).flatten(0, 1) for part in (turned_query, turned_key, value))
    local = self_attention(queries, keys, values, mask).unflatten(0, (len(query), -1)).transpose(1, 2)
    return _mixed(remembered, local, gate[..., None]).flatten(2, 3)[:, :, :length]


def _read_all(queries: Tensor, memory: Tensor) -> Tensor:
    """Each query head from its key/value head's memory: ``queries [batch, heads, ..., width]``, ``memory
    [batch, kv_heads, ..., width, width + 1]``."""
    groups = queries.unflatten(1, (memory.shape[1], -1))
    return read(groups, memory[:, :, None]).flatten(1, 2)


def _mixed(remembered: Tensor, local: Tensor, gate: Tensor) -> Tensor:
    return (gate * remembered + (1 - gate) * local).to(local.dtype)


def _segment_mask(start: Tensor) -> Tensor:
    """``[batch * segments, 1, length, length]`` bool from document starts ``[batch, segments, length]``."""
    same = start[..., :, None] == start[..., None, :]
    return same.tril().flatten(0, 1)[:, None]
