"""Near-duplicates: signatures estimate similarity, planted copies are found, nothing else is."""

import random

import numpy as np
import pytest

from lightbulb.data_prep import minhash, native
from lightbulb.data_prep.shingles import shingles

WORDS = [f"word{i}" for i in range(2000)]


def text(rng: random.Random, length: int = 200) -> str:
    return " ".join(rng.choices(WORDS, k=length))


def changed(rng: random.Random, original: str, share: float) -> str:
    words = original.split()
    for place in rng.sample(range(len(words)), round(share * len(words))):
        words[place] = "other"
    return " ".join(words)


def jaccard(a: str, b: str, words: int) -> float:
    one, other = (set(shingles([t], words)[0].tolist()) for t in (a, b))
    return len(one & other) / len(one | other)


def test_agreement_of_signatures_estimates_similarity() -> None:
    rng = random.Random(0)
    originals = [text(rng) for _ in range(200)]
    copies = [changed(rng, original, 0.02) for original in originals]
    rows, has_words = minhash.signatures([*originals, *copies], 5)
    estimates = (rows[:200] == rows[200:]).mean(1)
    exact = [jaccard(a, b, 5) for a, b in zip(originals, copies, strict=True)]
    assert has_words.all()
    # standard deviation of one estimate: sqrt(0.8 * 0.2 / 128) = 0.035
    assert abs(np.mean(estimates - exact)) < 0.01 and np.std(estimates - exact) < 0.06


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler here when LightBulb was installed")
@pytest.mark.parametrize("words", [1, 5])
def test_equality_of_arrays_and_native(words: int) -> None:
    rng = random.Random(1)
    texts = ["", *(text(rng, rng.randrange(1, 50)) for _ in range(30)), "", "!"]
    hashes, offsets = shingles(texts, words)
    assert np.array_equal(minhash._natively(hashes, offsets), minhash._in_arrays(hashes, offsets))


@pytest.mark.parametrize("threshold", [0.6, 0.8, 0.9])
def test_planted_duplicates_are_found_and_nothing_else(threshold: float) -> None:
    rng = random.Random(2)
    originals = [text(rng) for _ in range(150)]
    near = [changed(rng, original, 0.005) for original in originals[:50]]  # similarity about 0.95
    unlike = [changed(rng, original, 0.3) for original in originals[50:100]]  # about 0.1
    first = minhash.first_of_group(minhash.signatures([*originals, *near, *unlike], 5)[0], threshold)
    assert first.tolist() == [*range(150), *range(50), *range(200, 250)]


def test_exact_copies_and_empty_texts() -> None:
    rows, has_words = minhash.signatures(["a b c", "", "a b c", "!", "", "c b a", "A, B. C?"], 3)
    assert has_words.tolist() == [True, False, True, False, False, True, True]
    assert minhash.first_of_group(rows[has_words], 0.8).tolist() == [0, 0, 2, 0]


def test_no_documents() -> None:
    assert minhash.first_of_group(minhash.signatures([], 5)[0], 0.8).tolist() == []


def test_many_copies_of_one_document_are_one_group() -> None:
    rng = random.Random(3)
    original = text(rng)
    texts = [original, text(rng), *(changed(rng, original, 0.01) for _ in range(40))]
    first = minhash.first_of_group(minhash.signatures(texts, 5)[0], 0.75)
    assert first.tolist() == [0, 1] + [0] * 40
