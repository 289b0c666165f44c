"""Layers with one matrix per expert, over rows sorted by expert."""

from functools import partial

from torch import Tensor

from lightbulb import ops
from lightbulb.nn.groups import Axis
from lightbulb.nn.linear import SplitLinear
from lightbulb.nn.parameter import Logical, make_parameter
from lightbulb.nn.precision import product_dtype


def grouped_swiglu(rows: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
    """As :func:`lightbulb.ops.grouped_swiglu`, in the dtype that this machine multiplies fastest in."""
    return ops.grouped_swiglu(rows, gate_up, down, counts, product_dtype(rows))


def mixture_swiglu(x: Tensor, gates: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As :func:`lightbulb.ops.mixture_swiglu`, in the dtype that this machine multiplies fastest in."""
    return ops.mixture_swiglu(x, gates, experts, gate_up, down, product_dtype(x))


class GroupedLinear(SplitLinear):
    """One matrix per expert, or several: ``weight [experts, out, in]``, or ``[experts, parts, out, in]``.

    Args:
        num_experts: over all ranks.
        in_features: size of the logical input.
        out_features: size of the logical output (of each part).
        std: standard deviation of the initial weights.
        axis: the tensor axis that splits the matrices.
        expert: the axis over which experts are spread.
        has_split_input: the input features are split over the axis, not the output features.
        parts: matrices per expert that share their input.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        std: float,
        axis: Axis,
        expert: Axis,
        has_split_input: bool = False,
        parts: int = 1,
    ):
        super().__init__()
        self.axis, self.has_split_input = axis, has_split_input
        shape = (num_experts, *([parts] if parts > 1 else []), out_features, in_features)
        split = len(shape) - (1 if has_split_input else 2)
        self.weight = make_parameter(Logical(shape, std, split, axis, expert, is_expert=True))

    def forward(self, rows: Tensor, counts: list[int]) -> Tensor:
        """``rows [R, in]`` sorted by expert to ``[R, parts x out]``: local parts, summed over no axis."""
        product = self.product(rows, partial(ops.grouped_linear, counts=counts), start_dim=1, counts=counts)
        return product if self.adapter is None else product + self.adapter(rows, counts)
