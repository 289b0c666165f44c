"""Causal softmax attention over whole sequences, with key/value heads shared by groups of query heads."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from lightbulb.nn.precision import product_dtype

_ROWS = 64  # queries of one block; the keys after its last query are never touched
_LONGEST = 1024  # the blocks keep their probabilities for the backward, which grows with the square of the length


def causal_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """``softmax(q k^T / sqrt(width)) v`` over the positions up to each query's own.

    Args:
        query: ``[batch, heads, length, width]``.
        key: ``[batch, kv_heads, length, width]``; each serves ``heads / kv_heads`` consecutive query heads.
        value: as key.
        mask: ``[batch, 1, length, length]`` bool, causal and with each token seeing itself, to allow less than the
            whole past.

    Returns:
        ``[batch, heads, length, width]``.
    """
    if query.device.type == "cpu" and query.shape[2] <= _LONGEST:
        return _BlockAttention.apply(query, key, value, mask)
    dtype = product_dtype(query)
    return attend(query.to(dtype), key.to(dtype), value.to(dtype), mask).to(query.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's attention: causal without a mask, else over what the mask allows (any query and key lengths)."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)


class _BlockAttention(torch.autograd.Function):
    """Block by block of queries, each against its past only, by batched products.

    At these lengths PyTorch's flash kernel for CPU takes longer: at 512 positions 1.4 times in float32 and 2 to 3 times
    in bfloat16, its backward most of all. Query heads that share a key head are rows of one product, so that keys and
    values are never repeated.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, length, width = query.shape
        dtype, kv_heads = product_dtype(query), key.shape[1]
        q = _grouped(query, kv_heads, dtype) * width**-0.5
        k, v = (_grouped(t, kv_heads, dtype)[:, 0] for t in (key, value))
        # In memory [length, batch, heads, width]: what the output projection reads.
        result = query.new_empty(length, batch, heads, width).permute(1, 2, 0, 3)
        blocks = []
        for start, stop in _spans(length):
            scores = q[:, :, start:stop].flatten(1, 2) @ k[:, :stop].transpose(1, 2)
            _hide(scores.view(batch, heads, stop - start, stop), start, mask)
            torch.softmax(scores, dim=-1, out=scores)
            result[:, :, start:stop] = (scores @ v[:, :stop]).view(batch, heads, stop - start, width)
            blocks.append(scores)
        ctx.save_for_backward(q, k, v, *blocks)
        ctx.dtype = query.dtype
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *blocks = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (start, stop), weights in zip(_spans(q.shape[2]), blocks, strict=True):
            past = slice(0, stop)
            rows = q[:, :, start:stop].flatten(1, 2)
            incoming = _grouped(grad[:, :, start:stop], len(q) // len(grad), q.dtype).flatten(1, 2)
            grad_v[:, past].baddbmm_(weights.transpose(1, 2), incoming)
            grad_scores = incoming @ v[:, past].transpose(1, 2)
            torch.ops.aten._softmax_backward_data.out(grad_scores, weights, -1, q.dtype, grad_input=grad_scores)
            grad_q[:, :, start:stop] = (grad_scores @ k[:, past]).view(len(q), -1, stop - start, q.shape[3])
            grad_k[:, past].baddbmm_(grad_scores.transpose(1, 2), rows)
        grad_q *= q.shape[3] ** -0.5
        return *(_ungrouped(t, len(grad), ctx.dtype) for t in (grad_q, grad_k[:, None], grad_v[:, None])), None


def _spans(length: int) -> list[tuple[int, int]]:
    """First and last row (exclusive) of each block of queries."""
    return [(start, min(start + _ROWS, length)) for start in range(0, length, _ROWS)]


def _hide(scores: Tensor, start: int, mask: Tensor | None) -> None:
    """Minus infinity at the pairs that must not see each other: ``scores [batch, heads, rows, start + rows]``."""
    rows, past = scores.shape[2:]
    if mask is not None:
        scores.masked_fill_(~mask[:, :, start:past, :past], float("-inf"))
        return
    future = scores.new_full((rows, rows), float("-inf")).triu_(1)
    scores[..., start:] += future


def _grouped(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """``[batch, heads, length, width]`` as ``[batch * kv_heads, heads of a group, length, width]``."""
    return x.to(dtype).reshape(x.shape[0] * kv_heads, -1, *x.shape[2:])


def _ungrouped(x: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).reshape(batch, -1, *x.shape[2:])
