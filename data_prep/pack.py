"""Documents to rows of ``context_length + 1`` tokens.

``concatenate`` lays the documents of a group end to end, each with its end-of-text id, and cuts the stream into rows
that overlap by one::

    stream   t0 t1 t2 t3 t4 t5 t6 ...
    row 0    t0 t1 t2 t3              inputs t0 t1 t2, labels t1 t2 t3
    row 1             t3 t4 t5 t6     inputs t3 t4 t5, labels t4 t5 t6

so that every token but the first is predicted exactly once. The last partial row of a training stream is dropped; a
held-out one is padded, because held-out text is evaluated to its last token. ``ordered`` is the same for documents in
a given order, such as that of in-context pretraining (Shi et al. 2023, arXiv:2310.10638); its rows are shuffled
afterwards, so that neighbours share a row while rows that follow each other have nothing in common. ``best_fit`` (Ding
et al. 2024, arXiv:2404.10830) cuts only documents longer than a row, into pieces that overlap by one, and packs whole
ones by best-fit-decreasing; what is left of a row is padding.

Nothing here touches a token: rows are lists of segments of documents.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PADDING_DOCUMENT = 0
"""Document number of padding in a row; documents are numbered from 1."""


class Rows(NamedTuple):
    """Segments of documents, row after row.

    Attributes:
        ends: ``[rows]``: where each row's segments end.
        document: ``[segments]``: place of the document in the order that was packed.
        start: ``[segments]``: first token, in the document.
        length: ``[segments]``: tokens.
    """

    ends: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """``[rows]``: segments of each row."""
        return np.diff(self.ends, prepend=0)


def num_rows(num_tokens: int, context_length: int, is_padded: bool) -> int:
    """Rows that a stream of this many tokens fills."""
    predicted = max(0, num_tokens - 1)
    return -(-predicted // context_length) if is_padded else predicted // context_length


def concatenate(lengths: np.ndarray, context_length: int, is_padded: bool) -> Rows:
    """Cut the documents' stream into rows; ``is_padded`` keeps a last row that is not full."""
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    first_token = np.arange(num_rows(total, context_length, is_padded), dtype=np.int64) * context_length
    stop_token = np.minimum(first_token + context_length + 1, total)
    first = np.searchsorted(ends, first_token, side="right")
    counts = np.searchsorted(ends, stop_token - 1, side="right") - first + 1
    document = np.repeat(first, counts) + _within(counts)
    begins = ends[document] - lengths[document]
    start = np.maximum(np.repeat(first_token, counts) - begins, 0)
    stop = np.minimum(np.repeat(stop_token, counts) - begins, lengths[document])
    return Rows(np.cumsum(counts), document, start, stop - start)


def best_fit(lengths: np.ndarray, context_length: int) -> Rows:
    """Pack whole documents by best-fit-decreasing; longer ones are cut into rows first."""
    size = context_length + 1
    # Of a document longer than a row, every piece begins with the token the one before ended with.
    pieces = np.maximum(1, -(-(lengths - 1) // context_length))
    document = np.repeat(np.arange(len(lengths)), pieces)
    start = _within(pieces) * context_length
    length = np.minimum(lengths[document] - start, size)
    order = np.argsort(-length, kind="stable")
    rows, count = _fit(length[order].tolist(), size)
    by_row = np.argsort(rows, kind="stable")
    chosen = order[by_row]
    ends = np.cumsum(np.bincount(rows, minlength=count))
    return Rows(ends, document[chosen], start[chosen], length[chosen])


def _fit(lengths: Sequence[int], size: int) -> tuple[np.ndarray, int]:
    """The row of each piece, longest first, and how many rows: the fullest row with room takes it."""
    rows = np.empty(len(lengths), dtype=np.int64)
    with_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # rising; those that some row has
    count = 0
    for i, length in enumerate(lengths):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, room = count, size
            count += 1
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                rooms.pop(place)
        rows[i] = row
        if left := room - length:
            stack = with_room.setdefault(left, [])
            if not stack:
                insort(rooms, left)
            stack.append(row)
    return rows, count


def shuffled(rows: Rows, seed: Sequence[int]) -> Rows:
    """The rows in an order drawn by seed."""
    order = np.random.default_rng(seed).permutation(len(rows.ends))
    counts = rows.counts
    begins = rows.ends - counts
    chosen = np.repeat(begins[order], counts[order]) + _within(counts[order])
    return Rows(np.cumsum(counts[order]), rows.document[chosen], rows.start[chosen], rows.length[chosen])


def _within(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... for each of the counts: ``[2, 3]`` gives 0 1 0 1 2."""
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts)
