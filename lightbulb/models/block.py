"""One layer: pre-norm residual around a token mixer, then around a channel mixer."""

from typing import Annotated, Any

import torch
from torch import Tensor, nn

from lightbulb.config import Config, Cost, Registered
from lightbulb.mixers.base import ChannelMixerConfig, Context, TokenMixerConfig
from lightbulb.nn.norm import RMSNorm
from lightbulb.nn.parameter import Init

BlockState = dict[str, Any]
"""Decode states of a block's mixers, by part."""


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

    def check_sequence_parallel(self, tensor: int, ulysses: int, sequence: bool) -> None:
        """Raise ValueError, naming field, value and fix, when the block cannot run on split sequences."""

    def routers(self) -> dict[str, int]:
        """Module name inside the block of each router, with its experts."""
        return {
            f"{part}.{name}": num_experts
            for part, config in (("token", self.token), ("channel", self.channel))
            for name, num_experts in config.routers().items()
        }


class Block(nn.Module):
    """``x + token(norm(x))``, then ``x + channel(norm(x))``, with dropout on what is added."""

    def __init__(self, config: BlockConfig, dim: int, context_length: int, norm_eps: float, dropout: float, init: Init):
        super().__init__()
        self.dropout = dropout
        self.token_norm = RMSNorm(dim, norm_eps)
        self.token = config.token.build(dim, context_length, init)
        self.channel_norm = RMSNorm(dim, norm_eps)
        self.channel = config.channel.build(dim, init)

    def forward(self, x: Tensor, context: Context, state: BlockState | None = None) -> tuple[Tensor, BlockState | None]:
        """``x [length, batch, dim]`` and the mixers' decode states, all updated."""
        here = context.at("token")
        mixed, token_state = self.token(self.token_norm(x), here, None if state is None else state["token"])
        x = x + here.dropout(mixed, self.dropout)
        here = context.at("channel")
        mixed, channel_state = self.channel(self.channel_norm(x), here, None if state is None else state["channel"])
        x = x + here.dropout(mixed, self.dropout)
        return x, None if state is None else state | {"token": token_state, "channel": channel_state}

    def init_state(self, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype) -> BlockState:
        """Empty decode states of both mixers."""
        sizes = batch_size, max_length, device, dtype
        return {"token": self.token.init_state(*sizes), "channel": self.channel.init_state(*sizes)}
