"""Which token sees which: one rule for dense masks, blocks of them and FlexAttention.

Sliding window (Longformer, Beltagy et al. 2020, arXiv:2004.05150), Lambda-shaped mask (LM-Infinite, Han et al. 2023,
arXiv:2308.16137), gist tokens (Mu et al. 2023, arXiv:2304.08467), packed documents, and fillers where a sample holds
fewer tokens than others.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lightbulb.nn.documents import run_starts

_NEVER = torch.iinfo(torch.int64).max  # more runs of gist tokens than any sequence has


@dataclass(frozen=True)
class Tokens:
    """What the rule asks of tokens; every tensor is ``[batch or 1, length]``.

    Attributes:
        order: place in the sequence, which decides what is past.
        positions: true positions, which distances are measured by.
        documents: ids of documents, or None.
        ages: positions from the start of the token's document, or None where that is the position.
        closed: runs of gist tokens that end before the token, or None without gist tokens.
        opened: runs of gist tokens that begin up to the token; beyond any number at a gist token itself.
        present: false for fillers, or None without any.
    """

    order: Tensor
    positions: Tensor
    documents: Tensor | None = None
    ages: Tensor | None = None
    closed: Tensor | None = None
    opened: Tensor | None = None
    present: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Tokens":
        """The same tokens with every tensor changed."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return Tokens(**{name: change(value) for name, value in given.items() if value is not None})

    def with_gists(self, gist: Tensor) -> "Tokens":
        """With the runs of ``gist [batch, positions]``, which is looked up by true position."""
        begins = gist & ~gist.roll(1, dims=1)
        begins[:, 0] = gist[:, 0]
        runs = begins.cumsum(1)
        places = self.positions.expand(len(gist), -1)
        closed, opened = runs - gist.long(), runs.masked_fill(gist, _NEVER)
        return replace(self, closed=closed.gather(1, places), opened=opened.gather(1, places))

    def with_ages(self) -> "Tokens":
        """With the ages of tokens in documents, each consecutive."""
        if self.documents is None:
            return self
        positions = self.positions.expand(len(self.documents), -1)
        return replace(self, ages=positions - positions.gather(1, run_starts(self.documents)))


@dataclass(frozen=True)
class Rule:
    """Which keys a query may see, whatever the sequence.

    Attributes:
        causal: none after the query.
        window: only those fewer than this many positions away.
        max_distance: only those fewer than this many positions away, and the global ones.
        num_global: the first tokens of a document that ``max_distance`` does not hide.
    """

    causal: bool = True
    window: int | None = None
    max_distance: int | None = None
    num_global: int = 0

    @property
    def reach(self) -> int | None:
        """Distance from which no key is seen, if there is one."""
        if self.max_distance is None:
            return self.window
        return None if self.num_global else self.max_distance

    def sees_all_of(self, length: int) -> bool:
        """Whether consecutive tokens this few see all (causal: all of the past) of each other."""
        return all(most is None or length <= most for most in (self.window, self.max_distance))

    def mean_seen(self, length: int) -> float:
        """Tokens that a token of a whole sequence sees, on average."""

        def ramp(length: int, most: int) -> int:
            """Sum of min(n, most) over n from 1 to ``length``."""
            short = min(length, most)
            return short * (short + 1) // 2 + (length - short) * most

        near = min(self.window or length, self.max_distance or length)
        pairs = ramp(length, near) if self.causal else 2 * ramp(length, near) - length
        return (pairs + ramp(max(0, length - near), self.num_global)) / length

    def allows(self, query: Tokens, key: Tokens) -> Tensor:
        """Bool, of the shape that the tensors of ``query`` and ``key`` broadcast to.

        A filler sees everything, so that no row of scores is empty; its result is to be set to zero.
        """
        allowed = (
            query.order >= key.order if self.causal else torch.ones_like(query.order + key.order, dtype=torch.bool)
        )
        if self.window is not None:
            allowed = allowed & (self._apart(query, key) < self.window)
        if self.max_distance is not None:
            ages = key.positions if key.ages is None else key.ages
            allowed = allowed & ((self._apart(query, key) < self.max_distance) | (ages < self.num_global))
        if query.documents is not None and key.documents is not None:
            allowed = allowed & (query.documents == key.documents)
        if query.closed is not None and key.opened is not None and key.closed is not None:
            allowed = allowed & (query.closed <= key.opened)
            if not self.causal:  # nor does a prompt see what follows its gist tokens
                allowed = allowed & (key.closed <= query.closed)
        if key.present is not None:
            allowed = allowed & key.present
        return allowed if query.present is None else allowed | ~query.present

    def _apart(self, query: Tokens, key: Tokens) -> Tensor:
        distance = query.positions - key.positions
        return distance if self.causal else distance.abs()


@dataclass(frozen=True)
class Visibility:
    """A rule and the tokens it is for.

    Attributes:
        rule: which keys a query may see.
        query: the tokens that see.
        key: the tokens that are seen.
        consecutive: the keys' positions follow one another, in every sample alike.
        plain: whole sequences, in which a token sees all others, or all of the past where the rule is causal.
    """

    rule: Rule
    query: Tokens
    key: Tokens
    consecutive: bool = False
    plain: bool = False

    @property
    def has_far_pairs(self) -> bool:
        """Whether a key may be farther than the rule's distances."""
        return not (self.consecutive and self.rule.sees_all_of(self.key.positions.shape[1]))

    def block(self, rows: slice, columns: slice) -> Tensor:
        """``[batch or 1, 1, rows, columns]`` bool: whether these queries see these keys."""
        query = self.query.each(lambda t: t[:, None, rows, None])
        return self.rule.allows(query, self.key.each(lambda t: t[:, None, None, columns]))

    def dense(self) -> Tensor:
        """``[batch or 1, 1, queries, keys]`` bool."""
        return self.block(slice(None), slice(None))

    def distances(self) -> Tensor:
        """``[batch or 1, 1, queries, keys]``: position of the query less that of the key, but no more than the rule's
        longest distance."""
        apart = self.query.positions[:, None, :, None] - self.key.positions[:, None, None, :]
        return apart if self.rule.max_distance is None else apart.clamp(max=self.rule.max_distance)

    def at(self, sample: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether one query sees one key, for FlexAttention, which traces this with scalars."""
        pick = lambda index: lambda t: t[sample if len(t) > 1 else 0, index]  # noqa: E731
        return self.rule.allows(self.query.each(pick(query)), self.key.each(pick(key)))
