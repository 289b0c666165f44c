"""How many samples each step of a run takes, and so which step a sample belongs to.

A run may change its batch at some steps, as when a decay begins; larger batches late in training are what the falling
gradient-to-noise ratio asks for (McCandlish et al. 2018, arXiv:1812.06162; MiniCPM, Hu et al. 2024, arXiv:2404.06395,
3.2). Samples are counted over all ranks, so a change falls between two samples of the run, the same on every rank.
"""

from bisect import bisect_right
from collections.abc import Sequence


class BatchSizes:
    """Samples of every step, over all ranks.

    Args:
        first: samples of the first step.
        changes: steps before each change, rising from 1 on, and the samples of every step after it.
    """

    def __init__(self, first: int, changes: Sequence[tuple[int, int]] = ()):
        self._starts = [0, *(step for step, _ in changes)]
        self._sizes = [first, *(size for _, size in changes)]
        self._before = [0]
        """Samples before each change."""
        for number, start in enumerate(self._starts[1:]):
            self._before.append(self._before[-1] + (start - self._starts[number]) * self._sizes[number])

    @property
    def distinct(self) -> list[int]:
        """The sizes there are, rising."""
        return sorted(set(self._sizes))

    def of_step(self, step: int) -> int:
        """Samples of the step that has ``step`` steps before it."""
        return self._sizes[bisect_right(self._starts, step) - 1]

    def samples(self, steps: int) -> int:
        """Samples of the first ``steps`` steps together."""
        number = bisect_right(self._starts, steps) - 1
        return self._before[number] + (steps - self._starts[number]) * self._sizes[number]

    def step_at(self, sample: int) -> int:
        """Steps before the one that takes a sample."""
        number = bisect_right(self._before, sample) - 1
        return self._starts[number] + (sample - self._before[number]) // self._sizes[number]


def batch_sizes(sizes: int | BatchSizes) -> BatchSizes:
    """Batch sizes from one size for the whole run, or as they are."""
    return BatchSizes(sizes) if isinstance(sizes, int) else sizes
