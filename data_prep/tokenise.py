"""Documents to rows of tokens.

Each document is followed by the end-of-text id, the documents of one domain and split are laid end to end, and the
stream is cut into rows of ``context_length + 1`` tokens that overlap by one::

    stream   t0 t1 t2 t3 t4 t5 t6 ...
    row 0    t0 t1 t2 t3              inputs t0 t1 t2, labels t1 t2 t3
    row 1             t3 t4 t5 t6     inputs t3 t4 t5, labels t4 t5 t6

so that every token but the first is predicted exactly once. Beside each token stands the number of its document in
the row, from 1; number 0 marks the padding that completes the last held-out row, which is no one's label. The last
partial row of a training stream is dropped.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightbulb.data.tokenizer import Tokenizer
from lightbulb.data_prep.split import Spool
from lightbulb.folder import explained

PADDING_DOCUMENT = 0
BATCH_CHARS = 1 << 22
PACK_TOKENS = 1 << 20


class Row(NamedTuple):
    """One context: ``[context_length + 1]`` token ids and the number of each token's document in the row."""

    tokens: np.ndarray
    document_ids: np.ndarray


class TokenFile:
    """The tokens of a group of documents on disk, in the order they were added."""

    def __init__(self, folder: Path, name: str, dtype: str):
        self.tokens = folder / f"{name}.tokens"
        self.lengths = folder / f"{name}.lengths"
        self.dtype = dtype
        self.num_documents = 0
        self.num_tokens = 0

    def append(self, documents: Sequence[list[int]]) -> None:
        """Add documents, each with its end-of-text id."""
        with explained(self.tokens), self.tokens.open("ab") as tokens, self.lengths.open("ab") as lengths:
            for ids in documents:
                np.array(ids, dtype=self.dtype).tofile(tokens)
            np.array([len(ids) for ids in documents], dtype=np.int64).tofile(lengths)
        self.num_documents += len(documents)
        self.num_tokens += sum(len(ids) for ids in documents)


def read_documents(tokens: Path, lengths: Path, dtype: str, shuffle_seed: Sequence[int] | None) -> Iterator[np.ndarray]:
    """The documents of a :class:`TokenFile`, in the order of the file or shuffled."""
    sizes = np.fromfile(lengths, dtype=np.int64)
    ends = np.cumsum(sizes)
    order = np.arange(len(sizes))
    if shuffle_seed is not None:
        order = np.random.default_rng(shuffle_seed).permutation(order)
    mapped = np.memmap(tokens, dtype=dtype, mode="r")
    for i in order:
        yield mapped[ends[i] - sizes[i] : ends[i]]


def token_dtype(vocab_size: int) -> str:
    """The smallest of uint16 and uint32 that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def num_rows(num_tokens: int, context_length: int, is_padded: bool) -> int:
    """Rows that a stream of this many tokens fills."""
    predicted = max(0, num_tokens - 1)
    return -(-predicted // context_length) if is_padded else predicted // context_length


def tokenise(
    spool: Spool,
    tokenizer: Tokenizer,
    group_of: np.ndarray,
    groups: Sequence[TokenFile],
    progress: Callable[[int], None],
) -> None:
    """Append every document of the spool to its group's file; ``progress`` gets the number of documents done."""
    done = 0
    for batch in _batches(spool.texts()):
        encoded = [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(batch)]
        members = group_of[done : done + len(batch)]
        for group in np.unique(members):
            groups[group].append([encoded[i] for i in np.flatnonzero(members == group)])
        done += len(batch)
        progress(len(batch))


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """The texts in lists of a few million characters."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    yield batch


def pack(documents: Iterator[np.ndarray], context_length: int, pad_with: int | None) -> Iterator[Row]:
    """Cut the documents' stream into rows.

    Args:
        documents: token ids of each document, its end-of-text id included.
        context_length: tokens per row less one.
        pad_with: id that completes the last row, or None to drop a partial last row.
    """
    tokens = np.empty(0, dtype=np.int64)
    numbers = np.empty(0, dtype=np.int64)
    for tokens, numbers in _blocks(documents, context_length):
        for start in range(0, len(tokens) - context_length, context_length):
            yield _row(tokens, numbers, start, context_length)
    used = max(0, (len(tokens) - 1) // context_length * context_length)
    rest, rest_numbers = tokens[used:], numbers[used:]
    # A rest of one token has no label left: it was the label of the row before.
    if pad_with is not None and len(rest) > 1:
        missing = context_length + 1 - len(rest)
        row = _row(rest, rest_numbers, 0, context_length)
        yield Row(
            np.concatenate([row.tokens, np.full(missing, pad_with)]),
            np.concatenate([row.document_ids, np.full(missing, PADDING_DOCUMENT)]),
        )


def _row(tokens: np.ndarray, numbers: np.ndarray, start: int, context_length: int) -> Row:
    window = slice(start, start + context_length + 1)
    return Row(tokens[window], numbers[window] - numbers[start] + 1)


def _blocks(documents: Iterator[np.ndarray], context_length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The stream in large blocks of tokens and document numbers; each begins where the last whole row before ended."""
    pieces: list[np.ndarray] = []
    numbers: list[np.ndarray] = []
    size = 0
    for number, document in enumerate(documents):
        pieces.append(np.asarray(document, dtype=np.int64))
        numbers.append(np.full(len(document), number, dtype=np.int64))
        size += len(document)
        if size > max(PACK_TOKENS, context_length):
            block, block_numbers = np.concatenate(pieces), np.concatenate(numbers)
            yield block, block_numbers
            used = (size - 1) // context_length * context_length
            pieces, numbers, size = [block[used:]], [block_numbers[used:]], size - used
    if pieces:
        yield np.concatenate(pieces), np.concatenate(numbers)
