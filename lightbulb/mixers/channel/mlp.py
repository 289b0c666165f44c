"""Gated feed-forward layer: SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from lightbulb.config import Cost
from lightbulb.mixers.base import ChannelMixer, ChannelMixerConfig, Context
from lightbulb.nn.activation import swiglu
from lightbulb.nn.groups import enter_tensor_region, tensor_axis
from lightbulb.nn.linear import ColumnParallelLinear, RowParallelLinear
from lightbulb.nn.parameter import Init
from lightbulb.registry import register


@register("channel_mixer", "mlp")
class MLPConfig(ChannelMixerConfig):
    """Dense SwiGLU."""

    type: Literal["mlp"] = "mlp"
    hidden_dim: int = Field(ge=1)
    """Width of the gated hidden layer."""

    def build(self, dim: int, init: Init) -> "MLP":
        return MLP(self, dim, init)

    def cost(self, dim: int) -> Cost:
        params = 3 * dim * self.hidden_dim
        return Cost(params, params, 2.0 * params)

    def check_tensor_parallel(self, degree: int) -> None:
        if self.hidden_dim % degree:
            raise ValueError(
                f"hidden_dim {self.hidden_dim} cannot be split over parallel.tensor {degree}; "
                f"choose a multiple of {degree}"
            )


class MLP(ChannelMixer):
    """``(silu(x Wg) * (x Wu)) Wd``, the hidden features split over the tensor axis."""

    def __init__(self, config: MLPConfig, dim: int, init: Init):
        super().__init__()
        self.axis = tensor_axis()
        self.gate = ColumnParallelLinear(dim, config.hidden_dim, init.std)
        self.up = ColumnParallelLinear(dim, config.hidden_dim, init.std)
        self.down = RowParallelLinear(config.hidden_dim, dim, init.output_std)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = enter_tensor_region(x, self.axis)
        return self.down(swiglu(self.gate(x), self.up(x)))
