"""Block-sparse attention in the dtype in which this machine multiplies fastest, and masks for it."""

from collections.abc import Callable, Hashable
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lightbulb import ops
from lightbulb.nn.attention_mask import Rule, Visibility
from lightbulb.nn.documents import run_starts
from lightbulb.nn.precision import product_dtype
from lightbulb.ops import Sight, Tiles

_BLOCK = 64

_of_documents = WeakIdKeyDictionary()  # a batch's document ids, by identity: their masks' tiles


def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, tiles: Tiles, sink: Tensor | None = None
) -> Tensor:
    """As :func:`lightbulb.ops.block_sparse_attention`."""
    dtype = product_dtype(query)
    inputs = (t.to(dtype) for t in (query, key, value))
    return ops.block_sparse_attention(*inputs, tiles, sink).to(query.dtype)


def obstacle(seen: Visibility) -> str | None:
    """Why :func:`tiles_of` cannot say this, or None when it can."""
    if not seen.consecutive or seen.key.present is not None:
        return "tiles take no positions per sample"
    if seen.key.closed is not None:
        return "tiles have no mask for gist tokens"
    if seen.rule.max_distance is not None and not seen.rule.causal:
        return "tiles have no Lambda mask that sees the future"
    return None


def tiles_of(seen: Visibility) -> Tiles:
    """The mask of whole sequences, without an :func:`obstacle`."""
    length, rule, documents = seen.key.order.shape[1], seen.rule, seen.key.documents
    if documents is None:
        return _tiles_of_one_document(rule, length, seen.key.order.device)
    ages = seen.key.ages if rule.num_global else None
    return once_per_batch(documents, rule, lambda: Tiles(_sight(rule, documents, ages), length, _BLOCK))


def once_per_batch(documents: Tensor, mask: Hashable, make: Callable[[], Tiles]) -> Tiles:
    """What ``make`` gives for this mask of ``documents``, which nobody changes: all layers share the lists."""
    known = _of_documents.setdefault(documents, {})
    if mask not in known:
        known[mask] = make()
    return known[mask]


@lru_cache(maxsize=32)
def _tiles_of_one_document(rule: Rule, length: int, device: torch.device) -> Tiles:
    place = torch.arange(length, device=device)[None]
    return Tiles(_sight(rule, torch.zeros_like(place), place), length, _BLOCK)


def _sight(rule: Rule, documents: Tensor, ages: Tensor | None) -> Sight:
    """What tokens of ``documents [problems, length]`` see that are ``ages`` away from their document's start."""
    start = run_starts(documents)
    place = torch.arange(documents.shape[1], device=documents.device).expand_as(start)
    stop = place + 1 if rule.causal else documents.shape[1] - run_starts(documents.flip(-1)).flip(-1)
    if rule.window is not None:
        start, stop = start.maximum(place - rule.window + 1), stop.minimum(place + rule.window)
    if rule.max_distance is None:
        return Sight(start, stop)
    sinks = None if ages is None else place - ages + rule.num_global
    return Sight(start, stop, place - rule.max_distance + 1, sinks)
