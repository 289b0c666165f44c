"""Runs of words as 64-bit numbers, for near-duplicates and contamination.

A word is a run of letters, digits and bytes beyond ASCII, lower-cased; what stands between words does not count. In
scripts without spaces (Chinese, Japanese, Korean) each character is a word. Everything is computed for many texts at
once in arrays: hashing word by word in Python would take longer than all that follows.
"""

from collections.abc import Sequence

import numpy as np

from lightbulb.data_prep import native

_LETTERS = np.zeros(256, dtype=bool)
_LETTERS[[*range(ord("0"), ord("9") + 1), *range(ord("a"), ord("z") + 1), ord("_")]] = True
_LETTERS[128:] = True
_WIDE_SCRIPTS = (0xE3, 0xED)  # first bytes, in UTF-8, of most of what is written without spaces

_generator = np.random.default_rng(20240913)
_BYTE_VALUES = _generator.integers(1, 1 << 64, 256, dtype=np.uint64)
_PLACES = _generator.integers(1, 1 << 64, 256, dtype=np.uint64) | np.uint64(1)
_ORDER = _generator.integers(1, 1 << 64, 256, dtype=np.uint64) | np.uint64(1)

MAX_WORDS = len(_ORDER)
"""Longest run of words."""


def shingles(texts: Sequence[str], words: int) -> tuple[np.ndarray, np.ndarray]:
    """Every run of ``words`` consecutive words of every text, hashed.

    A text of fewer words gives one number, of all its words; one without words gives none.

    Args:
        texts: any number.
        words: length of a run, up to :data:`MAX_WORDS`.

    Returns:
        hashes ``[runs]`` uint64, text after text, and offsets ``[texts + 1]`` int64 where each text's begin.
    """
    parts = [text.lower().encode("utf-8", "surrogatepass") for text in texts]
    begins = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    make = _in_arrays if native.library() is None else _natively
    return make(b"".join(parts), begins, words)


def _natively(data: bytes, begins: np.ndarray, words: int) -> tuple[np.ndarray, np.ndarray]:
    hashes = np.empty(len(data), dtype=np.uint64)
    scratch = np.empty(max(np.diff(begins), default=0), dtype=np.uint64)
    offsets = np.empty(len(begins), dtype=np.int64)
    tables = (_LETTERS, _BYTE_VALUES, _PLACES, _ORDER)
    native.function("shingle_texts")(data, begins, len(begins) - 1, words, *tables, scratch, hashes, offsets)
    return hashes[: offsets[-1]].copy(), offsets


def _in_arrays(data: bytes, begins: np.ndarray, words: int) -> tuple[np.ndarray, np.ndarray]:
    hashes, text_of_word = _words(np.frombuffer(data, dtype=np.uint8), begins)
    counts = np.bincount(text_of_word, minlength=len(begins) - 1)
    first_words = np.concatenate([[0], np.cumsum(counts)])
    runs = np.where(counts >= words, counts - words + 1, np.minimum(counts, 1))
    offsets = np.concatenate([[0], np.cumsum(runs)])
    # Each run's first word, then the words of the run one place after the other.
    first = np.arange(offsets[-1]) + np.repeat(first_words[:-1] - offsets[:-1], runs)
    length = np.minimum(np.repeat(counts, runs), words)
    result = np.zeros(offsets[-1], dtype=np.uint64)
    for place in range(words):
        has = place < length
        result[has] += hashes[first[has] + place] * _ORDER[place]
    return _mixed(result), offsets


def _words(data: np.ndarray, begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hash of each word, and the number of the text it stands in."""
    is_letter = _LETTERS[data]
    is_start = is_letter.copy()
    is_start[1:] &= ~is_letter[:-1]
    is_start |= (data >= _WIDE_SCRIPTS[0]) & (data <= _WIDE_SCRIPTS[1])
    inner = begins[(begins > 0) & (begins < len(data))]
    is_start[inner] |= is_letter[inner]
    starts = np.flatnonzero(is_start)
    if not len(starts):
        return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    letters = np.flatnonzero(is_letter)
    word_of_letter = np.cumsum(is_start)[letters] - 1
    place = (letters - starts[word_of_letter]) % len(_PLACES)
    values = _BYTE_VALUES[data[letters]] * _PLACES[place]
    hashes = np.add.reduceat(values, np.searchsorted(letters, starts))
    return _mixed(hashes), np.searchsorted(begins, starts, side="right") - 1


def _mixed(x: np.ndarray) -> np.ndarray:
    """Every bit of the input moves every bit of the output (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
