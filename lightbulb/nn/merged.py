"""Layers whose matrix is a weighted mean of expert matrices, one mean for each piece of a sequence."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from lightbulb import ops
from lightbulb.nn.groups import Axis
from lightbulb.nn.linear import SplitLinear
from lightbulb.nn.parameter import Logical, make_parameter, values_of
from lightbulb.nn.precision import product_dtype
from lightbulb.nn.recompute import recompute

_QUANTIZED_PIECES = 8  # whose merged matrices exist at a time


def merged_swiglu(rows: Tensor, shares: Tensor, matrices: ops.Matrices, counts: list[int]) -> Tensor:
    """As :func:`lightbulb.ops.merged_swiglu`, in the dtype that this machine multiplies fastest in."""
    return ops.merged_swiglu(rows, shares, matrices, counts, product_dtype(rows))


def merged_linear(rows: Tensor, shares: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """As :func:`lightbulb.ops.merged_linear`, in the dtype that this machine multiplies fastest in."""
    return ops.merged_linear(rows, shares, weight, counts, product_dtype(rows))


class MergedLinear(SplitLinear):
    """One matrix per expert, ``weight [experts, out, in]``, of which every rank holds the same slice of each: merging
    is local. A quantizer rounds the merged matrix, not the experts'.

    Args:
        num_experts: matrices.
        in_features: size of the logical input.
        out_features: size of the logical output.
        std: standard deviation of the initial weights.
        axis: the tensor axis.
        has_split_input: it splits the input features, not the output features.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        std: float,
        axis: Axis,
        has_split_input: bool = False,
    ):
        super().__init__()
        self.axis, self.has_split_input = axis, has_split_input
        shape = (num_experts, out_features, in_features)
        self.weight = make_parameter(Logical(shape, std, tensor_dim=2 if has_split_input else 1, tensor=axis))

    def forward(self, rows: Tensor, shares: Tensor, counts: list[int]) -> Tensor:
        """As :func:`merged_linear`, local parts, leaving no tensor region."""
        if self.quantizer is None:
            product = merged_linear(rows, shares, values_of(self.weight), counts)
        else:
            product = self._quantized_product(self.quantizer.input(rows), shares, counts)
        return product if self.adapter is None else product + self._adapted(rows, shares, counts)

    def merge(self, shares: Tensor) -> Tensor:
        """``shares [P, E]`` to ``[P, out, in]``, as they are to be multiplied."""
        weight = values_of(self.weight)
        merged = (shares.to(weight.dtype) @ weight.flatten(1)).unflatten(1, weight.shape[1:])
        return merged if self.quantizer is None else self.quantizer.matrix(merged)

    def multiply_merged(self, rows: Tensor, merged: Tensor, shares: Tensor) -> Tensor:
        """The product where the merged matrices ``[P, out, in]`` are known and all pieces have equally many rows."""
        pieces = len(merged)
        inputs = rows if self.quantizer is None else self.quantizer.input(rows)
        product = torch.bmm(inputs.unflatten(0, (pieces, -1)), merged.transpose(1, 2)).flatten(0, 1)
        if self.adapter is None:
            return product
        return product + self._adapted(rows, shares, [len(rows) // pieces] * pieces)

    def _quantized_product(self, rows: Tensor, shares: Tensor, counts: list[int]) -> Tensor:
        """Some pieces at a time; their merged matrices are not kept."""

        def products(shares: Tensor, *parts: Tensor) -> Tensor:
            return torch.cat([linear(part, matrix) for part, matrix in zip(parts, self.merge(shares), strict=True)])

        parts = rows.split(counts)
        chunks = [slice(i, i + _QUANTIZED_PIECES) for i in range(0, len(parts), _QUANTIZED_PIECES)]
        return torch.cat([recompute(products, shares[chunk], *parts[chunk]) for chunk in chunks])

    def _adapted(self, rows: Tensor, shares: Tensor, counts: list[int]) -> Tensor:
        """Each expert's adapter on all rows, weighted as its matrix is."""
        assert self.adapter is not None
        experts = self.logical.shape[0]
        each = self.adapter(rows.repeat(experts, 1), [len(rows)] * experts).view(experts, len(rows), -1)
        weights = shares.to(rows.dtype).repeat_interleave(torch.tensor(counts, device=rows.device), dim=0)
        return torch.einsum("re,ero->ro", weights, each)
