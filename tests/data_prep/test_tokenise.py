"""Packing: every token but the first is predicted exactly once, and padding is marked."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lightbulb.data.tokenizer import Tokenizer
from lightbulb.data_prep import tokenise as tokenise_module
from lightbulb.data_prep.read import Document
from lightbulb.data_prep.split import Spool
from lightbulb.data_prep.tokenise import TokenFile, num_rows, pack, read_documents, token_dtype, tokenise


def documents_of(lengths: list[int]) -> Iterator[np.ndarray]:
    """Documents whose tokens count up over the whole stream from 1."""
    first = 1
    for length in lengths:
        yield np.arange(first, first + length)
        first += length


@pytest.mark.parametrize("block", [1, 50, 1 << 20], ids=lambda size: f"block{size}")
@pytest.mark.parametrize("lengths", [[1], [4, 1, 9], [5] * 20, [100, 1, 1, 3], [9], [8], [1] * 9], ids=str)
def test_labels_are_the_stream_without_its_first_token(
    lengths: list[int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenise_module, "PACK_TOKENS", block)
    total = sum(lengths)
    rows = list(pack(documents_of(lengths), 4, pad_with=0))
    labels = np.concatenate([row.tokens[1:][row.document_ids[1:] > 0] for row in rows]) if rows else np.array([])
    assert labels.tolist() == list(range(2, total + 1))
    assert len(rows) == num_rows(total, 4, is_padded=True)
    whole = list(pack(documents_of(lengths), 4, pad_with=None))
    assert len(whole) == num_rows(total, 4, is_padded=False)
    for row, padded in zip(whole, rows, strict=False):
        assert (row.tokens == padded.tokens).all() and (row.document_ids == padded.document_ids).all()


def test_document_numbers_begin_at_one_in_each_row() -> None:
    rows = list(pack(documents_of([2, 3, 6]), 4, pad_with=0))
    assert [row.tokens.tolist() for row in rows] == [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9], [9, 10, 11, 0, 0]]
    assert [row.document_ids.tolist() for row in rows] == [[1, 1, 2, 2, 2], [1, 2, 2, 2, 2], [1, 1, 1, 0, 0]]


def test_documents_go_to_their_group_each_with_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise_module, "BATCH_CHARS", 10)
    texts = [f"document number {i}\n" for i in range(7)]
    tokenizer = Tokenizer.train(texts, 300)
    with Spool(tmp_path / "texts") as spool:
        for i, text in enumerate(texts):
            spool.add(0, Document(str(i), text))
    groups = [TokenFile(tmp_path, name, "uint16") for name in "ab"]
    done: list[int] = []
    tokenise(spool, tokenizer, np.arange(7) % 2, groups, done.append)
    assert sum(done) == 7 and [group.num_documents for group in groups] == [4, 3]
    for number, group in enumerate(groups):
        read = list(read_documents(group.tokens, group.lengths, group.dtype, None))
        assert all(ids[-1] == tokenizer.eos_id for ids in read)
        assert [tokenizer.decode(ids.tolist()) for ids in read] == texts[number::2]
        assert group.num_tokens == sum(len(ids) for ids in read)


def test_shuffling_is_a_permutation_given_by_its_seed(tmp_path: Path) -> None:
    group = TokenFile(tmp_path, "a", "uint16")
    group.append([[i] * (i % 3 + 1) for i in range(50)])
    read = [
        [int(ids[0]) for ids in read_documents(group.tokens, group.lengths, group.dtype, seed)]
        for seed in (None, (0, 1), (0, 1), (0, 2))
    ]
    assert read[0] == sorted(read[1]) == list(range(50))
    assert read[1] == read[2] != read[3]


def test_ids_take_the_smallest_type_that_holds_them() -> None:
    assert token_dtype(1 << 16) == "uint16"
    assert token_dtype((1 << 16) + 1) == "uint32"
