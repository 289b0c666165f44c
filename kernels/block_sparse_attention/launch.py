"""Starting the Triton kernels: tiles by head size, gradients by autograd."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightbulb.kernels.block_sparse_attention import kernel
from lightbulb.kernels.block_sparse_attention.kernel import LOG2E
from lightbulb.kernels.block_sparse_attention.tiles import Schedule, Tiles

WIDEST = 256
"""Largest width of a head."""

_CACHE = 32 << 20  # bytes of keys and values that stay in a GPU's L2 cache (50 MB on an H100) next to all else


class Shape(NamedTuple):
    """How one kernel computes.

    Attributes:
        rows: queries of a tile.
        columns: keys of a tile.
        warps: of a program.
        stages: tiles that are loaded ahead, and the one computed.
    """

    rows: int
    columns: int
    warps: int
    stages: int


class Shapes(NamedTuple):
    """By kernel; tiles of one shape share their lists."""

    forward: Shape
    grad_query: Shape
    grad_key: Shape


# By bytes of a number and padded width. Largest tiles that leave (next to) no register in memory when compiled for a
# Hopper, two or three of them in its shared memory; the forward's are PyTorch's own choices for FlexAttention there.
_SHAPES = {
    (2, 64): Shapes(Shape(128, 64, 4, 3), Shape(128, 64, 8, 3), Shape(64, 128, 8, 3)),
    (2, 128): Shapes(Shape(128, 64, 8, 3), Shape(128, 64, 8, 2), Shape(64, 128, 8, 2)),
    (2, 256): Shapes(Shape(64, 64, 8, 2), Shape(64, 32, 8, 2), Shape(32, 64, 8, 2)),
    (4, 64): Shapes(Shape(64, 32, 4, 2), Shape(64, 32, 4, 2), Shape(32, 64, 4, 2)),
    (4, 128): Shapes(Shape(64, 32, 8, 2), Shape(64, 32, 8, 2), Shape(32, 64, 8, 2)),
    (4, 256): Shapes(Shape(32, 32, 8, 2), Shape(32, 32, 8, 2), Shape(32, 32, 8, 2)),
}


def shapes(width: int, dtype: torch.dtype) -> Shapes:
    """The tiles for heads of this width."""
    return _SHAPES[dtype.itemsize, min(size for _, size in _SHAPES if size >= width)]


def padded(width: int) -> int:
    """The width that products have."""
    return max(16, triton.next_power_of_2(width))


def attention(query: Tensor, key: Tensor, value: Tensor, tiles: Tiles, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result, and the log-sum-exp in float32; shapes as in
    :func:`lightbulb.kernels.block_sparse_attention.block_sparse_attention`."""
    return _Attention.apply(query, key, value, sink, tiles)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sink: Tensor | None, tiles: Tiles
    ) -> tuple[Tensor, Tensor]:
        query, key, value = (_rows(t) for t in (query, key, value))
        out, lse = forward(query, key, value, sink, tiles)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, sink, out, lse)
        ctx.tiles = tiles
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, sink, out, lse = ctx.saved_tensors
        grad = torch.zeros_like(out) if grad is None else _rows(grad)
        grads, delta = backward(query, key, value, out, lse, grad, grad_lse, ctx.tiles)
        return *grads, None if sink is None else _grad_sink(sink, lse, delta), None


def _grad_sink(sink: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """A sink has the gradient of a key with value zero: minus its weight times what the others lose."""
    weights = (sink.float()[:, None] - lse).exp().masked_fill(lse == float("-inf"), 0)
    return -(weights * delta).sum((0, 2)).to(sink.dtype)


def forward(query: Tensor, key: Tensor, value: Tensor, sink: Tensor | None, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """The result and the log-sum-exp ``[batch, heads, queries]``."""
    out, lse = _empty(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    shape = shapes(query.shape[3], query.dtype).forward
    schedule = tiles.schedule(shape.rows, shape.columns)
    heads = query.shape[0] * query.shape[1]
    kernel.forward_kernel[(schedule.lines * heads,)](
        *(query, key, value, query if sink is None else sink, out, lse, tiles.bounds, *schedule[:3]),
        *(number for t in (query, key, value, out) for number in t.stride()[:3]),
        *(query.shape[1], heads, query.shape[1] // key.shape[1], *_sizes(tiles, schedule, heads, key)),
        HAS_SINK=sink is not None,
        **_constants(query, tiles, shape),
    )
    return out, lse


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    grad_lse: Tensor | None,
    tiles: Tiles,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Gradients of query, key and value; and ``[batch, heads, queries]`` what each score's gradient loses by being part
    of a softmax: ``grad . out``, less the gradient of the log-sum-exp."""
    grad_query, delta = _empty(query), torch.empty_like(lse)
    shape = shapes(query.shape[3], query.dtype).grad_query
    schedule = tiles.schedule(shape.rows, shape.columns)
    heads = query.shape[0] * query.shape[1]
    kernel.grad_query_kernel[(schedule.lines * heads,)](
        *(query, key, value, out, grad, lse if grad_lse is None else grad_lse.contiguous(), lse, delta, grad_query),
        *(tiles.bounds, *schedule[:3]),
        *(number for t in (query, key, value, out, grad) for number in t.stride()[:3]),
        *(query.shape[1], heads, query.shape[1] // key.shape[1], *_sizes(tiles, schedule, heads, key)),
        HAS_GRAD_LSE=grad_lse is not None,
        **_constants(query, tiles, shape),
    )
    grad_key, grad_value = _empty(key), _empty(value)
    shape = shapes(query.shape[3], query.dtype).grad_key
    schedule = tiles.schedule(shape.rows, shape.columns, by_key=True)
    heads = key.shape[0] * key.shape[1]
    kernel.grad_key_kernel[(schedule.lines * heads,)](
        *(query, key, value, grad, lse, delta, grad_key, grad_value, tiles.bounds, *schedule[:3]),
        *(number for t in (query, key, value, grad, grad_key) for number in t.stride()[:3]),
        *(key.shape[1], heads, *_sizes(tiles, schedule, heads, query)),
        GROUP=query.shape[1] // key.shape[1],
        **_constants(query, tiles, shape),
    )
    return (grad_query, grad_key, grad_value), delta


def _sizes(tiles: Tiles, schedule: Schedule, heads: int, read: Tensor) -> tuple[int | float, ...]:
    """The kernels' arguments from ``queries`` to ``scale``, for programs of this many heads, which read two tensors
    like ``read``: keys and values, or queries and gradients."""
    section = max(1, min(heads, _CACHE * heads // (2 * read.numel() * read.element_size())))
    pairs = tiles.problems * tiles.queries
    scale = read.shape[3] ** -0.5 * LOG2E.value
    return tiles.queries, tiles.keys, schedule.lines, section, heads // tiles.problems, pairs, scale


def _constants(query: Tensor, tiles: Tiles, shape: Shape) -> dict[str, Any]:
    stride, width = tiles.simple.stride or 0, query.shape[3]
    return {
        "SINKS": tiles.simple.sinks is not None,
        "STRIDE": stride,
        "BLOCK": tiles.block_size if stride else 1,
        "WIDTH": width,
        "SIZE": padded(width),
        "ROWS": shape.rows,
        "COLUMNS": shape.columns,
        # As torch's own products of float32.
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        "num_warps": shape.warps,
        "num_stages": shape.stages,
    }


def _rows(x: Tensor) -> Tensor:
    """With the numbers of a row side by side."""
    return x if x.stride(3) == 1 else x.contiguous()


def _empty(x: Tensor) -> Tensor:
    """Of the shape of ``x [batch, heads, length, width]``; in memory ``[length, batch, heads, width]``, which is what
    the projections before and behind an attention read."""
    batch, heads, length, width = x.shape
    return x.new_empty(length, batch, heads, width).permute(1, 2, 0, 3)
