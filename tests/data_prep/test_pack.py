"""Packing: every token but a document's first is predicted exactly once, and nothing is lost that need not be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightbulb.data_prep.pack import Rows, best_fit, concatenate, num_rows, shuffled

LENGTHS = [[1], [4, 1, 9], [5] * 20, [100, 1, 1, 3], [9], [8], [1] * 9]
any_lengths = st.lists(st.integers(1, 40), max_size=60)
any_context = st.integers(2, 20)


def tokens_of(rows: Rows, lengths: list[int]) -> list[list[tuple[int, int]]]:
    """Each row's tokens as (document, place in it)."""
    assert np.all(rows.start + rows.length <= np.array(lengths, dtype=int)[rows.document])
    segments = [[(d, s + i) for i in range(n)] for d, s, n in zip(rows.document, rows.start, rows.length, strict=True)]
    bounds = zip(rows.ends - rows.counts, rows.ends, strict=True)
    return [[token for segment in segments[a:b] for token in segment] for a, b in bounds]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_labels_are_the_stream_without_its_first_token(lengths: list[int]) -> None:
    stream = [(d, i) for d, n in enumerate(lengths) for i in range(n)]
    rows = tokens_of(concatenate(np.array(lengths), 4, is_padded=True), lengths)
    assert [token for row in rows for token in row[1:]] == stream[1:]
    assert len(rows) == num_rows(len(stream), 4, is_padded=True) and all(len(row) == 5 for row in rows[:-1])
    whole = tokens_of(concatenate(np.array(lengths), 4, is_padded=False), lengths)
    assert len(whole) == num_rows(len(stream), 4, is_padded=False)
    assert whole == [row for row in rows if len(row) == 5]


def test_rows_by_hand() -> None:
    rows = concatenate(np.array([2, 3, 6]), 4, is_padded=True)
    assert rows.counts.tolist() == [2, 2, 1]
    assert rows.document.tolist() == [0, 1, 1, 2, 2]
    assert rows.start.tolist() == [0, 0, 2, 0, 3]
    assert rows.length.tolist() == [2, 3, 1, 4, 3]


@given(lengths=any_lengths, context_length=any_context)
def test_best_fit_cuts_only_what_is_longer_than_a_row(lengths: list[int], context_length: int) -> None:
    rows = best_fit(np.array(lengths, dtype=int), context_length)
    contents = tokens_of(rows, lengths)
    assert all(0 < len(row) <= context_length + 1 for row in contents)
    labels: list[tuple[int, int]] = []
    for document, start, length in zip(rows.document, rows.start, rows.length, strict=True):
        assert length == lengths[document] or lengths[document] > context_length + 1
        labels += [(document, start + i) for i in range(start > 0, length)]
    assert sorted(labels) == [(d, i) for d, n in enumerate(lengths) for i in range(n)]
    # No two rows would fit into one.
    sizes = sorted(map(len, contents))
    assert len(sizes) < 2 or sizes[0] + sizes[1] > context_length + 1


@given(lengths=any_lengths, context_length=any_context, seed=st.integers(0, 5))
def test_shuffling_moves_whole_rows(lengths: list[int], context_length: int, seed: int) -> None:
    rows = concatenate(np.array(lengths, dtype=int), context_length, is_padded=True)
    moved = shuffled(rows, (seed, 1))
    assert sorted(tokens_of(moved, lengths)) == sorted(tokens_of(rows, lengths))
    assert all((a == b).all() for a, b in zip(moved, shuffled(rows, (seed, 1)), strict=True))


def test_shuffling_depends_on_its_seed() -> None:
    rows = concatenate(np.full(100, 9), 4, is_padded=False)
    assert shuffled(rows, (0, 1)).start.tolist() != shuffled(rows, (0, 2)).start.tolist()
