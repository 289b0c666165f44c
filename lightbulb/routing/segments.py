"""Segments of a sequence, cut at document starts: what a segment router decides for."""

from dataclasses import dataclass

import torch
from torch import Tensor

NOWHERE = -2
"""The segment before any token: no segment follows it."""


@dataclass(frozen=True)
class Pieces:
    """Runs of tokens of one sample, one segment and one document, in order of sample, then of position.

    Attributes:
        counts: tokens of each piece.
        index: ``[batch, length]``, the piece of each token.
        sample: ``[P]``.
        segment: ``[P]``.
        leads: ``[P]`` bool: the first piece of its sample.
        continues: ``[P]`` bool: leads, in the segment where the earlier tokens ended.
        follows: ``[P]`` bool: the piece before it (or what is known of earlier tokens) is the same document's part in
            the segment before.
    """

    counts: list[int]
    index: Tensor
    sample: Tensor
    segment: Tensor
    leads: Tensor
    continues: Tensor
    follows: Tensor


def find_pieces(segment: Tensor, document: Tensor | None, before: Tensor) -> Pieces:
    """Cut where segment or document change.

    Args:
        segment: of each token, ``[batch, length]``.
        document: of each token, ``[batch, length]``, or None.
        before: ``[batch]``, the segment where earlier tokens ended, or NOWHERE.
    """
    document = torch.zeros_like(segment) if document is None else document
    starts = torch.ones_like(segment, dtype=torch.bool)
    starts[:, 1:] = (segment[:, 1:] != segment[:, :-1]) | (document[:, 1:] != document[:, :-1])
    sample, start = starts.nonzero().unbind(1)
    ends = [*starts.flatten().nonzero()[1:, 0].tolist(), starts.numel()]
    segment, document = segment[sample, start], document[sample, start]
    leads = start == 0
    previous = torch.where(leads, before[sample], segment.roll(1))
    same = leads | (document == document.roll(1))
    return Pieces(
        counts=[end - begin for begin, end in zip([0, *ends], ends, strict=False)],
        index=starts.flatten().cumsum(0).sub_(1).view_as(starts),
        sample=sample,
        segment=segment,
        leads=leads,
        continues=leads & (segment == previous),
        follows=same & (segment == previous + 1),
    )


def fill(values: Tensor, present: Tensor, before: Tensor) -> Tensor:
    """``values [batch, length]`` with those of fillers (``present`` false) replaced by the last present token's, or by
    ``before [batch]``."""
    columns = torch.arange(1, values.shape[1] + 1, device=values.device)
    last = torch.where(present, columns, 0).cummax(1).values
    return torch.cat((before[:, None], values), 1).gather(1, last)


def sum_pieces(rows: Tensor, counts: list[int]) -> Tensor:
    """``[R, ...]`` to ``[P, ...]``: the sum of each piece's rows."""
    if counts.count(counts[0]) == len(counts):
        return rows.unflatten(0, (len(counts), -1)).sum(1)
    return torch.stack([part.sum(0) for part in rows.split(counts)])
