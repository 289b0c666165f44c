"""Which kernel computes an attention of whole sequences."""

from typing import Literal

from torch import Tensor

from lightbulb.nn.attention import self_attention
from lightbulb.nn.attention_mask import Visibility
from lightbulb.nn.block_sparse import block_sparse_attention, tiles_of
from lightbulb.nn.block_sparse import obstacle as tiles_obstacle
from lightbulb.nn.flash import flash_self_attention, obstacle
from lightbulb.nn.flex import flex_self_attention
from lightbulb.ops import takes_tiles

Backend = Literal["auto", "sdpa", "flex", "flash", "tiles"]
"""``sdpa``: PyTorch's scaled_dot_product_attention, or blocks of products on CPU; ``flex``: FlexAttention; ``flash``:
flash-attn; ``tiles``: LightBulb's block-sparse kernels; ``auto``: on CUDA flash-attn where it is installed and can,
else tiles where they can, or FlexAttention, for windows, documents and sinks; as ``sdpa`` for the rest."""


def whole_attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Visibility, sink: Tensor | None, backend: Backend
) -> Tensor:
    """Softmax attention of whole sequences, ``[batch, heads, length, width]``.

    Args:
        query: ``[batch, heads, length, width]``.
        key: ``[batch, kv_heads, length, width]``.
        value: as key.
        seen: which tokens see which.
        sink: ``[heads]`` logits of one more key with value zero, or None.
        backend: the kernel wanted.

    Raises:
        ValueError: the kernel cannot do this.
    """
    if backend in ("auto", "flash"):
        against = obstacle(query, seen, sink)
        if against is None:
            return flash_self_attention(query, key, value, seen)
        if backend == "flash":
            raise ValueError(f"backend 'flash': {against}; set backend: auto")
    if backend == "tiles" or backend == "auto" and takes_tiles(query, key) and (sink is not None or not seen.plain):
        against = tiles_obstacle(seen)
        if against is None:
            return block_sparse_attention(query, key, value, tiles_of(seen), sink)
        if backend == "tiles":
            raise ValueError(f"backend 'tiles': {against}; set backend: auto")
    rule = seen.rule
    skips = not seen.plain and (rule.window is not None or rule.max_distance is not None)
    on_cuda = query.device.type == "cuda"
    if backend == "flex" or on_cuda and (sink is not None or backend == "auto" and skips):
        return flex_self_attention(query, key, value, seen, sink)
    reach = rule.reach if seen.consecutive else None
    return self_attention(query, key, value, None if seen.plain else seen, rule.causal, reach, sink)
