"""Which steps are too far out to be taken: loss or gradient norm many standard deviations above the recent mean.

The rule of OLMo 2 (Team OLMo 2024, arXiv:2501.00656) as its training code applies it: a batch whose loss or gradient
norm stands more than six standard deviations over the last 128 steps updates nothing. Skipped values stay in the
window, so that a level that has changed for good is accepted after a while.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

WINDOW = 128
"""Steps the mean and deviation are taken over."""
MIN_STEPS = WINDOW // 2
"""With fewer known steps nothing is skipped."""


class Limits(NamedTuple):
    """The largest values of a step that is taken."""

    max_loss: float = math.inf
    max_grad_norm: float = math.inf


class SpikeRule:
    """Remembers the last steps and says what the next may reach; pure arithmetic, the same on every rank.

    Args:
        sigma: standard deviations above the mean that are still taken; 0 turns the rule off.
    """

    def __init__(self, sigma: float):
        self.sigma = sigma
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)

    def add(self, loss: float, grad_norm: float) -> None:
        """Record one step, taken or not; values that are not finite say nothing about the level."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._losses.append(loss)
            self._norms.append(grad_norm)

    def restore(self, steps: Iterable[tuple[float | None, float | None]]) -> None:
        """Start anew from earlier steps' losses and gradient norms, oldest first (None was not finite)."""
        self._losses.clear()
        self._norms.clear()
        for loss, norm in steps:
            if loss is not None and norm is not None:
                self.add(loss, norm)

    def limits(self) -> Limits:
        """What the next step may reach."""
        if not self.sigma or len(self._losses) < MIN_STEPS:
            return Limits()
        return Limits(self._limit(self._losses), self._limit(self._norms))

    def _limit(self, values: deque[float]) -> float:
        return statistics.fmean(values) + self.sigma * statistics.stdev(values)
