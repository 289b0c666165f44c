"""The Triton kernels: chunks in two passes, both ways.

``state_kernel`` walks over the chunks with one block of a head's state in registers, in float32, and leaves the state
before each chunk; blocks of keys and of values are separate programs, so that wide heads do not spill. ``mix_kernel``
gives each chunk its rows: pairs inside the chunk, and what the state brings. The recurrence is its own transpose: with
``mix(a, b, c, S) = (a b^T * decay) c + fade * (a S)`` over the past, and ``mix'`` over the future,

    y = mix(q, k, v, S)    dq = mix(dy, v, k, S^T)    dv = mix'(k, q, dy, dS)    dk = mix'(v, dy, q, dS^T)

so that two kernels serve both passes. Sums of log decays come from ``decays.py``. Every number is summed in a fixed
order: same inputs, same bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightbulb.kernels.linear_recurrence.decays import Decays, decay_gradient

MAX_WIDTH = 256
"""Widest keys and values."""

_PROGRAMS = 256  # about two for each processor of a large GPU


@triton.jit
def state_kernel(
    a,
    b,
    first,
    high,
    low,
    documents,
    entering,
    states,
    last,
    along,
    a_b,
    a_h,
    a_t,
    b_b,
    b_h,
    b_t,
    heads,
    length,
    chunks,
    A_SHARE: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    REVERSED: tl.constexpr,
    HAS_ALONG: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """``states[chunk] = s; s = across * s + a^T (fade * b)`` over the chunks, from the last one on if REVERSED.

    Forward ``a`` is the key, ``b`` the value, and rows fade to the chunk's end. Reversed, ``a`` is the query, ``b`` the
    gradient of the result, ``s`` that of the state, and rows fade from the chunk's start; ``along`` takes the gradient
    of each ``across``'s logarithm, from the states ``entering``.
    """
    item = tl.program_id(2).to(tl.int64)
    batch, head = item // heads, item % heads
    ks = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    ws = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    in_state = (ks < K)[:, None] & (ws < W)[None, :]
    cells = ks[:, None] * W + ws[None, :]
    s = tl.load(first + item * K * W + cells, mask=in_state, other=0.0).to(tl.float32)
    a += batch * a_b + head // A_SHARE * a_h
    b += batch * b_b + head * b_h
    for step in range(chunks):
        chunk = chunks - 1 - step if REVERSED else step
        rows = chunk * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = rows < length
        row_totals, end = item * chunks * ROWS + rows, item * chunks * ROWS + chunk * ROWS + ROWS - 1
        total_high, total_low = tl.load(high + row_totals), tl.load(low + row_totals)
        end_high, end_low = tl.load(high + end), tl.load(low + end)
        keep = inside
        across = tl.exp(end_high + end_low)
        if HAS_DOCUMENTS:
            document = tl.load(documents + batch * chunks * ROWS + rows)
            end_document = tl.load(documents + batch * chunks * ROWS + chunk * ROWS + ROWS - 1)
            keep = inside & (document == (0 if REVERSED else end_document))
        cell = (item * chunks + chunk) * K * W + cells
        tl.store(states + cell, s, mask=in_state)
        if HAS_ALONG:
            before = tl.load(entering + cell, mask=in_state, other=0.0).to(tl.float32)
            gradient = tl.sum(tl.sum(before * s, 1), 0) * across
            if HAS_DOCUMENTS:
                gradient = tl.where(end_document == 0, gradient, 0.0)
            blocks = tl.num_programs(0) * tl.num_programs(1)
            block = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
            tl.store(along + (item * chunks + chunk) * blocks + block, gradient)
        fade = tl.exp(total_high + total_low if REVERSED else (end_high - total_high) + (end_low - total_low))
        left = tl.load(a + rows[None, :] * a_t + ks[:, None], mask=inside[None, :] & (ks < K)[:, None], other=0.0)
        right = tl.load(b + rows[:, None] * b_t + ws[None, :], mask=keep[:, None] & (ws < W)[None, :], other=0.0)
        faded = (right.to(tl.float32) * fade[:, None]).to(left.dtype)
        s *= across
        if HAS_DOCUMENTS:
            s = tl.where(end_document == 0, s, 0.0)
        s = tl.dot(left, faded, s, input_precision=PRECISION)
    tl.store(last + item * K * W + cells, s, mask=in_state)


@triton.jit
def mix_kernel(
    a,
    b,
    c,
    x,
    states,
    high,
    low,
    documents,
    out,
    far_dots,
    near_dots,
    a_b,
    a_h,
    a_t,
    b_b,
    b_h,
    b_t,
    c_b,
    c_h,
    c_t,
    x_b,
    x_h,
    x_t,
    out_b,
    out_h,
    out_t,
    heads,
    length,
    chunks,
    A_SHARE: tl.constexpr,
    B_SHARE: tl.constexpr,
    SUMMED: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    REVERSED: tl.constexpr,
    HAS_DOTS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One chunk's rows of ``sum over heads of (a b^T * decay) c + fade * (a states)``, over the future if REVERSED.

    As many results as ``c`` has heads, each the sum over SUMMED heads; ``*_SHARE`` heads share their rows of a tensor.
    With HAS_DOTS also, per head, the products of ``x`` with the state's part and with that of the chunk's other rows.
    """
    chunk = tl.program_id(0).to(tl.int64)
    item = tl.program_id(1).to(tl.int64)
    results = heads // SUMMED
    batch, result = item // results, item % results
    rows = chunk * ROWS + tl.arange(0, ROWS)
    inside = rows < length
    ws = tl.arange(0, BLOCK_W)
    in_row = inside[:, None] & (ws < W)[None, :]
    index = tl.arange(0, ROWS)
    seen = (index[:, None] <= index[None, :]) if REVERSED else (index[:, None] >= index[None, :])
    reached = inside
    if HAS_DOCUMENTS:
        document = tl.load(documents + batch * chunks * ROWS + rows)
        seen &= document[:, None] == document[None, :]
        if REVERSED:
            reached &= document == tl.load(documents + batch * chunks * ROWS + chunk * ROWS + ROWS - 1)
        else:
            reached &= document == 0
    total = tl.zeros([ROWS, BLOCK_W], dtype=tl.float32)
    for member in range(SUMMED):
        head = result * SUMMED + member
        of_head = batch * heads + head
        a_rows = a + batch * a_b + head // A_SHARE * a_h + rows[:, None] * a_t
        b_rows = b + batch * b_b + head // B_SHARE * b_h + rows[None, :] * b_t
        state = states + (of_head * chunks + chunk) * K * W
        weights = tl.zeros([ROWS, ROWS], dtype=tl.float32)
        far = tl.zeros([ROWS, BLOCK_W], dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            ks = start + tl.arange(0, BLOCK_K)
            left = tl.load(a_rows + ks[None, :], mask=inside[:, None] & (ks < K)[None, :], other=0.0)
            right = tl.load(b_rows + ks[:, None], mask=inside[None, :] & (ks < K)[:, None], other=0.0)
            cells = ws[None, :] * K + ks[:, None] if TRANSPOSED else ks[:, None] * W + ws[None, :]
            held = tl.load(state + cells, mask=(ks < K)[:, None] & (ws < W)[None, :], other=0.0)
            weights = tl.dot(left, right, weights, input_precision=PRECISION)
            far = tl.dot(left, held, far, input_precision=PRECISION)
        totals = of_head * chunks * ROWS + rows
        total_high, total_low = tl.load(high + totals), tl.load(low + totals)
        span = (total_high[:, None] - total_high[None, :]) + (total_low[:, None] - total_low[None, :])
        if REVERSED:
            end = of_head * chunks * ROWS + chunk * ROWS + ROWS - 1
            span = -span
            fade = tl.exp((tl.load(high + end) - total_high) + (tl.load(low + end) - total_low))
        else:
            fade = tl.exp(total_high + total_low)
        weights = tl.where(seen, weights * tl.exp(tl.where(seen, span, 0.0)), 0.0)
        far = tl.where(reached[:, None], far * fade[:, None], 0.0)
        others = tl.load(c + batch * c_b + result * c_h + rows[:, None] * c_t + ws[None, :], mask=in_row, other=0.0)
        if HAS_DOTS:
            own = tl.load(x + batch * x_b + result * x_h + rows[:, None] * x_t + ws[None, :], mask=in_row, other=0.0)
            tl.store(far_dots + totals, tl.sum(far * own.to(tl.float32), 1))
            pairs = weights * tl.dot(own, tl.trans(others), input_precision=PRECISION)
            # A row meets itself without a decay.
            tl.store(near_dots + totals, tl.sum(tl.where(index[:, None] == index[None, :], 0.0, pairs), 1))
        total = tl.dot(weights.to(others.dtype), others, total + far, input_precision=PRECISION)
    tl.store(out + batch * out_b + result * out_h + rows[:, None] * out_t + ws[None, :], total, mask=in_row)


def scan(
    a: Tensor, b: Tensor, first: Tensor, sums: Decays, is_reversed: bool = False, entering: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """States before (reversed: behind) each chunk, ``[batch, heads, chunks, K, W]`` in the dtype of ``a``; the state
    after all; with ``entering`` also the parts of the gradient along the chunks, ``[batch, heads, chunks, blocks]``."""
    (batch, heads, length, width), keys = b.shape, a.shape[3]
    tiles = state_tiles(keys, width, batch * heads)
    grid = triton.cdiv(keys, tiles["BLOCK_K"]), triton.cdiv(width, tiles["BLOCK_W"]), batch * heads
    states = a.new_empty(batch, heads, sums.chunks, keys, width)
    last = torch.empty_like(first, memory_format=torch.contiguous_format)
    along = None if entering is None else first.new_empty(batch, heads, sums.chunks, grid[0] * grid[1])
    state_kernel[grid](
        a,
        b,
        first.contiguous(),
        *sums[:3],
        entering,
        states,
        last,
        along,
        *a.stride()[:3],
        *b.stride()[:3],
        heads,
        length,
        sums.chunks,
        A_SHARE=heads // a.shape[1],
        K=keys,
        W=width,
        HAS_DOCUMENTS=sums.documents is not None,
        REVERSED=is_reversed,
        HAS_ALONG=entering is not None,
        PRECISION=precision(a.dtype),
        ROWS=sums.rows,
        **tiles,
    )
    return states, last, along


def mix(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    states: Tensor,
    sums: Decays,
    is_reversed: bool = False,
    is_transposed: bool = False,
    x: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What :func:`mix_kernel` says, in the shape of ``c``; with ``x``, of that shape too, also its two products,
    ``[batch, heads, chunks * rows]``."""
    batch, heads, width = states.shape[0], states.shape[1], c.shape[3]
    out = torch.empty_like(c)
    far, near = (None, None) if x is None else (torch.empty_like(sums.high) for _ in range(2))
    own = c if x is None else x
    mix_kernel[sums.chunks, batch * c.shape[1]](
        a,
        b,
        c,
        own,
        states,
        *sums[:3],
        out,
        far,
        near,
        *(stride for t in (a, b, c, own, out) for stride in t.stride()[:3]),
        heads,
        c.shape[2],
        sums.chunks,
        A_SHARE=heads // a.shape[1],
        B_SHARE=heads // b.shape[1],
        SUMMED=heads // c.shape[1],
        K=a.shape[3],
        W=width,
        TRANSPOSED=is_transposed,
        HAS_DOCUMENTS=sums.documents is not None,
        REVERSED=is_reversed,
        HAS_DOTS=x is not None,
        PRECISION=precision(a.dtype),
        ROWS=sums.rows,
        **mix_tiles(a.shape[3], width, a.element_size()),
    )
    return out, far, near


def forward(query: Tensor, key: Tensor, value: Tensor, state: Tensor, sums: Decays) -> tuple[Tensor, Tensor]:
    """Result and last state."""
    states, last, _ = scan(key, value, state, sums)
    return mix(query, key, value, states, sums)[0], last


def backward(
    grad: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    sums: Decays,
    starts: Tensor | None,
    needs_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of query, key, value, log decay (if needed) and first state. States are computed again."""
    states = scan(key, value, state, sums)[0]
    entering = states if needs_decay else None
    d_states, d_first, along = scan(query, grad, grad_state, sums, is_reversed=True, entering=entering)
    own = (query, value) if needs_decay else (None, None)
    dq, read, paired = mix(grad, value, key, states, sums, is_transposed=True, x=own[0])
    dv, written, pairing = mix(key, query, grad, d_states, sums, is_reversed=True, x=own[1])
    dk, _, _ = mix(value, grad, query, d_states, sums, is_reversed=True, is_transposed=True)
    d_decay = None
    if needs_decay:
        d_decay = decay_gradient([read, paired, written, pairing], along, sums, starts, value.shape[2])
    return dq, dk, dv, d_decay, d_first


def state_tiles(keys: int, width: int, items: int) -> dict[str, Any]:
    """Block sizes and warps of :func:`state_kernel`: 64 x 64 of a state are 32 registers a thread. Few sequences, which
    leave processors idle as long as the chunks last, get narrower blocks."""
    block_k, block_w = _block(keys, 64), _block(width, 64)
    while block_w > 16 and items * triton.cdiv(keys, block_k) * triton.cdiv(width, block_w) < _PROGRAMS:
        block_w //= 2
    return {"BLOCK_K": block_k, "BLOCK_W": block_w, "num_warps": 4, "num_stages": 3}


def mix_tiles(keys: int, width: int, element_size: int) -> dict[str, Any]:
    """The same of :func:`mix_kernel`, which holds whole rows of its result."""
    whole = _block(width, MAX_WIDTH)
    deep = 2 if element_size == 4 or whole == MAX_WIDTH else 3
    block = _block(keys, 32 if element_size == 4 else 64)
    return {"BLOCK_K": block, "BLOCK_W": whole, "num_warps": 4 if whole <= 64 else 8, "num_stages": deep}


def precision(dtype: torch.dtype) -> str:
    """Of products: float32 ones as three in TensorFloat-32, which lose next to nothing."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _block(width: int, most: int) -> int:
    return max(16, min(most, triton.next_power_of_2(width)))
