"""Near-duplicates by MinHash and locality-sensitive hashing.

The share of equal places in two signatures estimates the Jaccard similarity of the documents' shingles (Broder 1997).
Signatures are cut into bands; documents that agree in all of some band are compared (Leskovec et al., Mining of Massive
Datasets, ch. 3). Of each connected group the first document is kept. Memory: one signature per document, which may lie
in a memory-mapped file, and a few numbers.
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lightbulb.data_prep import native
from lightbulb.data_prep.shingles import shingles

PERMUTATIONS = 128
_SEED = 1
_MARGIN = 0.1  # candidates begin this much below the threshold, so that few pairs above it are missed
_BLOCK = 1 << 16

_generator = np.random.default_rng(_SEED)
# Multiply-shift hashing (Dietzfelbinger et al. 1997): the upper half of (factor * key + shift) modulo 2^64.
_FACTORS = _generator.integers(1, 1 << 64, PERMUTATIONS, dtype=np.uint64) | np.uint64(1)
_SHIFTS = _generator.integers(0, 1 << 64, PERMUTATIONS, dtype=np.uint64)


def signatures(texts: Sequence[str], words: int) -> tuple[np.ndarray, np.ndarray]:
    """MinHash signatures of the runs of ``words`` words.

    Returns:
        ``[texts, PERMUTATIONS]`` uint32, and ``[texts]`` bool: whether a text has any word at all.
    """
    hashes, offsets = shingles(texts, words)
    make = _in_arrays if native.library() is None else _natively
    return make(hashes, offsets), np.diff(offsets) > 0


def _natively(hashes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    rows = np.empty((len(offsets) - 1, PERMUTATIONS), dtype=np.uint32)
    native.function("minhash")(hashes, offsets, len(rows), _FACTORS, _SHIFTS, PERMUTATIONS, rows)
    return rows


def _in_arrays(hashes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    rows = np.full((len(offsets) - 1, PERMUTATIONS), 0xFFFFFFFF, dtype=np.uint32)
    filled = np.flatnonzero(np.diff(offsets))
    keys = hashes >> np.uint64(32)
    for place, (factor, shift) in enumerate(zip(_FACTORS, _SHIFTS, strict=True)):
        values = (keys * factor + shift) >> np.uint64(32)
        if len(filled):
            rows[filled, place] = np.minimum.reduceat(values, offsets[filled])
    return rows


def first_of_group(rows: np.ndarray, threshold: float) -> np.ndarray:
    """Number of the first document of each document's group of near-duplicates; its own where it is that or alone.

    Two documents are joined when their signatures agree in at least ``threshold`` of the places and they stand side by
    side, or one of them first, among the documents that share a band.

    Args:
        rows: ``[documents, PERMUTATIONS]`` from :func:`signatures`, of documents that have words.
        threshold: similarity from which documents are duplicates.
    """
    count = len(rows)
    numbers = np.arange(count)
    pairs = [np.empty((0, 2), dtype=np.int64)]
    size = rows_per_band(threshold)
    for begin in range(0, PERMUTATIONS - size + 1, size):
        candidates = _pairs(numbers, _keys(rows, numbers, slice(begin, begin + size)))
        pairs += [
            part[(rows[part[:, 0]] == rows[part[:, 1]]).mean(1) >= threshold]
            for part in np.split(candidates, range(_BLOCK, len(candidates), _BLOCK))
        ]
    joined = np.concatenate(pairs)
    edges = coo_array((np.ones(len(joined), dtype=bool), (joined[:, 0], joined[:, 1])), shape=(count, count))
    _, group = connected_components(edges, directed=False)
    _, first = np.unique(group, return_index=True)
    return first[group]


def rows_per_band(threshold: float) -> int:
    """The longest bands with which pairs well below the threshold still meet half of the time or more."""
    fitting = [1]
    for size in range(2, PERMUTATIONS + 1):
        if (size / PERMUTATIONS) ** (1 / size) <= threshold - _MARGIN:
            fitting.append(size)
    return fitting[-1]


def _keys(rows: np.ndarray, numbers: np.ndarray, band: slice) -> np.ndarray:
    """One number for each document's band."""
    generator = np.random.default_rng([_SEED, band.start])
    factors = generator.integers(1, 1 << 64, band.stop - band.start, dtype=np.uint64) | np.uint64(1)
    blocks = np.split(numbers, range(_BLOCK, len(numbers), _BLOCK))
    return np.concatenate([(rows[block, band].astype(np.uint64) * factors).sum(1) for block in blocks])


def _pairs(numbers: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Among documents of one key: each with the one before it, and with the first."""
    order = np.argsort(keys, kind="stable")
    keys, numbers = keys[order], numbers[order]
    is_same = np.concatenate([[False], keys[1:] == keys[:-1]])[: len(keys)]
    members = np.flatnonzero(is_same)
    leaders = np.maximum.accumulate(np.where(is_same, 0, np.arange(len(keys))))[members]
    far = leaders < members - 1
    before = np.stack([numbers[members - 1], numbers[members]], 1)
    return np.concatenate([before, np.stack([numbers[leaders[far]], numbers[members[far]]], 1)])
