"""A layer of attention against x-transformers': norm, attention with rotary positions, residual; forward and backward.

The peer runs at its best: with and without PyTorch's fused attention, whichever is faster.
"""

import torch
from x_transformers import Decoder

from lightbulb.mixers.base import Context
from lightbulb.mixers.token.attention import AttentionConfig
from lightbulb.nn.norm import RMSNorm
from lightbulb.nn.parameter import Init, initialise
from mixer_peers.timing import forward_backward, interleaved

DIM, HEADS, LENGTH, BATCH = 256, 8, 512, 4


class Layer(torch.nn.Module):
    """``x + attention(norm(x))``, ``[length, batch, dim]``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm(DIM, 1e-6)
        self.attention = AttentionConfig(num_heads=HEADS).build(DIM, LENGTH, Init(0.02, 0.02))
        self.context = Context(torch.arange(LENGTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attention(self.norm(x), self.context)[0]


def peer(flash: bool) -> torch.nn.Module:
    """One attention layer of x-transformers with the same parts, ``[batch, length, dim]``."""
    return Decoder(
        dim=DIM,
        depth=1,
        heads=HEADS,
        attn_dim_head=DIM // HEADS,
        custom_layers=("a",),
        use_rmsnorm=True,
        rotary_pos_emb=True,
        rotary_emb_dim=DIM // HEADS,
        pre_norm_has_final_norm=False,
        attn_flash=flash,
    )


def measure(rounds: int) -> dict[str, float]:
    """How many times longer the peer takes."""
    torch.manual_seed(0)
    ours = Layer()
    initialise(ours, 0)
    x = torch.randn(LENGTH, BATCH, DIM, requires_grad=True)
    theirs = x.detach().transpose(0, 1).contiguous().requires_grad_()
    peers = {str(flash): peer(flash) for flash in (False, True)}
    runs = {name: forward_backward(module, lambda module=module: module(theirs)) for name, module in peers.items()}
    seconds = interleaved({"ours": forward_backward(ours, lambda: ours(x))} | runs, rounds)
    best = min(seconds[name] for name in peers)
    return {"attention_vs_xtransformers": best / seconds["ours"]}
