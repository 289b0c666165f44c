"""Kolmogorov-Arnold network as a feed-forward layer: every edge carries a learnable function.

KAN (Liu et al. 2024, arXiv:2404.19756), in the form that evaluates the bases once per input (efficient-kan), or with
Gaussian bases (FastKAN, Li 2024, arXiv:2405.06721). Two layers, dim to hidden to dim, each
``silu(x) Wb^T + bases(standardise(x)) Ws^T``. The hidden features are split over the tensor axis; what the second
layer standardises by is summed over it. At equal parameters a KAN is expected to model language no better than SwiGLU
(Yu et al. 2024, arXiv:2407.16674): it is here to be compared.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import silu

from lightbulb.config import Cost
from lightbulb.mixers.base import ChannelMixer, ChannelMixerConfig, Context, DecodeState, Facts, check_split
from lightbulb.nn.groups import SINGLE, enter_tensor_region, exit_tensor_region, tensor_axis
from lightbulb.nn.linear import ColumnParallelLinear, RowParallelLinear
from lightbulb.nn.parameter import Init
from lightbulb.nn.splines import Basis, SplineLinear, cubic_basis, gaussian_basis, standardise
from lightbulb.registry import register


@register("channel_mixer", "kan")
class KANConfig(ChannelMixerConfig):
    """Two Kolmogorov-Arnold layers."""

    facts = Facts(
        "KAN: Kolmogorov-Arnold Networks, 2024, arXiv:2404.19756; FastKAN, 2024, arXiv:2405.06721",
        ("tensor", "sequence", "ulysses"),
        "none",
        "the grid is fixed: adapting it needs quantiles over all ranks; inputs are standardised to it instead",
    )
    type: Literal["kan"] = "kan"
    hidden_dim: int = Field(ge=1)
    """Width between the two layers. An edge has 9 weights: a sixth of a SwiGLU's width is as many parameters."""
    basis: Literal["fastkan", "bspline"] = "fastkan"
    """What edge functions are made of: 8 Gaussians with centres in [-2, 2], or the 8 cubic B-splines on 5 intervals of
    [-1, 1]. Inputs are scaled so that either range is two standard deviations to both sides."""

    def bases(self) -> Basis:
        """The basis of every edge."""
        return gaussian_basis() if self.basis == "fastkan" else cubic_basis()

    def build(self, dim: int, init: Init) -> "KAN":
        return KAN(self, dim, init)

    def cost(self, dim: int) -> Cost:
        params = 2 * dim * self.hidden_dim * (1 + self.bases().count)
        return Cost(params, params, 2.0 * params)

    def check_tensor_parallel(self, degree: int) -> None:
        check_split("hidden_dim", self.hidden_dim, degree)


class KAN(ChannelMixer):
    """A column-parallel layer of edges, then a row-parallel one; one sum over ranks at the end."""

    def __init__(self, config: KANConfig, dim: int, init: Init):
        super().__init__()
        self.axis = tensor_axis()
        self.up = _Edges(dim, config.hidden_dim, config.bases(), init.std)
        self.down = _Edges(config.hidden_dim, dim, config.bases(), init.output_std, has_split_input=True)

    def forward(
        self, x: Tensor, context: Context, state: DecodeState | None = None
    ) -> tuple[Tensor, DecodeState | None]:
        x = enter_tensor_region(x, self.axis)
        return exit_tensor_region(self.down(self.up(x)), self.axis), state


class _Edges(nn.Module):
    """A function for each edge: a multiple of silu and a combination of bases; partial sums when inputs are split."""

    def __init__(self, in_features: int, out_features: int, basis: Basis, std: float, has_split_input: bool = False):
        super().__init__()
        axis = tensor_axis()
        self.norm_axis = axis if has_split_input else SINGLE
        self.base = (RowParallelLinear if has_split_input else ColumnParallelLinear)(in_features, out_features, std)
        # What writes to the residual stream starts as a nearly smooth function: bases are narrow, so that their slopes
        # are large, and those of all layers multiply.
        spline_std = std / basis.count if has_split_input else std
        self.spline = SplineLinear(in_features, out_features, basis, spline_std, axis, has_split_input)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``, local parts."""
        inputs = standardise(x, self.norm_axis) * (self.spline.basis.reach / 2)
        return self.base.multiply(silu(x)).add_(self.spline(inputs))
