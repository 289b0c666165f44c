"""Feed-forward layer: SwiGLU (Shazeer 2020, arXiv:2002.05202), or ungated with GELU (Hendrycks and Gimpel 2016,
arXiv:1606.08415) or squared ReLU (So et al. 2021, arXiv:2109.08668)."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import gelu

from lightbulb.config import Cost
from lightbulb.mixers.base import ChannelMixer, ChannelMixerConfig, Context, DecodeState, Facts, check_split
from lightbulb.nn.activation import squared_relu, swiglu
from lightbulb.nn.grouped import GroupedLinear, grouped_swiglu, mixture_swiglu
from lightbulb.nn.groups import enter_tensor_region, expert_axis, expert_tensor_axis, tensor_axis
from lightbulb.nn.linear import ColumnParallelLinear, RowParallelLinear
from lightbulb.nn.noise import RowDropout
from lightbulb.nn.parameter import Init
from lightbulb.registry import register

UNGATED: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu, "gelu_tanh": partial(gelu, approximate="tanh"), "squared_relu": squared_relu
}  # fmt: skip
"""What is between the two matrices of a layer without a gate."""


@register("channel_mixer", "mlp")
class MLPConfig(ChannelMixerConfig):
    """Dense feed-forward layer."""

    facts = Facts(
        "GLU Variants Improve Transformer, 2020, arXiv:2002.05202; Primer, 2021, arXiv:2109.08668",
        ("tensor", "sequence", "ulysses"),
        "none",
    )
    type: Literal["mlp"] = "mlp"
    hidden_dim: int = Field(ge=1)
    """Width of the hidden layer."""
    activation: Literal["swiglu", "gelu", "gelu_tanh", "squared_relu"] = "swiglu"
    """What makes the layer nonlinear: "swiglu" has three matrices, of which one gates; the others have two. "gelu_tanh"
    is GELU's approximation by a tanh, as in GPT-2."""
    bias: bool = False
    """Every matrix has a bias."""

    @property
    def num_matrices(self) -> int:
        """Matrices of dim x hidden_dim."""
        return 3 if self.activation == "swiglu" else 2

    def build(self, dim: int, init: Init) -> "MLP":
        return MLP(self, dim, init)

    def build_experts(self, num_experts: int, dim: int, init: Init) -> nn.Module:
        if self.activation == "swiglu" and not self.bias:
            return SwiGLUExperts(num_experts, dim, self.hidden_dim, init)
        return super().build_experts(num_experts, dim, init)

    def cost(self, dim: int) -> Cost:
        matrices = self.num_matrices * dim * self.hidden_dim
        params = matrices + ((self.num_matrices - 1) * self.hidden_dim + dim if self.bias else 0)
        return Cost(params, params, 2.0 * matrices)

    def check_tensor_parallel(self, degree: int) -> None:
        check_split("hidden_dim", self.hidden_dim, degree)


class MLP(ChannelMixer):
    """``(silu(x Wg) * (x Wu)) Wd`` or ``f(x Wu) Wd``, the hidden features split over the tensor axis."""

    def __init__(self, config: MLPConfig, dim: int, init: Init):
        super().__init__()
        self.activation = config.activation
        self.axis = tensor_axis()
        if config.activation == "swiglu":
            self.gate = ColumnParallelLinear(dim, config.hidden_dim, init.std, bias=config.bias)
        self.up = ColumnParallelLinear(dim, config.hidden_dim, init.std, bias=config.bias)
        self.down = RowParallelLinear(config.hidden_dim, dim, init.output_std, bias=config.bias)

    def forward(
        self, x: Tensor, context: Context, state: DecodeState | None = None
    ) -> tuple[Tensor, DecodeState | None]:
        return self.down(self._hidden(enter_tensor_region(x, self.axis))), state

    def _hidden(self, x: Tensor) -> Tensor:
        if self.activation == "swiglu":
            return swiglu(self.gate(x), self.up(x))
        return UNGATED[self.activation](self.up(x))


class SwiGLUExperts(nn.Module):
    """The local experts: ``[rows sorted by expert]`` in and out, partial sums over the expert tensor axis."""

    def __init__(self, num_experts: int, dim: int, hidden_dim: int, init: Init):
        super().__init__()
        tensor, expert = expert_tensor_axis(), expert_axis()
        self.gate_up = GroupedLinear(num_experts, dim, hidden_dim, init.std, tensor, expert, parts=2)
        self.down = GroupedLinear(num_experts, hidden_dim, dim, init.output_std, tensor, expert, has_split_input=True)

    @property
    def is_plain(self) -> bool:
        """Whether no modifier changes these experts."""
        return self.gate_up.is_plain and self.down.is_plain

    def mix(self, x: Tensor, gates: Tensor, experts: Tensor) -> Tensor:
        """``x [T, dim]`` through the ``experts [T, k]``, all local, of each token, added up with its gates."""
        return mixture_swiglu(x, gates, experts, self.gate_up.weight, self.down.weight)

    def forward(self, rows: Tensor, counts: list[int], context: Context, dropout: RowDropout | None = None) -> Tensor:
        """``rows [R, dim]``; ``counts`` rows for each local expert; ``dropout`` of the hidden features."""
        if dropout is None and self.is_plain:
            return grouped_swiglu(rows, self.gate_up.weight, self.down.weight, counts)
        gate, up = self.gate_up(rows, counts).chunk(2, dim=-1)
        hidden = swiglu(gate, up)
        if dropout is not None:
            hidden = dropout(hidden, first=self.gate_up.axis.rank * hidden.shape[1])
        return self.down(hidden, counts)
