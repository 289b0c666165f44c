"""One global order of rows, whatever reads it; nothing lost or repeated over epochs, ranks and resumes."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightbulb.data.config import DataConfig, DataError
from lightbulb.data.loader import IGNORED_LABEL, PADDING_SAMPLE, Batch, HeldOut, TrainLoader
from lightbulb.data.tokenizer import Tokenizer

LENGTH, VOCAB = 16, 300


def loaders(data: DataConfig, size: int, global_batch: int = 8, seed: int = 0) -> list[TrainLoader]:
    return [TrainLoader(data, LENGTH, VOCAB, seed, global_batch, 2, rank, size) for rank in range(size)]


def global_step(ranks: list[TrainLoader]) -> torch.Tensor:
    """Tokens of the next global batch, laid together from all ranks."""
    return torch.cat([batch.tokens for rank in ranks for batch in rank.next_step()])


def test_batches_are_inputs_and_their_next_tokens(data: DataConfig) -> None:
    [loader] = loaders(data, 1)
    row = loader.corpus[int(loader.row_numbers(0, 1)[0])]
    batches = loader.next_step()
    assert [batch.tokens.shape for batch in batches] == [(2, LENGTH)] * 4
    assert batches[0].tokens.dtype == batches[0].labels.dtype == torch.int64
    assert batches[0].tokens[0].tolist() == row.tokens[:-1].tolist()
    assert batches[0].labels[0].tolist() == row.tokens[1:].tolist()
    assert batches[0].document_ids is None


def test_document_ids_come_with_the_mask(data: DataConfig) -> None:
    [loader] = loaders(data.model_copy(update={"document_mask": True}), 1)
    row = loader.corpus[int(loader.row_numbers(0, 1)[0])]
    documents = loader.next_step()[0].document_ids
    assert documents is not None and documents[0].tolist() == row.document_ids[:-1].tolist()


@pytest.mark.parametrize("size", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_ranks(data: DataConfig, size: int) -> None:
    alone, together = loaders(data, 1), loaders(data, size)
    for _ in range(5):
        assert torch.equal(global_step(alone), global_step(together))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_sample_ids_are_places_in_the_endless_sequence(data: DataConfig, size: int) -> None:
    ranks = loaders(data, size)
    rows = len(ranks[0].corpus)
    for step in range(2 * rows // 8):
        batches = [batch for rank in ranks for batch in rank.next_step()]
        ids = torch.cat([batch.sample_ids for batch in batches])
        assert ids.dtype == torch.int64 and ids.tolist() == list(range(8 * step, 8 * step + 8))


def test_every_epoch_reads_every_row_once_in_another_order(data: DataConfig) -> None:
    [loader] = loaders(data, 1)
    rows = len(loader.corpus)
    assert rows % 8, "an epoch should end inside a batch"
    order = loader.row_numbers(0, 2 * rows)
    assert sorted(order[:rows]) == sorted(order[rows:]) == list(range(rows))
    assert order[:rows].tolist() != order[rows:].tolist()
    taken: list[list[int]] = []
    while loader.samples_consumed < 2 * rows:
        taken += global_step([loader]).tolist()
    expected = [loader.corpus[int(row)].tokens[:-1].tolist() for row in order]
    assert taken[: 2 * rows] == expected


def test_order_without_shuffle_is_the_written_one(data: DataConfig) -> None:
    [loader] = loaders(data.model_copy(update={"shuffle": False}), 1)
    assert loader.row_numbers(0, 3).tolist() == [0, 1, 2]


def test_seed_changes_the_order_and_global_generators_do_not(data: DataConfig) -> None:
    first = loaders(data, 1)[0].row_numbers(0, 50)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert (loaders(data, 1)[0].row_numbers(0, 50) == first).all()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]
    assert (loaders(data, 1, seed=1)[0].row_numbers(0, 50) != first).any()


@pytest.mark.parametrize("steps", [0, 1, 37], ids=["start", "one", "second_epoch"])
@pytest.mark.parametrize(("saved_on", "resumed_on"), [(1, 2), (2, 4), (4, 1), (2, 2)])
def test_resume_on_other_ranks_goes_on_with_the_next_row(
    data: DataConfig, saved_on: int, resumed_on: int, steps: int
) -> None:
    whole, saved = loaders(data, 1), loaders(data, saved_on)
    for rank in saved:
        rank.samples_consumed = whole[0].samples_consumed = 8 * steps
    global_step(whole), global_step(saved)
    state = saved[0].state_dict()
    assert all(rank.state_dict() == state for rank in saved)
    resumed = loaders(data, resumed_on)
    for rank in resumed:
        rank.load_state_dict(state)
    for _ in range(3):
        assert torch.equal(global_step(whole), global_step(resumed))


def test_resume_with_another_batch_size_loses_nothing(data: DataConfig) -> None:
    [first] = loaders(data, 1)
    global_step([first])
    [second] = loaders(data, 1, global_batch=4)
    second.load_state_dict(first.state_dict())
    expected = global_step([first])
    assert torch.equal(torch.cat([global_step([second]), global_step([second])]), expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", 7), ("tokenizer_digest", "0" * 64), ("corpus_digest", "0" * 64), ("rows", 3), ("shuffle", False)],
)
def test_state_of_another_run_is_refused_with_both_values(data: DataConfig, key: str, value: Any) -> None:
    [loader] = loaders(data, 1)
    with pytest.raises(DataError, match=rf"data\.{key}: the checkpoint was trained with {value!r}, this run has"):
        loader.load_state_dict(loader.state_dict() | {key: value})
    with pytest.raises(DataError, match="samples_consumed: -1 in the checkpoint"):
        loader.load_state_dict(loader.state_dict() | {"samples_consumed": -1})
    assert loader.samples_consumed == 0


def test_batch_sizes_that_do_not_divide_are_refused(data: DataConfig) -> None:
    with pytest.raises(DataError, match=r"global_batch_size: 10 is not a multiple .* set it to a multiple of 8"):
        TrainLoader(data, LENGTH, VOCAB, 0, 10, 4, 0, 2)


def test_too_few_tokens_for_a_batch_are_counted(data: DataConfig) -> None:
    with pytest.raises(DataError, match=r"too few tokens for one batch: train has \d+ tokens, \d+ rows of 16, and"):
        TrainLoader(data, LENGTH, VOCAB, 0, 1 << 20, 1)


def test_damaged_shard_stops_the_step_that_needs_it(data: DataConfig) -> None:
    path = data.path / "train" / "poems" / "shard.00000.mds"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    [loader] = loaders(data, 1)
    with pytest.raises(DataError, match=r"poems/shard\.00000\.mds: damaged"):
        for _ in range(len(loader.corpus) // 8):
            loader.next_step()


def held_out(data: DataConfig, size: int = 1, **options: Any) -> list[list[Batch]]:
    return [list(HeldOut(data, LENGTH, VOCAB, 4, rank, size, **options)) for rank in range(size)]


def test_held_out_labels_restore_the_held_out_text(data: DataConfig, written_corpus: Path) -> None:
    [batches] = held_out(data)
    labels = torch.cat([batch.labels.flatten() for batch in batches])
    tokenizer = Tokenizer.load(data.path / "tokenizer.json")
    text = tokenizer.decode(labels[labels != IGNORED_LABEL].tolist())
    sources = written_corpus.parent
    documents = [path.read_text() for domain in ("plain", "poems") for path in sorted((sources / domain).iterdir())]
    kept = [document for document in documents if document[1:] in text]
    # The first token of each domain has no label, and with it goes the beginning of that domain's first document.
    assert 10 < len(kept) < 30 and len("".join(kept)) - len(text) < 20
    assert (labels == IGNORED_LABEL).any()


@pytest.mark.parametrize("size", [2, 3])
def test_held_out_rows_are_divided_over_ranks_without_repeats(data: DataConfig, size: int) -> None:
    [alone] = held_out(data)
    ranks = held_out(data, size)
    assert len({len(batches) for batches in ranks}) == 1
    labels = [torch.cat([rank[i].labels for rank in ranks]) for i in range(len(ranks[0]))]
    together, expected = torch.cat(labels), torch.cat([batch.labels for batch in alone])
    rows = len(HeldOut(data, LENGTH, VOCAB, 4).rows)
    assert torch.equal(together[:rows], expected[:rows])
    assert (together[rows:] == IGNORED_LABEL).all()
    ids = torch.cat([rank[i].sample_ids for i in range(len(ranks[0])) for rank in ranks])
    assert ids[:rows].tolist() == list(range(rows)) and (ids[rows:] == PADDING_SAMPLE).all()


def test_max_rows_are_spread_over_the_domains(data: DataConfig) -> None:
    reader = HeldOut(data, LENGTH, VOCAB, 4, max_rows=6)
    border = len(reader.corpus.domains["plain"])
    assert len(reader.rows) == 6 and len(reader) == 2
    assert (reader.rows < border).any() and (reader.rows >= border).any()
    assert sum(int((batch.labels[:, 0] != IGNORED_LABEL).sum()) for batch in reader) == 6


def test_corpus_without_held_out_rows_is_refused(data: DataConfig) -> None:
    manifest = data.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"held_out": {', '"held_out": {}, "x": {'))
    with pytest.raises(DataError, match="manifest"):
        HeldOut(data, LENGTH, VOCAB, 4)
