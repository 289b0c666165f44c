"""Layers to compare: a norm, one of our mixers and a residual, and x-transformers' attention with the same parts."""

import torch
from torch import Tensor, nn
from x_transformers import Decoder

from lightbulb.mixers.base import Context, TokenMixerConfig
from lightbulb.nn.norm import RMSNorm
from lightbulb.nn.parameter import Init, initialise
from mixer_peers.timing import forward_backward, interleaved

DIM, HEADS, LENGTH, BATCH = 256, 8, 512, 4


class Layer(nn.Module):
    """``x + mixer(norm(x))``, ``[length, batch, dim]``."""

    def __init__(self, config: TokenMixerConfig):
        super().__init__()
        self.norm = RMSNorm(DIM, 1e-6)
        self.mixer = config.build(DIM, LENGTH, Init(0.02, 0.02))
        self.context = Context(torch.arange(LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x), self.context)[0]


def attention_peers() -> list[nn.Module]:
    """x-transformers' layer, ``[batch, length, dim]``, without and with PyTorch's fused attention."""
    return [
        Decoder(
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
        for flash in (False, True)
    ]


def ratio(ours: nn.Module, peers: list[nn.Module], rounds: int) -> float:
    """Time of the fastest of the peers, which take ``[batch, length, dim]``, over ours; forward and backward."""
    torch.manual_seed(0)
    initialise(ours, 0)
    x = torch.randn(LENGTH, BATCH, DIM, requires_grad=True)
    theirs = x.detach().transpose(0, 1).contiguous().requires_grad_()
    runs = {str(i): forward_backward(peer, lambda peer=peer: peer(theirs)) for i, peer in enumerate(peers)}
    seconds = interleaved({"ours": forward_backward(ours, lambda: ours(x))} | runs, rounds)
    return min(seconds[name] for name in runs) / seconds["ours"]
