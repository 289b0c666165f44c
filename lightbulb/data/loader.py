"""Rows to batches, in an order that does not know how many processes read it.

A step takes the next samples of the run's endless sequence (:mod:`lightbulb.data.sequence`; it may end one epoch and
begin the next), and each data-parallel rank reads its own contiguous part of them. What has
to be remembered is how many were taken, with a mixture also how many of each group, and a run resumed on another number
of ranks goes on with the very next row. The batches of the next step are read in a thread while this one is computed.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightbulb.data.batches import BatchSizes, batch_sizes
from lightbulb.data.config import DataConfig, DataError, MixtureConfig
from lightbulb.data.corpus import Corpus
from lightbulb.data.mixture import domain_of, resolve
from lightbulb.data.sequence import Draw, SampleSequence
from lightbulb.data.shards import IGNORED_LABEL, PADDING_DOCUMENT
from lightbulb.data.soft_targets import DistilConfig, SoftTargetFolder
from lightbulb.nn.soft_targets import SoftTargets

PADDING_SAMPLE = -1


class Batch(NamedTuple):
    """One micro-batch: ``[batch, context_length]`` int64 each, ``[batch]`` the last.

    Attributes:
        tokens: inputs.
        labels: the token after each input; ``IGNORED_LABEL`` where there is none, or it does not count.
        document_ids: number of each input's document within its row, or None without ``document_mask``.
        sample_ids: place of each row in the endless sequence of epochs (held out: its number), whichever rank reads
            it; ``PADDING_SAMPLE`` where a batch has no row.
        groups: number of each row's group; ``PADDING_SAMPLE`` where a batch has no row.
        group_places: with a mixture, the place of each row in the sequence of its group.
        targets: distributions to learn from besides the labels, if the run has some.
    """

    tokens: Tensor
    labels: Tensor
    document_ids: Tensor | None
    sample_ids: Tensor
    groups: Tensor
    group_places: Tensor | None = None
    targets: SoftTargets | None = None


class _Step(NamedTuple):
    """This rank's batches of a step, and what is drawn of each group after it."""

    batches: list[Batch]
    drawn: np.ndarray


class TrainLoader:
    """This rank's part of every training batch.

    Args:
        data: the corpus.
        context_length: tokens per row less one.
        vocab_size: of the model.
        seed: draws the order of each epoch.
        global_batch_size: rows per step over all ranks; one size, or one for every step.
        micro_batch_size: rows per :class:`Batch`.
        data_rank: this process among the data-parallel ones.
        data_size: how many data-parallel processes there are.
        mixtures: each mixture of the run with the number of steps before it (``DataConfig.mixtures``); none for a
            run without.
        distil: soft targets of the rows.

    Attributes:
        samples_consumed: samples taken by all ranks.
        batch_sizes: rows of every step over all ranks.

    Raises:
        DataError: the batch sizes do not divide, the corpus is damaged or holds less than one batch, or a mixture
            names groups it does not have.
    """

    def __init__(
        self,
        data: DataConfig,
        context_length: int,
        vocab_size: int,
        seed: int,
        global_batch_size: int | BatchSizes,
        micro_batch_size: int,
        data_rank: int = 0,
        data_size: int = 1,
        mixtures: Sequence[tuple[int, MixtureConfig]] = (),
        distil: DistilConfig | None = None,
    ):
        self.batch_sizes = batch_sizes(global_batch_size)
        self.corpus = Corpus(data.path.expanduser(), "train", context_length, vocab_size)
        parts = data.part.of if data.part else 1
        for size in self.batch_sizes.distinct:
            if size % (micro_batch_size * data_size):
                raise DataError(
                    f"global_batch_size: {size} is not a multiple of micro_batch_size {micro_batch_size} x "
                    f"{data_size} data-parallel ranks; set it to a multiple of {micro_batch_size * data_size}"
                )
            if len(self.corpus) < size * parts:
                where = f" in each of {parts} parts" if parts > 1 else ""
                raise _too_few(self.corpus, f"global_batch_size={size} rows{where} are")
        self.data = data
        self._targets = SoftTargetFolder(distil, self.corpus) if distil else None
        self.seed = seed
        self.micro_batch_size = micro_batch_size
        self.samples_consumed = 0
        groups = self.corpus.groups
        stages = [(self.batch_sizes.samples(step), resolve(mixture, groups)) for step, mixture in mixtures]
        part = None if data.part is None else (data.part.number, data.part.of)
        self.sequence = SampleSequence(groups, seed, data.shuffle, stages, part)
        self._data_rank, self._data_size = data_rank, data_size
        self._drawn = (0, np.zeros(len(groups), dtype=np.int64))
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="batches of the next step")
        self._ahead: tuple[int, Future[_Step]] | None = None

    @property
    def epoch(self) -> float:
        """How many times the corpus has been read."""
        return self.samples_consumed / int(self.sequence.sizes.sum())

    @property
    def drawn(self) -> np.ndarray:
        """``[groups]``: samples taken of each group, in the order of ``corpus.groups``."""
        samples, drawn = self._drawn
        if samples != self.samples_consumed:
            drawn = self.sequence.plain_counts(self.samples_consumed)
            self._drawn = self.samples_consumed, drawn
        return drawn

    @property
    def group_epochs(self) -> dict[str, float]:
        """How many times each group has been read."""
        sizes = np.maximum(self.sequence.sizes, 1)  # a part may have no row of a small group
        return dict(zip(self.sequence.names, (self.drawn / sizes).tolist(), strict=True))

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch.

        Raises:
            OutOfRows: the caps of the mixture allow no such batch; nothing is taken.
            DataError: a shard is damaged.
        """
        first = self.samples_consumed
        if self._ahead is None or self._ahead[0] != first:
            self._read_ahead(first, self.drawn)
        assert self._ahead is not None
        batches, drawn = self._ahead[1].result()
        self.samples_consumed += self._size_at(first)
        self._drawn = self.samples_consumed, drawn
        self._read_ahead(self.samples_consumed, drawn)
        return batches

    def row_numbers(self, start: int, stop: int) -> np.ndarray:
        """Corpus rows at these places of the endless sequence of epochs of a run without a mixture."""
        return self.sequence.plain_rows(start, stop)

    def exhausted(self) -> list[str]:
        """Groups that the mixture of the next step leaves out because they have reached their caps."""
        return self.sequence.exhausted(self.samples_consumed, self.drawn)

    def check_enough(self, steps: int) -> None:
        """Whether the caps of the mixtures allow the run to reach so many steps, as far as that can be foreseen.

        Raises:
            OutOfRows: they do not.
        """
        self.sequence.check_enough(self.samples_consumed, self.batch_sizes.samples(steps), self.drawn)

    def close(self) -> None:
        """Read nothing more ahead."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; the same on every rank."""
        state = {"samples_consumed": self.samples_consumed, **self._identity()}
        if self.sequence.stages:
            state["plain_samples"] = self.sequence.plain_samples
            state["groups"] = dict(zip(self.sequence.names, self.drawn.tolist(), strict=True))
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the last row a checkpoint's run consumed.

        Raises:
            DataError: the state is of another corpus, tokenizer, seed or order, or of a run with a mixture.
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
        groups = state.get("groups")
        if groups is not None and not self.sequence.stages:
            raise DataError(
                "data.mixture: the checkpoint was trained with one, and without one the run could not go on without "
                "repeating rows; set data.mixture={} to draw all groups in proportion to tokens"
            )
        plain, drawn = consumed, None
        if groups is not None:
            plain, drawn = _checked_counts(state, self.sequence.names, consumed)
        self.sequence.plain_samples = plain if self.sequence.stages else 0
        self.samples_consumed = consumed
        self._drawn = consumed, self.sequence.plain_counts(consumed) if drawn is None else drawn
        self._ahead = None

    def _identity(self) -> dict[str, Any]:
        """Everything that decides which row stands at which place."""
        part = {"part": self.data.part.model_dump()} if self.data.part else {}
        return part | {
            "seed": self.seed,
            "shuffle": self.data.shuffle,
            "rows": len(self.corpus),
            "tokenizer_digest": self.corpus.tokenizer_digest,
            "corpus_digest": self.corpus.digest,
        }

    def _size_at(self, sample: int) -> int:
        """Rows of the step that begins with a sample, over all ranks."""
        return self.batch_sizes.of_step(self.batch_sizes.step_at(sample))

    def _read_ahead(self, first: int, drawn: np.ndarray) -> None:
        self._ahead = first, self._reader.submit(self._read, first, drawn)

    def _read(self, first: int, drawn: np.ndarray) -> _Step:
        """The step that begins with a sample; changes nothing but what is cached."""
        draw = self.sequence.draw(first, self._size_at(first), drawn)
        size, mask = self.micro_batch_size, self.data.document_mask
        share = self._size_at(first) // self._data_size
        starts = range(self._data_rank * share, (self._data_rank + 1) * share, size)
        parts = [(draw.part(i, i + size), np.arange(i, i + size) + first) for i in starts]
        batches = [_batch(self.corpus, part, numbers, size, mask) for part, numbers in parts]
        if self._targets is not None:
            soft = [self._targets.batch(part.rows, size) for part, _ in parts]
            batches = [batch._replace(targets=found) for batch, found in zip(batches, soft, strict=True)]
        return _Step(batches, drawn + np.bincount(draw.groups, minlength=len(drawn)))


def _checked_counts(state: dict[str, Any], names: Sequence[str], consumed: int) -> tuple[int, np.ndarray]:
    """Samples before the first mixture, and ``[groups]`` counts, of a checkpoint."""
    plain, groups = state.get("plain_samples", -1), state["groups"]
    if not isinstance(groups, dict) or set(groups) != set(names):
        raise DataError("data.groups: not those of the corpus in the checkpoint; use an earlier checkpoint")
    counts = [groups[name] for name in names]
    are_counts = all(isinstance(count, int) and count >= 0 for count in [plain, *counts])
    if not are_counts or sum(counts) != consumed or plain > consumed:
        raise DataError(f"data.groups: the counts in the checkpoint do not add up to {consumed}")
    return plain, np.array(counts, dtype=np.int64)


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

    Attributes:
        domains: names of the domains, by number.

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
        names = [domain_of(name) for name in self.corpus.groups]
        self.domains = sorted(set(names))
        rows = [group.rows for group in self.corpus.groups.values()]
        self._groups = np.repeat(np.arange(len(rows)), rows)[self.rows]
        self._domains = np.array([self.domains.index(name) for name in names])[self._groups]

    def __len__(self) -> int:
        return -(-len(self.rows) // (self.micro_batch_size * self._size))

    def __iter__(self) -> Iterator[Batch]:
        for step in range(len(self)):
            part = self._part(step)
            draw = Draw(self.rows[part], self._groups[part], None)
            yield _batch(self.corpus, draw, draw.rows, self.micro_batch_size, self.data.document_mask)

    def domains_of(self, step: int) -> tuple[list[int], np.ndarray]:
        """Numbers of the domains that the ranks' batches of a step hold together, and ``[batch]`` those of this rank's.

        -1 where the batch has no row.
        """
        everywhere = self._domains[step * self._size * self.micro_batch_size :][: self._size * self.micro_batch_size]
        own = self._domains[self._part(step)]
        return np.unique(everywhere).tolist(), np.pad(own, (0, self.micro_batch_size - len(own)), constant_values=-1)

    def _part(self, step: int) -> slice:
        """Where this rank's rows of a step are."""
        start = (step * self._size + self._rank) * self.micro_batch_size
        return slice(start, start + self.micro_batch_size)


def _batch(corpus: Corpus, draw: Draw, sample_ids: np.ndarray, size: int, document_mask: bool) -> Batch:
    """The samples as one batch of ``size``; rows that are missing hold no labels."""
    length = corpus.context_length + 1
    tokens = np.zeros((size, length), dtype=np.int64)
    documents = np.full((size, length), PADDING_DOCUMENT, dtype=np.int64)
    labels = np.full((size, corpus.context_length), IGNORED_LABEL, dtype=np.int64)
    for i, number in enumerate(draw.rows):
        row = corpus[int(number)]
        tokens[i], documents[i], labels[i] = row.tokens, row.document_ids, row.labels()
    return Batch(
        torch.from_numpy(tokens[:, :-1].copy()),
        torch.from_numpy(labels),
        torch.from_numpy(documents[:, :-1].copy()) if document_mask else None,
        torch.from_numpy(_padded(sample_ids, size)),
        torch.from_numpy(_padded(draw.groups, size)),
        None if draw.places is None else torch.from_numpy(draw.places),
    )


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    """``[size]``: the values, then ``PADDING_SAMPLE``."""
    padded = np.full(size, PADDING_SAMPLE, dtype=np.int64)
    padded[: len(values)] = values
    return padded


def _too_few(corpus: Corpus, wanted: str) -> DataError:
    return DataError(
        f"{corpus.path}: too few tokens for one batch: {corpus.split} has {corpus.num_tokens} tokens, "
        f"{len(corpus)} rows of {corpus.context_length}, and {wanted} needed; add documents or lower the sizes"
    )
