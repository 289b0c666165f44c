"""The Triton kernels: a program has some whole rows at a time; statistics in float32.

A program of the backward goes through a fixed share of the rows and keeps its part of the weight's gradient in
registers; the parts are then added up. No atomics: same inputs, same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_DIM = 16384  # a row must fit into a block's registers
_TILE = 4096  # elements of a program at a time
_PROGRAMS = 1024  # of a backward, at most: a few for every multiprocessor


@triton.jit
def forward_kernel(
    x,
    delta,
    weight,
    total,
    y,
    scale,
    x_stride,
    delta_stride,
    rows,
    dim,
    eps,
    ADD: tl.constexpr,
    WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, DIM)[None, :]
    inside = (row < rows) & (column < dim)
    v = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    if ADD:
        added = v.to(tl.float32) + tl.load(delta + row * delta_stride + column, mask=inside, other=0.0).to(tl.float32)
        v = added.to(total.dtype.element_ty)  # as rounded: the backward knows no other
        tl.store(total + row * dim + column, v, mask=inside)
    v = v.to(tl.float32)
    s = 1.0 / tl.sqrt(tl.sum(v * v, axis=1, keep_dims=True) / dim + eps)
    unit = v * s
    if WEIGHT:
        unit *= tl.load(weight + column, mask=column < dim, other=0.0).to(tl.float32)
    tl.store(y + row * dim + column, unit, mask=inside)
    tl.store(scale + row, s, mask=row < rows)


@triton.jit
def backward_kernel(
    grad,
    grad_total,
    x,
    weight,
    scale,
    grad_x,
    partial,
    grad_stride,
    grad_total_stride,
    x_stride,
    rows,
    dim,
    turns,
    ADD: tl.constexpr,
    WEIGHT: tl.constexpr,
    PARTIAL: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, DIM)[None, :]
    w = tl.full((1, DIM), 1.0, tl.float32)
    if WEIGHT:
        w = tl.load(weight + column, mask=column < dim, other=0.0).to(tl.float32)
    sums = tl.zeros((1, DIM), tl.float32)
    for turn in range(turns):
        row = (program * turns + turn) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < dim)
        g = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(scale + row, mask=row < rows, other=0.0)
        unit = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32) * s
        if PARTIAL:
            sums += tl.sum(g * unit, axis=0, keep_dims=True)
        g *= w
        # The part of the gradient along the row changes only its length, which the norm removes.
        d = (g - unit * (tl.sum(g * unit, axis=1, keep_dims=True) / dim)) * s
        if ADD:
            d += tl.load(grad_total + row * grad_total_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + row * dim + column, d, mask=inside)
    if PARTIAL:
        tl.store(partial + program * dim + column, sums, mask=column < dim)


def forward(x: Tensor, delta: Tensor | None, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`lightbulb.kernels.rms_norm.native.forward`; the weight may be of any dtype."""
    (rows, dim), (y, total) = x.shape, (_like(x), x if delta is None else _like(x))
    scale = x.new_empty(rows, dtype=torch.float32)
    if x.numel():
        block, width, warps = tile(dim)
        added = x if delta is None else delta
        forward_kernel[(triton.cdiv(rows, block),)](
            x, added, x if weight is None else weight, total, y, scale, x.stride(0), added.stride(0), rows, dim, eps,
            ADD=delta is not None, WEIGHT=weight is not None, ROWS=block, DIM=width, num_warps=warps,
        )  # fmt: skip
    return y, total, scale


def backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor | None, scale: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """As :func:`lightbulb.kernels.rms_norm.native.backward`."""
    (rows, dim), grad_x = x.shape, _like(x)
    block, width, warps = tile(dim)
    turns = max(1, triton.cdiv(rows, block * _PROGRAMS))
    programs = triton.cdiv(rows, block * turns)
    partial = x.new_empty(programs, dim, dtype=torch.float32) if needs_weight else None
    if x.numel():
        more = grad if grad_total is None else grad_total
        backward_kernel[(programs,)](
            grad, more, x, x if weight is None else weight, scale, grad_x, x if partial is None else partial,
            grad.stride(0), more.stride(0), x.stride(0), rows, dim, turns,
            ADD=grad_total is not None, WEIGHT=weight is not None, PARTIAL=needs_weight, ROWS=block, DIM=width,
            num_warps=warps,
        )  # fmt: skip
    return grad_x, None if partial is None else partial.sum(0)


def tile(dim: int) -> tuple[int, int, int]:
    """Rows of a program at a time, their width as a power of two, and warps."""
    width = triton.next_power_of_2(dim)
    rows = max(1, min(32, _TILE // width))
    return rows, width, min(16, max(4, rows * width // 1024))


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
