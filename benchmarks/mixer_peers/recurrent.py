"""Mamba-2 against transformers' Mamba2Mixer and mambapy, retention against x-transformers' attention; forward and
backward.

Mamba: equal widths, heads, states and convolutions. transformers runs the path it takes without mamba-ssm, with the
chunks that suit it best; mambapy's module is Mamba-1 with its parallel scan, compared at its own state of 16 (its
Mamba-2 needs mamba-ssm). Retention: a block of norm, mixer and residual, with values as wide as keys; its gate makes it
five matrices (328k parameters with the norm) where attention has four (262k).
"""

import torch
from mambapy.mamba import MambaBlock
from mambapy.mamba import MambaConfig as MambapyConfig
from torch import Tensor, nn
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from x_transformers import Decoder

from lightbulb.mixers.base import Context, TokenMixerConfig
from lightbulb.mixers.token.mamba import MambaConfig
from lightbulb.mixers.token.retention import RetentionConfig
from lightbulb.nn.norm import RMSNorm
from lightbulb.nn.parameter import Init, initialise
from mixer_peers.timing import forward_backward, interleaved

DIM, LENGTH, BATCH = 256, 512, 4
HEADS = 8
STATE = 64


class Layer(nn.Module):
    """``x + mixer(norm(x))``, ``[length, batch, dim]``."""

    def __init__(self, config: TokenMixerConfig):
        super().__init__()
        self.norm = RMSNorm(DIM, 1e-6)
        self.mixer = config.build(DIM, LENGTH, Init(0.02, 0.02))
        self.context = Context(torch.arange(LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x), self.context)[0]


def measure(rounds: int) -> dict[str, float]:
    """How many times longer each peer takes."""
    retention = RetentionConfig(num_heads=HEADS, value_factor=1)
    mambapy = MambaBlock(MambapyConfig(d_model=DIM, n_layers=1))
    return {
        "mamba_vs_hf": _ratio(_Mixer(MambaConfig(state_dim=STATE)), _transformers(), rounds),
        "mamba_vs_mambapy": _ratio(_Mixer(MambaConfig(state_dim=16)), [mambapy], rounds),
        "retention_vs_xtransformers": _ratio(Layer(retention), [_attention(flash) for flash in (False, True)], rounds),
    }


class _Mixer(Layer):
    """The mixer alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x, self.context)[0]


def _ratio(ours: nn.Module, peers: list[nn.Module], rounds: int) -> float:
    """Time of the fastest of the peers, which take ``[batch, length, dim]``, over ours."""
    torch.manual_seed(0)
    initialise(ours, 0)
    x = torch.randn(LENGTH, BATCH, DIM, requires_grad=True)
    theirs = x.detach().transpose(0, 1).contiguous().requires_grad_()
    runs = {str(i): forward_backward(peer, lambda peer=peer: peer(theirs)) for i, peer in enumerate(peers)}
    seconds = interleaved({"ours": forward_backward(ours, lambda: ours(x))} | runs, rounds)
    return min(seconds[name] for name in runs) / seconds["ours"]


def _transformers() -> list[nn.Module]:
    shape = {"hidden_size": DIM, "num_heads": HEADS, "head_dim": 2 * DIM // HEADS, "state_size": STATE, "n_groups": 1}
    return [Mamba2Mixer(Mamba2Config(**shape, chunk_size=size), 0) for size in (16, 32, 64)]


def _attention(flash: bool) -> nn.Module:
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
