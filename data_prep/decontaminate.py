"""Evaluation text inside training text, found by runs of words they share (GPT-3, Brown et al. 2020,
arXiv:2005.14165, appendix C: 13 words)."""

from collections.abc import Iterable, Sequence

import numpy as np

from lightbulb.data_prep.shingles import shingles


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
