"""The two contracts every layer part fulfils, and the context they share.

Activations are ``[length, batch, dim]`` everywhere between embedding and head (Megatron's order: sequence
parallelism splits the first dimension). Tokens, labels and document ids are ``[batch, length]``.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightbulb.config import Config, Cost
from lightbulb.nn.parameter import Init

DecodeState = dict[str, Tensor]
"""What one layer carries from token to token; every tensor has the batch as its first dimension, so that beam
search can reorder any state without knowing the mixer."""


@dataclass(frozen=True)
class Context:
    """What all layers of one forward pass share.

    Attributes:
        positions: ``[length]`` positions of the tokens in ``x``, from 0 at the start of the context.
        document_ids: ``[batch, length]`` or None; when given, no token may see another document.
    """

    positions: Tensor
    document_ids: Tensor | None = None


class TokenMixerConfig(Config, ABC):
    """Config of a part that mixes along the sequence."""

    type: str

    @abstractmethod
    def build(self, dim: int, context_length: int, init: Init) -> "TokenMixer":
        """The module, uninitialised; the model fills its parameters."""

    @abstractmethod
    def cost(self, dim: int, context_length: int) -> Cost:
        """Parameters and FLOPs per token, averaged over a full context."""

    def check_tensor_parallel(self, degree: int) -> None:
        """Raise ValueError, naming field, value and fix, when the part cannot be split over ``degree`` ranks."""


class TokenMixer(nn.Module, ABC):
    """Mixes along the sequence; causal unless its config says otherwise."""

    @abstractmethod
    def forward(
        self, x: Tensor, context: Context, state: DecodeState | None = None
    ) -> tuple[Tensor, DecodeState | None]:
        """``x [length, batch, dim]`` to the same shape. With a state, ``x`` continues the sequence the state
        holds, and the returned state includes it; prefill then single steps must equal one full pass."""

    @abstractmethod
    def init_state(self, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype) -> DecodeState:
        """An empty decode state for sequences up to ``max_length``."""


class ChannelMixerConfig(Config, ABC):
    """Config of a part that mixes along the features of each token."""

    type: str

    @abstractmethod
    def build(self, dim: int, init: Init) -> "ChannelMixer":
        """The module, uninitialised; the model fills its parameters."""

    @abstractmethod
    def cost(self, dim: int) -> Cost:
        """Parameters and FLOPs per token."""

    def check_tensor_parallel(self, degree: int) -> None:
        """Raise ValueError, naming field, value and fix, when the part cannot be split over ``degree`` ranks."""

    def check_expert_parallel(self, degree: int) -> None:
        """Raise ValueError, naming field, value and fix, when the experts cannot be split over ``degree`` ranks."""


class ChannelMixer(nn.Module, ABC):
    """Mixes along the features; may route tokens to experts."""

    @abstractmethod
    def forward(self, x: Tensor, context: Context) -> Tensor:
        """``x [length, batch, dim]`` to the same shape."""


ModelState = dict[str, Any]
"""Decode state of a whole model: layer name to :data:`DecodeState`, plus ``"position"`` (an int)."""
