"""The two contracts every layer part fulfils, and the context they share.

Activations are ``[length, batch, dim]`` everywhere between embedding and head (Megatron's order: sequence
parallelism splits the first dimension). Tokens, labels and document ids are ``[batch, length]``. Under Ulysses and
sequence parallelism a rank's activations between mixers are the consecutive positions ``context.rows``.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightbulb.config import Config, Cost
from lightbulb.nn.noise import Noise
from lightbulb.nn.parameter import Init
from lightbulb.nn.recompute import Recompute

DecodeState = dict[str, Tensor]
"""What one layer carries from token to token; every tensor has the batch as its first dimension, so that beam
search can reorder any state without knowing the mixer."""


@dataclass(frozen=True)
class Context:
    """What all layers of one forward pass share.

    Attributes:
        positions: ``[length]`` positions of all tokens, from 0 at the start of the context.
        document_ids: ``[batch, length]`` or None; when given, no token may see another document.
        rows: the positions this rank holds between mixers.
        noise: source of dropout and jitter, or None outside training.
        place: name of the part that reads this context, for its noise.
        recompute: what the backward runs again.
    """

    positions: Tensor
    document_ids: Tensor | None = None
    rows: slice = field(default_factory=lambda: slice(None))
    noise: Noise | None = None
    place: str = ""
    recompute: Recompute = "none"

    def at(self, name: str) -> "Context":
        """The context of a part inside this one."""
        return self if self.noise is None else replace(self, place=f"{self.place}.{name}" if self.place else name)

    def uniform(self, x: Tensor) -> Tensor | None:
        """Noise for each feature of ``x [rows, batch, width]``, uniform on [0, 1); None outside training."""
        if self.noise is None:
            return None
        return self.noise.uniform(self.place, self.rows, x.shape[-1], x.device)

    def dropout(self, x: Tensor, probability: float) -> Tensor:
        """Set features of ``x [rows, batch, width]`` to zero and scale up the rest (Srivastava et al. 2014); the
        identity outside training."""
        noise = self.uniform(x) if probability else None
        return x if noise is None else x * ((noise >= probability).to(x.dtype) / (1 - probability))


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

    def check_ulysses(self, tensor: int, ulysses: int) -> None:
        """Raise ValueError, naming field, value and fix, when the part cannot run on split sequences."""
        if ulysses > 1:
            raise ValueError(f"type {self.type!r} needs whole sequences; set parallel.ulysses: 1")


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

    def check_expert_parallel(self, expert: int, expert_tensor: int) -> None:
        """Raise ValueError, naming field, value and fix, when the experts cannot be spread over ``expert`` ranks or
        each of them split over ``expert_tensor`` ranks."""


class ChannelMixer(nn.Module, ABC):
    """Mixes along the features; may route tokens to experts."""

    @abstractmethod
    def forward(self, x: Tensor, context: Context) -> Tensor:
        """``x [length, batch, dim]`` to the same shape."""


ModelState = dict[str, Any]
"""Decode state of a whole model: layer name to :data:`DecodeState`, plus ``"position"`` (an int)."""
