"""One layer: pre-norm residual around a token mixer, then around a channel mixer."""

from typing import Annotated

from torch import Tensor, nn

from lightbulb.config import Config, Cost, Registered
from lightbulb.mixers.base import ChannelMixerConfig, Context, DecodeState, TokenMixerConfig
from lightbulb.nn.norm import RMSNorm
from lightbulb.nn.parameter import Init


class BlockConfig(Config):
    """A token mixer and a channel mixer, each picked by ``type:``."""

    token: Annotated[TokenMixerConfig, Registered("token_mixer")]
    """Mixes along the sequence."""
    channel: Annotated[ChannelMixerConfig, Registered("channel_mixer")]
    """Mixes along the features."""

    def build(self, dim: int, context_length: int, norm_eps: float, dropout: float, init: Init) -> "Block":
        """The module, uninitialised."""
        return Block(self, dim, context_length, norm_eps, dropout, init)

    def cost(self, dim: int, context_length: int) -> Cost:
        """Both mixers and both norms."""
        return self.token.cost(dim, context_length) + self.channel.cost(dim) + Cost(2 * dim, 2 * dim, 0.0)


class Block(nn.Module):
    """``x + token(norm(x))``, then ``x + channel(norm(x))``, with dropout on what is added."""

    def __init__(self, config: BlockConfig, dim: int, context_length: int, norm_eps: float, dropout: float, init: Init):
        super().__init__()
        self.dropout = dropout
        self.token_norm = RMSNorm(dim, norm_eps)
        self.token = config.token.build(dim, context_length, init)
        self.channel_norm = RMSNorm(dim, norm_eps)
        self.channel = config.channel.build(dim, init)

    def forward(
        self, x: Tensor, context: Context, state: DecodeState | None = None
    ) -> tuple[Tensor, DecodeState | None]:
        """``x [length, batch, dim]`` and the layer's decode state, both updated."""
        here = context.at("token")
        mixed, state = self.token(self.token_norm(x), here, state)
        x = x + here.dropout(mixed, self.dropout)
        here = context.at("channel")
        return x + here.dropout(self.channel(self.channel_norm(x), here), self.dropout), state
