"""Multi-scale retention: attention without softmax, whose past fades at a fixed rate per head.

"Retentive Network: A Successor to Transformer for Large Language Models", 2023, arXiv:2307.08621. Head h keeps
``1 - 2^(-5 - h)`` of its state per position. Queries and keys are rotated (xPos without its scale, which is the rotary
embedding), each head's result is normalised without weights, and a swish gate lets it out. Training goes chunk by
chunk, decoding token by token with a state that does not grow.

The weights start as all of this project's do (:class:`~lightbulb.nn.parameter.Init`); the paper's Xavier gains are for
its own depth scaling. Nor are scores divided by their sums: that changes nothing behind the norm but its epsilon.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lightbulb.config import Cost
from lightbulb.mixers.base import Context, DecodeState, Facts, TokenMixer, TokenMixerConfig
from lightbulb.mixers.token.heads import check_heads, head_width
from lightbulb.nn.activation import swiglu
from lightbulb.nn.groups import enter_tensor_region, tensor_axis, ulysses_axis
from lightbulb.nn.linear import ColumnParallelLinear, RowParallelLinear
from lightbulb.nn.norm import unit_rms
from lightbulb.nn.parameter import Init
from lightbulb.nn.recompute import recompute
from lightbulb.nn.recurrence import chunk_flops, document_starts
from lightbulb.nn.rope import rotary_angles, rotate
from lightbulb.nn.ulysses import gather_heads, scatter_heads
from lightbulb.ops import linear_recurrence, state_dtype
from lightbulb.registry import register


@register("token_mixer", "retention")
class RetentionConfig(TokenMixerConfig):
    """Multi-scale retention."""

    facts = Facts(
        "Retentive Network, 2023, arXiv:2307.08621",
        ("tensor", "sequence", "ulysses"),
        "num_heads x key_dim x (value_factor x key_dim), whatever the length",
    )
    keeps_gaps: ClassVar[bool] = True
    type: Literal["retention"] = "retention"
    num_heads: int = Field(ge=1)
    """Heads, each with its own rate of decay."""
    key_dim: int | None = Field(None, ge=2)
    """Width of a head's queries and keys; None for ``dim / num_heads``."""
    value_factor: int = Field(2, ge=1)
    """Width of a head's values over that of its keys."""
    rope_theta: float = Field(10_000.0, gt=0)
    """Base of the rotary frequencies."""
    norm_eps: float = Field(1e-6, gt=0)
    """Epsilon of the heads' norms."""
    chunk_size: int = Field(64, ge=1)
    """Positions that meet directly; beyond, they meet through the state. Changes the speed, not the result."""

    @model_validator(mode="after")
    def _even_width(self) -> "RetentionConfig":
        if self.key_dim is not None and self.key_dim % 2:
            raise ValueError(f"key_dim {self.key_dim} is odd; rotary positions need an even width")
        return self

    def width(self, dim: int) -> int:
        """Width of a head's queries and keys for a model width.

        Raises:
            ValueError: ``dim`` does not divide into an even head width.
        """
        if self.key_dim is not None:
            return self.key_dim
        return head_width(dim, self.num_heads, "key_dim")

    def log_decay(self) -> Tensor:
        """``[num_heads]`` logarithm of what each head keeps per position, in float64."""
        return torch.log1p(-torch.exp2(-5.0 - torch.arange(self.num_heads, dtype=torch.float64, device="cpu")))

    def build(self, dim: int, context_length: int, init: Init) -> "Retention":
        return Retention(self, dim, init)

    def cost(self, dim: int, context_length: int) -> Cost:
        width = self.width(dim)
        params = dim * self.num_heads * width * (2 + 3 * self.value_factor)
        sizes = (self.num_heads, self.num_heads, width, self.value_factor * width)
        return Cost(params, params, 2.0 * params + chunk_flops(*sizes, context_length, self.chunk_size))

    def check_tensor_parallel(self, degree: int) -> None:
        check_heads({"num_heads": self.num_heads}, degree)

    def check_ulysses(self, tensor: int, ulysses: int) -> None:
        check_heads({"num_heads": self.num_heads}, tensor, ulysses)


class Retention(TokenMixer):
    """``silu(x Wg) * norm((Q K^T * decay) V)``, heads local to the tensor rank."""

    def __init__(self, config: RetentionConfig, dim: int, init: Init):
        super().__init__()
        self.config = config
        self.axis = tensor_axis()
        self.ulysses = ulysses_axis()
        self.width = config.width(dim)
        self.heads = config.num_heads // self.axis.size
        keys = config.num_heads * self.width
        self.query = ColumnParallelLinear(dim, keys, init.std)
        self.key = ColumnParallelLinear(dim, keys, init.std)
        self.value = ColumnParallelLinear(dim, config.value_factor * keys, init.std)
        self.gate = ColumnParallelLinear(dim, config.value_factor * keys, init.std)
        self.output = RowParallelLinear(config.value_factor * keys, dim, init.output_std)

    def forward(
        self, x: Tensor, context: Context, state: DecodeState | None = None
    ) -> tuple[Tensor, DecodeState | None]:
        x = enter_tensor_region(x, self.axis)
        # Values travel as value_factor heads of the keys' width, so that one exchange takes all three.
        parts = [layer(x).unflatten(-1, (-1, self.width)) for layer in (self.query, self.key, self.value)]
        query, key, value = scatter_heads(parts, self.ulysses)
        value = value.unflatten(2, (-1, self.config.value_factor)).flatten(3)
        angles = rotary_angles(context.positions, self.width, self.config.rope_theta)
        cos, sin = (t.to(state_dtype(x.dtype)) for t in angles)
        scale = self.width**-0.5
        query, key = rotate(query, scale * cos, scale * sin), rotate(key, cos, sin)
        heads = [t.permute(1, 2, 0, 3) for t in (query, key, value)]
        if state is not None:
            mixed, state = self._continue(heads, context, state)
        elif context.recompute == "selective":
            mixed = recompute(self._retain, heads, context)
        else:
            mixed = self._retain(heads, context)
        mixed = gather_heads(mixed.permute(2, 0, 1, 3), self.ulysses)
        return self.output(swiglu(self.gate(x), unit_rms(mixed, self.config.norm_eps).flatten(2))), state

    def init_state(self, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype) -> DecodeState:
        shape = (batch_size, self.heads, self.width, self.config.value_factor * self.width)
        return {
            "memory": torch.zeros(shape, device=device, dtype=state_dtype(dtype)),
            "position": torch.full((batch_size,), -1, device=device),
        }

    def _retain(self, heads: list[Tensor], context: Context) -> Tensor:
        """Whole sequences: ``[batch, heads, length, width]``."""
        query, key, value = heads
        starts, decay = document_starts(context.document_ids), self._log_decay(value)
        if context.positions.ndim == 2:
            places = _places(context)
            decay = decay[:, None] * places.diff(dim=1, prepend=places[:, :1])[:, None]
            key = _only_present(key, context)
        return linear_recurrence(query, key, value, decay, None, starts, self.config.chunk_size)[0]

    def _continue(self, heads: list[Tensor], context: Context, state: DecodeState) -> tuple[Tensor, DecodeState]:
        """The same behind the sequences that ``state`` holds."""
        query, key, value = heads
        last = state["position"][:, None]
        places = torch.maximum(_places(context), last)
        decay = self._log_decay(value)[:, None] * places.diff(dim=1, prepend=last)[:, None]
        key = _only_present(key, context)
        mixed, memory = linear_recurrence(query, key, value, decay, state["memory"], chunk_size=self.config.chunk_size)
        return mixed, {"memory": memory, "position": places[:, -1]}

    def _log_decay(self, value: Tensor) -> Tensor:
        """Those of the heads on this rank, in float64."""
        first = self.axis.rank * self.heads + self.ulysses.rank * value.shape[1]
        return self.config.log_decay()[first : first + value.shape[1]].to(value.device)


def _places(context: Context) -> Tensor:
    """``[batch or 1, length]`` positions that never fall: a filler stands where the token before it does."""
    if context.positions.ndim == 1:
        return context.positions[None]
    places = context.positions.t()
    return places if context.present is None else places.where(context.present, -1).cummax(dim=1).values


def _only_present(key: Tensor, context: Context) -> Tensor:
    """Fillers leave nothing behind."""
    return key if context.present is None else key.masked_fill(~context.present[:, None, :, None], 0.0)
