"""Evaluation text inside training text, found by runs of words they share (GPT-3, Brown et al. 2020,
arXiv:2005.14165, appendix C: 13 words)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightbulb.data_prep.config import DecontaminateConfig
from lightbulb.data_prep.documents import DROPPED_NAME, Documents, array_hash, batched
from lightbulb.data_prep.shingles import shingles
from lightbulb.data_prep.step import Step, Task

SHARES_NAME = "shares.npy"
"""Of each document that was dropped: which part of its runs stands in an evaluation text."""


class Contamination:
    """The runs of words of all evaluation texts.

    Args:
        texts: the evaluation texts.
        words: length of a run.
    """

    def __init__(self, texts: Iterable[str], words: int):
        self.words = words
        hashes = [shingles([text], words)[0] for text in texts]
        self._known = np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *hashes]))

    def __len__(self) -> int:
        return len(self._known)

    def share(self, texts: Sequence[str]) -> np.ndarray:
        """Which part of each text's runs stands in an evaluation text, ``[texts]`` from 0 to 1."""
        hashes, offsets = shingles(texts, self.words)
        if not len(self._known):
            return np.zeros(len(texts))
        places = np.searchsorted(self._known, hashes).clip(max=len(self._known) - 1)
        found = np.concatenate([[0], np.cumsum(self._known[places] == hashes)])
        return (found[offsets[1:]] - found[offsets[:-1]]) / np.maximum(np.diff(offsets), 1)


@dataclass(frozen=True)
class Contaminated(Step):
    """Drops documents that share too many runs of words with evaluation texts.

    Attributes:
        wanted: ``[documents]`` bool.
        evaluation: the evaluation texts.
    """

    documents: Documents
    wanted: np.ndarray
    evaluation: Documents
    config: DecontaminateConfig

    name = "contaminated"
    title = "Evaluation texts"
    version = 2

    def settings(self) -> Any:
        return [self.config.ngram, self.config.max_overlap]

    def parts(self) -> Sequence[Any]:
        keys, evaluation = self.documents.read.keys, self.evaluation.read.keys
        return [
            [key, array_hash(self.wanted[self.documents.of_task(task)]), evaluation] for task, key in enumerate(keys)
        ]

    def sizes(self) -> Sequence[int]:
        return [int(self.wanted[self.documents.of_task(task)].sum()) for task in range(len(self.documents.read.keys))]

    def run_task(self, rank: int, task: Task) -> dict[str, Any]:
        tasks = range(len(self.evaluation.read.folders))
        texts = (text for number in tasks for _, text in self.evaluation.texts(number))
        known, found = Contamination(texts, self.config.ngram), []
        for batch in batched(self.documents.texts(rank, self.wanted)):
            shares = known.share([text for _, text in batch])
            over = np.flatnonzero(shares > self.config.max_overlap)
            found += [(batch[i][0], round(float(shares[i]), 4)) for i in over]
            task.advance(len(batch))
        np.save(task.out / DROPPED_NAME, np.array([number for number, _ in found], dtype=np.int64))
        np.save(task.out / SHARES_NAME, np.array([share for _, share in found]))
        return {"runs": len(known), "dropped": len(found)}
