"""Exact softmax attention that touches only the tiles of the score matrix in which some query sees some key.

Tiled attention (FlashAttention, Dao et al. 2022, arXiv:2205.14135) over listed tiles only. A :class:`Sight` says which
keys each query sees, by bounds; :func:`list_tiles` turns it into a list of tiles in compressed rows (CSR), each FULL
(every pair visible, nothing to test) or in need of tests of single pairs; :func:`block_sparse_attention` computes
attention and its gradients from the lists alone, so that a kernel can take its place.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from lightbulb.nn.precision import product_dtype

FULL, SPAN, WINDOW = 0, 1, 2
"""What a pair in a listed tile must pass: nothing; ``start`` and ``stop``; also ``near`` or ``sinks``."""

_NO_TILE = -1
_HIDDEN = -1e30  # finite, so that a row without keys gives no NaN; its result is set to zero
_SCORES = 1 << 18  # scores of one batched product: they stay in the cache of a core
_SLIDING = 8  # rows of a head from which views of its keys pay: gathered, rows of all heads fill one product


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


class Group(NamedTuple):
    """Rows of tiles with equally many tiles of keys.

    Attributes:
        rows: ``[rows]`` places among all ``problems * query tiles``.
        entries: ``[rows, count]`` places in the tile list.
        masked: the columns of ``entries`` in which some tile is not full.
        slides: whether each row's key tiles lie side by side, and one further than those of the row before.
    """

    rows: Tensor
    entries: Tensor
    masked: list[int]
    slides: bool


@dataclass(frozen=True, eq=False)
class Tiles:
    """The tiles to compute, row by row of query tiles.

    Attributes:
        block_size: queries and keys of a tile.
        row_start: ``[problems * query tiles + 1]`` where each row's tiles start in ``column`` and ``kind``.
        column: ``[listed]`` key tile.
        kind: ``[listed]`` FULL, SPAN or WINDOW.
        bounds: of the queries, each ``[problems * query tiles, block_size]``; the last query's fill its tile.
        problems: masks.
    """

    block_size: int
    row_start: Tensor
    column: Tensor
    kind: Tensor
    bounds: Sight
    problems: int

    @property
    def query_tiles(self) -> int:
        """Rows of one problem."""
        return (len(self.row_start) - 1) // self.problems

    @cached_property
    def sightless(self) -> Tensor | None:
        """``[problems, queries rounded up]`` bool: queries that may see no key; None when there are none."""
        blind = self.bounds.start >= self.bounds.stop
        return blind.view(self.problems, -1) if bool(blind.any()) else None

    @cached_property
    def groups(self) -> list[Group]:
        """The rows that have tiles, by their number."""
        counts = self.row_start.diff()
        groups = []
        for count in counts.unique().tolist():
            if count:
                rows = (counts == count).nonzero()[:, 0]
                entries = self.row_start[rows, None] + torch.arange(count, device=rows.device)
                masked = (self.kind[entries] != FULL).any(0).nonzero()[:, 0].tolist()
                groups.append(Group(rows, entries, masked, self._slides(rows, entries)))
        return groups

    def _slides(self, rows: Tensor, entries: Tensor) -> bool:
        if self.problems > 1 or len(rows) < _SLIDING:
            return False
        steps = [torch.arange(size, device=rows.device) for size in entries.shape]
        column = self.column[entries] - steps[0][:, None] - steps[1]
        return bool((column == column[0, 0]).all() and (rows == rows[0] + steps[0]).all())

    def bias(self, rows: Tensor, entries: Tensor, dtype: torch.dtype) -> Tensor:
        """``[rows, block_size, block_size]``: 0 or a large negative number for each pair of one tile per row."""
        if self.problems > 1:
            return self._bias(rows, entries, dtype)
        table, place = self._table
        return table.to(dtype).index_select(0, place[entries])

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor]:
        """The different biases of a mask that all heads share, and each listed tile's place among them."""
        count = self.row_start.diff()
        partial = (self.kind != FULL).nonzero()[:, 0]
        rows = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)[partial]
        looks = torch.cat([end for span in self._spans(rows, partial) for end in span], dim=1)
        different, place = looks.unique(dim=0, return_inverse=True)
        example = partial.new_zeros(len(different)).scatter_(0, place, torch.arange(len(place), device=place.device))
        table = self._bias(rows[example], partial[example], torch.float32)
        places = torch.zeros_like(self.column).index_copy_(0, partial, place + 1)
        return pad(table, (0, 0, 0, 0, 1, 0)), places

    def _bias(self, rows: Tensor, entries: Tensor, dtype: torch.dtype) -> Tensor:
        before, after = (table.to(dtype) for table in self._hiding)
        spans = [
            before.index_select(0, first.flatten()).add_(after.index_select(0, behind.flatten()))
            for first, behind in self._spans(rows, entries)
        ]
        bias = spans[0] if len(spans) == 1 else torch.maximum(*spans)
        return bias.view(-1, self.block_size, self.block_size)

    @cached_property
    def _hiding(self) -> tuple[Tensor, Tensor]:
        """``[block_size + 1, block_size]`` each: row i hides the keys of a tile before its i-th, and those from it on.
        Looking rows up takes a third of the time of comparing keys with bounds."""
        hidden = torch.full((self.block_size + 1, self.block_size), _HIDDEN, device=self.kind.device)
        return hidden.tril(-1), hidden.triu()

    def _spans(self, rows: Tensor, entries: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The runs of keys that each query of a row sees of a tile, counted from its first key: the first key and one
        past the last, ``[rows, block_size]`` each."""
        bounds = self.bounds.map(lambda bound: bound.index_select(0, rows))
        first = bounds.start
        if bounds.near is not None:
            first = torch.where((self.kind[entries] == WINDOW)[:, None], first.maximum(bounds.near), first)
        spans = [(first, bounds.stop)]
        if bounds.sinks is not None:
            spans.append((bounds.start, bounds.stop.minimum(bounds.sinks)))
        origin = self.column[entries, None] * self.block_size
        return [((a - origin).clamp_(0, self.block_size), (b - origin).clamp_(0, self.block_size)) for a, b in spans]


def list_tiles(sight: Sight, keys: int, block_size: int) -> Tiles:
    """The tiles with a visible pair (and perhaps a few without, where bounds jump inside a tile of queries)."""
    problems, queries = sight.start.shape
    rows, columns = -(-queries // block_size), -(-keys // block_size)
    bounds = sight.map(lambda bound: _by_tile(bound, rows, block_size))
    first = torch.arange(columns, device=sight.start.device) * block_size
    behind = first + block_size
    some = (behind > _least(bounds.start)) & (first < _most(bounds.stop))
    every = (first >= _most(bounds.start)) & (behind <= _least(bounds.stop))
    kind = torch.where(every, FULL, SPAN)
    if bounds.near is not None:
        anyway = torch.zeros_like(some)
        if sight.stride is not None:
            back = torch.arange(rows, device=first.device)[:, None] - first // block_size
            anyway |= (back > 0) & (back % sight.stride == 0)
        inside = anyway | (first >= _most(bounds.near))
        within = anyway | (behind > _least(bounds.near))
        if bounds.sinks is not None:
            inside |= behind <= _least(bounds.sinks)
            within |= _touched(bounds.start, bounds.sinks, columns, block_size)
        some &= within
        kind = torch.where(inside, kind, WINDOW)
    kind = torch.where(some, kind, _NO_TILE).flatten(0, 1)
    row, column = (kind != _NO_TILE).nonzero(as_tuple=True)
    row_start = pad(torch.bincount(row, minlength=len(kind)).cumsum(0), (1, 0))
    bounds = bounds.map(lambda bound: bound.flatten(0, 1))
    return Tiles(block_size, row_start, column, kind[row, column], bounds, problems)


def _by_tile(bound: Tensor, rows: int, block_size: int) -> Tensor:
    """``[problems, queries]`` as ``[problems, rows, block_size]``, the last query's bound repeated."""
    filler = bound[:, -1:].expand(-1, rows * block_size - bound.shape[1])
    return torch.cat((bound, filler), dim=1).unflatten(1, (rows, block_size))


def _least(bound: Tensor) -> Tensor:
    return bound.amin(-1, keepdim=True)


def _most(bound: Tensor) -> Tensor:
    return bound.amax(-1, keepdim=True)


def _touched(start: Tensor, sinks: Tensor, columns: int, block_size: int) -> Tensor:
    """``[problems, rows, columns]``: the tiles that hold a first key of some query."""
    touched = torch.zeros(*start.shape[:2], columns, device=start.device, dtype=torch.long)
    first, last = start // block_size, (sinks - 1) // block_size
    for tile in range(int((last - first).amax()) + 1):
        place = torch.minimum(first + tile, last).clamp(0, columns - 1)
        touched.scatter_add_(2, place, (sinks > start).long())
    return touched > 0


def block_sparse_attention(query: Tensor, key: Tensor, value: Tensor, tiles: Tiles) -> Tensor:
    """``softmax(q k^T / sqrt(width)) v`` over the visible keys; zero for a query that sees none.

    Args:
        query: ``[batch, heads, queries, width]``.
        key: ``[batch, kv_heads, keys, width]``; each serves ``heads / kv_heads`` consecutive query heads.
        value: as key.
        tiles: of ``problems`` masks, a divisor of ``batch * kv_heads``.

    Returns:
        ``[batch, heads, queries, width]``.
    """
    return _TileAttention.apply(query, key, value, tiles)


class _TileAttention(torch.autograd.Function):
    """Batched products over rows with equally many tiles.

    A row's keys are all in one product, so its softmax needs no running maximum; the backward repeats it from the
    scores instead of keeping probabilities, so that memory grows with the length only. (Kernels keep each row's
    log-sum-exp for that. Here ``exp(score - logsumexp)`` would cost more than a softmax: the exponential of a hidden
    pair underflows, which is 10 to 100 times slower.) Scores, what is made of them row by row and the sums over queries
    are in float32 at least; what goes into a product is in the fastest dtype.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiles: Tiles) -> Tensor:
        dtype = product_dtype(query)
        q = _query_tiles(query.to(dtype) * query.shape[3] ** -0.5, key.shape[1], tiles.block_size)
        k, v = (_key_tiles(t.to(dtype), tiles.block_size) for t in (key, value))
        result = torch.zeros_like(q)
        for part in _parts(tiles, q, k):
            weights = part.weights(part.take_rows(q), part.take_columns(k))
            part.put_rows(result, torch.bmm(weights.to(dtype), part.take_columns(v)))
        result = _from_query_tiles(result, query.shape, key.shape[1])
        if tiles.sightless is not None:
            result.masked_fill_(_sightless(tiles, query), 0)
        ctx.save_for_backward(q, k, v)
        ctx.tiles, ctx.dtype, ctx.shapes = tiles, query.dtype, (query.shape, key.shape)
        return result.to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        tiles, (query_shape, key_shape) = ctx.tiles, ctx.shapes
        grad = grad.to(q.dtype)
        if tiles.sightless is not None:
            grad = grad.masked_fill(_sightless(tiles, grad), 0)
        grad = _query_tiles(grad, key_shape[1], tiles.block_size)
        grad_q = torch.zeros_like(q)
        grad_k, grad_v = (torch.zeros_like(t, dtype=_wide(t)) for t in (k, v))
        for part in _parts(tiles, q, k):
            rows, keys, incoming = part.take_rows(q), part.take_columns(k), part.take_rows(grad)
            weights = part.weights(rows, keys)
            part.add_columns(grad_v, torch.bmm(weights.to(q.dtype).transpose(1, 2), incoming))
            wide = _wide_product(incoming, part.take_columns(v))
            torch.ops.aten._softmax_backward_data.out(wide, weights, -1, wide.dtype, grad_input=wide)
            grad_scores = wide.to(q.dtype)
            part.put_rows(grad_q, torch.bmm(grad_scores, keys))
            part.add_columns(grad_k, torch.bmm(grad_scores.transpose(1, 2), rows))
        grad_q = _from_query_tiles(grad_q, query_shape, key_shape[1]) * query_shape[3] ** -0.5
        grads = (grad_q, *(_from_key_tiles(t, key_shape) for t in (grad_k, grad_v)))
        return *(t.to(ctx.dtype) for t in grads), None


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

    def weights(self, rows: Tensor, keys: Tensor) -> Tensor:
        """The softmax of the rows' scores: ``[rows, queries, count * block_size]``."""
        scores = _wide_product(rows, keys)
        for place, bias in self.biases.items():
            block = bias.shape[2]
            by_head = scores.view(len(scores), -1, block, scores.shape[2])[..., place * block : (place + 1) * block]
            by_head += bias[:, None]
        return torch.softmax(scores, dim=-1, out=scores)


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


def _parts(tiles: Tiles, q: Tensor, k: Tensor) -> Iterator[_Part]:
    """The whole work, cut into products whose scores fit the cache."""
    heads = len(q) // tiles.query_tiles // tiles.problems
    key_tiles = len(k) // (tiles.problems * heads)
    for group in tiles.groups:
        head = torch.arange(heads, device=q.device)[:, None] + heads * (group.rows // tiles.query_tiles)
        rows = (head * tiles.query_tiles + group.rows % tiles.query_tiles).flatten()
        columns = (head[..., None] * key_tiles + tiles.column[group.entries]).flatten(0, 1)
        mask_rows, entries = group.rows.repeat(heads), group.entries.repeat(heads, 1)
        step = max(1, _SCORES // (columns.shape[1] * q.shape[1] * k.shape[1]))
        for here in _cuts(len(rows), step, len(group.rows) if group.slides else len(rows)):
            biases = {c: tiles.bias(mask_rows[here], entries[here, c], _wide(q)) for c in group.masked}
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


def _sightless(tiles: Tiles, x: Tensor) -> Tensor:
    """``[batch, heads, queries, 1]`` bool for ``x [batch, heads, queries, width]``."""
    assert tiles.sightless is not None
    blind = tiles.sightless[:, : x.shape[2]]
    return blind.repeat_interleave(x.shape[0] * x.shape[1] // len(blind), 0).view(*x.shape[:3], 1)
