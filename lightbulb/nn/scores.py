"""Attention that forms whole score matrices, for what no fused kernel computes.

Adaptive temperature (softmax is not enough, Veličković et al. 2024, arXiv:2410.01104), disentangled scores (DeBERTa,
He et al. 2020, arXiv:2006.03654), distances that stop growing (LM-Infinite, Han et al. 2023, arXiv:2308.16137), sinks
(softmax1, Miller 2023; learned per head, Xiao et al. 2023, arXiv:2309.17453).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightbulb.nn.precision import product_dtype
from lightbulb.ops import softmax

_TEMPERATURE = (-0.037, 0.481, -2.3, 4.917, -1.791)  # of the entropy, highest power first
_MIN_ENTROPY = 0.5  # below it a head is sharp enough
_MAX_ENTROPY = 4.0  # the polynomial was fitted to few items and falls back to 1 where there are many


@dataclass(frozen=True)
class Disentangled:
    """Scores by relative position next to those by content.

    Attributes:
        key: ``[kv_heads, 2k, width]``, the relative positions as keys.
        query: ``[heads, 2k, width]``, the relative positions as queries.
    """

    key: Tensor
    query: Tensor

    def scores(self, query: Tensor, key: Tensor, distances: Tensor) -> Tensor:
        """Content to position and position to content, ``[batch, heads, queries, keys]``: products with all 2k
        positions, of which each pair picks its own."""
        batch, count = len(query), self.key.shape[1]
        reach = count // 2
        to_position = grouped_product(query, self.key.to(query.dtype)[None].expand(batch, -1, -1, -1))
        to_content = grouped_product(self.query.to(key.dtype)[None].expand(batch, -1, -1, -1), key)
        shape = (*query.shape[:3], key.shape[2])
        ahead = (distances + reach).clamp(0, count - 1).expand(shape)
        back = (reach - distances).clamp(0, count - 1).expand(shape)
        return to_position.gather(3, ahead) + to_content.gather(2, back)


@dataclass(frozen=True)
class Clamped:
    """Rotary scores of pairs farther than the longest distance, as if they were that far.

    Attributes:
        query: ``[batch, heads, queries, width]``, rotated as at position ``max_distance``.
        key: ``[batch, kv_heads, keys, width]``, not rotated; the first keys only, where others are never that far.
        max_distance: the longest distance.
    """

    query: Tensor
    key: Tensor
    max_distance: int

    def replace(self, scores: Tensor, distances: Tensor) -> Tensor:
        """``scores [batch, heads, queries, keys]`` with those of far pairs replaced."""
        count = self.key.shape[2]
        far = grouped_product(self.query.to(scores.dtype), self.key.to(scores.dtype))
        near = torch.where(distances[..., :count] < self.max_distance, scores[..., :count], far)
        return near if count == scores.shape[3] else torch.cat((near, scores[..., count:]), dim=3)


def scored_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    distances: Tensor | None = None,
    *,
    sink: Tensor | None = None,
    sharpen: bool = False,
    disentangled: Disentangled | None = None,
    clamped: Clamped | None = None,
) -> Tensor:
    """Softmax attention in plain operations, ``[batch, heads, queries, width]``.

    Args:
        query: ``[batch, heads, queries, width]``.
        key: ``[batch, kv_heads, keys, width]``.
        value: as key.
        mask: bool, broadcastable to ``[batch, heads, queries, keys]``, true at one key of each query at least.
        distances: ``[batch or 1, 1, queries, keys]``, of positions; needed by what depends on them.
        sink: ``[heads]`` logits of one more key with value zero.
        sharpen: raise the inverse temperature of rows with much entropy.
        disentangled: adds scores by relative position; three sums, each of ``width`` products, are divided by
            sqrt(3 width).
        clamped: replaces the scores of far pairs.
    """
    dtype, wanted = product_dtype(query), query.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scores = grouped_product(query, key)
    if clamped is not None:
        assert distances is not None
        scores = clamped.replace(scores, distances)
    if disentangled is not None:
        assert distances is not None
        scores = scores + disentangled.scores(query, key, distances)
    sums = 1 if disentangled is None else 3
    scores = (scores if scores.dtype == torch.float64 else scores.float()) * (sums * query.shape[3]) ** -0.5
    weights = softmax_with_sink(scores, mask, sink, sharpen).to(dtype)
    kv_heads, shape = key.shape[1], query.shape
    mixed = weights.unflatten(1, (kv_heads, -1)).flatten(2, 3) @ value
    return mixed.view(shape).to(wanted)


def grouped_product(query: Tensor, key: Tensor) -> Tensor:
    """``[batch, heads, m, width]`` by ``[batch, kv_heads, n, width]`` to ``[batch, heads, m, n]``: each key head serves
    consecutive query heads."""
    rows = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    return (rows @ key.transpose(2, 3)).view(*query.shape[:3], key.shape[2])


def softmax_with_sink(scores: Tensor, mask: Tensor, sink: Tensor | None, sharpen: bool = False) -> Tensor:
    """Weights of those of ``scores [batch, heads, queries, keys]`` that the mask allows; with ``sink [heads]`` they
    sum to less than 1. The sink is a key like others: it counts in the entropy and is sharpened with them."""
    logits = None if sink is None else sink[:, None]
    if sharpen:
        factor = inverse_temperature(_with_the_sink(scores, mask, logits))
        scores = scores * factor  # before the mask: the factor's gradient would be 0 times minus infinity
        logits = None if logits is None else logits * factor[..., 0]
    return softmax(scores, mask, logits)


def _with_the_sink(scores: Tensor, mask: Tensor, logits: Tensor | None) -> Tensor:
    """The weights of all keys, the sink last."""
    weights = softmax(scores, mask, logits)
    if logits is None:
        return weights
    rest = (1.0 - weights.sum(-1, keepdim=True)).clamp(min=0.0)  # rounding may leave less than nothing
    return torch.cat((weights, rest), dim=-1)


def inverse_temperature(weights: Tensor) -> Tensor:
    """``[..., 1]``: what to multiply the scores by that gave the probabilities ``weights [..., keys]``; at least 1."""
    entropy = -(weights * (weights + 1e-9).log()).sum(-1, keepdim=True)
    bounded, factor = entropy.clamp(max=_MAX_ENTROPY), torch.zeros_like(entropy)
    for coefficient in _TEMPERATURE:
        factor = factor * bounded + coefficient
    return torch.where(entropy > _MIN_ENTROPY, factor.clamp(min=1.0), 1.0)
