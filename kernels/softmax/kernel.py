"""The Triton kernels: a program has some whole rows; in float32."""

import triton
import triton.language as tl
from torch import Tensor

from lightbulb.kernels.softmax.rows import row_stride

MAX_KEYS = 16384  # a row must fit into a block's registers
_TILE = 4096  # elements of a program


@triton.jit
def place(row, middle, inner, outer_stride, middle_stride, inner_stride):
    """Where what is broadcast over the rows lies; a row's number counts through three dimensions."""
    outer = row // (middle * inner)
    return outer * outer_stride + row // inner % middle * middle_stride + row % inner * inner_stride


@triton.jit
def forward_kernel(
    scores,
    mask,
    sink,
    out,
    share,
    stride,
    out_stride,
    middle,
    inner,
    mask_outer,
    mask_middle,
    mask_inner,
    sink_outer,
    sink_middle,
    sink_inner,
    rows,
    keys,
    MASK: tl.constexpr,
    SINK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    key = tl.arange(0, KEYS)[None, :]
    inside = (row < rows)[:, None] & (key < keys)
    visible = inside
    if MASK:
        offset = place(row, middle, inner, mask_outer, mask_middle, mask_inner)
        visible = inside & (tl.load(mask + offset[:, None] + key, mask=inside, other=0) != 0)
    v = tl.load(scores + row[:, None] * stride + key, mask=visible, other=float("-inf")).to(tl.float32)
    highest = tl.max(v, axis=1)
    if SINK:
        logit = tl.load(sink + place(row, middle, inner, sink_outer, sink_middle, sink_inner), mask=row < rows, other=0)
        highest = tl.maximum(highest, logit)
    highest = tl.where(highest == float("-inf"), 0.0, highest)  # a row without a key
    powers = tl.exp(v - highest[:, None])
    total = tl.sum(powers, axis=1)
    if SINK:
        power = tl.exp(logit - highest)
        total += power
        tl.store(share + row, power / total, mask=row < rows)
    weights = powers / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + row[:, None] * out_stride + key, weights, mask=inside)


@triton.jit
def backward_kernel(
    grad,
    weights,
    out,
    dots,
    grad_stride,
    stride,
    out_stride,
    rows,
    keys,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    key = tl.arange(0, KEYS)[None, :]
    inside = (row < rows)[:, None] & (key < keys)
    g = tl.load(grad + row[:, None] * grad_stride + key, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weights + row[:, None] * stride + key, mask=inside, other=0.0).to(tl.float32)
    dot = tl.sum(g * w, axis=1)
    tl.store(dots + row, dot, mask=row < rows)
    tl.store(out + row[:, None] * out_stride + key, (g - dot[:, None]) * w, mask=inside)


def forward(scores: Tensor, mask: Tensor | None, sink: Tensor | None, out: Tensor, share: Tensor | None) -> None:
    """As :func:`lightbulb.kernels.softmax.native.forward`."""
    _, middle, inner, keys = scores.shape
    rows = scores.shape[:3].numel()
    strides = [n for t in (mask, sink) for n in ((0, 0, 0) if t is None else t.stride()[:3])]
    block, width, warps = tile(keys)
    forward_kernel[(triton.cdiv(rows, block),)](
        scores, scores if mask is None else mask, scores if sink is None else sink, out,
        scores if share is None else share, row_stride(scores), row_stride(out), middle, inner, *strides, rows, keys,
        MASK=mask is not None, SINK=sink is not None, ROWS=block, KEYS=width, num_warps=warps,
    )  # fmt: skip


def backward(grad: Tensor, weights: Tensor, out: Tensor, dots: Tensor) -> None:
    """As :func:`lightbulb.kernels.softmax.native.backward`."""
    rows, keys = dots.numel(), grad.shape[3]
    block, width, warps = tile(keys)
    backward_kernel[(triton.cdiv(rows, block),)](
        grad, weights, out, dots, row_stride(grad), row_stride(weights), row_stride(out), rows, keys,
        ROWS=block, KEYS=width, num_warps=warps,
    )  # fmt: skip


def tile(keys: int) -> tuple[int, int, int]:
    """Rows of a program, their keys as a power of two, and warps."""
    width = triton.next_power_of_2(keys)
    rows = max(1, min(32, _TILE // width))
    return rows, width, min(16, max(4, rows * width // 1024))
