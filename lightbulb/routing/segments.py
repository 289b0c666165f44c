"""Segments of a sequence, cut at document starts: what a segment router decides for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightbulb.nn.merged import Places

NOWHERE = -2
"""The segment before any token: no segment follows it."""


@dataclass(frozen=True)
class Pieces:
    """Runs of tokens of one sample, one segment and one document, in order of sample, then of position.

    Attributes:
        places: sample and positions of each piece.
        index: ``[length, batch]``, the piece of each token.
        sample: ``[P]``.
        segment: ``[P]``.
        leads: ``[P]`` bool: the first piece of its sample.
        continues: ``[P]`` bool: leads, in the segment where the earlier tokens ended.
        follows: ``[P]`` bool: the piece before it (or what is known of earlier tokens) is the same document's part in
            the segment before.
    """

    places: Places
    index: Tensor
    sample: Tensor
    segment: Tensor
    leads: Tensor
    continues: Tensor
    follows: Tensor


def find_pieces(segment: Tensor, document: Tensor | None, before: Tensor) -> Pieces:
    """Cut where segment or document change.

    Args:
        segment: of each token, ``[length, batch]``.
        document: of each token, ``[length, batch]``, or None.
        before: ``[batch]``, the segment where earlier tokens ended, or NOWHERE.
    """
    document = torch.zeros_like(segment) if document is None else document
    starts = torch.ones_like(segment, dtype=torch.bool)
    starts[1:] = (segment[1:] != segment[:-1]) | (document[1:] != document[:-1])
    sample, start = starts.t().nonzero().unbind(1)
    segment, document = segment[start, sample], document[start, sample]
    leads = start == 0
    previous = torch.where(leads, before[sample], segment.roll(1))
    same = leads | (document == document.roll(1))
    return Pieces(
        places=_places(sample.tolist(), start.tolist(), len(starts)),
        index=starts.t().flatten().cumsum(0).sub_(1).view(starts.shape[1], -1).t(),
        sample=sample,
        segment=segment,
        leads=leads,
        continues=leads & (segment == previous),
        follows=same & (segment == previous + 1),
    )


def fill(values: Tensor, present: Tensor, before: Tensor) -> Tensor:
    """``values [length, batch]`` with those of fillers (``present`` false) replaced by the last present token's, or by
    ``before [batch]``."""
    rows = torch.arange(1, len(values) + 1, device=values.device)[:, None]
    last = torch.where(present, rows, 0).cummax(0).values
    return torch.cat((before[None], values)).gather(0, last)


def _places(samples: list[int], starts: list[int], length: int) -> Places:
    ends = [*starts[1:], 0]
    return [(b, slice(start, end or length)) for b, start, end in zip(samples, starts, ends, strict=True)]
