"""Block-sparse attention in the dtype in which this machine multiplies fastest, and masks for it."""

from torch import Tensor

from lightbulb import ops
from lightbulb.nn.precision import product_dtype
from lightbulb.ops import Tiles


def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, tiles: Tiles, sink: Tensor | None = None
) -> Tensor:
    """As :func:`lightbulb.ops.block_sparse_attention`."""
    dtype = product_dtype(query)
    inputs = (t.to(dtype) for t in (query, key, value))
    return ops.block_sparse_attention(*inputs, tiles, sink).to(query.dtype)
