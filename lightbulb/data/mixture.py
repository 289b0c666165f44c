"""Mixtures: from which group of a corpus each sample of a run is drawn.

The i-th sample of a run has a point in [0, 1) that depends on the seed and i alone, and the group whose interval of
the cumulated weights holds the point gives it. The points are a Weyl sequence, ``x0 + i * phi mod 1`` with the golden
ratio (Weyl 1916; Knuth, TAOCP 3, 6.4): of any n samples in a row each group gets its share to within O(log n), closer
than independent draws with their O(sqrt n), and point i is one multiplication in 64-bit integers, whatever i is.

Temperature is that of multilingual training (Arivazhagan et al. 2019, arXiv:1907.05019); switching the mixture late in
training is midtraining as in OLMo 2 (2025, arXiv:2501.00656).
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np

from lightbulb.data.config import DataError, MixtureConfig

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 / phi, rounded to odd."""

UNLIMITED = 1 << 62


class Group(NamedTuple):
    """Size of a group."""

    rows: int
    tokens: int


class Mixture(NamedTuple):
    """A mixture of known groups, in their order.

    Attributes:
        weights: ``[groups]`` float64, of sum 1.
        caps: ``[groups]`` int64: rows that may be drawn since the run began, repeats counted.
    """

    weights: np.ndarray
    caps: np.ndarray


class OutOfRows(DataError):
    """Every group of the mixture has been read as often as it may be."""


def domain_of(group: str) -> str:
    """The domain that a group is, or is a cluster of."""
    return group.partition("/")[0]


def resolve(config: MixtureConfig, groups: Mapping[str, Group]) -> Mixture:
    """The mixture over these groups.

    Raises:
        DataError: a name matches nothing; the known ones are listed.
    """
    if config.weights is None:
        weights = _by_temperature(config.temperature, groups)
    else:
        weights = _by_name(config.weights, groups)
    caps = []
    for name, group in groups.items():
        epochs = _best(config.max_epochs, name)
        # rounded first: 0.29 * 100 is less than 29
        caps.append(UNLIMITED if epochs is None else math.floor(round(config.max_epochs[epochs] * group.rows, 6)))
    for name in config.max_epochs:
        if not any(_matches(name, group) for group in groups):
            raise _unknown("max_epochs", name, groups)
    return Mixture(weights / weights.sum(), np.array(caps, dtype=np.int64))


def choose(seed: int, first: int, count: int, weights: np.ndarray) -> np.ndarray:
    """``[count]``: the group of the samples from ``first`` on, where none is exhausted."""
    start = np.uint64(int.from_bytes(hashlib.sha256(f"mixture {seed}".encode()).digest()[:8], "big"))
    points = start + np.arange(first, first + count, dtype=np.uint64) * GOLDEN  # modulo 2^64
    ends = np.cumsum(weights)
    return np.searchsorted(ends / ends[-1], (points >> np.uint64(11)) * 2.0**-53, side="right")


def assign(seed: int, first: int, count: int, mixture: Mixture, drawn: np.ndarray) -> np.ndarray:
    """``[count]``: the group of the samples from ``first`` on.

    A group that reaches its cap is left out from the next sample on, so the answer for a sample does not depend on how
    the samples before it were cut into calls.

    Args:
        drawn: ``[groups]``: rows drawn before.

    Raises:
        OutOfRows: no group has rows left for one of them.
    """
    left = mixture.caps - drawn
    groups = np.empty(count, dtype=np.int64)
    done = 0
    while done < count:
        weights = np.where(left > 0, mixture.weights, 0.0)
        if not weights.any():
            raise OutOfRows(f"max_epochs: every group of the mixture is used up after {first + done} samples")
        chosen = choose(seed, first + done, count - done, weights)
        last_ones = np.flatnonzero(occurrences(chosen) + 1 >= left[chosen])
        chosen = chosen[: int(last_ones[0]) + 1] if len(last_ones) else chosen
        groups[done : done + len(chosen)] = chosen
        left = left - np.bincount(chosen, minlength=len(left))
        done += len(chosen)
    return groups


def occurrences(values: np.ndarray) -> np.ndarray:
    """How often each value stood before it: 5 7 5 5 gives 0 0 1 2."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    begins = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(values) else np.zeros(0, dtype=np.int64)
    found = np.empty(len(values), dtype=np.int64)
    found[order] = np.arange(len(values)) - np.repeat(begins, np.diff(np.r_[begins, len(values)]))
    return found


def check_enough(stages: Sequence[tuple[int, Mixture]], first: int, stop: int, drawn: np.ndarray) -> None:
    """Whether the caps allow the samples ``[first, stop)``, as far as that can be told beforehand.

    Each stage by itself, and all of them together, must have rows enough; which stage uses up what two of them share
    is not foreseen.

    Raises:
        OutOfRows: they do not.
    """
    ends = [begin for begin, _ in stages[1:]] + [stop]
    used = np.zeros(len(drawn), dtype=bool)
    for (begin, mixture), end in zip(stages, ends, strict=True):
        needed = min(end, stop) - max(begin, first)
        if needed > 0:
            used |= mixture.weights > 0
            _check_allowed(needed, mixture.caps - drawn, mixture.weights > 0)
    caps = np.max([mixture.caps for _, mixture in stages], axis=0)
    _check_allowed(max(0, stop - first), caps - drawn, used)


def _check_allowed(needed: int, left: np.ndarray, used: np.ndarray) -> None:
    allowed = sum(max(0, int(rows)) for rows in left[used])
    if needed > allowed:
        raise OutOfRows(
            f"data.mixture: the run needs {needed} more samples, the caps of max_epochs allow {allowed}; raise them, "
            "lower train.steps, or give more groups a weight"
        )


def _by_temperature(temperature: float, groups: Mapping[str, Group]) -> np.ndarray:
    """Domains by tokens^(1 / T); the clusters of a domain share its weight by tokens."""
    domains: dict[str, int] = {}
    for name, group in groups.items():
        domains[domain_of(name)] = domains.get(domain_of(name), 0) + group.tokens
    total = sum(domains.values())
    share = {name: (tokens / total) ** (1 / temperature) / max(1, tokens) for name, tokens in domains.items()}
    return np.array([share[domain_of(name)] * group.tokens for name, group in groups.items()])


def _by_name(weights: Mapping[str, float], groups: Mapping[str, Group]) -> np.ndarray:
    owners = [_best(weights, name) for name in groups]
    tokens = dict.fromkeys(weights, 0)
    for owner, group in zip(owners, groups.values(), strict=True):
        if owner is not None:
            tokens[owner] += group.tokens
    for name, weight in weights.items():
        if not any(_matches(name, group) for group in groups):
            raise _unknown("weights", name, groups)
        if weight and not tokens[name]:
            raise DataError(f"data.mixture.weights: every group that {name!r} matches has a longer name of its own")
    return np.array(
        [
            0.0 if owner is None else weights[owner] * group.tokens / max(1, tokens[owner])
            for owner, group in zip(owners, groups.values(), strict=True)
        ]
    )


def _best(names: Mapping[str, float], group: str) -> str | None:
    """The longest name that matches a group, wildcards not counted."""
    matching = [name for name in names if _matches(name, group)]
    return max(matching, key=lambda name: sum(c not in "*?[]" for c in name), default=None)


def _matches(name: str, group: str) -> bool:
    return fnmatchcase(group, name) or fnmatchcase(domain_of(group), name)


def _unknown(where: str, name: str, groups: Mapping[str, Group]) -> DataError:
    known = sorted({domain_of(group) for group in groups} | set(groups))
    more = f" and {len(known) - 40} more" if len(known) > 40 else ""
    return DataError(
        f"data.mixture.{where}: {name!r} matches no group of the corpus; known are {', '.join(known[:40])}{more}"
    )
