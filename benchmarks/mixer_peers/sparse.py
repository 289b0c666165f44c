"""Block-sparse attention and Infini-attention: against PyTorch's dense attention, and how their time grows."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightbulb.mixers.base import TokenMixerConfig
from lightbulb.mixers.token.attention import AttentionConfig
from lightbulb.mixers.token.block_sparse import BlockSparseConfig, band_tiles
from lightbulb.mixers.token.infini import InfiniConfig
from lightbulb.ops import Tiles, block_sparse_attention
from mixer_peers.growth import ratio, seconds_per_token
from mixer_peers.timing import interleaved

_LENGTH, _HEADS, _WIDTH = 4096, 4, 64
_DIM = 256


def measure(rounds: int) -> dict[str, float]:
    """``block_sparse_vs_dense_4k`` is how many times faster than dense causal attention a window of 256 is at 4096
    positions, and ``density`` the part of the dense causal tiles it computes; ``growth_...`` is the time of a token at
    8192 positions over that at 512, of the whole mixer."""
    config = BlockSparseConfig(num_heads=_HEADS, window=256)
    tiles = band_tiles(config, _LENGTH, torch.device("cpu"))
    seconds = interleaved(
        {
            "dense": _step(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True)),
            "sparse": _step(lambda q, k, v: block_sparse_attention(q, k, v, tiles)),
        },
        rounds,
    )
    found = {"block_sparse_vs_dense_4k": seconds["dense"] / seconds["sparse"], "density": _density(tiles)}
    return found | {f"growth_{name}": ratio(times) for name, times in growth(max(1, rounds // 2)).items()}


def growth(rounds: int) -> dict[str, dict[int, float]]:
    """Mixer to length to seconds per token, forward and backward."""
    mixers: dict[str, TokenMixerConfig] = {
        "block_sparse": BlockSparseConfig(num_heads=_HEADS, window=256),
        "infini": InfiniConfig(num_heads=_HEADS, segment_length=256),
        "attention": AttentionConfig(num_heads=_HEADS),
    }
    return {name: seconds_per_token(config, _DIM, rounds=rounds) for name, config in mixers.items()}


def _density(tiles: Tiles) -> float:
    """Listed tiles over those of dense causal attention."""
    return len(tiles.lists.column) / (tiles.lists.query_tiles * (tiles.lists.query_tiles + 1) / 2)


def _step(attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, _HEADS, _LENGTH, _WIDTH, generator=generator, requires_grad=True) for _ in range(3)]
    grad = torch.randn(1, _HEADS, _LENGTH, _WIDTH, generator=generator)
    return lambda: torch.autograd.grad(attention(*inputs), inputs, grad)
