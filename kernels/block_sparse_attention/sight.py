"""Which keys each query sees, by bounds, and which tiles of the score matrix hold a pair of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sight:
    """The keys that queries see: ``start <= key < stop``, and of these ``key >= near`` or ``key < sinks``.

    A query with ``start < stop`` must see some key. The bounds are integers ``[problems, queries]``; a problem is one
    mask, shared by equally many consecutive heads of the flattened ``batch * heads``.

    Attributes:
        start: first key of the query's document.
        stop: one past the last key the past allows.
        near: first key of the window; None for no window.
        sinks: one past the document's first keys, those that stay visible from outside the window; None for no such.
        stride: keys 1, 2, ... times this many blocks back are visible from outside the window; None for no such.
            Queries and keys then count from the same origin.
    """

    start: Tensor
    stop: Tensor
    near: Tensor | None = None
    sinks: Tensor | None = None
    stride: int | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Sight":
        """The same with every bound changed."""
        near, sinks = (None if bound is None else change(bound) for bound in (self.near, self.sinks))
        return Sight(change(self.start), change(self.stop), near, sinks, self.stride)

    def simple(self, keys: int) -> "Sight":
        """The same among this many keys, with no window where a later start says as much."""
        stop = self.stop.clamp(max=keys)
        if self.near is None:
            return Sight(self.start, stop)
        if self.sinks is None and self.stride is None:
            return Sight(self.start.maximum(self.near), stop)
        return Sight(self.start, stop, self.near, self.sinks, self.stride)

    def mask(self, keys: int, block_size: int) -> Tensor:
        """``[problems, queries, keys]`` bool: what is visible, pair by pair."""
        key = torch.arange(keys, device=self.start.device)
        allowed = (key >= self.start[..., None]) & (key < self.stop[..., None])
        if self.near is None:
            return allowed
        within = key >= self.near[..., None]
        if self.sinks is not None:
            within |= key < self.sinks[..., None]
        if self.stride is not None:
            back = (self.stop[..., None] - 1) // block_size - key // block_size
            within |= (back > 0) & (back % self.stride == 0)
        return allowed & within


def classify(sight: Sight, keys: int, block_size: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three times ``[problems, row tiles, column tiles]`` bool, of tiles of ``rows`` queries by ``columns`` keys: what
    to list, in what of it every pair is visible, and where ``start`` and ``stop`` decide."""
    queries = sight.start.shape[1]
    bounds = sight.map(lambda bound: by_tile(bound, -(-queries // rows), rows))
    first = torch.arange(-(-keys // columns), device=sight.start.device) * columns
    behind = first + columns
    some = (behind > _least(bounds.start)) & (first < _most(bounds.stop))
    full = (first >= _most(bounds.start)) & (behind <= _least(bounds.stop))
    if bounds.near is None:
        return some, full & some, torch.ones_like(some)
    inside = first >= _most(bounds.near)
    within = behind > _least(bounds.near)
    if sight.stride is not None:
        touched, covered = _strided(bounds.stop, first, block_size, columns, sight.stride)
        within |= touched
        inside |= covered
    if bounds.sinks is not None:
        inside |= behind <= _least(bounds.sinks)
        within |= _touched(bounds.start, bounds.sinks, len(first), columns)
    some &= within
    return some, full & some & inside, inside


def _strided(stop: Tensor, first: Tensor, block_size: int, columns: int, stride: int) -> tuple[Tensor, Tensor]:
    """Tiles that may hold, and those that are, blocks a multiple of ``stride`` behind their queries'."""
    own = (stop - 1) // block_size
    nearest = _least(own) - (first + columns - 1) // block_size
    farthest = _most(own) - first // block_size
    touched = farthest // stride * stride >= nearest.clamp(min=1)
    return touched, touched & (nearest == farthest)


def by_tile(bound: Tensor, tiles: int, size: int) -> Tensor:
    """``[problems, queries]`` as ``[problems, tiles, size]``, the last query's bound repeated."""
    filler = bound[:, -1:].expand(-1, tiles * size - bound.shape[1])
    return torch.cat((bound, filler), dim=1).unflatten(1, (tiles, size))


def _least(bound: Tensor) -> Tensor:
    return bound.amin(-1, keepdim=True)


def _most(bound: Tensor) -> Tensor:
    return bound.amax(-1, keepdim=True)


def _touched(start: Tensor, sinks: Tensor, columns: int, size: int) -> Tensor:
    """``[problems, rows, columns]``: the tiles of ``size`` keys that hold a first key of some query."""
    touched = torch.zeros(*start.shape[:2], columns, device=start.device, dtype=torch.long)
    first, last = start // size, (sinks - 1) // size
    for tile in range(int((last - first).amax()) + 1):
        place = torch.minimum(first + tile, last).clamp(0, columns - 1)
        touched.scatter_add_(2, place, (sinks > start).long())
    return touched > 0
