"""Products with a weighted mean of expert matrices, one mean for each piece of a sequence.

Merging in parameter space (SMEAR, Muqeeth et al. 2023, arXiv:2306.03745; Lory, Zhong et al. 2024, arXiv:2405.03133):
``y = x (sum_i e_i W_i)^T``. With P pieces the merged matrices are P times the size of a dense layer's, so they exist
for some output features at a time, and are merged again in the backward. There, with ``G_p`` the gradient of a merged
matrix, ``dL/dW_i = sum_p e_pi G_p`` and ``dL/de_pi = <G_p, W_i>``.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lightbulb.nn.groups import Axis
from lightbulb.nn.linear import SplitLinear
from lightbulb.nn.parameter import Logical, make_parameter, values_of
from lightbulb.nn.precision import product_dtype
from lightbulb.nn.recompute import recompute

_CPU_NUMBERS = 2**23  # of merged matrices at a time
_GPU_NUMBERS = 2**27
_QUANTIZED_PIECES = 8  # whose merged matrices exist at a time


def merged_linear(rows: Tensor, shares: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """``y[r] = (sum_i shares[p, i] weight[i]) @ rows[r]`` with p the piece of r.

    Args:
        rows: ``[R, in]``, piece after piece.
        shares: ``[P, E]``.
        weight: ``[E, out, in]``.
        counts: rows of each piece, none of them zero; the sum is R.

    Returns:
        ``[R, out]``.
    """
    return _MergedLinear.apply(rows, shares, weight, counts)


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
        merged = _merged(shares.to(weight.dtype), weight)
        return merged if self.quantizer is None else self.quantizer.matrix(merged)

    def multiply_merged(self, rows: Tensor, merged: Tensor, shares: Tensor) -> Tensor:
        """The product where the merged matrices ``[P, out, in]`` are known and all pieces have equally many rows."""
        counts = [len(rows) // len(merged)] * len(merged)
        product = _products(rows if self.quantizer is None else self.quantizer.input(rows), merged, counts)
        return product if self.adapter is None else product + self._adapted(rows, shares, counts)

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


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, shares: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(rows, shares, weight)
        ctx.counts = counts
        dtype = product_dtype(rows)
        inputs, mix = rows.to(dtype), shares.to(dtype)
        parts = []
        for part in _blocks(weight, len(mix)):
            parts.append(_products(inputs, _merged(mix, weight[:, part].to(dtype)), counts))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, shares, weight = ctx.saved_tensors
        dtype, counts = product_dtype(rows), ctx.counts
        inputs, mix, grad = rows.to(dtype), shares.to(dtype), grad.to(dtype).contiguous()
        grad_rows, grad_mix = torch.zeros((), dtype=dtype), torch.zeros_like(mix)
        grad_weight = torch.empty_like(weight, dtype=dtype)
        for part in _blocks(weight, len(mix)):
            theta, incoming = weight[:, part].to(dtype), grad[:, part]
            grad_part = _products(incoming, _merged(mix, theta).transpose(1, 2), counts)
            grad_rows = grad_part if part.start == 0 else grad_rows.add_(grad_part)
            grad_merged = _outer_products(incoming, inputs, counts)
            torch.mm(mix.t(), grad_merged.flatten(1), out=grad_weight[:, part].flatten(1))
            grad_mix += inner_products(grad_merged, theta)
        return grad_rows.to(rows.dtype), grad_mix.to(shares.dtype), grad_weight.to(weight.dtype), None


def inner_products(merged: Tensor, weight: Tensor) -> Tensor:
    """``<merged[p], weight[i]>``: of ``[P, out, in]`` and ``[E, out, in]`` to ``[P, E]``."""
    # Row by row of the matrices: one product with rows of out x in numbers takes twice as long.
    return torch.bmm(merged.transpose(0, 1), weight.permute(1, 2, 0)).sum(0)


def _merged(mix: Tensor, weight: Tensor) -> Tensor:
    """``[P, out, in]`` of ``mix [P, E]`` and ``weight [E, out, in]``."""
    return (mix @ weight.flatten(1)).unflatten(1, weight.shape[1:])


def _products(rows: Tensor, matrices: Tensor, counts: list[int]) -> Tensor:
    """``y[r] = matrices[p] @ rows[r]``."""
    if _are_equal(counts):
        return torch.bmm(rows.unflatten(0, (len(counts), -1)), matrices.transpose(1, 2)).flatten(0, 1)
    result = rows.new_empty(len(rows), matrices.shape[1])
    for part, matrix, result_part in zip(rows.split(counts), matrices, result.split(counts), strict=True):
        torch.mm(part, matrix.t(), out=result_part)
    return result


def _outer_products(grad: Tensor, rows: Tensor, counts: list[int]) -> Tensor:
    """``[P, out, in]``: the gradients of the matrices of :func:`_products`."""
    if _are_equal(counts):
        grad, rows = (t.unflatten(0, (len(counts), -1)) for t in (grad, rows))
        return torch.bmm(grad.transpose(1, 2), rows)
    result = rows.new_empty(len(counts), grad.shape[1], rows.shape[1])
    for incoming, part, matrix in zip(grad.split(counts), rows.split(counts), result, strict=True):
        torch.mm(incoming.t(), part, out=matrix)
    return result


def _are_equal(counts: list[int]) -> bool:
    return counts.count(counts[0]) == len(counts)


def _blocks(weight: Tensor, pieces: int) -> list[slice]:
    """Slices of the output features of ``weight [E, out, in]``, about equal, whose merged matrices fit the budget."""
    _, features, width = weight.shape
    budget = _CPU_NUMBERS if weight.device.type == "cpu" else _GPU_NUMBERS
    most = max(32, budget // (pieces * width))
    step = math.ceil(features / math.ceil(features / most))
    return [slice(start, min(start + step, features)) for start in range(0, features, step)]
