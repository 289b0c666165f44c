"""Exact softmax attention to a part of the past: a window, or what each head's hash or noise picks.

Patterns, all computed tile by tile in time proportional to the tiles that hold a visible pair:

- ``band``: a sliding window, with global first tokens and every ``stride``-th block behind it (Sparse Transformer,
  Child et al. 2019, arXiv:1904.10509; Longformer, Beltagy et al. 2020, arXiv:2004.05150; BigBird, Zaheer et al. 2020,
  arXiv:2007.14062). Global tokens are those of the query's own document; blocks are counted from the context's start.
- ``hash``: within equal buckets of a locality-sensitive hash (sparse flash attention, Pagliardini et al. 2023,
  arXiv:2306.01160). Keys are the normalised queries; buckets go by the query before its rotation, so that equal tokens
  meet at any distance.
- ``qk``: in training each head drops a random part of the queries (their output is zero) and of the keys, as the
  language models of the same paper do; otherwise it is full attention. What is dropped does not depend on the tokens,
  so that nothing leaks from the future.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import normalize

from lightbulb.config import Cost
from lightbulb.mixers.base import Context, DecodeState, Facts
from lightbulb.mixers.token.heads import HeadsConfig, HeadsMixer, head_slice
from lightbulb.nn.attention import attend
from lightbulb.nn.block_sparse import block_sparse_attention, once_per_batch
from lightbulb.nn.documents import run_starts
from lightbulb.nn.dynamic_sparse import hash_attention, hash_buckets, kept_attention
from lightbulb.nn.groups import share_in_tensor_region
from lightbulb.nn.kv_cache import write_all
from lightbulb.nn.noise import Noise
from lightbulb.nn.norm import RMSNorm
from lightbulb.nn.parameter import Init
from lightbulb.nn.recompute import recompute
from lightbulb.nn.rope import rotary_angles, rotate
from lightbulb.nn.ulysses import gather_heads
from lightbulb.ops import Sight, Tiles
from lightbulb.registry import register

_OWN_FIELDS = {
    "window": "band",
    "stride": "band",
    "num_global": "band",
    "num_buckets": "hash",
    "hash_seed": "hash",
    "drop": "qk",
}


@register("token_mixer", "block_sparse")
class BlockSparseConfig(HeadsConfig):
    """Causal self-attention to a part of the past."""

    facts = Facts(
        "Generating Long Sequences with Sparse Transformers, 2019, arXiv:1904.10509; "
        "Faster Causal Attention Over Large Sequences Through Sparse Flash Attention, 2023, arXiv:2306.01160",
        ("tensor", "sequence", "ulysses"),
        "2 x num_kv_heads x head_dim per token; hash: and num_heads buckets",
        "hash shares queries as keys, so it has no fewer key/value heads",
    )
    type: Literal["block_sparse"] = "block_sparse"
    pattern: Literal["band", "hash", "qk"] = "band"
    """What a query sees: near and chosen positions, its hash bucket, or what training does not drop."""
    block_size: int = Field(64, ge=1)
    """Queries and keys of a tile, and the blocks that ``stride`` counts."""
    window: int | None = Field(None, ge=1)
    """band: positions a query sees, its own included; None for the whole past."""
    num_global: int | None = Field(None, ge=1)
    """band: first tokens of a document that stay visible."""
    stride: int | None = Field(None, ge=2)
    """band: blocks 1, 2, ... times this far back stay visible."""
    num_buckets: int | None = Field(None, ge=1)
    """hash: buckets per head; 1 or an even number."""
    hash_seed: int | None = None
    """hash: seed of the rotations, which are the same in every layer and never change; None for 0."""
    drop: float | None = Field(None, ge=0, lt=1)
    """qk: part of the queries, and of the keys, that each head drops in training."""
    qk_norm: bool = False
    """Normalise queries and keys per head before the rotation (hash: the queries, of which keys are made)."""
    norm_eps: float = Field(1e-6, gt=0)
    """Epsilon of the query/key norms."""

    @model_validator(mode="after")
    def _pattern_has_its_fields(self) -> "BlockSparseConfig":
        for field, owner in _OWN_FIELDS.items():
            value = getattr(self, field)
            if value is not None and owner != self.pattern:
                raise ValueError(f"{field} {value} has no effect with pattern {self.pattern!r}; set pattern: {owner}")
        for field in ("num_global", "stride"):
            if self.window is None and getattr(self, field) is not None:
                raise ValueError(f"{field} {getattr(self, field)} has no effect without a window; set window")
        if self.pattern == "hash":
            self._check_hash()
        if self.pattern == "qk" and self.drop is None:
            raise ValueError("pattern 'qk' needs drop, the part of queries and keys to drop; set drop: 0.5")
        return self

    def _check_hash(self) -> None:
        if self.num_buckets is None:
            raise ValueError("pattern 'hash' needs num_buckets; set num_buckets: 16")
        if self.num_buckets > 1 and self.num_buckets % 2:
            raise ValueError(
                f"num_buckets {self.num_buckets} is odd; buckets come in pairs of directions, so choose "
                f"{self.num_buckets + 1}"
            )
        if self.kv_heads != self.num_heads:
            raise ValueError(
                f"num_kv_heads {self.kv_heads} is not num_heads {self.num_heads}; pattern 'hash' makes each head's "
                "keys of its queries, so leave num_kv_heads out"
            )

    def build(self, dim: int, context_length: int, init: Init) -> "BlockSparse":
        return BlockSparse(self, dim, init)

    def cost(self, dim: int, context_length: int) -> Cost:
        width, hashed = self.width(dim), self.pattern == "hash"
        matrices = dim * width * (2 * self.num_heads + (1 if hashed else 2) * self.kv_heads)
        norms = (1 if hashed else 2) * width if self.qk_norm else 0
        pairs = 4.0 * self.num_heads * width * self.visible(context_length)
        hashing = self.num_heads * width * (self.num_buckets or 0) // 2 * 2.0
        return Cost(matrices + norms, matrices + norms, 2.0 * matrices + pairs + hashing)

    def visible(self, length: int) -> float:
        """Keys a token sees in training, averaged over a context of one document (and balanced buckets)."""
        if self.pattern == "hash":
            return 1 + (length - 1) / 2 / (self.num_buckets or 1)
        if self.pattern == "qk":
            return (1 - (self.drop or 0)) ** 2 * (length + 1) / 2
        return _visible(self.window, self.num_global or 0, self.stride, self.block_size, length)


@lru_cache(maxsize=64)
def _visible(window: int | None, num_global: int, stride: int | None, block_size: int, length: int) -> float:
    if window is None:
        return (length + 1) / 2
    position = torch.arange(length)
    near = (position - window + 1).clamp(min=0)
    seen = position + 1 - near + near.clamp(max=num_global)
    if stride is not None:
        for back in range(stride, -(-length // block_size), stride):
            first = (position // block_size - back) * block_size
            seen += (torch.minimum(first + block_size, near) - first.clamp(min=num_global)).clamp(min=0)
    return float(seen.double().mean())


class BlockSparse(HeadsMixer):
    """``softmax(q k^T / sqrt(width)) v`` over the visible past, heads local to the tensor rank."""

    rotation: Tensor

    def __init__(self, config: BlockSparseConfig, dim: int, init: Init):
        super().__init__(config, dim, init, has_keys=config.pattern != "hash")
        self.config = config
        if config.qk_norm:
            self.query_norm = RMSNorm(self.width, config.norm_eps, by_position=False)
            if config.pattern != "hash":
                self.key_norm = RMSNorm(self.width, config.norm_eps, by_position=False)
        if config.num_buckets is not None:
            mine = head_slice(config.num_heads, self.axis, self.ulysses)
            self.register_buffer("rotation", _rotation(config, self.width)[mine], persistent=False)

    def forward(
        self, x: Tensor, context: Context, state: DecodeState | None = None
    ) -> tuple[Tensor, DecodeState | None]:
        query, key, value, bucket = self._heads(x, context)
        if state is not None:
            new = {"key": key, "value": value} | ({} if bucket is None else {"bucket": bucket})
            state = write_all(state, new, context.positions)
        if state is not None and int(context.positions[0]):
            mixed = self._attend_to_past(query, context.positions, state)
        elif self.config.pattern == "hash":
            mixed = self._hashed(query, key, value, bucket, context)
        elif self.config.pattern == "qk" and context.noise is not None:
            mixed = self._dropped(query, key, value, context, context.noise)
        else:
            mixed = self._banded(query, key, value, context)
        return self.output(gather_heads(mixed.permute(2, 0, 1, 3), self.ulysses).flatten(2)), state

    def init_state(self, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype) -> DecodeState:
        shape = (batch_size, self.kv_heads, max_length)
        state = {name: torch.zeros(*shape, self.width, device=device, dtype=dtype) for name in ("key", "value")}
        if self.config.pattern == "hash":
            state["bucket"] = torch.zeros(shape, device=device, dtype=torch.long)
        return state

    def _heads(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys and values ``[batch, heads, length, width]``, rotated, and the queries' buckets."""
        hashed = self.config.pattern == "hash"
        heads = self.project(x)
        query, value = heads[0], heads[-1]
        if self.config.qk_norm:
            query = self.query_norm(query, share_in_tensor_region(self.query_norm.weight, self.axis))
        key = normalize(query, dim=-1) if hashed else heads[1]
        if self.config.qk_norm and not hashed:
            key = self.key_norm(key, share_in_tensor_region(self.key_norm.weight, self.axis))
        bucket = hash_buckets(query.permute(1, 2, 0, 3), self.rotation) if hashed else None
        if self.config.rope_theta is not None:
            cos, sin = rotary_angles(context.positions, self.width, self.config.rope_theta)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        return query, key, value, bucket

    def _banded(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        config, length, documents = self.config, query.shape[2], context.document_ids
        if documents is None:
            tiles = band_tiles(config, length, query.device)
        else:
            tiles = once_per_batch(documents, config, lambda: _packed_tiles(config, context.positions, documents))
        return _run(context, block_sparse_attention, query, key, value, tiles)

    def _hashed(self, query: Tensor, key: Tensor, value: Tensor, bucket: Tensor | None, context: Context) -> Tensor:
        ids, block_size = context.document_ids, self.config.block_size
        return _run(context, hash_attention, query, key, value, bucket, ids, block_size)

    def _dropped(self, query: Tensor, key: Tensor, value: Tensor, context: Context, noise: Noise) -> Tensor:
        config = self.config
        drawn = noise.uniform(f"{context.place}.drop", slice(None), config.num_heads + config.kv_heads, query.device)
        queries, keys = (
            _kept(part[..., head_slice(part.shape[2], self.axis, self.ulysses)], config.drop or 0.0)
            for part in drawn.split([config.num_heads, config.kv_heads], dim=2)
        )
        groups = query.shape[1] // key.shape[1]
        key, value, keys = (t.repeat_interleave(groups, dim) for t, dim in ((key, 1), (value, 1), (keys, 0)))
        start = None if context.document_ids is None else run_starts(context.document_ids)
        return _run(context, kept_attention, query, key, value, queries, keys, start, config.block_size)

    def _attend_to_past(self, query: Tensor, positions: Tensor, state: DecodeState) -> Tensor:
        """All pairs, masked: few queries at a time gain nothing by tiles."""
        known = int(positions[-1]) + 1
        if self.config.pattern == "hash":
            mask = torch.arange(known, device=query.device) <= positions[:, None]
            buckets = state["bucket"]
            mask = mask & (buckets[:, :, positions, None] == buckets[:, :, None, :known])
        else:
            origin = torch.zeros_like(positions)[None]
            mask = _band(self.config, positions, origin).mask(known, self.config.block_size)[:, None]
        return attend(query, state["key"][:, :, :known], state["value"][:, :, :known], mask)


def _run(context: Context, core: Callable[..., Tensor], *args: Any) -> Tensor:
    return recompute(core, *args) if context.recompute == "selective" else core(*args)


def _rotation(config: BlockSparseConfig, width: int) -> Tensor:
    """``[num_heads, width, num_buckets / 2]``, a function of the seed alone: orthogonal directions as far as the width
    allows, so that no bucket is much wider than another."""
    generator = torch.Generator().manual_seed(config.hash_seed or 0)
    directions = (config.num_buckets or 0) // 2
    turns = -(-directions // width)
    drawn = torch.randn(config.num_heads, turns, width, width, generator=generator, device="cpu")
    return torch.linalg.qr(drawn)[0].transpose(1, 2).flatten(2)[..., :directions]


def _band(config: BlockSparseConfig, positions: Tensor, start: Tensor) -> Sight:
    """What queries at ``positions [queries]`` see whose documents start at ``start [problems, queries]``."""
    stop = (positions + 1).expand_as(start)
    if config.window is None:
        return Sight(start, stop)
    near = (positions - config.window + 1).expand_as(start)
    sinks = None if config.num_global is None else start + config.num_global
    return Sight(start, stop, near, sinks, config.stride)


@lru_cache(maxsize=32)
def band_tiles(config: BlockSparseConfig, length: int, device: torch.device) -> Tiles:
    """The tiles of one document of ``length`` tokens, pattern ``band``."""
    positions = torch.arange(length, device=device)
    return Tiles(_band(config, positions, torch.zeros_like(positions)[None]), length, config.block_size)


def _packed_tiles(config: BlockSparseConfig, positions: Tensor, documents: Tensor) -> Tiles:
    """The same of ``documents [batch, length]``."""
    return Tiles(_band(config, positions, run_starts(documents)), len(positions), config.block_size)


def _kept(noise: Tensor, drop: float) -> Tensor:
    """``[batch * heads, kept]`` rising positions: as many of each head's as it keeps, those with the least noise.

    Args:
        noise: ``[length, batch, heads]``.
        drop: part to drop.
    """
    kept = max(1, round(len(noise) * (1 - drop)))
    return noise.permute(1, 2, 0).flatten(0, 1).argsort(dim=1, stable=True)[:, :kept].contiguous().sort(dim=1).values
