"""The Triton products: one launch for all experts, tiles of the rows of one expert each.

Rows are sorted by expert. A program reads from a schedule (:mod:`lightbulb.kernels.experts.schedule`) which rows
of which expert are its tile's; experts without rows cost nothing. Rows may be gathered while they
are loaded (``index``), so that permuted copies of tokens are never written. The launch order keeps some tiles of rows
against all tiles of columns together, which the second-level cache rewards (Tillet et al. 2019, Triton).

Inputs bfloat16 (or float16, or float32 without TensorFloat-32), sums in float32, rounded once. No atomic operation:
same inputs, same bits.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightbulb.kernels.experts.schedule import TABLE, Schedule

_WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def _dot(a, b, total):
    """``total + a @ b``; the interpreter knows no product of bfloat16."""
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _place(table, tiles, columns, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """This program's expert, first row, end and column: groups of row tiles, column by column."""
    program = tl.program_id(0)
    per_group = GROUP * tl.cdiv(columns, BLOCK_N)
    first = program // per_group * GROUP
    size = min(tiles - first, GROUP)
    slot = first + program % per_group % size
    column = program % per_group // size
    entry = table + slot * 3
    return tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2), column * BLOCK_N


@triton.jit
def _row_places(index, row, start, end, HAS_INDEX: tl.constexpr):
    """Where the rows of a tile lie; rows past the end read one of the tile's own, and are not stored."""
    inside = tl.where(row < end, row, start)
    if HAS_INDEX:
        return tl.load(index + inside).to(tl.int64)
    return inside.to(tl.int64)


@triton.jit
def _inside(stride, n, BLOCK_M: tl.constexpr):
    """Offsets of a tile's numbers from its first row: 32 bits are enough, and spare registers."""
    return tl.arange(0, BLOCK_M)[:, None] * stride + n[None, :]


@triton.jit
def linear_kernel(
    a,
    weight,
    out,
    index,
    table,
    tiles,
    columns,
    depth,
    a_stride,
    weight_stride_e,
    weight_stride_n,
    weight_stride_k,
    out_stride,
    HAS_INDEX: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``out[r] = weight[expert of r] @ a[index[r]]``."""
    expert, start, end, first = _place(table, tiles, columns, BLOCK_N, GROUP)
    if start >= end:
        return
    row = start + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    n = first + tl.arange(0, BLOCK_N)
    a_place = a + _row_places(index, row, start, end, HAS_INDEX)[:, None] * a_stride + k[None, :]
    w_place = weight + expert * weight_stride_e
    w_place += (n % columns).to(tl.int64)[None, :] * weight_stride_n + k.to(tl.int64)[:, None] * weight_stride_k
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, depth, BLOCK_K):
        if EVEN:
            left, right = tl.load(a_place), tl.load(w_place)
        else:
            left = tl.load(a_place, mask=(k < depth - step)[None, :], other=0.0)
            right = tl.load(w_place, mask=(k < depth - step)[:, None], other=0.0)
        total = _dot(left, right, total)
        a_place += BLOCK_K
        w_place += BLOCK_K * weight_stride_k
    place = out + start.to(tl.int64) * out_stride + _inside(out_stride, n, BLOCK_M)
    tl.store(place, total.to(out.dtype.element_ty), mask=(row < end)[:, None] & (n < columns)[None, :])


@triton.jit
def swiglu_kernel(
    a,
    weight,
    inner,
    hidden,
    index,
    table,
    tiles,
    width,
    depth,
    a_stride,
    weight_stride_e,
    weight_stride_n,
    HAS_INDEX: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``inner[r] = weight[expert of r] @ a[index[r]]``, gate and up, and ``hidden = silu(gate) * up``.

    The activation takes the rounded ``inner``, as the backward will, which has nothing else.
    """
    expert, start, end, first = _place(table, tiles, width, BLOCK_N, GROUP)
    if start >= end:
        return
    row = start + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    n = first + tl.arange(0, BLOCK_N)
    a_place = a + _row_places(index, row, start, end, HAS_INDEX)[:, None] * a_stride + k[None, :]
    weight += expert * weight_stride_e
    feature = (n % width).to(tl.int64)[None, :]
    gate_place = weight + feature * weight_stride_n + k[:, None]
    up_place = weight + (feature + width) * weight_stride_n + k[:, None]
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, depth, BLOCK_K):
        if EVEN:
            left, gate_part, up_part = tl.load(a_place), tl.load(gate_place), tl.load(up_place)
        else:
            inside = k < depth - step
            left = tl.load(a_place, mask=inside[None, :], other=0.0)
            gate_part = tl.load(gate_place, mask=inside[:, None], other=0.0)
            up_part = tl.load(up_place, mask=inside[:, None], other=0.0)
        gate = _dot(left, gate_part, gate)
        up = _dot(left, up_part, up)
        a_place += BLOCK_K
        gate_place += BLOCK_K
        up_place += BLOCK_K
    stored = (row < end)[:, None] & (n < width)[None, :]
    own = inner + start.to(tl.int64) * (2 * width) + _inside(2 * width, n, BLOCK_M)
    gate_kept, up_kept = gate.to(inner.dtype.element_ty), up.to(inner.dtype.element_ty)
    tl.store(own, gate_kept, mask=stored)
    tl.store(own + width, up_kept, mask=stored)
    g = gate_kept.to(tl.float32)
    result = g * tl.sigmoid(g) * up_kept.to(tl.float32)
    place = hidden + start.to(tl.int64) * width + _inside(width, n, BLOCK_M)
    tl.store(place, result.to(hidden.dtype.element_ty), mask=stored)


@triton.jit
def _swiglu_grad(d, inner, grad_inner, hidden, scale, used, n, width, BLOCK_M: tl.constexpr):
    """Store what follows from the gradient ``d`` of some hidden features; their inner products with them."""
    stored = used[:, None] & (n < width)[None, :]
    own = _inside(2 * width, n, BLOCK_M)
    gate = tl.load(inner + own, mask=stored, other=0.0).to(tl.float32)
    up = tl.load(inner + own + width, mask=stored, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    activated = gate * sigmoid
    product = activated * up
    part = tl.sum(tl.where(stored, d * product, 0.0), 1)
    d *= scale[:, None]
    tl.store(grad_inner + own + width, (d * activated).to(grad_inner.dtype.element_ty), mask=stored)
    grad_gate = d * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(grad_inner + own, grad_gate.to(grad_inner.dtype.element_ty), mask=stored)
    place = hidden + _inside(width, n, BLOCK_M)
    tl.store(place, (product * scale[:, None]).to(hidden.dtype.element_ty), mask=stored)
    return part


@triton.jit
def swiglu_grad_kernel(
    grad,
    weight,
    inner,
    gates,
    grad_inner,
    hidden,
    grad_gates,
    index,
    table,
    tiles,
    width,
    depth,
    grad_stride,
    weight_stride_e,
    weight_stride_k,
    HAS_INDEX: tl.constexpr,
    HAS_GATES: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """From the gradient of the down product's result to that of gate and up, and what the other gradients take.

    With ``d = gates[r] * down^T @ grad[index[r]]`` the gradient of the hidden features: ``grad_inner`` is that of gate
    and up; ``hidden = gates[r] * silu(gate) * up`` is what meets ``grad`` in the gradient of ``down``; and
    ``grad_gates[r, tile]`` is this tile's part of ``<result of r, grad>``, equal to ``<hidden, d>`` without gates, so
    that results need not be kept (as SonicMoE, Guo et al. 2025, arXiv:2512.14080).
    """
    expert, start, end, first = _place(table, tiles, width, BLOCK_N, GROUP)
    if start >= end:
        return
    row = start + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    n = first + tl.arange(0, BLOCK_N)
    g_place = grad + _row_places(index, row, start, end, HAS_INDEX)[:, None] * grad_stride + k[None, :]
    w_place = weight + expert * weight_stride_e + (n % width)[None, :] + k.to(tl.int64)[:, None] * weight_stride_k
    d = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, depth, BLOCK_K):
        if EVEN:
            left, right = tl.load(g_place), tl.load(w_place)
        else:
            left = tl.load(g_place, mask=(k < depth - step)[None, :], other=0.0)
            right = tl.load(w_place, mask=(k < depth - step)[:, None], other=0.0)
        d = _dot(left, right, d)
        g_place += BLOCK_K
        w_place += BLOCK_K * weight_stride_k
    first_own = start.to(tl.int64) * width
    inner += 2 * first_own
    grad_inner += 2 * first_own
    hidden += first_own
    scale = tl.full((BLOCK_M,), 1.0, tl.float32)
    if HAS_GATES:
        scale = tl.load(gates + row, mask=row < end, other=0.0).to(tl.float32)
    # Half of the columns at a time: all of them together do not fit the registers.
    left, right = tl.split(tl.permute(tl.reshape(d, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    half = first + tl.arange(0, BLOCK_N // 2)
    part = _swiglu_grad(left, inner, grad_inner, hidden, scale, row < end, half, width, BLOCK_M)
    part += _swiglu_grad(right, inner, grad_inner, hidden, scale, row < end, half + BLOCK_N // 2, width, BLOCK_M)
    if HAS_GATES:
        place = grad_gates + row.to(tl.int64) * tl.cdiv(width, BLOCK_N) + first // BLOCK_N
        tl.store(place, part, mask=row < end)


@triton.jit
def weight_grad_kernel(
    grad,
    a,
    out,
    grad_index,
    a_index,
    ends,
    height,
    columns,
    grad_stride,
    a_stride,
    HAS_GRAD_INDEX: tl.constexpr,
    HAS_A_INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``out[e] = sum over e's rows r of grad[grad_index[r]] a[a_index[r]]^T``: zero for an expert without rows."""
    down, across = tl.cdiv(height, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    expert = tl.program_id(0) // (down * across)
    program = tl.program_id(0) % (down * across)
    first = program // (GROUP * across) * GROUP
    size = min(down - first, GROUP)
    m = (first + program % (GROUP * across) % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = program % (GROUP * across) // size * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(ends + expert)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    m_inside, n_inside = (m % height)[None, :], (n % columns)[None, :]
    for row in range(start, end, BLOCK_K):
        r = row + tl.arange(0, BLOCK_K)
        used = (r < end)[:, None]
        g_row = _row_places(grad_index, r, start, end, HAS_GRAD_INDEX)[:, None]
        a_row = _row_places(a_index, r, start, end, HAS_A_INDEX)[:, None]
        left = tl.load(grad + g_row * grad_stride + m_inside, mask=used, other=0.0)
        right = tl.load(a + a_row * a_stride + n_inside, mask=used, other=0.0)
        total = _dot(tl.trans(left), right, total)
    place = out + (expert.to(tl.int64) * height + m.to(tl.int64)[:, None]) * columns + n[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(m < height)[:, None] & (n < columns)[None, :])


_GROUP = 8  # tiles of rows that run together


def linear(plan: Schedule, a: Tensor, weight: Tensor, index: Tensor | None = None) -> Tensor:
    """``y[r] = weight[expert of r] @ a[index[r]]``: ``[R, out]`` of ``a [*, in]``, ``weight [E, out, in]`` of any
    strides, and ``index [R]`` or None where a's rows are sorted already."""
    rows, columns, depth = len(a if index is None else index), weight.shape[1], weight.shape[2]
    tiles = TABLE["linear", plan.tile]
    out = a.new_empty(rows, columns)
    if rows:
        linear_kernel[(len(plan.table) * triton.cdiv(columns, tiles.columns),)](
            a,
            weight,
            out,
            index,
            plan.table,
            len(plan.table),
            columns,
            depth,
            a.stride(0),
            *weight.stride(),
            out.stride(0),
            HAS_INDEX=index is not None,
            EVEN=depth % tiles.depth == 0,
            GROUP=_GROUP,
            **tiles.launch(),
        )
    return out


def swiglu(plan: Schedule, a: Tensor, weight: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gate and up ``[R, 2 x hidden]`` and the hidden features ``[R, hidden]``; ``weight [E, 2 x hidden, in]``."""
    rows, width, depth = len(a if index is None else index), weight.shape[1] // 2, weight.shape[2]
    tiles = TABLE["swiglu", plan.tile]
    inner, hidden = a.new_empty(rows, 2 * width), a.new_empty(rows, width)
    if rows:
        swiglu_kernel[(len(plan.table) * triton.cdiv(width, tiles.columns),)](
            a,
            weight,
            inner,
            hidden,
            index,
            plan.table,
            len(plan.table),
            width,
            depth,
            a.stride(0),
            weight.stride(0),
            weight.stride(1),
            HAS_INDEX=index is not None,
            EVEN=depth % tiles.depth == 0,
            GROUP=_GROUP,
            **tiles.launch(),
        )
    return inner, hidden


def swiglu_grad(
    plan: Schedule, grad: Tensor, down: Tensor, inner: Tensor, gates: Tensor | None = None, index: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """From the gradient ``[*, out]`` of the results to the gradients of ``inner``, the hidden features times their
    gates, and the gradients ``[R]`` of the gates; ``down [E, out, hidden]``."""
    (rows, width), depth = inner.shape, down.shape[1]
    width //= 2
    tiles = TABLE["swiglu_grad", plan.tile]
    across = triton.cdiv(width, tiles.columns)
    grad_inner, hidden = torch.empty_like(inner), inner.new_empty(rows, width)
    parts = None if gates is None else inner.new_empty(rows, across, dtype=torch.float32)
    if rows:
        swiglu_grad_kernel[(len(plan.table) * across,)](
            grad,
            down,
            inner,
            gates,
            grad_inner,
            hidden,
            parts,
            index,
            plan.table,
            len(plan.table),
            width,
            depth,
            grad.stride(0),
            down.stride(0),
            down.stride(1),
            HAS_INDEX=index is not None,
            HAS_GATES=gates is not None,
            EVEN=depth % tiles.depth == 0,
            GROUP=_GROUP,
            **tiles.launch(),
        )
    return grad_inner, hidden, None if parts is None else parts.sum(1)


def weight_grad(
    plan: Schedule, grad: Tensor, a: Tensor, grad_index: Tensor | None = None, a_index: Tensor | None = None
) -> Tensor:
    """``[E, out, in]``: for each expert the sum over its rows of ``grad[r] a[r]^T``."""
    experts, height, columns = len(plan.ends), grad.shape[1], a.shape[1]
    is_gathered = grad_index is not None or a_index is not None
    tiles = TABLE["gathered_weight_grad" if is_gathered else "weight_grad", 128]
    out = a.new_empty(experts, height, columns)
    weight_grad_kernel[(experts * triton.cdiv(height, tiles.rows) * triton.cdiv(columns, tiles.columns),)](
        grad,
        a,
        out,
        grad_index,
        a_index,
        plan.ends,
        height,
        columns,
        grad.stride(0),
        a.stride(0),
        HAS_GRAD_INDEX=grad_index is not None,
        HAS_A_INDEX=a_index is not None,
        GROUP=_GROUP,
        **tiles.launch(),
    )
    return out
