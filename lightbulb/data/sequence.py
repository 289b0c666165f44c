"""The endless sequence of a run's samples: which row of the corpus stands at which place.

Without a mixture every epoch visits all rows once, in an order drawn from the seed and the epoch's number. With one,
:mod:`lightbulb.data.mixture` names the group of each sample, and every group has an endless sequence of its own, of
shuffled epochs over its rows. What has to be remembered is how many samples were drawn, and how many of each group.

A run that gets a mixture after it has begun without reads, in the epoch it was in, the rest of each group in the order
it was reading it, so that no row is repeated or left out.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lightbulb.data.mixture import Group, Mixture, assign, check_enough, occurrences


class Draw(NamedTuple):
    """Consecutive samples of a run, ``[count]`` int64 each.

    Attributes:
        rows: the corpus's row of each.
        groups: the number of its group.
        places: its place in the sequence of its group, or None without a mixture.
    """

    rows: np.ndarray
    groups: np.ndarray
    places: np.ndarray | None

    def part(self, start: int, stop: int) -> "Draw":
        """Some of the samples."""
        places = None if self.places is None else self.places[start:stop]
        return Draw(self.rows[start:stop], self.groups[start:stop], places)


class SampleSequence:
    """Places to rows.

    Args:
        groups: the corpus's groups in the order of its rows.
        seed: draws the order of each epoch, and the group of each sample.
        shuffle: whether epochs are shuffled.
        stages: first sample and mixture of each stage, the first from sample 0; none for a run without mixtures.
        part: number of the random part that is read and how many there are, without mixtures; None for all rows.

    Attributes:
        plain_samples: samples that were drawn before the run had a mixture.
    """

    def __init__(
        self,
        groups: Mapping[str, Group],
        seed: int,
        shuffle: bool,
        stages: Sequence[tuple[int, Mixture]] = (),
        part: tuple[int, int] | None = None,
    ):
        self.names = list(groups)
        self.sizes = np.array([group.rows for group in groups.values()], dtype=np.int64)
        self.seed = seed
        self.shuffle = shuffle
        self.stages = list(stages)
        self.plain_samples = 0
        self._first_rows = np.cumsum(self.sizes) - self.sizes
        self._rows: np.ndarray | None = None
        if part is not None:
            self._rows = rows_of_part(int(self.sizes.sum()), *part)
            self.sizes = np.bincount(self.groups_of(self._rows), minlength=len(self.names))
        self._num_rows = int(self.sizes.sum())
        self._orders: dict[int, np.ndarray] = {}
        self._group_orders: dict[tuple[int, int], np.ndarray] = {}

    def draw(self, first: int, count: int, drawn: np.ndarray) -> Draw:
        """The samples ``[first, first + count)``, which must not cross into the next stage.

        Args:
            drawn: ``[groups]``: samples of each group before ``first``.

        Raises:
            OutOfRows: the caps of the mixture do not allow them.
        """
        mixture = self.mixture(first)
        if mixture is None:
            rows = self.plain_rows(first, first + count)
            return Draw(rows, self.groups_of(rows), None)
        groups = assign(self.seed, first, count, mixture, drawn)
        places = drawn[groups] + occurrences(groups)
        rows = np.empty(count, dtype=np.int64)
        for group in np.unique(groups):
            rows[groups == group] = self.group_rows(int(group), places[groups == group])
        return Draw(rows, groups, places)

    def mixture(self, sample: int) -> Mixture | None:
        """The mixture that is in force at a sample."""
        return self.stages[self.stage(sample)][1] if self.stages else None

    def stage(self, sample: int) -> int:
        """The number of the mixture that is in force at a sample; 0 without any."""
        return max(0, sum(first <= sample for first, _ in self.stages) - 1)

    def exhausted(self, sample: int, drawn: np.ndarray) -> list[str]:
        """Groups that the mixture of a sample would draw from, had they not reached their caps."""
        mixture = self.mixture(sample)
        if mixture is None:
            return []
        over = (mixture.weights > 0) & (drawn >= mixture.caps)
        return [self.names[i] for i in np.flatnonzero(over)]

    def check_enough(self, first: int, stop: int, drawn: np.ndarray) -> None:
        """Whether the caps allow the samples ``[first, stop)``, as far as that can be foreseen.

        Raises:
            OutOfRows: they do not.
        """
        if self.stages:
            check_enough(self.stages, first, stop, drawn)

    def plain_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows at these places of the sequence of a run without a mixture."""
        return _by_epoch(np.arange(start, stop), self._num_rows, self.plain_order)

    def group_rows(self, group: int, places: np.ndarray) -> np.ndarray:
        """Rows of the corpus at these places of a group's sequence."""
        return _by_epoch(places, int(self.sizes[group]), lambda epoch: self.group_order(group, epoch))

    def plain_counts(self, samples: int) -> np.ndarray:
        """``[groups]``: how many of a run's first samples each group gave, without a mixture."""
        epochs, rest = divmod(samples, self._num_rows)
        part = self.groups_of(self.plain_order(epochs)[:rest])
        return epochs * self.sizes + np.bincount(part, minlength=len(self.sizes))

    def groups_of(self, rows: np.ndarray) -> np.ndarray:
        """The number of each row's group."""
        return np.searchsorted(self._first_rows, rows, side="right") - 1

    def first_row(self, group: int) -> int:
        """The row of the corpus that a group begins with."""
        return int(self._first_rows[group])

    def plain_order(self, epoch: int) -> np.ndarray:
        """All rows in the order of one epoch without a mixture; a step touches two epochs at most."""
        if (order := self._orders.get(epoch)) is None:
            order = np.arange(self._num_rows)
            if self.shuffle:
                order = np.random.default_rng([self.seed, epoch]).permutation(order)
            if self._rows is not None:
                order = self._rows[order]
            self._orders = {e: kept for e, kept in self._orders.items() if e == epoch - 1} | {epoch: order}
        return order

    def group_order(self, group: int, epoch: int) -> np.ndarray:
        """Rows of a group in the order of one of its epochs."""
        if (order := self._group_orders.get((group, epoch))) is None:
            order = self._new_group_order(group, epoch)
            self._group_orders.pop((group, epoch - 2), None)
            self._group_orders[group, epoch] = order
        return order

    def _new_group_order(self, group: int, epoch: int) -> np.ndarray:
        first, size = self.first_row(group), int(self.sizes[group])
        if epoch * self._num_rows < self.plain_samples:
            order = self.plain_order(epoch)
            return order[(order >= first) & (order < first + size)]
        rows = np.arange(first, first + size)
        if not self.shuffle:
            return rows
        return np.random.default_rng([self.seed, epoch, zlib.crc32(self.names[group].encode())]).permutation(rows)


def rows_of_part(rows: int, number: int, parts: int) -> np.ndarray:
    """The rows of a random part of a corpus, rising; the same whatever the run's seed."""
    return np.sort(np.random.default_rng([rows, parts]).permutation(rows)[number::parts])


def _by_epoch(places: np.ndarray, size: int, order_of: Callable[[int], np.ndarray]) -> np.ndarray:
    """What stands at rising places of a sequence of epochs, given the order of each."""
    if not len(places):
        return places
    first, last = int(places[0]) // size, int(places[-1]) // size
    parts = [(epoch, places[places // size == epoch] if first < last else places) for epoch in range(first, last + 1)]
    return np.concatenate([order_of(epoch)[part - epoch * size] for epoch, part in parts])
