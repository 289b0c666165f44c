"""Documents to splits: which are for training, which are held out.

The choice for a document depends on its path alone, so adding documents moves none from one side to the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightbulb.data_prep.counts import CorpusError
from lightbulb.data_prep.documents import Documents, kept
from lightbulb.data_prep.step import Output, Step, Task

TRAIN = "train"
HELD_OUT = "held_out"
SPLITS = (TRAIN, HELD_OUT)
DROPPED = -1
SPLIT_NAME = "split.npy"


@dataclass(frozen=True)
class Split(Step):
    """Gives every document its place in :data:`SPLITS`, or :data:`DROPPED`."""

    documents: Documents
    drops: tuple[Output, ...]
    fraction: float

    name = "split"
    title = "Splitting"

    def settings(self) -> Any:
        return self.fraction

    def parts(self) -> Sequence[Any]:
        return [{"documents": self.documents.read.keys, "drops": [output.keys for output in self.drops]}]

    def run_task(self, rank: int, task: Task) -> dict[str, Any]:
        index, wanted = self.documents.index, kept(self.documents, self.drops)
        held = held_out(
            index["path"], np.where(wanted, index["domain"].astype(np.int32), -1), self.fraction, self.documents.domains
        )
        split = np.where(wanted, held.astype(np.int8), np.int8(DROPPED))
        np.save(task.out / SPLIT_NAME, split)
        return {name: int((split == number).sum()) for number, name in enumerate(SPLITS)}


def load_split(output: Output) -> np.ndarray:
    """``[documents]`` int8: the place of each document's split in :data:`SPLITS`, or :data:`DROPPED`."""
    return np.load(output.folders[0] / SPLIT_NAME)


def held_out(hashes: np.ndarray, domains: np.ndarray, fraction: float, names: Sequence[str]) -> np.ndarray:
    """Which documents are held out: those whose path hashes below the fraction.

    A domain whose hashes all fall on one side gives one document to the other.

    Args:
        hashes: ``[documents]`` uint64, of the paths.
        domains: ``[documents]``, the number of each one's domain; -1 where a document is dropped.
        fraction: share that is held out.
        names: of the domains, for messages.

    Raises:
        CorpusError: a domain of one document.
    """
    if fraction == 0.0:
        return np.zeros(len(hashes), dtype=bool)
    chosen = (hashes.astype(np.float64) / 2.0**64 < fraction) & (domains >= 0)
    for domain in np.unique(domains[domains >= 0]):
        members = np.flatnonzero(domains == domain)
        if len(members) == 1:
            raise CorpusError(
                f"held_out_fraction: domain {names[domain]!r} has one document, which cannot be divided; add "
                "documents, give a text source a delimiter ('' for blank lines), or set held_out_fraction=0"
            )
        lowest = members[np.argsort(hashes[members], kind="stable")]
        if not chosen[members].any():
            chosen[lowest[0]] = True
        if chosen[members].all():
            chosen[lowest[-1]] = False
    return chosen
