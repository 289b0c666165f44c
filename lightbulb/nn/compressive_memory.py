"""The memory of Infini-attention: what a head keeps of all earlier segments, in one matrix.

Munkhdalai et al. 2024, arXiv:2404.07143. With ``f(x) = elu(x) + 1``, a memory holds ``M = sum f(k)^T v`` and
``z = sum f(k)``, here as one matrix ``[M, z]`` of ``width + 1`` columns (a value with a one behind it), and a query
reads ``f(q) M / f(q) z``: linear attention (Katharopoulos et al. 2020, arXiv:2006.16236) over everything written. All
of it is float32, or float64 for float64 inputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import elu, pad


class Reset(NamedTuple):
    """Where documents start and end, segment by segment.

    A segment reads what earlier segments wrote of the document that reaches into it, and only this document's tokens
    read. It writes its last document's tokens only, to a memory emptied if that document began in it. So no token
    reads another document, at the price that the first, part segment of a document reads nothing.

    Attributes:
        reads: ``[batch, segments, length]`` bool: the token's document began before the segment.
        writes: ``[batch, segments, length]`` bool: the token is of the segment's last document.
        last: ``[batch, segments]`` first position of the segment's last document.
        keeps: ``[batch, segments]`` bool: that document began before the segment.
    """

    reads: Tensor
    writes: Tensor
    last: Tensor
    keeps: Tensor


def resets(document_start: Tensor, segment_length: int) -> Reset:
    """For positions whose documents start at ``document_start [batch, length]``, ``length`` whole segments."""
    start = document_start.unflatten(1, (-1, segment_length))
    first = torch.arange(start.shape[1], device=start.device) * segment_length
    last = start[:, :, -1]
    return Reset(start < first[:, None], start == last[..., None], last, last < first)


def features(x: Tensor) -> Tensor:
    """``elu(x) + 1``, positive, in the memory's dtype."""
    return elu(x.to(torch.promote_types(x.dtype, torch.float32))) + 1


def read(queries: Tensor, memory: Tensor) -> Tensor:
    """What ``queries [..., tokens, width]`` (features) find in ``memory [..., width, width + 1]``; zero in an empty
    one."""
    found = queries @ memory
    total = found[..., -1:]
    return found[..., :-1] / torch.where(total > 0, total, 1.0)


def write(keys: Tensor, values: Tensor, memory: Tensor | None) -> Tensor:
    """What tokens add to a memory: ``keys [..., tokens, width]`` (features) and values.

    Args:
        keys: features; zero for a token that writes nothing.
        values: as keys.
        memory: of the delta rule, by which only the difference to what the memory already gives is written; None for
            the plain sum.

    Returns:
        ``[..., width, width + 1]``.
    """
    values = values.to(keys.dtype)
    if memory is not None:
        values = values - read(keys, memory)
    return keys.transpose(-1, -2) @ pad(values, (0, 1), value=1.0)


def linear_memories(keys: Tensor, values: Tensor, reset: Reset | None) -> Tensor:
    """The memory before each segment, all segments at once.

    Args:
        keys: features ``[batch, heads, segments, length, width]``.
        values: as keys.
        reset: of the documents; None for one document.

    Returns:
        ``[batch, heads, segments, width, width + 1]``.
    """
    if reset is not None:
        keys = keys * reset.writes[:, None, ..., None]
    written = write(keys[:, :, :-1], values[:, :, :-1], None)
    if reset is None:
        return pad(written.cumsum(2), (0, 0, 0, 0, 1, 0))
    # Before a segment: what was written of the document in which the segment before it ended.
    same = pad(reset.last[:, :-1], (1, 0), value=-1)[:, :, None] == reset.last[:, None, :-1]
    chain = same.tril(-1)[:, None].to(written.dtype)
    return (chain @ written.flatten(3)).unflatten(3, written.shape[3:])


def delta_memories(keys: Tensor, values: Tensor, reset: Reset | None) -> Tensor:
    """As :func:`linear_memories` by the delta rule, one segment after the other: a segment's tokens all compare with
    the memory before it."""
    batch, heads, segments, _, width = keys.shape
    memories = [keys.new_zeros(batch, heads, width, width + 1)]
    for segment in range(segments - 1):
        old, here = memories[-1], keys[:, :, segment]
        if reset is not None:
            old = old * reset.keeps[:, None, segment, None, None]
            here = here * reset.writes[:, None, segment, :, None]
        memories.append(old + write(here, values[:, :, segment], old))
    return torch.stack(memories, dim=2)
