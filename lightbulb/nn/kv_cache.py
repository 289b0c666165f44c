"""The keys and values that decoding keeps, at their true positions.

``key`` and ``value`` are ``[batch, kv_heads, max_length, width]``; ``present [batch, max_length]`` says where a token
was written: samples may skip positions, each its own.
"""

import torch
from torch import Tensor

Cache = dict[str, Tensor]


def empty_cache(
    batch_size: int, kv_heads: int, max_length: int, width: int, device: torch.device, dtype: torch.dtype
) -> Cache:
    """A cache without tokens."""
    shape = (batch_size, kv_heads, max_length, width)
    cache = {name: torch.zeros(shape, device=device, dtype=dtype) for name in ("key", "value")}
    return cache | {"present": torch.zeros(batch_size, max_length, device=device, dtype=torch.bool)}


def write(cache: Cache, key: Tensor, value: Tensor, positions: Tensor, present: Tensor | None) -> Cache:
    """The cache with new tokens; in place without gradients, else a copy.

    Args:
        cache: to write to.
        key: ``[batch, kv_heads, length, width]``.
        value: as key.
        positions: ``[length]``, or ``[length, batch]`` per sample.
        present: ``[batch, length]`` bool; fillers are not written.
    """
    new = {"key": key, "value": value}
    if positions.dim() == 1 and present is None:
        cache = write_all(cache, new, positions)
        cache["present"].index_fill_(1, positions, True)
        return cache
    cache = _writable(cache)
    places = (positions[:, None] if positions.dim() == 1 else positions).t().expand(len(key), -1)
    written = torch.ones_like(places, dtype=torch.bool) if present is None else present
    sample, step = written.nonzero(as_tuple=True)
    place = places[sample, step]
    for name, part in new.items():
        cache[name].transpose(1, 2)[sample, place] = part.transpose(1, 2)[sample, step]
    cache["present"][sample, place] = True
    return cache


def write_all(cache: Cache, new: Cache, positions: Tensor) -> Cache:
    """As :func:`write`, tokens of any kind, no fillers, at positions that samples share.

    Args:
        cache: to write to, each part ``[batch, heads, max_length, ...]``.
        new: parts by their names in the cache, each ``[batch, heads, length, ...]``.
        positions: ``[length]``.
    """
    cache = _writable(cache)
    for name, part in new.items():
        cache[name].index_copy_(2, positions, part)
    return cache


def _writable(cache: Cache) -> Cache:
    return {name: part.clone() for name, part in cache.items()} if torch.is_grad_enabled() else cache
