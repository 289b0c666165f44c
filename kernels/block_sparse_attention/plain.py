"""Attention over listed tiles in plain operations: what computes on the CPU, in float64 and for very wide heads."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from lightbulb.kernels.block_sparse_attention.lists import Lists

_SCORES = 1 << 18  # scores of one batched product: they stay in the cache of a core


def attention(
    query: Tensor, key: Tensor, value: Tensor, lists: Lists, with_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``softmax(q k^T / sqrt(width)) v`` over the visible keys, and the logarithm of each query's sum of exponentials
    where it is wanted; shapes as in :func:`lightbulb.kernels.block_sparse_attention.block_sparse_attention`."""
    out, lse = _TileAttention.apply(query, key, value, lists, with_lse)
    return out, lse


def with_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """The same with one more key of value zero, whose logits are ``sink [heads]``."""
    logits = sink.to(lse.dtype)[:, None].expand_as(lse)
    return out * torch.sigmoid(lse - logits)[..., None].to(out.dtype), torch.logaddexp(lse, logits)


class _TileAttention(torch.autograd.Function):
    """Batched products over rows with equally many tiles.

    A row's keys are all in one product, so its softmax needs no running maximum; the backward repeats it from the
    scores instead of keeping probabilities, so that memory grows with the length only. (Kernels keep each row's
    log-sum-exp for that. Here ``exp(score - logsumexp)`` would cost more than a softmax: the exponential of a hidden
    pair underflows, which is 10 to 100 times slower.) Scores, what is made of them row by row and the sums over queries
    are in float32 at least.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lists: Lists, with_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        kv_heads, block_size = key.shape[1], lists.block_size
        ctx.set_materialize_grads(False)
        q = _query_tiles(query * query.shape[3] ** -0.5, kv_heads, block_size)
        k, v = (_key_tiles(t, block_size) for t in (key, value))
        result = torch.zeros_like(q)
        lse = q.new_full((*q.shape[:2], 1), float("-inf"), dtype=_wide(q)) if with_lse else None
        for part in _parts(lists, q, k):
            scores = part.scores(part.take_rows(q), part.take_columns(k))
            if lse is not None:
                part.put_rows(lse, scores.logsumexp(-1, keepdim=True))
            weights = torch.softmax(scores, dim=-1, out=scores)
            part.put_rows(result, torch.bmm(weights.to(q.dtype), part.take_columns(v)))
        result = _from_query_tiles(result, query.shape, kv_heads)
        if lse is not None:
            lse = _from_query_tiles(lse, query.shape, kv_heads)
        if lists.sightless is not None:
            blind = _sightless(lists, query)
            result.masked_fill_(blind, 0)
            lse = None if lse is None else lse.masked_fill(blind, float("-inf"))
        ctx.save_for_backward(q, k, v)
        ctx.lists, ctx.shapes = lists, (query.shape, key.shape)
        return result, None if lse is None else lse[..., 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        lists, (query_shape, key_shape) = ctx.lists, ctx.shapes
        kv_heads, block_size = key_shape[1], lists.block_size
        grad = q.new_zeros(query_shape) if grad is None else grad
        incoming_lse = None if grad_lse is None else grad_lse[..., None]
        if lists.sightless is not None:
            blind = _sightless(lists, grad)
            grad = grad.masked_fill(blind, 0)
            incoming_lse = None if incoming_lse is None else incoming_lse.masked_fill(blind, 0)
        grad = _query_tiles(grad, kv_heads, block_size)
        grad_q = torch.zeros_like(q)
        grad_k, grad_v = (torch.zeros_like(t, dtype=_wide(t)) for t in (k, v))
        of_lse = None if incoming_lse is None else _query_tiles(incoming_lse, kv_heads, block_size)
        for part in _parts(lists, q, k):
            rows, keys, incoming = part.take_rows(q), part.take_columns(k), part.take_rows(grad)
            scores = part.scores(rows, keys)
            weights = torch.softmax(scores, dim=-1, out=scores)
            part.add_columns(grad_v, torch.bmm(weights.to(q.dtype).transpose(1, 2), incoming))
            wide = _wide_product(incoming, part.take_columns(v))
            torch.ops.aten._softmax_backward_data.out(wide, weights, -1, wide.dtype, grad_input=wide)
            if of_lse is not None:
                wide.addcmul_(weights, part.take_rows(of_lse).to(wide.dtype))
            grad_scores = wide.to(q.dtype)
            part.put_rows(grad_q, torch.bmm(grad_scores, keys))
            part.add_columns(grad_k, torch.bmm(grad_scores.transpose(1, 2), rows))
        grad_q = _from_query_tiles(grad_q, query_shape, kv_heads) * query_shape[3] ** -0.5
        grads = (grad_q, *(_from_key_tiles(t, key_shape) for t in (grad_k, grad_v)))
        return *(t.to(q.dtype) for t in grads), None, None


@dataclass
class _Part:
    """Some rows of one group, of some heads: one batched product.

    Attributes:
        rows: ``[rows]`` places among the query tiles of all heads.
        columns: ``[rows, count]`` places among the key tiles of all heads.
        biases: by column of ``columns``, what to add to scores: ``[rows, block_size, block_size]``.
    """

    rows: Tensor
    columns: Tensor
    biases: dict[int, Tensor]

    def take_rows(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.rows)

    def put_rows(self, total: Tensor, x: Tensor) -> None:
        total.index_copy_(0, self.rows, x)

    def take_columns(self, x: Tensor) -> Tensor:
        """``[rows, count * block_size, width]`` of ``x [tiles, block_size, width]``."""
        return x.index_select(0, self.columns.flatten()).view(len(self.rows), -1, x.shape[2])

    def add_columns(self, total: Tensor, x: Tensor) -> None:
        """Add what :meth:`take_columns` would give."""
        total.index_add_(0, self.columns.flatten(), x.view(-1, *total.shape[1:]).to(total.dtype))

    def scores(self, rows: Tensor, keys: Tensor) -> Tensor:
        """``[rows, queries, count * block_size]``, those of hidden pairs far below all others."""
        scores = _wide_product(rows, keys)
        for place, bias in self.biases.items():
            block = bias.shape[2]
            by_head = scores.view(len(scores), -1, block, scores.shape[2])[..., place * block : (place + 1) * block]
            by_head += bias[:, None]
        return scores


@dataclass
class _SlidingPart(_Part):
    """Rows of one head whose key tiles slide along: views where other parts copy.

    Attributes:
        row: the first of the rows.
        column: the first key tile of the first row.
    """

    row: int
    column: int

    def take_rows(self, x: Tensor) -> Tensor:
        return x[self.row : self.row + len(self.rows)]

    def put_rows(self, total: Tensor, x: Tensor) -> None:
        total[self.row : self.row + len(self.rows)] = x

    def take_columns(self, x: Tensor) -> Tensor:
        _, block_size, width = x.shape
        rows, count = self.columns.shape
        tile = block_size * width
        size, stride = (rows, count * block_size, width), (tile, width, 1)
        return x.as_strided(size, stride, x.storage_offset() + self.column * tile)

    def add_columns(self, total: Tensor, x: Tensor) -> None:
        rows, count = self.columns.shape
        for place, part in enumerate(x.view(rows, count, *total.shape[1:]).unbind(1)):
            total[self.column + place : self.column + place + rows] += part


def _parts(lists: Lists, q: Tensor, k: Tensor) -> Iterator[_Part]:
    """The whole work, cut into products whose scores fit the cache."""
    heads = len(q) // lists.query_tiles // lists.problems
    key_tiles = len(k) // (lists.problems * heads)
    for group in lists.groups:
        head = torch.arange(heads, device=q.device)[:, None] + heads * (group.rows // lists.query_tiles)
        rows = (head * lists.query_tiles + group.rows % lists.query_tiles).flatten()
        columns = (head[..., None] * key_tiles + lists.column[group.entries]).flatten(0, 1)
        mask_rows, entries = group.rows.repeat(heads), group.entries.repeat(heads, 1)
        step = max(1, _SCORES // (columns.shape[1] * q.shape[1] * k.shape[1]))
        for here in _cuts(len(rows), step, len(group.rows) if group.slides else len(rows)):
            biases = {c: lists.bias(mask_rows[here], entries[here, c], _wide(q)) for c in group.masked}
            if group.slides:
                origin = int(rows[here.start]), int(columns[here.start, 0])
                yield _SlidingPart(rows[here], columns[here], biases, *origin)
            else:
                yield _Part(rows[here], columns[here], biases)


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of scores and sums."""
    return torch.promote_types(x.dtype, torch.float32)


def _wide_product(x: Tensor, y: Tensor) -> Tensor:
    """``x y^T`` of batches, unrounded: in bfloat16 the differences in a softmax, and in its gradient, would be lost."""
    return torch.bmm(x.to(_wide(x)), y.to(_wide(y)).transpose(1, 2))


def _cuts(length: int, step: int, unit: int) -> Iterator[slice]:
    """Slices of at most ``step`` that do not cross a multiple of ``unit``."""
    for first in range(0, length, unit):
        for at in range(first, first + unit, step):
            yield slice(at, min(at + step, first + unit))


def _query_tiles(x: Tensor, kv_heads: int, block_size: int) -> Tensor:
    """``[batch, heads, length, width]`` as ``[batch * kv_heads * tiles, heads / kv_heads * block_size, width]``."""
    tiles = _padded(x, block_size).unflatten(2, (-1, block_size)).unflatten(1, (kv_heads, -1))
    return tiles.transpose(2, 3).flatten(0, 2).flatten(1, 2)


def _from_query_tiles(x: Tensor, shape: torch.Size, kv_heads: int) -> Tensor:
    """Back to ``[batch, heads, length, width]``."""
    batch, heads, length, _ = shape
    tiles = x.unflatten(1, (heads // kv_heads, -1)).unflatten(0, (batch, kv_heads, -1))
    return tiles.transpose(2, 3).flatten(1, 2).flatten(2, 3)[:, :, :length]


def _key_tiles(x: Tensor, block_size: int) -> Tensor:
    """``[batch, heads, length, width]`` as ``[batch * heads * tiles, block_size, width]``."""
    return _padded(x, block_size).unflatten(2, (-1, block_size)).flatten(0, 2).contiguous()


def _from_key_tiles(x: Tensor, shape: torch.Size) -> Tensor:
    """Back to ``[batch, heads, length, width]``."""
    return x.unflatten(0, (*shape[:2], -1)).flatten(2, 3)[:, :, : shape[2]]


def _padded(x: Tensor, block_size: int) -> Tensor:
    missing = -x.shape[2] % block_size
    return pad(x, (0, 0, 0, missing)) if missing else x


def _sightless(lists: Lists, x: Tensor) -> Tensor:
    """``[batch, heads, queries, 1]`` bool for ``x [batch, heads, queries, width]``."""
    assert lists.sightless is not None
    blind = lists.sightless[:, : x.shape[2]]
    return blind.repeat_interleave(x.shape[0] * x.shape[1] // len(blind), 0).view(*x.shape[:3], 1)
