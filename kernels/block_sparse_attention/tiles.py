"""The tiles of the score matrix in which some query sees some key, listed in compressed rows (CSR).

Tiled attention (FlashAttention, Dao et al. 2022, arXiv:2205.14135) over listed tiles only.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightbulb.kernels.block_sparse_attention.lists import Lists, list_tiles
from lightbulb.kernels.block_sparse_attention.sight import Sight, classify


class Schedule(NamedTuple):
    """Tiles of one shape in the order in which a GPU computes them; all int32.

    Attributes:
        order: ``[problems * lines]`` the lines of each problem, the longest first, so that no long one is left for
            last. A line is a row of tiles, or a column of them where the lists are those of the keys.
        starts: ``[2 * problems * lines + 1]`` where each line's full tiles start in ``place``, and its partial ones.
        place: ``[listed]`` the tile's place in its line.
        lines: of one problem.
    """

    order: Tensor
    starts: Tensor
    place: Tensor
    lines: int


@dataclass(frozen=True, eq=False)
class Tiles:
    """A mask, cut into tiles when it is used. The lists are kept: a mask that stays is listed once.

    Attributes:
        sight: what each query sees.
        keys: how many there are.
        block_size: the blocks that ``sight.stride`` counts, and the tiles of the torch form.
    """

    sight: Sight
    keys: int
    block_size: int
    _schedules: dict[tuple[int, int, bool], Schedule] = field(default_factory=dict, repr=False)

    @property
    def problems(self) -> int:
        """Different masks."""
        return len(self.sight.start)

    @property
    def queries(self) -> int:
        """Queries of each head."""
        return self.sight.start.shape[1]

    @cached_property
    def simple(self) -> Sight:
        """The sight in its simplest form."""
        return self.sight.simple(self.keys)

    @cached_property
    def lists(self) -> Lists:
        """The tiles of ``block_size`` by ``block_size``."""
        return list_tiles(self.simple, self.keys, self.block_size)

    @cached_property
    def bounds(self) -> Tensor:
        """``[2 or 4, problems, queries]`` int32: the run of keys that each query sees, from and to, and where that is
        not all: the first key of its document, and one past the last of the first keys it sees."""
        sight = self.simple
        if sight.near is None:
            return torch.stack((sight.start, sight.stop)).int()
        sinks = sight.start if sight.sinks is None else sight.sinks.minimum(sight.stop)
        return torch.stack((sight.start.maximum(sight.near), sight.stop, sight.start, sinks)).int()

    def schedule(self, rows: int, columns: int, by_key: bool = False) -> Schedule:
        """The tiles of this many queries by this many keys, as rows or, ``by_key``, as columns."""
        shape = rows, columns, by_key
        if shape not in self._schedules:
            some, full, _ = classify(self.simple, self.keys, self.block_size, rows, columns)
            if by_key:
                some, full = some.transpose(1, 2), full.transpose(1, 2)
            self._schedules[shape] = _schedule(some, full)
        return self._schedules[shape]

    def density(self, rows: int, columns: int) -> float:
        """The part of the whole score matrix that tiles of this shape touch."""
        area = len(self.schedule(rows, columns).place) * rows * columns
        return area / max(1, self.problems * self.queries * self.keys)

    @cached_property
    def is_past(self) -> bool:
        """Whether every query sees all keys up to its own place, and no others."""
        start, stop = self.simple.start, self.simple.stop
        if self.simple.near is not None or self.queries != self.keys:
            return False
        past = torch.arange(1, self.keys + 1, device=start.device)
        return bool(((start == 0) & (stop == past)).all())


def _schedule(some: Tensor, full: Tensor) -> Schedule:
    """Of ``[problems, lines, places]`` bool: what to list, and what of it is full."""
    problems, lines, places = some.shape
    sorts = torch.stack((full, some & ~full), dim=2).flatten(0, 1)
    order = some.sum(2).argsort(dim=1, descending=True, stable=True)
    starts = pad(sorts.sum(2).flatten().cumsum(0), (1, 0))
    place = sorts.view(problems * lines * 2, places).nonzero()[:, 1]
    return Schedule(order.flatten().int(), starts.int(), place.int(), lines)
