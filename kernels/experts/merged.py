"""Products with a weighted mean of expert matrices, one mean for each piece of a sequence.

Merging in parameter space (SMEAR, Muqeeth et al. 2023, arXiv:2306.03745; Lory, Zhong et al. 2024, arXiv:2405.03133):
``y = x (sum_i e_i W_i)^T``. With P pieces the merged matrices are P times the size of a dense layer's, so they exist
for some features at a time, few enough to stay in cache until they are multiplied, and are merged again in the
backward. There, with ``G_p`` the gradient of a merged matrix, ``dL/dW_i = sum_p e_pi G_p`` and ``dL/de_pi = <G_p,
W_i>``. Features are cut rather than pieces, so that each expert's numbers are read once.
"""

import math
import threading
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightbulb.kernels.experts.grouped import Scratch
from lightbulb.kernels.swiglu import swiglu_, swiglu_grad_

CPU_NUMBERS = 2**23
"""Of merged matrices at a time: four bytes each stay in the last level of a server's cache."""
GPU_NUMBERS = 2**24
"""Two bytes each fit the 50 MB of a Hopper's second level: in its main memory, writing and reading a merged number
takes twice as long as 256 rows take to multiply it."""
_NARROWEST = 64  # features at a time, below which products are slow

Matrices = tuple[Tensor, Tensor, Tensor]
"""Gate and up ``[E, hidden, dim]``, down ``[E, dim, hidden]``."""


class MergedLinear(torch.autograd.Function):
    """``y[r] = (sum_i shares[p, i] weight[i]) @ rows[r]`` with p the piece of r."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, shares: Tensor, weight: Tensor, counts: list[int], dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(rows, shares, weight)
        ctx.counts, ctx.dtype = counts, dtype
        inputs, mix = rows.to(dtype), shares.to(dtype)
        parts = []
        for part in _slices(weight.shape[1], len(mix) * weight.shape[2], weight):
            parts.append(_products(inputs, _merged(mix, weight[:, part].to(dtype)), counts))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, shares, weight = ctx.saved_tensors
        dtype, counts = ctx.dtype, ctx.counts
        inputs, mix, grad = rows.to(dtype), shares.to(dtype), grad.to(dtype).contiguous()
        grad_rows, grad_mix = torch.zeros((), dtype=dtype), torch.zeros_like(mix)
        grad_weight = torch.empty_like(weight, dtype=dtype)
        for part in _slices(weight.shape[1], len(mix) * weight.shape[2], weight):
            theta, incoming = weight[:, part].to(dtype), grad[:, part]
            grad_part = _products(incoming, _merged(mix, theta).transpose(1, 2), counts)
            grad_rows = grad_part if part.start == 0 else grad_rows.add_(grad_part)
            grad_merged = _outer_products(incoming, inputs, counts)
            torch.mm(mix.t(), grad_merged.flatten(1), out=grad_weight[:, part].flatten(1))
            grad_mix += _inner_products(grad_merged, theta)
        return grad_rows.to(rows.dtype), grad_mix.to(shares.dtype), grad_weight.to(weight.dtype), None, None


class MergedSwiGLU(torch.autograd.Function):
    """Some hidden features at a time, piece by piece through all products, so that what one leaves is still in cache
    for the next.

    Keeps the rows and the inputs of the activation. In the backward the gradients of merged matrices take their place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        shares: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        counts: list[int],
        dtype: torch.dtype,
    ) -> Tensor:
        inputs, mix, scratch = rows.to(dtype), shares.to(dtype), _kept(dtype)
        result, kept = inputs.new_empty(len(rows), down.shape[1]), []
        for part in _slices(gate.shape[1], 3 * len(mix) * gate.shape[2], gate):
            width = part.stop - part.start
            gate_up, back = _merge(mix, _cut((gate, up, down), part, scratch), scratch)
            kept.append(inputs.new_empty(len(rows), 2 * width))
            for piece, own in enumerate(_parts(counts)):
                inner, hidden = kept[-1][own], scratch.take("hidden", own.stop - own.start, width)
                torch.mm(inputs[own], gate_up[piece].t(), out=inner)
                swiglu_(inner[:, :width], inner[:, width:], hidden)
                _add_product(hidden, back[piece].t(), result[own], part)
        ctx.save_for_backward(rows, shares, gate, up, down, *kept)
        ctx.counts = counts
        return result.to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, shares, *weights = ctx.saved_tensors
        weights, kept = weights[:3], weights[3:]
        dtype, counts = kept[0].dtype, ctx.counts
        inputs, mix, grad, scratch = rows.to(dtype), shares.to(dtype), grad.to(dtype), _kept(dtype)
        grad_rows, grad_mix = torch.empty_like(inputs), torch.zeros_like(mix)
        grad_weights = [torch.empty_like(matrix) for matrix in weights]
        slices = _slices(weights[0].shape[1], 3 * len(mix) * rows.shape[1], weights[0])
        for part, inner in zip(slices, kept, strict=True):
            matrices = _cut(weights, part, scratch)
            gate_up, back = _merge(mix, matrices, scratch)
            for piece, own in enumerate(_parts(counts)):
                count, width = own.stop - own.start, part.stop - part.start
                hidden, grad_inner = scratch.take("hidden", count, width), scratch.take("inner", count, 2 * width)
                torch.mm(grad[own], back[piece], out=hidden)
                swiglu_grad_(hidden, *inner[own].chunk(2, dim=1), grad_inner.chunk(2, dim=1), hidden=hidden)
                torch.mm(grad[own].t(), hidden, out=back[piece])
                _add_product(grad_inner, gate_up[piece], grad_rows[own], part)
                torch.mm(grad_inner.t(), inputs[own], out=gate_up[piece])
            # Now the gradients of the merged matrices lie where these were.
            found = (*gate_up.chunk(2, dim=1), back)
            for merged, matrix, place in zip(found, matrices, _features(grad_weights, part), strict=True):
                grad_mix += _inner_products(merged, matrix)
                _give(mix, merged, place, scratch)
        return grad_rows.to(rows.dtype), grad_mix.to(shares.dtype), *grad_weights, None, None


class _Kept(threading.local):
    """Memory that stays: the page faults of a fresh buffer cost more than writing the merged matrices to it."""

    scratch: Scratch | None = None


_memory = _Kept()


def _kept(dtype: torch.dtype) -> Scratch:
    if _memory.scratch is None or _memory.scratch.dtype != dtype:
        _memory.scratch = Scratch(dtype, torch.device("cpu"))
    return _memory.scratch


def _features(matrices: list[Tensor] | Matrices, part: slice) -> Matrices:
    """These hidden features of gate, up and down."""
    gate, up, down = matrices
    return gate[:, part], up[:, part], down[:, :, part]


def _cut(matrices: list[Tensor] | Matrices, part: slice, scratch: Scratch) -> Matrices:
    """The same in the dtype of the products."""
    gate, up, down = _features(matrices, part)
    return scratch.convert("gate", gate), scratch.convert("up", up), scratch.take("down", *down.shape).copy_(down)


def _merge(mix: Tensor, matrices: Matrices, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Gate and up ``[P, 2 x features, dim]`` and down ``[P, dim, features]``, valid until the next call."""
    gate, up, down = matrices
    width = gate.shape[1]
    gate_up = scratch.take("merged gate and up", len(mix), 2 * width, gate.shape[2])
    back = scratch.take("merged down", len(mix), *down.shape[1:])
    for place, matrix in zip((gate_up[:, :width], gate_up[:, width:], back), matrices, strict=True):
        torch.mm(mix, matrix.flatten(1), out=place.view(len(mix), -1))
    return gate_up, back


def _give(mix: Tensor, merged: Tensor, place: Tensor, scratch: Scratch) -> None:
    """Write to ``place [E, ...]`` what the gradients ``merged [P, ...]`` give to each expert."""
    direct = place.dtype == merged.dtype and place[0].is_contiguous()
    product = place if direct else scratch.take("gradient", *place.shape)
    torch.mm(mix.t(), merged.flatten(1), out=product.flatten(1))
    if not direct:
        place.copy_(product)


def _add_product(a: Tensor, b: Tensor, out: Tensor, part: slice) -> None:
    """``out += a @ b``; for the first features ``out = a @ b``."""
    torch.addmm(out, a, b, beta=int(part.start > 0), out=out)


def _slices(features: int, numbers: int, weight: Tensor) -> list[slice]:
    """Slices of the features, about equal, whose merged matrices fit the budget; ``numbers`` of them for a feature."""
    most = max(_NARROWEST, (CPU_NUMBERS if weight.device.type == "cpu" else GPU_NUMBERS) // numbers)
    step = math.ceil(features / math.ceil(features / most))
    return [slice(start, min(start + step, features)) for start in range(0, features, step)]


def _parts(counts: list[int]) -> Iterator[slice]:
    """The rows of each piece."""
    return (slice(end - count, end) for end, count in zip(accumulate(counts), counts, strict=True))


def _inner_products(merged: Tensor, weight: Tensor) -> Tensor:
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
