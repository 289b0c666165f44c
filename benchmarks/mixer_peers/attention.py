"""A layer of attention against x-transformers': norm, attention with rotary positions, residual; forward and backward.

The peer runs at its best: with and without PyTorch's fused attention, whichever is faster.
"""

from lightbulb.mixers.token.attention import AttentionConfig
from mixer_peers.layers import HEADS, Layer, attention_peers, ratio


def measure(rounds: int) -> dict[str, float]:
    """How many times longer the peer takes."""
    ours = Layer(AttentionConfig(num_heads=HEADS))
    return {"attention_vs_xtransformers": ratio(ours, attention_peers(), rounds)}
