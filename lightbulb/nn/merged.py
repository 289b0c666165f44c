"""Products with a weighted mean of expert matrices, one mean for each piece of a sequence.

Merging in parameter space (SMEAR, Muqeeth et al. 2023, arXiv:2306.03745; Lory, Zhong et al. 2024, arXiv:2405.03133):
``y = x (sum_i e_i W_i)^T``. With P pieces the merged matrices are P times the size of a dense layer's, so they exist for
some output features at a time, small enough to stay in cache, and are merged again in the backward:
``dL/dW_i = sum_p e_pi G_p`` and ``dL/de_pi = <G_p, W_i>``, where ``G_p`` is the gradient of the merged matrix.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lightbulb.nn.groups import Axis
from lightbulb.nn.linear import SplitLinear
from lightbulb.nn.parameter import Logical, make_parameter
from lightbulb.nn.precision import product_dtype
from lightbulb.nn.recompute import recompute

Places = list[tuple[int, slice]]
"""The sample and the positions of each piece; together every token once, sample by sample, in order of position."""

_CPU_NUMBERS = 2**19  # of merged matrices and their gradients at a time
_GPU_NUMBERS = 2**27
_QUANTIZED_PIECES = 8  # whose merged matrices exist at a time


def merged_linear(x: Tensor, shares: Tensor, weight: Tensor, places: Places) -> Tensor:
    """``y[t] = (sum_i shares[p, i] weight[i]) @ x[t]`` for the tokens t of each piece p.

    Args:
        x: ``[length, batch, in]``.
        shares: ``[P, E]``.
        weight: ``[E, out, in]``.
        places: of the P pieces.

    Returns:
        ``[length, batch, out]``.
    """
    return _MergedLinear.apply(x, shares, weight, places)


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

    def forward(self, x: Tensor, shares: Tensor, places: Places) -> Tensor:
        """As :func:`merged_linear`, local parts, leaving no tensor region."""
        if self.quantizer is None:
            product = merged_linear(x, shares, self.weight, places)
        else:
            product = self._quantized_product(self.quantizer.input(x), shares, places)
        return product if self.adapter is None else product + self._adapted(x, shares, places)

    def merge(self, shares: Tensor) -> Tensor:
        """``shares [P, E]`` to ``[P, out, in]``, as they are to be multiplied."""
        merged = (shares.to(self.weight.dtype) @ self.weight.flatten(1)).unflatten(1, self.weight.shape[1:])
        return merged if self.quantizer is None else self.quantizer.matrix(merged)

    def multiply_merged(self, x: Tensor, merged: Tensor, shares: Tensor) -> Tensor:
        """The product when each sample is one piece, whose matrix is known: ``merged [batch, out, in]``."""
        inputs = x if self.quantizer is None else self.quantizer.input(x)
        product = torch.bmm(inputs.transpose(0, 1), merged.transpose(1, 2)).transpose(0, 1)
        places = [(sample, slice(0, len(x))) for sample in range(x.shape[1])]
        return product if self.adapter is None else product + self._adapted(x, shares, places)

    def _quantized_product(self, x: Tensor, shares: Tensor, places: Places) -> Tensor:
        """Some pieces at a time; their merged matrices are not kept."""

        def products(shares: Tensor, *parts: Tensor) -> Tensor:
            return torch.cat([linear(part, matrix) for part, matrix in zip(parts, self.merge(shares), strict=True)])

        parts = [x[where, sample] for sample, where in places]
        chunks = [slice(i, i + _QUANTIZED_PIECES) for i in range(0, len(parts), _QUANTIZED_PIECES)]
        rows = [recompute(products, shares[chunk], *parts[chunk]) for chunk in chunks]
        return torch.cat(rows).view(x.shape[1], x.shape[0], -1).transpose(0, 1)

    def _adapted(self, x: Tensor, shares: Tensor, places: Places) -> Tensor:
        """Each expert's adapter on all tokens, weighted as its matrix is."""
        assert self.adapter is not None
        rows = x.transpose(0, 1).flatten(0, 1)
        every = self.adapter(rows.repeat(len(self.weight), 1), [len(rows)] * len(self.weight))
        lengths = torch.tensor([where.stop - where.start for _, where in places], device=x.device)
        weights = shares.to(x.dtype).repeat_interleave(lengths, dim=0)
        mixed = torch.einsum("re,ero->ro", weights, every.view(len(self.weight), len(rows), -1))
        return mixed.view(x.shape[1], x.shape[0], -1).transpose(0, 1)


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: Tensor, weight: Tensor, places: Places) -> Tensor:
        ctx.save_for_backward(x, shares, weight)
        ctx.places = places
        dtype = product_dtype(x)
        inputs, mix = x.to(dtype), shares.to(dtype)
        result = inputs.new_empty(*x.shape[:2], weight.shape[1])
        for part in _blocks(weight, len(shares)):
            merged = (mix @ _flat(weight, part).to(dtype)).unflatten(1, (-1, weight.shape[2]))
            for (sample, where), matrix in zip(places, merged, strict=True):
                torch.mm(inputs[where, sample], matrix.t(), out=result[where, sample, part])
        return result.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, shares, weight = ctx.saved_tensors
        dtype = product_dtype(x)
        inputs, mix, grad = x.to(dtype), shares.to(dtype), grad.to(dtype)
        grad_x = torch.zeros_like(inputs)
        grad_mix, grad_weight = torch.zeros_like(mix), torch.empty_like(weight, dtype=dtype)
        for part in _blocks(weight, len(shares)):
            theta = _flat(weight, part).to(dtype)
            merged = (mix @ theta).unflatten(1, (-1, weight.shape[2]))
            grad_merged = torch.empty_like(merged)
            for (sample, where), matrix, grad_matrix in zip(ctx.places, merged, grad_merged, strict=True):
                incoming = grad[where, sample, part]
                grad_x[where, sample].addmm_(incoming, matrix)
                torch.mm(incoming.t(), inputs[where, sample], out=grad_matrix)
            torch.mm(mix.t(), grad_merged.flatten(1), out=_flat(grad_weight, part))
            grad_mix.addmm_(grad_merged.flatten(1), theta.t())
        return grad_x.to(x.dtype), grad_mix.to(shares.dtype), grad_weight.to(weight.dtype), None


def _flat(weight: Tensor, part: slice) -> Tensor:
    """Some output features of every expert: a view ``[E, part x in]``."""
    return weight[:, part].flatten(1)


def _blocks(weight: Tensor, pieces: int) -> Iterator[slice]:
    """Slices of the output features whose merged matrices and gradients fit the budget."""
    _, features, width = weight.shape
    budget = _CPU_NUMBERS if weight.device.type == "cpu" else _GPU_NUMBERS
    step = max(64, budget // (2 * pieces * width))
    return (slice(start, min(start + step, features)) for start in range(0, features, step))
