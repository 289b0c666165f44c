"""Mamba-2 against transformers' Mamba2Mixer and mambapy, retention against x-transformers' attention; forward and
backward.

Mamba: equal widths, heads, states and convolutions. transformers runs the path it takes without mamba-ssm, with the
chunks that suit it best; mambapy's module is Mamba-1 with its parallel scan, compared at its own state of 16 (its
Mamba-2 needs mamba-ssm). Retention: a block of norm, mixer and residual, with values as wide as keys; its gate makes it
five matrices (328k parameters with the norm) where attention has four (262k).
"""

from mambapy.mamba import MambaBlock
from mambapy.mamba import MambaConfig as MambapyConfig
from torch import Tensor, nn
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from lightbulb.mixers.token.mamba import MambaConfig
from lightbulb.mixers.token.retention import RetentionConfig
from mixer_peers.layers import DIM, HEADS, Layer, attention_peers, ratio

STATE = 64


def measure(rounds: int) -> dict[str, float]:
    """How many times longer each peer takes."""
    retention = RetentionConfig(num_heads=HEADS, value_factor=1)
    mambapy = MambaBlock(MambapyConfig(d_model=DIM, n_layers=1))
    return {
        "mamba_vs_hf": ratio(_Mixer(MambaConfig(state_dim=STATE)), _transformers(), rounds),
        "mamba_vs_mambapy": ratio(_Mixer(MambaConfig(state_dim=16)), [mambapy], rounds),
        "retention_vs_xtransformers": ratio(Layer(retention), attention_peers(), rounds),
    }


class _Mixer(Layer):
    """The mixer alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x, self.context)[0]


def _transformers() -> list[nn.Module]:
    shape = {"hidden_size": DIM, "num_heads": HEADS, "head_dim": 2 * DIM // HEADS, "state_size": STATE, "n_groups": 1}
    return [Mamba2Mixer(Mamba2Config(**shape, chunk_size=size), 0) for size in (16, 32, 64)]
