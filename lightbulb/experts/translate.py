"""Distributions of a model with another tokenizer, in the student's tokens.

FuseLLM (Wan et al. 2024, arXiv:2401.10491) aligns two tokenizations of a text by a minimum edit distance over their
tokens' letters. Tokenizers here give back every byte of a text, so where each token begins is known and nothing has to
be guessed: two tokens are a pair when they begin at the same byte. As there, a pair is used where the source's token is
the student's in its vocabulary; elsewhere (one token here, two there) there is no target, and the text alone teaches.

The map of vocabularies is FuseLLM's: a token to the one with the same bytes, else to the one at the least edit distance
(Levenshtein 1966), if they have anything in common.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightbulb.data.tokenizer import Tokenizer

_CONTINUATION = range(0x80, 0xC0)
_LONGEST = 32
"""Bytes of a token that are compared."""
_UNKNOWN, _NONE = -2, -1


class Alignment(NamedTuple):
    """A row in the source's tokens, and which of the student's tokens are which of its own.

    Attributes:
        ids: the source's tokens.
        ours: places of the student's tokens that have a partner.
        theirs: the partners' places.
    """

    ids: list[int]
    ours: list[int]
    theirs: list[int]


class Translation:
    """From a source's tokens to the student's.

    Args:
        source: tokenizer of the source.
        student: tokenizer of the rows.
    """

    def __init__(self, source: Tokenizer, student: Tokenizer):
        self.source, self.student = source, student
        self._source_bytes, self._student_bytes = _pieces(source), _pieces(student)
        known = {piece: i for i, piece in reversed(list(enumerate(self._student_bytes))) if piece}
        exact = [known.get(piece, _UNKNOWN) if piece else _NONE for piece in self._source_bytes]
        exact[source.eos_id] = student.eos_id
        self._map = np.array(exact)
        self._letters, self._lengths = _table(self._student_bytes)

    def align(self, row: Sequence[int]) -> Alignment:
        """A row of the student's tokens as the source would have it. Ends of documents stay where they are."""
        ids: list[int] = []
        ours: list[int] = []
        theirs: list[int] = []
        start = 0
        while start < len(row):
            stop = next((i for i in range(start, len(row)) if row[i] == self.student.eos_id), len(row))
            document = self._align_text(row[start:stop])
            ours += [start + i for i in document.ours]
            theirs += [len(ids) + i for i in document.theirs]
            ids += document.ids
            if stop < len(row):
                ours.append(stop)
                theirs.append(len(ids))
                ids.append(self.source.eos_id)
            start = stop + 1
        return Alignment(ids, ours, theirs)

    def translated(self, ids: Tensor) -> Tensor:
        """The student's tokens for the source's, of any shape; -1 where there is none, as for rows of a model's
        vocabulary that its tokenizer does not use."""
        is_used, ids = ids < len(self._map), ids.clamp(max=len(self._map) - 1)
        for unknown in np.unique(ids[torch.from_numpy(self._map)[ids] == _UNKNOWN].numpy()):
            self._map[unknown] = self._nearest(self._source_bytes[unknown])
        return torch.from_numpy(self._map)[ids].masked_fill(~is_used, _NONE)

    def _align_text(self, row: Sequence[int]) -> Alignment:
        """A part of one document, which may begin and end within a letter: those bytes are left out."""
        text = self.student.decode_bytes(row)
        first = next((i for i, byte in enumerate(text) if byte not in _CONTINUATION), len(text))
        whole = text[first:].decode("utf-8", errors="ignore")
        (ids,) = self.source.encode_batch([whole]) if whole else ([],)
        added = len(self.source.decode_bytes(ids)) - len(whole.encode())  # a space that some put before every text
        ours = _starts([self._student_bytes[i] for i in row])
        theirs = _starts([self._source_bytes[i] for i in ids])
        place = {first + max(0, start - added): i for i, start in enumerate(theirs)}
        partners = self.translated(torch.tensor(ids, dtype=torch.int64)).tolist()
        pairs = [
            (i, place[start])
            for i, start in enumerate(ours)
            if start in place and partners[place[start]] == row[i] and self._student_bytes[row[i]]
        ]
        return Alignment(ids, [i for i, _ in pairs], [j for _, j in pairs])

    def _nearest(self, piece: bytes) -> int:
        """The student's token at the least edit distance, the first of several; -1 where nothing is in common."""
        distances = edit_distances(piece[:_LONGEST], self._letters, self._lengths)
        distances[self._lengths == 0] = 1 << 30
        nearest = int(distances.argmin())
        return nearest if distances[nearest] < max(len(piece), self._lengths[nearest]) else _NONE


def has_same_vocabulary(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether every id stands for the same bytes in both."""
    return one.eos_id == other.eos_id and _pieces(one) == _pieces(other)


def edit_distances(piece: bytes, letters: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Insertions, deletions and changes of a byte from a piece to each of many ``[pieces]``.

    Args:
        piece: to begin with.
        letters: ``[pieces, longest]`` bytes of the many, padded.
        lengths: ``[pieces]`` of them.
    """
    row = np.broadcast_to(np.arange(letters.shape[1] + 1), (len(letters), letters.shape[1] + 1)).copy()
    for i, byte in enumerate(piece, 1):
        before, row[:, 0] = row.copy(), i
        changed = before[:, :-1] + (letters != byte)
        for j in range(1, row.shape[1]):
            row[:, j] = np.minimum(np.minimum(before[:, j], row[:, j - 1]) + 1, changed[:, j - 1])
    return row[np.arange(len(letters)), lengths]


def _pieces(tokenizer: Tokenizer) -> list[bytes]:
    return [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]


def _table(pieces: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([min(len(piece), _LONGEST) for piece in pieces])
    letters = np.zeros((len(pieces), int(lengths.max(initial=1))), dtype=np.int16) - 1
    for number, piece in enumerate(pieces):
        letters[number, : lengths[number]] = list(piece[:_LONGEST])
    return letters, lengths


def _starts(pieces: Sequence[bytes]) -> list[int]:
    return np.cumsum([0, *map(len, pieces)])[:-1].tolist()
