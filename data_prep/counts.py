"""What becomes of documents: how many there were, how many were repaired or dropped, and why."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

EXAMPLES = 5
"""How many dropped documents of a source and a reason are shown."""

EXCERPT = 80
"""Characters of a text that are shown."""

Text = str | bytes


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
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def drop(self, reason: str, path: str, text: Text = "") -> None:
        """Count a dropped document; the first ones of each reason are kept by name, with how they begin."""
        self.dropped[reason] += 1
        self.first_dropped.setdefault(reason, path)
        if len(shown := self.examples.setdefault(reason, [])) < EXAMPLES:
            shown.append({"path": path, "text": excerpt(text)})

    def add(self, other: dict[str, Any]) -> None:
        """Add the counts of the same source's next task, as its report has them."""
        self.documents += other["documents"]
        self.bytes += other["bytes"]
        self.repaired.update(other["repaired"])
        self.dropped.update(other["dropped"])
        self.first_dropped = other["first_dropped"] | self.first_dropped
        for reason, examples in other["examples"].items():
            self.examples[reason] = (self.examples.get(reason, []) + examples)[:EXAMPLES]

    def describe_dropped(self) -> str:
        """For example ``3 not_utf8 (first: a/b.txt), 1 empty (first: c.txt)``."""
        return ", ".join(f"{n} {why} (first: {self.first_dropped[why]})" for why, n in sorted(self.dropped.items()))

    def to_json(self) -> dict[str, Any]:
        """Plain values, in the order of their names."""
        named: dict[str, dict[str, Any]] = {
            "repaired": self.repaired,
            "dropped": self.dropped,
            "first_dropped": self.first_dropped,
            "examples": self.examples,
        }
        sizes: dict[str, Any] = {"documents": self.documents, "bytes": self.bytes}
        return sizes | {name: dict(sorted(values.items())) for name, values in named.items()}


def excerpt(text: Text) -> str:
    """How a text begins, on one line and printable."""
    begin = text[: 4 * EXCERPT]
    line = " ".join((begin.decode("utf-8", "replace") if isinstance(begin, bytes) else begin).split())
    return "".join(c if c.isprintable() else "\ufffd" for c in line[:EXCERPT])
