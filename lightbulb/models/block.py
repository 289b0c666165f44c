"""One layer: pre-norm residual around a token mixer, then around a channel mixer, if it has one."""

from typing import Annotated, Any

import torch
from torch import Tensor, nn

from lightbulb.config import Config, Cost, Registered
from lightbulb.mixers.base import ChannelMixer, ChannelMixerConfig, Context, TokenMixerConfig
from lightbulb.models.scaling import scaled
from lightbulb.nn.norm import Norms
from lightbulb.nn.parameter import Init

BlockState = dict[str, Any]
"""Decode states of a block's mixers, by part."""


class BlockConfig(Config):
    """A token mixer and a channel mixer, each picked by ``type:``."""

    token: Annotated[TokenMixerConfig, Registered("token_mixer")]
    """Mixes along the sequence."""
    channel: Annotated[ChannelMixerConfig, Registered("channel_mixer")] | None = None
    """Mixes along the features; None for nothing, as in Mamba."""

    def build(self, dim: int, context_length: int, norms: Norms, dropout: float, init: Init) -> "Block":
        """The module, uninitialised."""
        return Block(self, dim, context_length, norms, dropout, init)

    def cost(self, dim: int, context_length: int, norms: Norms) -> Cost:
        """The mixers and a norm for each."""
        norm = Cost(norms.params(dim), norms.params(dim), 0.0)
        token = self.token.cost(dim, context_length) + norm
        return token if self.channel is None else token + self.channel.cost(dim) + norm

    def mixers(self) -> dict[str, TokenMixerConfig | ChannelMixerConfig]:
        """The mixers by the name of their field."""
        return {"token": self.token} | ({} if self.channel is None else {"channel": self.channel})

    def check_sequence_parallel(self, tensor: int, ulysses: int, sequence: bool) -> None:
        """Raise ValueError, naming field, value and fix, when the block cannot run on split sequences."""

    def routers(self) -> dict[str, int]:
        """Module name inside the block of each router, with its experts."""
        return {
            f"{part}.{name}": num_experts
            for part, config in self.mixers().items()
            for name, num_experts in config.routers().items()
        }


class Block(nn.Module):
    """``x + token(norm(x))``, then ``x + channel(norm(x))``, with dropout on what is added."""

    def __init__(self, config: BlockConfig, dim: int, context_length: int, norms: Norms, dropout: float, init: Init):
        super().__init__()
        self.dropout = dropout
        self.residual_scale = 1.0
        """Factor of what the mixers add (:mod:`lightbulb.models.scaling`)."""
        self.token_norm = norms.build(dim)
        self.token = config.token.build(dim, context_length, init)
        self.channel: ChannelMixer | None = None
        if config.channel is not None:
            self.channel_norm = norms.build(dim)
            self.channel = config.channel.build(dim, init)

    def forward(self, x: Tensor, context: Context, state: BlockState | None = None) -> tuple[Tensor, BlockState | None]:
        """``x [length, batch, dim]`` and the mixers' decode states, all updated."""
        past = state or {"token": None, "channel": None}
        here = context.at("token")
        mixed, token_state = self.token(self.token_norm(x), here, past["token"])
        mixed = scaled(here.dropout(mixed, self.dropout), self.residual_scale)
        channel_state = past["channel"]
        if self.channel is None:
            x = x + mixed
        else:
            normed, x = self.channel_norm.add(x, mixed)
            here = context.at("channel")
            mixed, channel_state = self.channel(normed, here, channel_state)
            x = x + scaled(here.dropout(mixed, self.dropout), self.residual_scale)
        return x, None if state is None else {"token": token_state, "channel": channel_state}

    def init_state(self, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype) -> BlockState:
        """Empty decode states of the mixers."""
        sizes = batch_size, max_length, device, dtype
        channel = {} if self.channel is None else self.channel.init_state(*sizes)
        return {"token": self.token.init_state(*sizes), "channel": channel}
