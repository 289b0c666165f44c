"""Softmax attention of whole sequences, with key/value heads shared by groups of query heads."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from lightbulb import ops
from lightbulb.nn.attention_mask import Visibility
from lightbulb.nn.precision import product_dtype

_ROWS = 64  # queries of one block; the keys after its last query are never touched
_CACHED = 1 << 18  # features of a head's keys that stay in a core's cache; for more PyTorch's kernel is faster
_LONGEST = 1024  # the blocks keep their probabilities for the backward, which grows with the square of the length


def self_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | Visibility | None = None,
    causal: bool = True,
    reach: int | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """``softmax(q k^T / sqrt(width)) v`` over the positions up to each query's own, or over all.

    Args:
        query: ``[batch, heads, length, width]``.
        key: ``[batch, kv_heads, length, width]``; each serves ``heads / kv_heads`` consecutive query heads.
        value: as key.
        mask: ``[batch or 1, 1, length, length]`` bool, to allow less: causal where ``causal``, and with
            each token seeing itself.
        causal: nothing after a query is seen.
        reach: a promise of the mask that keys this many places away, or more, are not seen.
        sink: ``[heads]`` logits of one more key with value zero.

    Returns:
        ``[batch, heads, length, width]``.
    """
    dtype = product_dtype(query)
    is_plain = causal and mask is None and sink is None and (reach is None or reach >= query.shape[2])
    is_cached = query.shape[2] * query.shape[3] <= _CACHED
    if is_plain and is_cached and dtype == torch.float32 and ops.has_fast_causal_attention(query, key, value):
        return ops.causal_attention(query, key, value)
    is_short = query.device.type == "cpu" and min(reach or query.shape[2], query.shape[2]) <= _LONGEST
    if is_short or sink is not None:
        return _BlockAttention.apply(query, key, value, sink, mask, causal, reach)
    dense = mask.dense() if isinstance(mask, Visibility) else mask
    return attend(query.to(dtype), key.to(dtype), value.to(dtype), dense, causal).to(query.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool = True) -> Tensor:
    """PyTorch's attention: over what the mask allows (any query and key lengths); without one over the past, or over
    everything when not ``causal``."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal and mask is None)


class _BlockAttention(torch.autograd.Function):
    """Block by block of queries, each against what it can reach only, by batched products.

    At these lengths PyTorch's flash kernel for CPU takes longer: at 512 positions 1.4 times in float32 and 2 to 3 times
    in bfloat16, its backward most of all. Query heads that share a key head are rows of one product, so that keys and
    values are never repeated. A sink is one more column of scores.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink: Tensor | None,
        mask: Tensor | Visibility | None,
        causal: bool,
        reach: int | None,
    ) -> Tensor:
        batch, heads, length, width = query.shape
        dtype, kv_heads = product_dtype(query), key.shape[1]
        q = _grouped(query, kv_heads, dtype) * width**-0.5
        k, v = (_grouped(t, kv_heads, dtype)[:, 0] for t in (key, value))
        # In memory [length, batch, heads, width]: what the output projection reads.
        result = query.new_empty(length, batch, heads, width).permute(1, 2, 0, 3)
        ctx.spans = _spans(length, causal, reach)
        blocks = []
        for rows, seen in ctx.spans:
            count = seen.stop - seen.start
            scores = _products(q[:, :, rows].flatten(1, 2), k[:, seen], sink is not None)
            by_head = scores.view(batch, heads, rows.stop - rows.start, -1)
            if sink is not None:
                by_head[..., count] = sink[:, None]
            _hide(by_head[..., :count], rows, seen, mask, causal)
            torch.softmax(scores, dim=-1, out=scores)
            mixed = scores[..., :count] @ v[:, seen]
            result[:, :, rows] = mixed.view(batch, heads, rows.stop - rows.start, width)
            blocks.append(scores)
        ctx.save_for_backward(q, k, v, *blocks)
        ctx.dtype, ctx.sink = query.dtype, None if sink is None else (len(sink), sink.dtype)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *blocks = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grad_sink = None if ctx.sink is None else q.new_zeros(ctx.sink[0])
        for (span, seen), weights in zip(ctx.spans, blocks, strict=True):
            count = seen.stop - seen.start
            rows = q[:, :, span].flatten(1, 2)
            incoming = _grouped(grad[:, :, span], len(q) // len(grad), q.dtype).flatten(1, 2)
            grad_v[:, seen].baddbmm_(weights[..., :count].transpose(1, 2), incoming)
            grad_scores = _products(incoming, v[:, seen], grad_sink is not None)
            torch.ops.aten._softmax_backward_data.out(grad_scores, weights, -1, q.dtype, grad_input=grad_scores)
            if grad_sink is not None:
                grad_sink += grad_scores[..., -1].view(len(grad), len(grad_sink), -1).sum((0, 2))
            grad_scores = grad_scores[..., :count]
            grad_q[:, :, span] = (grad_scores @ k[:, seen]).view(len(q), -1, span.stop - span.start, q.shape[3])
            grad_k[:, seen].baddbmm_(grad_scores.transpose(1, 2), rows)
        grad_q *= q.shape[3] ** -0.5
        grads = (_ungrouped(t, len(grad), ctx.dtype) for t in (grad_q, grad_k[:, None], grad_v[:, None]))
        return *grads, None if grad_sink is None else grad_sink.to(ctx.sink[1]), None, None, None


def _spans(length: int, causal: bool, reach: int | None) -> list[tuple[slice, slice]]:
    """Queries of each block, and the keys they can reach."""
    reach = length if reach is None else reach
    spans = []
    for start in range(0, length, _ROWS):
        stop = min(start + _ROWS, length)
        last = stop if causal else min(length, stop + reach - 1)
        spans.append((slice(start, stop), slice(max(0, start - reach + 1), last)))
    return spans


def _products(rows: Tensor, keys: Tensor, has_sink: bool) -> Tensor:
    """``[batch * kv_heads, rows, keys]``; with one more column, of zeros, for a sink."""
    if not has_sink:
        return rows @ keys.transpose(1, 2)
    products = rows.new_empty(len(rows), rows.shape[1], keys.shape[1] + 1)
    torch.bmm(rows, keys.transpose(1, 2), out=products[..., :-1])
    products[..., -1] = 0
    return products


def _hide(scores: Tensor, rows: slice, seen: slice, mask: Tensor | Visibility | None, causal: bool) -> None:
    """Minus infinity at the pairs that must not see each other: ``scores [batch, heads, rows, seen]``."""
    if mask is not None:
        allowed = mask.block(rows, seen) if isinstance(mask, Visibility) else mask[:, :, rows, seen]
        scores.masked_fill_(~allowed, float("-inf"))
    elif causal:
        count = rows.stop - rows.start
        scores[..., rows.start - seen.start :] += scores.new_full((count, count), float("-inf")).triu_(1)


def _grouped(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """``[batch, heads, length, width]`` as ``[batch * kv_heads, heads of a group, length, width]``."""
    return x.to(dtype).reshape(x.shape[0] * kv_heads, -1, *x.shape[2:])


def _ungrouped(x: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).reshape(batch, -1, *x.shape[2:])
