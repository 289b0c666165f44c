"""Linear layers split over the tensor axis: the door through which every projection goes.

A column-parallel layer holds some rows of the output, a row-parallel layer some columns of the input (Megatron-LM,
Shoeybi et al. 2019). A mixer calls :func:`~lightbulb.nn.groups.enter_tensor_region` once on its input, any number of
column-parallel layers, and one row-parallel layer, whose result is summed over the axis: one all-reduce forward and
one backward per mixer. With one rank both are ``nn.Linear`` without bias.
"""

from torch import Tensor, nn
from torch.nn.functional import linear

from lightbulb.nn.groups import exit_tensor_region, tensor_axis
from lightbulb.nn.parameter import Logical, make_parameter


class ColumnParallelLinear(nn.Module):
    """``y = x W^T`` with the output features split over the tensor axis.

    Args:
        in_features: size of the (replicated) input.
        out_features: size of the logical output.
        std: standard deviation of the initial weight.
    """

    def __init__(self, in_features: int, out_features: int, std: float):
        super().__init__()
        self.weight = make_parameter(Logical((out_features, in_features), std, tensor_dim=0, tensor=tensor_axis()))

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features]`` inside the tensor region to ``[..., out_features / axis size]``."""
        return linear(x, self.weight)


class RowParallelLinear(nn.Module):
    """``y = x W^T`` with the input features split over the tensor axis; the result is whole on every rank.

    Args:
        in_features: size of the logical input.
        out_features: size of the output.
        std: standard deviation of the initial weight.
    """

    def __init__(self, in_features: int, out_features: int, std: float):
        super().__init__()
        self.axis = tensor_axis()
        self.weight = make_parameter(Logical((out_features, in_features), std, tensor_dim=1, tensor=self.axis))

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features / axis size]`` to ``[..., out_features]``, leaving the tensor region."""
        return exit_tensor_region(linear(x, self.weight), self.axis)
