"""Mamba-2: a linear recurrence whose steps, reads and writes depend on the input.

"Transformers are SSMs", 2024, arXiv:2405.21060: per head ``S_t = exp(dt_t A) S_{t-1} + dt_t B_t^T x_t`` and
``y_t = C_t S_t + D x_t``, behind a short convolution and before a gate and a norm. The bidirectional form, for images,
is Vision Mamba's, 2024, arXiv:2401.09417: a second scan with weights of its own over the reversed sequence, both
behind one gate.

In the names of :func:`lightbulb.ops.linear_recurrence`, which runs it, B is the key, C the query and x the value. The
norm is over the heads of each group, as in the paper's code; one group's heads on several tensor ranks sum their
squares over them, so that every layout computes the same function.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from lightbulb.config import Cost
from lightbulb.mixers.base import Context, DecodeState, Facts, TokenMixer, TokenMixerConfig
from lightbulb.nn import mamba_kernels
from lightbulb.nn.activation import swiglu
from lightbulb.nn.groups import SINGLE, enter_tensor_region, tensor_axis, ulysses_axis
from lightbulb.nn.linear import ColumnParallelLinear, RowParallelLinear, SplitLinear, WholeLinear
from lightbulb.nn.norm import SplitRMSNorm
from lightbulb.nn.parameter import Init, Logical, make_parameter
from lightbulb.nn.recompute import recompute
from lightbulb.nn.recurrence import chunk_flops, document_starts
from lightbulb.nn.short_conv import ShortConv, next_window
from lightbulb.nn.ulysses import gather_heads, gather_length, my_heads, scatter_heads
from lightbulb.ops import linear_recurrence, state_dtype
from lightbulb.registry import register

WINDOWS = ("value", "key", "query")
"""What a decode state keeps of the convolutions' last inputs."""


@register("token_mixer", "mamba")
class MambaConfig(TokenMixerConfig):
    """Mamba-2 (selective state space), causal or bidirectional."""

    facts = Facts(
        "Transformers are SSMs (Mamba-2), 2024, arXiv:2405.21060; Vision Mamba, 2024, arXiv:2401.09417",
        ("tensor", "sequence", "ulysses"),
        "expand x dim x state_dim, and conv_width - 1 inputs of the convolution, whatever the length",
        "the bidirectional form sees the future and cannot decode",
    )
    type: Literal["mamba"] = "mamba"
    state_dim: int = Field(128, ge=1)
    """Rows of a head's state."""
    head_dim: int = Field(64, ge=1)
    """Width of a head; ``expand * dim / head_dim`` heads."""
    expand: int = Field(2, ge=1)
    """Inner width over model width."""
    num_groups: int = Field(1, ge=1)
    """Groups of heads with keys and queries of their own."""
    conv_width: int = Field(4, ge=1)
    """Positions the short convolution sees."""
    bidirectional: bool = False
    """Scan the reversed sequence too."""
    norm_eps: float = Field(1e-5, gt=0)
    """Epsilon of the norm before the output."""
    chunk_size: int = Field(64, ge=1)
    """Positions that meet directly; beyond, they meet through the state. Changes the speed, not the result."""
    rate_range: tuple[float, float] = (1.0, 16.0)
    """Range of the initial decay rates (-A)."""
    step_range: tuple[float, float] = (1e-3, 0.1)
    """Range of the initial steps (dt), drawn uniformly in the logarithm."""
    step_floor: float = Field(1e-4, gt=0)
    """Least initial step."""

    @model_validator(mode="after")
    def _ranges_rise(self) -> "MambaConfig":
        for field in ("rate_range", "step_range"):
            low, high = getattr(self, field)
            if not 0 < low <= high:
                raise ValueError(f"{field} [{low}, {high}] is no range of positive numbers; give the lower one first")
        return self

    def heads(self, dim: int) -> int:
        """Heads for a model width.

        Raises:
            ValueError: the inner width does not divide into heads, or the heads into groups.
        """
        inner = self.expand * dim
        if inner % self.head_dim:
            raise ValueError(
                f"head_dim {self.head_dim} does not divide expand {self.expand} x dim {dim} = {inner}; choose a divisor"
            )
        heads = inner // self.head_dim
        if heads % self.num_groups:
            raise ValueError(f"num_groups {self.num_groups} does not divide the {heads} heads; choose a divisor")
        return heads

    @property
    def sees_future(self) -> bool:
        return self.bidirectional

    def build(self, dim: int, context_length: int, init: Init) -> "Mamba":
        return Mamba(self, dim, init)

    def cost(self, dim: int, context_length: int) -> Cost:
        heads, directions = self.heads(dim), 2 if self.bidirectional else 1
        inner, keys = self.expand * dim, self.num_groups * self.state_dim
        matrices = 3 * dim * inner + directions * dim * (2 * keys + heads)
        taps = directions * (inner + 2 * keys) * self.conv_width
        params = matrices + taps + directions * (inner + 2 * keys + 3 * heads) + inner
        sizes = (heads, self.num_groups, self.state_dim, self.head_dim)
        core = directions * chunk_flops(*sizes, context_length, self.chunk_size)
        return Cost(params, params, 2.0 * (matrices + taps) + core)

    def check_tensor_parallel(self, degree: int) -> None:
        if self.num_groups > 1 and self.num_groups % degree:
            raise ValueError(
                f"num_groups {self.num_groups} cannot be split over parallel.tensor {degree}; "
                f"choose a multiple of it, or one group that all ranks share"
            )

    def check_ulysses(self, tensor: int, ulysses: int) -> None:
        if self.num_groups not in (1, tensor) and self.num_groups % (tensor * ulysses):
            raise ValueError(
                f"num_groups {self.num_groups} cannot be split over parallel.tensor {tensor} x parallel.ulysses "
                f"{ulysses}; choose a multiple of {tensor * ulysses}, or one group that all ranks share"
            )

    def check_width(self, dim: int, tensor: int, ulysses: int) -> None:
        if self.heads(dim) % (tensor * ulysses):
            raise ValueError(
                f"head_dim {self.head_dim} makes {self.heads(dim)} heads, which cannot be split over parallel.tensor "
                f"{tensor} x parallel.ulysses {ulysses}; make it smaller"
            )

    def log_rates(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Initial logarithms of the rates (A_log), uniform in the rate."""
        return torch.empty(shape).uniform_(*self.rate_range, generator=generator).log_()

    def step_biases(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Initial biases whose softplus is the step."""
        low, high = (math.log(step) for step in self.step_range)
        steps = torch.empty(shape).uniform_(low, high, generator=generator).exp_().clamp_(min=self.step_floor)
        return steps + torch.log(-torch.expm1(-steps))


class Mamba(TokenMixer):
    """``norm(silu(x Wz) * scan(x Wx)) Wo``, heads local to the tensor rank."""

    def __init__(self, config: MambaConfig, dim: int, init: Init):
        super().__init__()
        self.config = config
        self.axis = tensor_axis()
        self.ulysses = ulysses_axis()
        inner, heads = config.expand * dim, config.heads(dim)
        parts = self.axis.size * self.ulysses.size
        if heads % parts:
            raise ValueError(
                f"mamba has {heads} heads (expand {config.expand} x dim {dim} / head_dim {config.head_dim}), which "
                f"parallel.tensor x parallel.ulysses = {parts} cannot split; choose a smaller head_dim"
            )
        self.gate = ColumnParallelLinear(dim, inner, init.std)
        self.value = ColumnParallelLinear(dim, inner, init.std)
        self.scan = Scan(config, dim, init)
        if config.bidirectional:
            self.reversed_scan = Scan(config, dim, init, is_reversed=True)
        self.norm = SplitRMSNorm(inner, config.num_groups, config.norm_eps)
        self.output = RowParallelLinear(inner, dim, init.output_std)

    def forward(
        self, x: Tensor, context: Context, state: DecodeState | None = None
    ) -> tuple[Tensor, DecodeState | None]:
        whole = enter_tensor_region(x, self.axis)
        (values,) = scatter_heads([self.value(whole).unflatten(-1, (-1, self.config.head_dim))], self.ulysses)
        mixed, state = self.scan(x, whole, values, context, state)
        if self.config.bidirectional:
            mixed = mixed + self.reversed_scan(x, whole, values, context)[0]
        mixed = gather_heads(mixed, self.ulysses).flatten(2)
        return self.output(self.norm(swiglu(self.gate(whole), mixed))), state

    def init_state(self, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype) -> DecodeState:
        if self.config.bidirectional:
            raise ValueError("a bidirectional mamba sees the future and cannot decode; set bidirectional: false")
        return self.scan.init_state(batch_size, device, dtype)


class Scan(nn.Module):
    """One direction: the short convolution and the recurrence, with the weights that steer them."""

    def __init__(self, config: MambaConfig, dim: int, init: Init, is_reversed: bool = False):
        super().__init__()
        self.config = config
        self.is_reversed = is_reversed
        self.axis = tensor_axis()
        self.ulysses = ulysses_axis()
        heads, keys = config.heads(dim), config.num_groups * config.state_dim
        self.has_split_groups = config.num_groups > 1
        self.key = self._steering(dim, keys, init)
        self.query = self._steering(dim, keys, init)
        self.step = ColumnParallelLinear(dim, heads, init.std)
        self.value_conv = ShortConv(heads * config.head_dim, config.conv_width, is_split=True)
        self.key_conv = ShortConv(keys, config.conv_width, self.has_split_groups)
        self.query_conv = ShortConv(keys, config.conv_width, self.has_split_groups)
        per_head = Logical((heads,), None, tensor_dim=0, tensor=self.axis, keep_fp32=True)
        self.log_rate = make_parameter(replace(per_head, fill=config.log_rates))
        self.step_bias = make_parameter(replace(per_head, fill=config.step_biases))
        self.skip = make_parameter(per_head)
        self.local_heads = heads // self.axis.size
        self.local_groups = config.num_groups // self.axis.size if self.has_split_groups else 1

    def forward(
        self, x: Tensor, whole: Tensor, values: Tensor, context: Context, state: DecodeState | None = None
    ) -> tuple[Tensor, DecodeState | None]:
        """``values [length, batch, heads, width]`` to the same shape.

        Args:
            x: ``[rows, batch, dim]`` outside the tensor region.
            whole: the same, inside it.
            values: of this rank's heads, all positions.
            context: of the pass.
            state: what came before.
        """
        keys, queries = self._keys_and_queries(x, whole)
        (steps,) = scatter_heads([self.step(whole)[..., None]], self.ulysses)
        inputs = [values, keys, queries, steps.squeeze(-1)]
        ids = context.document_ids
        if self.is_reversed:
            inputs, ids = [t.flip(0) for t in inputs], None if ids is None else ids.flip(1)
        starts = document_starts(ids)
        if context.recompute == "selective" and state is None:
            mixed, state = recompute(self._mix, inputs, starts, state)
        else:
            mixed, state = self._mix(inputs, starts, state)
        return mixed.flip(0) if self.is_reversed else mixed, state

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> DecodeState:
        """As a mixer's."""
        config = self.config
        keys, values = self.local_groups * config.state_dim, self.local_heads * config.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            name: (batch_size, config.conv_width - 1, width)
            for name, width in zip(WINDOWS, (values, keys, keys), strict=True)
        }
        shapes["memory"] = (batch_size, self.local_heads, config.state_dim, config.head_dim)
        wide = state_dtype(dtype)
        return {name: torch.zeros(shape, device=device, dtype=wide) for name, shape in shapes.items()}

    def _steering(self, dim: int, features: int, init: Init) -> SplitLinear:
        if self.has_split_groups:
            return ColumnParallelLinear(dim, features, init.std)
        return WholeLinear(dim, features, init.std)

    def _keys_and_queries(self, x: Tensor, whole: Tensor) -> list[Tensor]:
        """Each ``[length, batch, groups, state]``, of the groups that this rank's heads use."""
        if self.has_split_groups:
            parts = [layer(whole) for layer in (self.key, self.query)]
        else:
            parts = [enter_tensor_region(layer(x), self.axis) for layer in (self.key, self.query)]
        parts = [part.unflatten(-1, (self.local_groups, -1)) for part in parts]
        if self.local_groups == 1:
            return [gather_length(part, self.ulysses) for part in parts]
        return scatter_heads(parts, self.ulysses)

    def _mix(
        self, inputs: list[Tensor], starts: Tensor | None, state: DecodeState | None
    ) -> tuple[Tensor, DecodeState | None]:
        *raw, steps = inputs
        values, keys, queries = self._smooth(raw, starts, state)
        bias, log_rate, skip = (my_heads(p, self.ulysses) for p in (self.step_bias, self.log_rate, self.skip))
        steps, rates = softplus(steps.to(bias.dtype) + bias), -log_rate.exp()
        chunk_size = self.config.chunk_size
        if state is None and mamba_kernels.can_scan(values):
            return mamba_kernels.scan(values, steps, rates, keys, queries, skip, chunk_size, starts), None
        query, key = (t.permute(1, 2, 0, 3) for t in (queries, keys))
        written = (values * steps[..., None]).to(values.dtype).permute(1, 2, 0, 3)
        decay = (steps * rates).permute(1, 2, 0)
        memory = None if state is None else state["memory"]
        mixed, memory = linear_recurrence(query, key, written, decay, memory, starts, chunk_size)
        mixed = (mixed.permute(2, 0, 1, 3) + skip[:, None] * values).to(values.dtype)
        if state is not None:
            windows = zip(WINDOWS, raw, strict=True)
            state = {name: next_window(part.flatten(2), state[name]) for name, part in windows} | {"memory": memory}
        return mixed, state

    def _smooth(self, raw: list[Tensor], starts: Tensor | None, state: DecodeState | None) -> list[Tensor]:
        """Values, keys and queries ``[length, batch, heads or groups, width]`` behind their short convolutions."""
        shared = SINGLE if self.local_groups == 1 else self.ulysses
        convs = ((self.value_conv, self.ulysses), (self.key_conv, shared), (self.query_conv, shared))
        windows = [None] * 3 if state is None else [state[name] for name in WINDOWS]
        return [
            silu(conv(part.flatten(2), axis, starts, window)).view_as(part)
            for part, (conv, axis), window in zip(raw, convs, windows, strict=True)
        ]
