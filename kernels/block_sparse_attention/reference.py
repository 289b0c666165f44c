"""The naive twin: dense scores of every pair, and a mask."""

import torch
from torch import Tensor

from lightbulb.kernels.block_sparse_attention.tiles import Tiles


def attention(
    query: Tensor, key: Tensor, value: Tensor, tiles: Tiles, sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``softmax(q k^T / sqrt(width)) v`` over the visible keys, and the logarithm of each query's sum of exponentials:
    zero, and minus infinity, where there is nothing to sum."""
    batch, heads, queries, width = query.shape
    keys, groups = key.shape[2], heads // key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (t.to(wide) for t in (query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)))
    mask = tiles.sight.mask(keys, tiles.block_size)
    mask = mask.repeat_interleave(batch * heads // len(mask), 0).view(batch, heads, queries, keys)
    scores = (q @ k.transpose(2, 3) * width**-0.5).masked_fill(~mask, float("-inf"))
    if sink is not None:
        scores = torch.cat((scores, sink.to(wide)[:, None, None].expand(batch, -1, queries, 1)), dim=3)
        mask = torch.cat((mask, mask.new_ones(batch, heads, queries, 1)), dim=3)
    blind = ~mask.any(3, keepdim=True)
    weights = scores.masked_fill(blind, 0).softmax(3).masked_fill(blind, 0)[..., :keys]
    lse = scores.masked_fill(blind, 0).logsumexp(3).masked_fill(blind[..., 0], float("-inf"))
    return (weights @ v).to(query.dtype), lse
