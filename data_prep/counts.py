"""What becomes of documents: how many there were, how many were repaired or dropped, and why."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


class CorpusError(ValueError):
    """A corpus that cannot be built; the message names the source or file, what was found and the fix."""


@dataclass
class Counts:
    """What one source gave, what was repaired in it and what was dropped from it."""

    documents: int = 0
    bytes: int = 0
    repaired: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    first_dropped: dict[str, str] = field(default_factory=dict)

    def drop(self, reason: str, path: str) -> None:
        """Count a dropped document; the first of each reason is kept by name."""
        self.dropped[reason] += 1
        self.first_dropped.setdefault(reason, path)

    def add(self, other: dict[str, Any]) -> None:
        """Add the counts of the same source's next task, as its report has them."""
        self.documents += other["documents"]
        self.bytes += other["bytes"]
        self.repaired.update(other["repaired"])
        self.dropped.update(other["dropped"])
        self.first_dropped = other["first_dropped"] | self.first_dropped

    def describe_dropped(self) -> str:
        """For example ``3 not_utf8 (first: a/b.txt), 1 empty (first: c.txt)``."""
        return ", ".join(f"{n} {why} (first: {self.first_dropped[why]})" for why, n in sorted(self.dropped.items()))

    def to_json(self) -> dict[str, Any]:
        """Plain values, in the order of their names."""
        named: dict[str, dict[str, Any]] = {
            "repaired": self.repaired,
            "dropped": self.dropped,
            "first_dropped": self.first_dropped,
        }
        sizes: dict[str, Any] = {"documents": self.documents, "bytes": self.bytes}
        return sizes | {name: dict(sorted(values.items())) for name, values in named.items()}
