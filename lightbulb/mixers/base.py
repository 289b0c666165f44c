"""The two contracts every layer part fulfils, and the context they share.

Activations are ``[length, batch, dim]`` everywhere between embedding and head (Megatron's order: sequence
parallelism splits the first dimension). Tokens, labels and document ids are ``[batch, length]``. Under Ulysses and
sequence parallelism a rank's activations between mixers are the consecutive positions ``context.rows``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lightbulb.config import Config, Cost
from lightbulb.nn.bank import ExpertBank
from lightbulb.nn.noise import Noise
from lightbulb.nn.parameter import Init
from lightbulb.nn.recompute import Recompute

DecodeState = dict[str, Tensor]
"""What one mixer carries from token to token; every tensor has the batch as its first dimension, so that beam
search can reorder any state without knowing the mixer. Empty for a mixer that treats every token for itself."""


@dataclass(frozen=True)
class Context:
    """What all layers of one forward pass share.

    Attributes:
        positions: positions of all tokens, from 0 at the start of the context: ``[length]``, or ``[length, batch]``
            where samples keep different tokens (see :attr:`TokenMixerConfig.keeps_gaps`).
        document_ids: ``[batch, length]`` or None; when given, no token may see another document.
        present: ``[batch, length]`` bool or None; where false there is no token but a filler, which no token may see
            and whose result nobody reads. Comes with positions per sample only.
        rows: the positions this rank holds between mixers: a slice, or ``[length, batch]`` indices where samples keep
            different tokens.
        noise: source of dropout and jitter, or None outside training.
        place: name of the part that reads this context, for its noise.
        recompute: what the backward runs again.
        gist: ``[batch, positions]`` bool or None: which tokens of the whole sequences, by true position, are gist
            tokens. They stand for what is before them, which tokens after them do not see.
        ages: ``[batch, length]`` positions from the start of each token's document, given where there are documents
            and tokens are left out, perhaps the first of a document; None where ``document_ids`` tells.
    """

    positions: Tensor
    document_ids: Tensor | None = None
    present: Tensor | None = None
    rows: slice | Tensor = field(default_factory=lambda: slice(None))
    noise: Noise | None = None
    place: str = ""
    recompute: Recompute = "none"
    gist: Tensor | None = None
    ages: Tensor | None = None

    def at(self, name: str) -> "Context":
        """The context of a part inside this one."""
        return self if self.noise is None else replace(self, place=f"{self.place}.{name}" if self.place else name)

    def uniform(self, x: Tensor) -> Tensor | None:
        """Noise for each feature of ``x [rows, batch, width]``, uniform on [0, 1); None outside training."""
        if self.noise is None:
            return None
        return self._of_rows(partial(self.noise.uniform, width=x.shape[-1], device=x.device))

    def keys(self, x: Tensor, width: int) -> Tensor | None:
        """Keys of rows that leave the positions of ``x [rows, batch, ...]``: int64 ``[rows, batch, width]``, ``width``
        of each position (see :meth:`Noise.keys`); None outside training."""
        if self.noise is None:
            return None
        return self._of_rows(partial(self.noise.keys, width=width, device=x.device))

    def _of_rows(self, draw: Callable[[str, slice], Tensor]) -> Tensor:
        """The part of what ``draw`` gives for this place and positions, ``[positions, batch, width]``, that belongs to
        this context's rows."""
        if isinstance(self.rows, slice):
            return draw(self.place, self.rows)
        whole = draw(self.place, slice(None))
        return whole.gather(0, self.rows[..., None].expand(*self.rows.shape, whole.shape[-1]))

    def dropout(self, x: Tensor, probability: float) -> Tensor:
        """Set features of ``x [rows, batch, width]`` to zero and scale up the rest (Srivastava et al. 2014); the
        identity outside training."""
        noise = self.uniform(x) if probability else None
        return x if noise is None else x * ((noise >= probability).to(x.dtype) / (1 - probability))


class Facts(NamedTuple):
    """What a reader of the list of parts wants to know of one.

    Attributes:
        paper: where it comes from: title, year, arXiv number.
        shards: the axes that split it: "tensor", "sequence", "ulysses", "expert".
        state: what decoding carries per sequence, as a formula of the config's fields; "none" for nothing.
        limits: what it refuses or leaves out, in a few words.
    """

    paper: str
    shards: tuple[str, ...]
    state: str
    limits: str = ""


class _MixerConfig(Config, ABC):
    type: str
    facts: ClassVar[Facts]

    def check_tensor_parallel(self, degree: int) -> None:
        """Raise ValueError, naming field, value and fix, when the part cannot be split over ``degree`` ranks."""

    def check_width(self, dim: int, tensor: int, ulysses: int) -> None:
        """Raise ValueError, naming field, value and fix, when what a model ``dim`` wide makes of the part (its heads)
        cannot be split over so many ranks."""

    def check_gaps(self) -> None:
        """Raise ValueError, naming field, value and fix, when samples cannot have positions of their own."""

    def check_ulysses(self, tensor: int, ulysses: int) -> None:
        """Raise ValueError, naming field, value and fix, when the part cannot run on split sequences."""

    def check_expert_parallel(self, expert: int, expert_tensor: int) -> None:
        """Raise ValueError, naming field, value and fix, when the experts cannot be spread over ``expert`` ranks or
        each of them split over ``expert_tensor`` ranks."""

    def routers(self) -> dict[str, int]:
        """Module name inside the mixer of each :class:`~lightbulb.routing.router.Router`, with its experts."""
        return {}


class TokenMixerConfig(_MixerConfig, ABC):
    """Config of a part that mixes along the sequence."""

    keeps_gaps: ClassVar[bool] = False
    """Takes positions of its own for each sample, with gaps, and fillers (``Context.present``)."""
    masks_gists: ClassVar[bool] = False
    """Hides from tokens what gist tokens stand for (``Context.gist``)."""

    @property
    def sees_future(self) -> bool:
        """Whether tokens mix with later ones: fit for encoders, not for a language model."""
        return False

    @abstractmethod
    def build(self, dim: int, context_length: int, init: Init) -> "TokenMixer":
        """The module, uninitialised; the model fills its parameters."""

    @abstractmethod
    def cost(self, dim: int, context_length: int) -> Cost:
        """Parameters and FLOPs per token, averaged over a full context."""

    def check_ulysses(self, tensor: int, ulysses: int) -> None:
        if ulysses > 1:
            raise ValueError(f"type {self.type!r} needs whole sequences; set parallel.ulysses: 1")


def check_split(field: str, size: int, ranks: int) -> None:
    """Raise ValueError when ``size`` features of a field cannot be split over so many tensor ranks."""
    if size % ranks:
        raise ValueError(f"{field} {size} cannot be split over parallel.tensor {ranks}; choose a multiple of {ranks}")


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


class ChannelMixerConfig(_MixerConfig, ABC):
    """Config of a part that mixes along the features of each token."""

    spreads_experts: ClassVar[bool] = False
    """Has whole experts to spread over the expert axis."""
    treats_tokens_alone: ClassVar[bool] = True
    """What a token becomes depends on no other token, so that the part can be an expert."""
    keeps_gaps: ClassVar[bool] = True
    """As of token mixers; true of what treats every token for itself."""

    @abstractmethod
    def build(self, dim: int, init: Init) -> "ChannelMixer":
        """The module, uninitialised; the model fills its parameters."""

    @abstractmethod
    def cost(self, dim: int) -> Cost:
        """Parameters and FLOPs per token."""

    def build_experts(self, num_experts: int, dim: int, init: Init) -> nn.Module:
        """This mixer once per expert: called with ``rows [R, dim]`` sorted by expert, ``counts`` of each local expert
        and a context, it gives ``[R, dim]``, partial sums over the expert tensor axis."""
        return ExpertBank(num_experts, lambda: self.build(dim, init))


class ChannelMixer(nn.Module, ABC):
    """Mixes along the features; may route tokens, or segments of them, to experts."""

    @abstractmethod
    def forward(
        self, x: Tensor, context: Context, state: DecodeState | None = None
    ) -> tuple[Tensor, DecodeState | None]:
        """As :meth:`TokenMixer.forward`."""

    def init_state(self, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype) -> DecodeState:
        """An empty decode state; most channel mixers need none."""
        return {}


ModelState = dict[str, Any]
"""Decode state of a whole model: layer name to the states of its mixers (nested dictionaries of tensors whose first
dimension is the batch), plus ``"position"`` (an int) and, with gist tokens, ``"gist" [batch, max_length]``."""
