"""Runs of words as numbers: what counts as a word, and one result however it is computed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightbulb.data_prep import native, shingles

TEXTS = st.lists(st.text(st.sampled_from("ab1_ ,.\n\0é日本ｱA"), max_size=40), max_size=6)


def per_text(texts: list[str], words: int) -> list[list[int]]:
    hashes, offsets = shingles.shingles(texts, words)
    return [hashes[start:stop].tolist() for start, stop in zip(offsets, offsets[1:], strict=False)]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("The quick, brown fox", "the  QUICK brown\nfox!"),
        ("x_1 y2", "X_1-Y2"),
        ("日本 語", "日本語"),
        ("naïve café", "NAÏVE (CAFÉ)"),
    ],
)
def test_case_and_what_stands_between_words_do_not_count(text: str, same: str) -> None:
    first, second = per_text([text, same], 2)
    assert first and first == second


def test_order_words_and_places_count() -> None:
    texts = ["a b", "b a", "ab", "a c", "aa b", "a bb"]
    found = per_text(texts, 2)
    assert len({tuple(hashes) for hashes in found}) == len(texts)


@pytest.mark.parametrize(("words", "runs"), [(1, 5), (2, 4), (5, 1), (6, 1), (200, 1)])
def test_number_of_runs(words: int, runs: int) -> None:
    assert [len(hashes) for hashes in per_text(["", "a b c d e", " .,"], words)] == [0, runs, 0]


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler here when LightBulb was installed")
@given(TEXTS, st.integers(1, 6))
def test_equality_of_arrays_and_native(texts: list[str], words: int) -> None:
    parts = [text.lower().encode() for text in texts]
    begins = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    one, other = (make(b"".join(parts), begins, words) for make in (shingles._natively, shingles._in_arrays))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@given(TEXTS, st.integers(1, 6))
def test_texts_do_not_see_each_other(texts: list[str], words: int) -> None:
    assert per_text(texts, words) == [per_text([text], words)[0] for text in texts]


def test_lone_surrogates_and_long_words_are_no_trouble() -> None:
    assert [len(hashes) for hashes in per_text(["\ud800 a", "x" * 100_000], 2)] == [1, 1]
