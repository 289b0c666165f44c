"""Square tiles listed for batched products: what the torch form computes."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightbulb.kernels.block_sparse_attention.sight import Sight, by_tile, classify

FULL, SPAN, WINDOW = 0, 1, 2
"""What a pair in a listed tile must pass: nothing; ``start`` and ``stop``; also ``near`` or ``sinks``."""

HIDDEN = -1e30
"""Added to the score of a hidden pair; finite, so that a row without keys gives no NaN. Its result is set to zero."""

_SLIDING = 8  # rows of a head from which views of its keys pay: gathered, rows of all heads fill one product


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
class Lists:
    """Square tiles, row by row of query tiles.

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
        hidden = torch.full((self.block_size + 1, self.block_size), HIDDEN, device=self.kind.device)
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


def list_tiles(sight: Sight, keys: int, block_size: int) -> Lists:
    """The tiles with a visible pair (and perhaps a few without, where bounds jump inside a tile of queries)."""
    problems, queries = sight.start.shape
    some, full, inside = (part.flatten(0, 1) for part in classify(sight, keys, block_size, block_size, block_size))
    row, column = some.nonzero(as_tuple=True)
    kind = torch.where(full[row, column], FULL, torch.where(inside[row, column], SPAN, WINDOW))
    row_start = pad(torch.bincount(row, minlength=len(some)).cumsum(0), (1, 0))
    bounds = sight.map(lambda bound: by_tile(bound, -(-queries // block_size), block_size).flatten(0, 1))
    return Lists(block_size, row_start, column, kind, bounds, problems)
