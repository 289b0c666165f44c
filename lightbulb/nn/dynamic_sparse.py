"""Attention whose sparsity depends on the data: within equal hash buckets, or among the tokens that each head keeps.

Sparse flash attention (Pagliardini et al. 2023, arXiv:2306.01160). Both forms reorder or drop tokens per head, so that
what a query sees becomes one run of keys, and leave the rest to :mod:`lightbulb.nn.block_sparse`. Both are exact: the
softmax is over every visible key, however buckets and tiles fall, and causality goes by the original positions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightbulb.nn.block_sparse import block_sparse_attention
from lightbulb.nn.documents import run_starts
from lightbulb.ops import Sight, Tiles


def hash_buckets(x: Tensor, rotation: Tensor) -> Tensor:
    """Buckets by angle: the argmax of ``[x R, -x R]`` (Andoni et al. 2015, arXiv:1509.02897).

    Args:
        x: ``[batch, heads, length, width]``; its scale does not matter.
        rotation: ``[heads, width, buckets / 2]``; no columns for one bucket.

    Returns:
        ``[batch, heads, length]`` int64.
    """
    if not rotation.shape[2]:
        return torch.zeros(x.shape[:3], dtype=torch.long, device=x.device)
    with torch.no_grad():
        dtype = torch.promote_types(x.dtype, torch.float32)
        turned = x.to(dtype) @ rotation.to(dtype)
        return torch.cat((turned, -turned), dim=-1).argmax(-1)


def hash_attention(
    query: Tensor, key: Tensor, value: Tensor, bucket: Tensor, document_ids: Tensor | None, block_size: int
) -> Tensor:
    """Causal attention within equal buckets (and documents).

    Tokens are sorted by (bucket, position), which keeps each bucket in order: a query then sees the run from its
    bucket's first token of its document up to itself.

    Args:
        query: ``[batch, heads, length, width]``.
        key: as query.
        value: as query.
        bucket: ``[batch, heads, length]``, of queries and keys alike.
        document_ids: ``[batch, length]`` or None.
        block_size: of the tiles.
    """
    heads, length = query.shape[1:3]
    order = bucket.flatten(0, 1).argsort(dim=-1, stable=True)
    labels = [bucket.flatten(0, 1).gather(1, order)]
    if document_ids is not None:
        labels.append(document_ids.repeat_interleave(heads, 0).gather(1, order))
    start = run_starts(*labels)
    stop = torch.arange(1, length + 1, device=order.device).expand_as(order)
    tiles = Tiles(Sight(start, stop), length, block_size)
    query, key, value = (take(x, order) for x in (query, key, value))
    return put(block_sparse_attention(query, key, value, tiles), order, length)


def kept_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept_queries: Tensor,
    kept_keys: Tensor,
    document_start: Tensor | None,
    block_size: int,
) -> Tensor:
    """Causal attention of some queries to some keys; zero for the other queries, and for those left without keys.

    Args:
        query: ``[batch, heads, length, width]``.
        key: as query.
        value: as query.
        kept_queries: ``[batch * heads, kept]`` positions, rising.
        kept_keys: as kept_queries, of the keys.
        document_start: ``[batch, length]`` first position of each position's document; None for one document.
        block_size: of the tiles.
    """
    heads, length = query.shape[1:3]
    stop = torch.searchsorted(kept_keys, kept_queries, right=True)
    start = torch.zeros_like(stop)
    if document_start is not None:
        first = document_start.repeat_interleave(heads, 0).gather(1, kept_queries)
        start = torch.searchsorted(kept_keys, first)
    tiles = Tiles(Sight(start, stop), kept_keys.shape[1], block_size)
    query, key, value = take(query, kept_queries), take(key, kept_keys), take(value, kept_keys)
    return put(block_sparse_attention(query, key, value, tiles), kept_queries, length)


def take(x: Tensor, index: Tensor) -> Tensor:
    """``[batch, heads, kept, width]``: the tokens ``index [batch * heads, kept]``, each at most once, of
    ``x [batch, heads, length, width]``."""
    return _Take.apply(x, _rows(index, x.shape[2])).unflatten(0, (*x.shape[:2], -1))


def put(x: Tensor, index: Tensor, length: int) -> Tensor:
    """The inverse of :func:`take`; zeros elsewhere."""
    return _Put.apply(x.flatten(0, 2), _rows(index, length), len(index) * length).unflatten(0, (*x.shape[:2], -1))


def _rows(index: Tensor, length: int) -> Tensor:
    return (index + torch.arange(len(index), device=index.device)[:, None] * length).flatten()


class _Take(torch.autograd.Function):
    """Rows are different, so that gradients are copied where autograd would add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return x.flatten(0, 2).index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).flatten(0, 2).index_copy_(0, rows, grad).view(ctx.shape), None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, total: int) -> Tensor:
        ctx.save_for_backward(rows)
        return x.new_zeros(total, x.shape[1]).index_copy_(0, rows, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return grad.index_select(0, rows), None, None
