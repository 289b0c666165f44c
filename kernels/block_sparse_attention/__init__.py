"""Exact softmax attention to the keys that a mask shows, computing only the tiles in which some query sees some key.

Flash attention over listed tiles (Dao et al. 2022, arXiv:2205.14135) for windows, first tokens, strided blocks, packed
documents, hash buckets and kept tokens (Pagliardini et al. 2023, arXiv:2306.01160), with a sink (softmax1, Miller 2023;
learned, Xiao et al. 2023, arXiv:2309.17453). The mask is never formed: a :class:`Sight` says by a few numbers for each
query what it sees. Same inputs, same bits.
"""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightbulb.kernels.block_sparse_attention import plain, reference
from lightbulb.kernels.block_sparse_attention.sight import Sight
from lightbulb.kernels.block_sparse_attention.tiles import Tiles
from lightbulb.kernels.choice import HAS_TRITON, is_reference, takes_triton

if HAS_TRITON:
    from lightbulb.kernels.block_sparse_attention import launch

__all__ = ["Sight", "Tiles", "block_sparse_attention", "takes_tiles"]

CROSSOVER_LENGTH = 512
"""On a GPU, up to this many keys PyTorch's attention with a mask takes less time than listing tiles and three kernels.

Not measured yet: at such lengths both are bound by starting kernels, of which the tiles need about thirty. Set it from
the table of ``python -m lightbulb.kernels.block_sparse_attention.benchmark``."""

CROSSOVER_DENSITY = 0.5
"""On a GPU, with more than this part of the score matrix in listed tiles PyTorch's attention takes less time.

Chosen from published figures: block-sparse kernels reach about 0.7 of the rate of dense ones in the tiles they compute,
and dense causal attention computes half of the matrix. The benchmark prints the density at which both take the same
time on the machine at hand: set it from there."""

_LARGEST_MASK = 1 << 28  # pairs of a mask that is formed after all: 256 MB


def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, tiles: Tiles, sink: Tensor | None = None, detours: bool = True
) -> Tensor:
    """``softmax(q k^T / sqrt(width)) v`` over the visible keys; zero for a query that sees none.

    Args:
        query: ``[batch, heads, queries, width]``.
        key: ``[batch, kv_heads, keys, width]``; each serves ``heads / kv_heads`` consecutive query heads.
        value: as key.
        tiles: of ``problems`` masks, a divisor of ``batch * kv_heads``.
        sink: ``[heads]`` logits of one more key with value zero; zeros make it softmax1.
        detours: PyTorch's dense attention may compute it on a GPU, where that takes less time.

    Returns:
        ``[batch, heads, queries, width]``.
    """
    if detours and sink is None and takes_tiles(query, key) and _is_dense(query, key, tiles):
        return _dense(query, key, value, tiles)
    return _tiled(query, key, value, tiles, sink, with_lse=False)[0]


def attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, tiles: Tiles, sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same, always by tiles; and ``[batch, heads, queries]`` the logarithm of each query's sum of exponentials, the
    sink's included; minus infinity where there is nothing to sum. Both have gradients, so that results over different
    keys can be merged."""
    out, lse = _tiled(query, key, value, tiles, sink, with_lse=True)
    assert lse is not None
    return out, lse


def takes_tiles(query: Tensor, key: Tensor) -> bool:
    """Whether the Triton kernels may compute this."""
    return takes_triton(query, key) and query.shape[3] <= launch.WIDEST


def listed_density(query: Tensor, tiles: Tiles) -> float:
    """The part of the score matrix in the tiles that are computed for such queries."""
    if takes_tiles(query, query):
        return tiles.density(*launch.shapes(query.shape[3], query.dtype).forward[:2])
    return tiles.density(tiles.block_size, tiles.block_size)


def _tiled(
    query: Tensor, key: Tensor, value: Tensor, tiles: Tiles, sink: Tensor | None, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    if is_reference() or not query.numel() or not key.numel():
        return reference.attention(query, key, value, tiles, sink)
    if takes_tiles(query, key):
        return launch.attention(query, key, value, tiles, sink)
    out, lse = plain.attention(query, key, value, tiles.lists, with_lse or sink is not None)
    return (out, lse) if sink is None or lse is None else plain.with_sink(out, lse, sink)


def _is_dense(query: Tensor, key: Tensor, tiles: Tiles) -> bool:
    """Whether PyTorch's attention computes this sooner than the tiles."""
    fits = tiles.problems * tiles.queries * tiles.keys <= _LARGEST_MASK
    if max(tiles.queries, tiles.keys) <= CROSSOVER_LENGTH:
        return fits
    return listed_density(query, tiles) > CROSSOVER_DENSITY and (fits or tiles.is_past)


def _dense(query: Tensor, key: Tensor, value: Tensor, tiles: Tiles) -> Tensor:
    """PyTorch's attention, with a mask unless it is the past."""
    batch, heads, queries, _ = query.shape
    grouped = heads != key.shape[1]
    if tiles.is_past:
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    mask = tiles.sight.mask(tiles.keys, tiles.block_size)
    blind = ~mask.any(2, keepdim=True)
    mask, blind = (
        t.repeat_interleave(batch * heads // len(t), 0).view(batch, heads, queries, -1) if len(t) > 1 else t[None]
        for t in (mask | blind, blind)  # a query without keys would divide zero by zero
    )
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)
    return mixed.masked_fill(blind, 0)
