"""Products per expert where Triton does not apply: expert by expert, written straight into the result."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightbulb.kernels.swiglu import swiglu_, swiglu_grad_


class GroupedLinear(torch.autograd.Function):
    """``y[r] = weight[expert of r] @ rows[r]``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        return _products(rows, weight.transpose(1, 2), counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        grad_rows = _products(grad, weight, ctx.counts) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_rows, None, None
        grad_weight = _zero_unused(torch.empty_like(weight), ctx.counts)
        for expert, part in _parts(ctx.counts):
            torch.mm(grad[part].t(), rows[part], out=grad_weight[expert])
        return grad_rows, grad_weight, None


class GroupedSwiGLU(torch.autograd.Function):
    """Expert by expert through both products, so that an expert's activations are still in cache for the next step.

    Multiplies in ``dtype``. Keeps the rows and, with ``keep``, the inputs of the activation, which the backward needs;
    what is derived from them is computed again there. What an expert needs for the moment lies where the expert before
    it had its own.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, gate_up: Tensor, down: Tensor, counts: list[int], dtype: torch.dtype, keep: bool
    ) -> Tensor:
        width, scratch = down.shape[2], Scratch(dtype, rows.device)
        inner = rows.new_empty(len(rows) if keep else 0, 2 * width, dtype=dtype)
        result = rows.new_empty(rows.shape)
        for expert, part in _parts(counts):
            count = part.stop - part.start
            own = inner[part] if keep else scratch.take("inner", count, 2 * width)
            hidden = scratch.take("hidden", count, width)
            torch.mm(scratch.convert("rows", rows[part]), scratch.convert("weight", gate_up[expert]).t(), out=own)
            swiglu_(own[:, :width], own[:, width:], hidden)
            scratch.multiply(hidden, scratch.convert("weight", down[expert]).t(), result[part])
        ctx.save_for_backward(rows, gate_up, down, inner)
        ctx.counts = counts
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate_up, down, inner = ctx.saved_tensors
        width, scratch = down.shape[2], Scratch(inner.dtype, inner.device)
        grad_rows = rows.new_empty(rows.shape)
        grad_gate_up, grad_down = (_zero_unused(torch.empty_like(weight), ctx.counts) for weight in (gate_up, down))
        for expert, part in _parts(ctx.counts):
            count = part.stop - part.start
            hidden, grad_inner = scratch.take("hidden", count, width), scratch.take("inner", count, 2 * width)
            incoming = scratch.convert("grad", grad[part])
            torch.mm(incoming, scratch.convert("weight", down[expert]), out=hidden)
            swiglu_grad_(hidden, *inner[part].chunk(2, dim=1), grad_inner.chunk(2, dim=1), hidden=hidden)
            scratch.multiply(incoming.t(), hidden, grad_down[expert])
            scratch.multiply(grad_inner, scratch.convert("weight", gate_up[expert]), grad_rows[part])
            scratch.multiply(grad_inner.t(), scratch.convert("rows", rows[part]), grad_gate_up[expert])
        return grad_rows, grad_gate_up, grad_down, None, None, None


class Scratch:
    """Memory in the dtype of the products: what an expert needs lies where the expert before it had its own."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype = dtype
        self._empty = torch.empty(0, dtype=dtype, device=device)
        self._places: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor of this shape, valid until the next of this name."""
        size, place = math.prod(shape), self._places.get(name, self._empty)
        if len(place) < size:
            place = self._places[name] = self._empty.new_empty(size)
        return place[:size].view(shape)

    def convert(self, name: str, x: Tensor) -> Tensor:
        """``x`` in this dtype: itself where it has it."""
        return x if x.dtype == self.dtype else self.take(name, *x.shape).copy_(x)

    def multiply(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """``out = a @ b``, rounded to out's dtype."""
        if out.dtype == a.dtype:
            torch.mm(a, b, out=out)
        else:
            out.copy_(torch.mm(a, b, out=self.take("product", *out.shape)))


def _products(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """``y[r] = rows[r] @ weight[expert of r]`` with ``weight [E, in, out]``."""
    result = rows.new_empty(len(rows), weight.shape[2])
    for expert, part in _parts(counts):
        torch.mm(rows[part], weight[expert], out=result[part])
    return result


def _zero_unused(gradient: Tensor, counts: list[int]) -> Tensor:
    """Zero for the experts without rows, which no product writes."""
    for expert, count in enumerate(counts):
        if count == 0:
            gradient[expert].zero_()
    return gradient


def _parts(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, each with its slice."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count
