"""The Triton kernels: forward, gradient of the queries, gradients of keys and values.

One program computes one line of tiles of one head: first its full tiles, in which nothing is tested, then the others,
in which pairs are tested by the bounds of their queries. Products have float32 sums; exponentials are powers of two,
with log2(e) in the scale. No program adds to what another one writes, so that the same inputs give the same bits.

Arguments common to all: ``bounds`` as in ``Tiles.bounds``, of ``pairs`` numbers each; ``order``, ``starts`` and
``place`` of a ``Schedule`` with ``lines`` lines in each problem; ``section`` heads are computed at a time; a head's
``WIDTH`` is padded to ``SIZE``; tiles are ``ROWS`` queries by ``COLUMNS`` keys; ``scale`` includes log2(e).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def line_and_head(order, lines, heads, section, heads_per_problem):
    """This program's line (counted over all problems), line in its problem, and head. All heads of a section share the
    cache and are computed longest lines first; the next section follows."""
    program = tl.program_id(0)
    begin = program // (section * lines) * section
    size = tl.minimum(section, heads - begin)
    inside = program - begin * lines
    head = begin + inside % size
    problem = head // heads_per_problem
    line = tl.load(order + problem * lines + inside // size)
    return problem * lines + line, line, head, problem


@triton.jit
def load_tile(
    base, first, row_stride, limit, TESTED: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr
):
    """``[ROWS, SIZE]`` from row ``first`` on, zero beyond ``limit`` rows and ``WIDTH`` features."""
    rows, features = tl.arange(0, ROWS)[:, None], tl.arange(0, SIZE)[None, :]
    pointers = base + first.to(tl.int64) * row_stride + (rows * row_stride + features)
    if TESTED:
        if WIDTH == SIZE:
            return tl.load(pointers, mask=rows < limit - first, other=0.0)
        return tl.load(pointers, mask=(rows < limit - first) & (features < WIDTH), other=0.0)
    if WIDTH == SIZE:
        return tl.load(pointers)
    return tl.load(pointers, mask=(features < WIDTH) & (rows >= 0), other=0.0)


@triton.jit
def store_tile(base, first, row_stride, limit, tile, WIDTH: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr):
    """Write what :func:`load_tile` would read."""
    rows, features = tl.arange(0, ROWS)[:, None], tl.arange(0, SIZE)[None, :]
    pointers = base + first.to(tl.int64) * row_stride + (rows * row_stride + features)
    tl.store(pointers, tile, mask=(rows < limit - first) & (features < WIDTH))


@triton.jit
def load_bounds(bounds, pairs, index, inside, ALL: tl.constexpr):
    """First key, number of keys, first key of the document, number of keys up to the last of its first ones, number of
    keys of the document up to the query, and the last key: of each query of a tile."""
    first = tl.load(bounds + index, mask=inside, other=0)
    stop = tl.load(bounds + pairs + index, mask=inside, other=0)
    count = tl.maximum(stop - first, 0)
    if ALL:
        start = tl.load(bounds + 2 * pairs + index, mask=inside, other=0)
        sinks = tl.load(bounds + 3 * pairs + index, mask=inside, other=0)
        return first, count, start, tl.maximum(sinks - start, 0), tl.maximum(stop - start, 0), stop - 1
    return first, count, first, count, count, stop - 1


@triton.jit
def in_run(column, first, count):
    """``first <= column < first + count`` in one comparison: what lies before wraps around."""
    return (column - first).to(tl.uint32, bitcast=True) < count.to(tl.uint32, bitcast=True)


@triton.jit
def visible(
    column, first, count, start, sinks, whole, last, SINKS: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """Which pairs see each other; of bounds and keys that broadcast."""
    seen = in_run(column, first, count)
    if SINKS:
        seen |= in_run(column, start, sinks)
    if STRIDE > 0:
        back = last // BLOCK - column // BLOCK
        seen |= in_run(column, start, whole) & (back > 0) & (back % STRIDE == 0)
    return seen


@triton.jit
def scores_of(q, k, seen, TESTED: tl.constexpr, PRECISION: tl.constexpr):
    """Products of queries and keys; the sums of hidden pairs begin at minus infinity, and stay there."""
    if TESTED:
        return tl.dot(q, tl.trans(k), tl.where(seen, 0.0, float("-inf")), input_precision=PRECISION)
    return tl.dot(q, tl.trans(k), input_precision=PRECISION)


@triton.jit
def forward_tile(q, k, v, total, highest, mixed, seen, scale, TESTED: tl.constexpr, PRECISION: tl.constexpr):
    """One tile into the running maximum, sum and result of its queries."""
    scores = scores_of(q, k, seen, TESTED, PRECISION)
    higher = tl.maximum(highest, tl.max(scores, 1) * scale)
    # Finite also where nothing was visible yet.
    base = tl.where(higher == float("-inf"), 0.0, higher) if TESTED else higher
    weights = tl.math.exp2(tl.fma(scores, scale, -base[:, None]))
    shrink = tl.math.exp2(highest - base)
    total = total * shrink + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(v.dtype), v, mixed * shrink[:, None], input_precision=PRECISION)
    return total, higher, mixed


@triton.jit
def forward_kernel(
    query, key, value, sink, out, lse, bounds, order, starts, place,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    heads, all_heads, group, queries, keys, lines, section, heads_per_problem, pairs, scale,
    HAS_SINK: tl.constexpr, SINKS: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    line, tile, head, problem = line_and_head(order, lines, all_heads, section, heads_per_problem)
    batch, of_query, of_key = (head // heads).to(tl.int64), head % heads, (head % heads) // group
    query += batch * q_batch + of_query.to(tl.int64) * q_head
    key += batch * k_batch + of_key.to(tl.int64) * k_head
    value += batch * v_batch + of_key.to(tl.int64) * v_head
    row = tile * ROWS
    rows = row + tl.arange(0, ROWS)
    q = load_tile(query, row, q_row, queries, True, WIDTH, SIZE, ROWS)
    if HAS_SINK:
        highest = tl.zeros([ROWS], tl.float32) + tl.load(sink + of_query).to(tl.float32) * LOG2E
        total = tl.full([ROWS], 1.0, tl.float32)
    else:
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, SIZE], tl.float32)
    begin, middle, end = tl.load(starts + 2 * line), tl.load(starts + 2 * line + 1), tl.load(starts + 2 * line + 2)
    for entry in range(begin, middle):
        column = tl.load(place + entry) * COLUMNS
        k = load_tile(key, column, k_row, keys, False, WIDTH, SIZE, COLUMNS)
        v = load_tile(value, column, v_row, keys, False, WIDTH, SIZE, COLUMNS)
        total, highest, mixed = forward_tile(q, k, v, total, highest, mixed, 0, scale, False, PRECISION)
    ALL: tl.constexpr = SINKS or STRIDE > 0
    index = problem.to(tl.int64) * queries + rows
    first, count, start, sinks, whole, last = load_bounds(bounds, pairs, index, rows < queries, ALL)
    for entry in range(middle, end):
        column = tl.load(place + entry) * COLUMNS
        columns = column + tl.arange(0, COLUMNS)
        k = load_tile(key, column, k_row, keys, True, WIDTH, SIZE, COLUMNS)
        v = load_tile(value, column, v_row, keys, True, WIDTH, SIZE, COLUMNS)
        seen = visible(
            columns[None, :], first[:, None], count[:, None], start[:, None], sinks[:, None], whole[:, None],
            last[:, None], SINKS, STRIDE, BLOCK,
        )  # fmt: skip
        total, highest, mixed = forward_tile(q, k, v, total, highest, mixed, seen, scale, True, PRECISION)
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    store_tile(out + batch * o_batch + of_query.to(tl.int64) * o_head, row, o_row, queries, mixed, WIDTH, SIZE, ROWS)
    tl.store(lse + head.to(tl.int64) * queries + rows, (highest + tl.math.log2(total)) / LOG2E, mask=rows < queries)


@triton.jit
def load_lse(lse, index, inside):
    """In powers of two; infinite where a query sees nothing, so that its weights are zero."""
    found = tl.load(lse + index, mask=inside, other=float("-inf"))
    return tl.where(found == float("-inf"), float("inf"), found * LOG2E)


@triton.jit
def query_tile(q, k, v, grad, lse, delta, seen, grad_q, scale, TESTED: tl.constexpr, PRECISION: tl.constexpr):
    """What one tile adds to the gradient of its queries, before the scale."""
    weights = tl.math.exp2(tl.fma(scores_of(q, k, seen, TESTED, PRECISION), scale, -lse[:, None]))
    grad_scores = weights * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision=PRECISION)


@triton.jit
def grad_query_kernel(
    query, key, value, out, grad, grad_lse, lse, delta, grad_query, bounds, order, starts, place,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    g_batch, g_head, g_row, heads, all_heads, group, queries, keys, lines, section, heads_per_problem, pairs, scale,
    HAS_GRAD_LSE: tl.constexpr, SINKS: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    line, tile, head, problem = line_and_head(order, lines, all_heads, section, heads_per_problem)
    batch, of_query, of_key = (head // heads).to(tl.int64), head % heads, (head % heads) // group
    key += batch * k_batch + of_key.to(tl.int64) * k_head
    value += batch * v_batch + of_key.to(tl.int64) * v_head
    of_query = of_query.to(tl.int64)
    row = tile * ROWS
    rows = row + tl.arange(0, ROWS)
    q = load_tile(query + batch * q_batch + of_query * q_head, row, q_row, queries, True, WIDTH, SIZE, ROWS)
    do = load_tile(grad + batch * g_batch + of_query * g_head, row, g_row, queries, True, WIDTH, SIZE, ROWS)
    o = load_tile(out + batch * o_batch + of_query * o_head, row, o_row, queries, True, WIDTH, SIZE, ROWS)
    inside, row_index = rows < queries, head.to(tl.int64) * queries + rows
    deltas = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        deltas -= tl.load(grad_lse + row_index, mask=inside, other=0.0)
    logs = load_lse(lse, row_index, inside)
    deltas = tl.where(logs == float("inf"), 0.0, deltas)  # whatever gradient a row of nothing gets
    tl.store(delta + row_index, deltas, mask=inside)
    grad_q = tl.zeros([ROWS, SIZE], tl.float32)
    begin, middle, end = tl.load(starts + 2 * line), tl.load(starts + 2 * line + 1), tl.load(starts + 2 * line + 2)
    for entry in range(begin, middle):
        column = tl.load(place + entry) * COLUMNS
        k = load_tile(key, column, k_row, keys, False, WIDTH, SIZE, COLUMNS)
        v = load_tile(value, column, v_row, keys, False, WIDTH, SIZE, COLUMNS)
        grad_q = query_tile(q, k, v, do, logs, deltas, 0, grad_q, scale, False, PRECISION)
    ALL: tl.constexpr = SINKS or STRIDE > 0
    index = problem.to(tl.int64) * queries + rows
    first, count, start, sinks, whole, last = load_bounds(bounds, pairs, index, inside, ALL)
    for entry in range(middle, end):
        column = tl.load(place + entry) * COLUMNS
        columns = column + tl.arange(0, COLUMNS)
        k = load_tile(key, column, k_row, keys, True, WIDTH, SIZE, COLUMNS)
        v = load_tile(value, column, v_row, keys, True, WIDTH, SIZE, COLUMNS)
        seen = visible(
            columns[None, :], first[:, None], count[:, None], start[:, None], sinks[:, None], whole[:, None],
            last[:, None], SINKS, STRIDE, BLOCK,
        )  # fmt: skip
        grad_q = query_tile(q, k, v, do, logs, deltas, seen, grad_q, scale, True, PRECISION)
    grad_query += batch * o_batch + of_query * o_head
    store_tile(grad_query, row, o_row, queries, grad_q * (scale / LOG2E), WIDTH, SIZE, ROWS)


@triton.jit
def key_tile(q, k, v, grad, lse, delta, seen, grad_k, grad_v, scale, TESTED: tl.constexpr, PRECISION: tl.constexpr):
    """What one tile adds to the gradients of its keys and values, all of it transposed.

    Each thread holds a quarter of every vector over queries: to begin the sums with them frees their registers."""
    below = tl.zeros([k.shape[0], q.shape[0]], tl.float32) - (lse / scale)[None, :]
    if TESTED:
        below = tl.where(seen, below, float("-inf"))
    weights = tl.math.exp2(tl.dot(k, tl.trans(q), below, input_precision=PRECISION) * scale)
    grad_v = tl.dot(weights.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
    below = tl.zeros([k.shape[0], q.shape[0]], tl.float32) - delta[None, :]
    grad_scores = weights * tl.dot(v, tl.trans(grad), below, input_precision=PRECISION)
    grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit
def grad_key_kernel(
    query, key, value, grad, lse, delta, grad_key, grad_value, bounds, order, starts, place,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    d_batch, d_head, d_row, heads, all_heads, queries, keys, lines, section, heads_per_problem, pairs, scale,
    GROUP: tl.constexpr, SINKS: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    line, tile, head, problem = line_and_head(order, lines, all_heads, section, heads_per_problem)
    batch, of_key = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    query += batch * q_batch + of_key * GROUP * q_head
    grad += batch * g_batch + of_key * GROUP * g_head
    lse += head.to(tl.int64) * GROUP * queries
    delta += head.to(tl.int64) * GROUP * queries
    column = tile * COLUMNS
    k = load_tile(key + batch * k_batch + of_key * k_head, column, k_row, keys, True, WIDTH, SIZE, COLUMNS)
    v = load_tile(value + batch * v_batch + of_key * v_head, column, v_row, keys, True, WIDTH, SIZE, COLUMNS)
    grad_k, grad_v = tl.zeros([COLUMNS, SIZE], tl.float32), tl.zeros([COLUMNS, SIZE], tl.float32)
    begin, middle, end = tl.load(starts + 2 * line), tl.load(starts + 2 * line + 1), tl.load(starts + 2 * line + 2)
    # The query heads that share these keys take turns at each tile.
    for turn in range(begin * GROUP, middle * GROUP):
        row, member = tl.load(place + turn // GROUP) * ROWS, tl.cast(turn % GROUP, tl.int64)
        rows = row + tl.arange(0, ROWS)
        q = load_tile(query + member * q_head, row, q_row, queries, True, WIDTH, SIZE, ROWS)
        do = load_tile(grad + member * g_head, row, g_row, queries, True, WIDTH, SIZE, ROWS)
        inside, row_index = rows < queries, member * queries + rows
        logs = load_lse(lse, row_index, inside)
        deltas = tl.load(delta + row_index, mask=inside, other=0.0)
        grad_k, grad_v = key_tile(q, k, v, do, logs, deltas, 0, grad_k, grad_v, scale, False, PRECISION)
    ALL: tl.constexpr = SINKS or STRIDE > 0
    for turn in range(middle * GROUP, end * GROUP):
        row, member = tl.load(place + turn // GROUP) * ROWS, tl.cast(turn % GROUP, tl.int64)
        rows = row + tl.arange(0, ROWS)
        q = load_tile(query + member * q_head, row, q_row, queries, True, WIDTH, SIZE, ROWS)
        do = load_tile(grad + member * g_head, row, g_row, queries, True, WIDTH, SIZE, ROWS)
        inside, row_index = rows < queries, member * queries + rows
        logs = load_lse(lse, row_index, inside)
        deltas = tl.load(delta + row_index, mask=inside, other=0.0)
        index = problem.to(tl.int64) * queries + rows
        first, count, start, sinks, whole, last = load_bounds(bounds, pairs, index, inside, ALL)
        columns = column + tl.arange(0, COLUMNS)
        seen = visible(
            columns[:, None], first[None, :], count[None, :], start[None, :], sinks[None, :], whole[None, :],
            last[None, :], SINKS, STRIDE, BLOCK,
        )  # fmt: skip
        grad_k, grad_v = key_tile(q, k, v, do, logs, deltas, seen, grad_k, grad_v, scale, True, PRECISION)
    place_of_head = batch * d_batch + of_key * d_head
    store_tile(grad_key + place_of_head, column, d_row, keys, grad_k * (scale / LOG2E), WIDTH, SIZE, COLUMNS)
    store_tile(grad_value + place_of_head, column, d_row, keys, grad_v, WIDTH, SIZE, COLUMNS)
