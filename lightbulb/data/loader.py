"""Rows to batches, in an order that does not know how many processes read it.

Every epoch visits all rows of all domains once, in an order drawn from the seed and the epoch's number alone. Step s
takes the next ``global_batch_size`` rows of that endless sequence (a step may end one epoch and begin the next), and
each data-parallel rank reads its own contiguous part of them. What has to be remembered is therefore one number, and
a run resumed on another number of ranks goes on with the very next row.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightbulb.data.config import DataConfig, DataError
from lightbulb.data.corpus import Corpus

IGNORED_LABEL = -100
PADDING_SAMPLE = -1
PADDING_DOCUMENT = 0  # as data_prep/tokenise.py writes it


class Batch(NamedTuple):
    """One micro-batch: ``[batch, context_length]`` int64 each, ``[batch]`` the last.

    Attributes:
        tokens: inputs.
        labels: the token after each input; ``IGNORED_LABEL`` where there is none.
        document_ids: number of each input's document within its row, or None without ``document_mask``.
        sample_ids: place of each row in the endless sequence of epochs (held out: its number), whichever rank reads
            it; ``PADDING_SAMPLE`` where a batch has no row.
    """

    tokens: Tensor
    labels: Tensor
    document_ids: Tensor | None
    sample_ids: Tensor


class TrainLoader:
    """This rank's part of every training batch.

    Args:
        data: the corpus.
        context_length: tokens per row less one.
        vocab_size: of the model.
        seed: draws the order of each epoch.
        global_batch_size: rows per step over all ranks.
        micro_batch_size: rows per :class:`Batch`.
        data_rank: this process among the data-parallel ones.
        data_size: how many data-parallel processes there are.

    Raises:
        DataError: the batch sizes do not divide, or the corpus is damaged or holds less than one batch.
    """

    def __init__(
        self,
        data: DataConfig,
        context_length: int,
        vocab_size: int,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int = 0,
        data_size: int = 1,
    ):
        if global_batch_size % (micro_batch_size * data_size):
            raise DataError(
                f"global_batch_size: {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} x "
                f"{data_size} data-parallel ranks; set it to a multiple of {micro_batch_size * data_size}"
            )
        self.corpus = Corpus(data.path.expanduser(), "train", context_length, vocab_size)
        if len(self.corpus) < global_batch_size:
            raise _too_few(self.corpus, f"global_batch_size={global_batch_size} rows are")
        self.data = data
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.samples_consumed = 0
        self._part = global_batch_size // data_size
        self._offset = data_rank * self._part
        self._orders: dict[int, np.ndarray] = {}

    @property
    def epoch(self) -> float:
        """How many times the corpus has been read."""
        return self.samples_consumed / len(self.corpus)

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch."""
        start = self.samples_consumed + self._offset
        places = np.arange(start, start + self._part)
        rows = self.row_numbers(start, start + self._part)
        size, mask = self.micro_batch_size, self.data.document_mask
        batches = [
            _batch(self.corpus, rows[i : i + size], places[i : i + size], size, mask)
            for i in range(0, self._part, size)
        ]
        self.samples_consumed += self.global_batch_size
        return batches

    def row_numbers(self, start: int, stop: int) -> np.ndarray:
        """Corpus rows at these places of the endless sequence of epochs."""
        epochs, places = np.divmod(np.arange(start, stop), len(self.corpus))
        return np.array([self._order(int(e))[p] for e, p in zip(epochs, places, strict=True)], dtype=np.int64)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; the same on every rank."""
        return {"samples_consumed": self.samples_consumed, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the last row a checkpoint's run consumed.

        Raises:
            DataError: the state is of another corpus, tokenizer, seed or order.
        """
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise DataError(
                    f"data.{key}: the checkpoint was trained with {state.get(key)!r}, this run has {value!r} "
                    f"({self.corpus.path}); resume with the data and seed it was started with"
                )
        consumed = state.get("samples_consumed")
        if not isinstance(consumed, int) or consumed < 0:
            raise DataError(f"data.samples_consumed: {consumed!r} in the checkpoint is not a count of rows")
        self.samples_consumed = consumed

    def _identity(self) -> dict[str, Any]:
        """Everything that decides which row stands at which place."""
        return {
            "seed": self.seed,
            "shuffle": self.data.shuffle,
            "rows": len(self.corpus),
            "tokenizer_digest": self.corpus.tokenizer_digest,
            "corpus_digest": self.corpus.digest,
        }

    def _order(self, epoch: int) -> np.ndarray:
        """The rows in the order of one epoch; a step touches two epochs at most."""
        if epoch not in self._orders:
            rows = np.arange(len(self.corpus))
            if self.data.shuffle:
                rows = np.random.default_rng([self.seed, epoch]).permutation(rows)
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1} | {epoch: rows}
        return self._orders[epoch]


class HeldOut:
    """Held-out rows in their order, divided over the data-parallel ranks; every rank gets as many batches.

    Args:
        data: the corpus.
        context_length: tokens per row less one.
        vocab_size: of the model.
        micro_batch_size: rows per :class:`Batch`.
        data_rank: this process among the data-parallel ones.
        data_size: how many data-parallel processes there are.
        max_rows: take so many rows only, evenly spaced, so that every domain keeps its share.

    Raises:
        DataError: the corpus is damaged or has no held-out rows.
    """

    def __init__(
        self,
        data: DataConfig,
        context_length: int,
        vocab_size: int,
        micro_batch_size: int,
        data_rank: int = 0,
        data_size: int = 1,
        max_rows: int | None = None,
    ):
        self.corpus = Corpus(data.path.expanduser(), "held_out", context_length, vocab_size)
        if len(self.corpus) == 0:
            raise _too_few(self.corpus, "one row is")
        self.data = data
        self.micro_batch_size = micro_batch_size
        self.rows = np.arange(len(self.corpus))
        if max_rows is not None and max_rows < len(self.rows):
            self.rows = np.arange(max_rows) * len(self.rows) // max_rows
        self._rank = data_rank
        self._size = data_size

    def __len__(self) -> int:
        return -(-len(self.rows) // (self.micro_batch_size * self._size))

    def __iter__(self) -> Iterator[Batch]:
        size = self.micro_batch_size
        for step in range(len(self)):
            start = (step * self._size + self._rank) * size
            rows = self.rows[start : start + size]
            yield _batch(self.corpus, rows, rows, size, self.data.document_mask)


def _batch(corpus: Corpus, rows: np.ndarray, sample_ids: np.ndarray, size: int, document_mask: bool) -> Batch:
    """The rows as one batch of ``size``; rows that are missing hold no labels."""
    length = corpus.context_length + 1
    tokens = np.zeros((size, length), dtype=np.int64)
    documents = np.full((size, length), PADDING_DOCUMENT, dtype=np.int64)
    for i, row in enumerate(rows):
        tokens[i], documents[i] = corpus[int(row)]
    ids = np.full(size, PADDING_SAMPLE, dtype=np.int64)
    ids[: len(rows)] = sample_ids
    labels = np.where(documents[:, 1:] == PADDING_DOCUMENT, IGNORED_LABEL, tokens[:, 1:])
    return Batch(
        torch.from_numpy(tokens[:, :-1].copy()),
        torch.from_numpy(labels),
        torch.from_numpy(documents[:, :-1].copy()) if document_mask else None,
        torch.from_numpy(ids),
    )


def _too_few(corpus: Corpus, wanted: str) -> DataError:
    return DataError(
        f"{corpus.path}: too few tokens for one batch: {corpus.split} has {corpus.num_tokens} tokens, "
        f"{len(corpus)} rows of {corpus.context_length}, and {wanted} needed; add documents or lower the sizes"
    )
