"""Log decays in Triton: their running sums in each chunk, and their gradients.

Sums start anew in each chunk, are taken in float64 and kept as two float32, whose differences are exact enough behind
any decay; only differences over a span are raised to a power.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def decay_kernel(
    log_decay,
    starts,
    high,
    low,
    documents,
    decay_b,
    decay_h,
    decay_t,
    starts_b,
    starts_t,
    heads,
    length,
    chunks,
    HAS_DOCUMENTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Running sums of a chunk's log decays in two parts, and of its documents' starts."""
    chunk = tl.program_id(0)
    item = tl.program_id(1).to(tl.int64)
    batch, head = item // heads, item % heads
    rows = chunk * ROWS + tl.arange(0, ROWS).to(tl.int64)
    inside = rows < length
    steps = tl.load(log_decay + batch * decay_b + head * decay_h + rows * decay_t, mask=inside, other=0.0)
    steps = steps.to(tl.float64)
    # A decay beyond every number's range is cut, lest it swallow the digits of those that follow; NaN stays.
    total = tl.cumsum(tl.where(steps < -800.0, -800.0, steps), 0)
    rounded = total.to(tl.float32)
    place = item * chunks * ROWS + rows
    tl.store(high + place, rounded)
    tl.store(low + place, (total - rounded.to(tl.float64)).to(tl.float32))
    if HAS_DOCUMENTS and head == 0:
        begins = tl.load(starts + batch * starts_b + rows * starts_t, mask=inside, other=0)
        tl.store(documents + batch * chunks * ROWS + rows, tl.cumsum(begins.to(tl.int32), 0))


@triton.jit
def decay_gradient_kernel(
    read,
    paired,
    written,
    pairing,
    along,
    starts,
    documents,
    out,
    starts_b,
    starts_t,
    heads,
    length,
    chunks,
    blocks,
    HAS_DOCUMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Gradient of each log decay of a chunk: the sum of what passes through it.

    What is read from the state at a row passes the decays up to it; what a row writes, those after it; a pair, those
    from the earlier row's next to the later row's own (``paired`` by the later, ``pairing`` by the earlier row);
    ``along`` is what passes the whole chunk.
    """
    chunk = tl.program_id(0).to(tl.int64)
    item = tl.program_id(1).to(tl.int64)
    batch = item // heads
    index = tl.arange(0, ROWS)
    rows = chunk * ROWS + index
    place = item * chunks * ROWS + rows
    ends = tl.load(paired + place) + tl.load(read + place) - tl.load(pairing + place)
    writes = tl.load(written + place)
    later = index[None, :] >= index[:, None]
    earlier = index[None, :] < index[:, None]
    if HAS_DOCUMENTS:
        document = tl.load(documents + batch * chunks * ROWS + rows)
        later &= document[:, None] == document[None, :]
        earlier &= document[:, None] == document[None, :]
    gradient = tl.sum(tl.where(later, ends[None, :], 0.0), 1) + tl.sum(tl.where(earlier, writes[None, :], 0.0), 1)
    parts = tl.arange(0, BLOCKS)
    gradient += tl.sum(tl.load(along + (item * chunks + chunk) * blocks + parts, mask=parts < blocks, other=0.0), 0)
    if HAS_DOCUMENTS:
        begins = tl.load(starts + batch * starts_b + rows * starts_t, mask=rows < length, other=0)
        gradient = tl.where(begins != 0, 0.0, gradient)
    tl.store(out + item * length + rows, gradient, mask=rows < length)


class Decays(NamedTuple):
    """Sums of log decays, ``[batch, heads, chunks * rows]`` in two parts, and of starts ``[batch, chunks * rows]``."""

    high: Tensor
    low: Tensor
    documents: Tensor | None
    rows: int

    @property
    def chunks(self) -> int:
        return self.high.shape[2] // self.rows


def decays(value: Tensor, log_decay: Tensor, starts: Tensor | None, chunk_size: int) -> Decays:
    """Of chunks of 16, 32 or 64 rows, the most that ``chunk_size`` allows."""
    batch, heads, length = value.shape[:3]
    rows = 64 if chunk_size >= 64 else 32 if chunk_size >= 32 else 16
    chunks = triton.cdiv(length, rows)
    high = torch.empty(batch, heads, chunks * rows, device=value.device)
    low = torch.empty_like(high)
    documents = None if starts is None else high.new_empty(batch, chunks * rows, dtype=torch.int32)
    steps = log_decay[:, None] if log_decay.ndim == 1 else log_decay
    steps = steps.expand(batch, heads, length)
    decay_kernel[chunks, batch * heads](
        steps,
        starts,
        high,
        low,
        documents,
        *steps.stride(),
        *_starts_strides(starts),
        heads,
        length,
        chunks,
        HAS_DOCUMENTS=starts is not None,
        ROWS=rows,
    )
    return Decays(high, low, documents, rows)


def decay_gradient(
    parts: list[Tensor | None], along: Tensor | None, sums: Decays, starts: Tensor | None, length: int
) -> Tensor:
    """``[batch, heads, length]`` float32, from the four products of ``kernel.mix`` in the kernel's order."""
    assert along is not None
    batch, heads = sums.high.shape[:2]
    out = along.new_empty(batch, heads, length)
    decay_gradient_kernel[sums.chunks, batch * heads](
        *parts,
        along,
        starts,
        sums.documents,
        out,
        *_starts_strides(starts),
        heads,
        length,
        sums.chunks,
        along.shape[3],
        HAS_DOCUMENTS=starts is not None,
        ROWS=sums.rows,
        BLOCKS=triton.next_power_of_2(along.shape[3]),
    )
    return out


def _starts_strides(starts: Tensor | None) -> tuple[int, int]:
    return (0, 0) if starts is None else (starts.stride(0), starts.stride(1))
