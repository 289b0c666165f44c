"""Products with one matrix per expert, over rows sorted by expert."""

from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightbulb.nn.activation import swiglu, swiglu_grad_
from lightbulb.nn.groups import Axis
from lightbulb.nn.linear import SplitLinear
from lightbulb.nn.parameter import Logical, make_parameter
from lightbulb.nn.precision import product_dtype


def grouped_linear(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """``y[r] = weight[expert of r] @ rows[r]``.

    Args:
        rows: ``[R, in]``, sorted by expert.
        weight: ``[E, out, in]``.
        counts: rows of each expert; zeros are fine, the sum is R.

    Returns:
        ``[R, out]``. The gradient of an expert without rows is zero, not missing.
    """
    return _GroupedLinear.apply(rows, weight, counts)


def grouped_swiglu(rows: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
    """``y[r] = down[e] @ (silu(gate[e] @ rows[r]) * (up[e] @ rows[r]))`` with ``e`` the expert of r.

    Args:
        rows: ``[R, dim]``, sorted by expert.
        gate_up: ``[E, 2, hidden, dim]``: each expert's gate, then its up matrix.
        down: ``[E, dim, hidden]``.
        counts: rows of each expert; zeros are fine, the sum is R.

    Returns:
        ``[R, dim]``. The gradient of an expert without rows is zero, not missing.
    """
    gate_up = gate_up.flatten(1, 2)
    if rows.device.type == "cpu":
        return _GroupedSwiGLU.apply(rows, gate_up, down, counts)
    gate, up = grouped_linear(rows, gate_up, counts).chunk(2, dim=-1)
    return grouped_linear(swiglu(gate, up), down, counts)


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
        product = self.product(rows, partial(grouped_linear, counts=counts), start_dim=1, counts=counts)
        return product if self.adapter is None else product + self.adapter(rows, counts)


class _GroupedLinear(torch.autograd.Function):
    """One kernel for all experts where CUDA has it, else a loop of products written straight into the result."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        if _has_grouped_kernel(rows, weight):
            return torch._grouped_mm(rows, weight.transpose(1, 2), offs=_ends(counts, rows.device))
        result = rows.new_empty(len(rows), weight.shape[1])
        for expert, part in _parts(counts):
            torch.mm(rows[part], weight[expert].t(), out=result[part])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        grad = grad.contiguous()
        if not ctx.needs_input_grad[1]:
            return grouped_linear(grad, weight.transpose(1, 2), ctx.counts), None, None
        if _has_grouped_kernel(rows, weight):
            ends = _ends(ctx.counts, rows.device)
            grad_weight = torch._grouped_mm(grad.t(), rows, offs=ends)
            return torch._grouped_mm(grad, weight, offs=ends), _zero_unused(grad_weight, ctx.counts), None
        grad_rows = torch.empty_like(rows)
        grad_weight = _zero_unused(torch.empty_like(weight), ctx.counts)
        for expert, part in _parts(ctx.counts):
            torch.mm(grad[part], weight[expert], out=grad_rows[part])
            torch.mm(grad[part].t(), rows[part], out=grad_weight[expert])
        return grad_rows, grad_weight, None


class _GroupedSwiGLU(torch.autograd.Function):
    """Expert by expert through both products, so that an expert's activations are still in cache for the next step.

    Keeps the rows and the inputs of the activation; what is derived from them is computed again in the backward. What
    an expert needs for the moment lies where the expert before it had its own.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
        dtype, width = product_dtype(rows), down.shape[2]
        inner = rows.new_empty(len(rows), 2 * width, dtype=dtype)
        hidden = inner.new_empty(max(counts), width)
        result = torch.empty_like(rows)
        for expert, part in _parts(counts):
            own, active = inner[part], hidden[: part.stop - part.start]
            torch.mm(rows[part].to(dtype), gate_up[expert].to(dtype).t(), out=own)
            torch.ops.aten.silu.out(own[:, :width], out=active).mul_(own[:, width:])
            _product(active, down[expert].to(dtype).t(), result[part])
        ctx.save_for_backward(rows, gate_up, down, inner)
        ctx.counts = counts
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate_up, down, inner = ctx.saved_tensors
        dtype, width = inner.dtype, down.shape[2]
        grad_rows = torch.empty_like(rows)
        grad_gate_up, grad_down = (_zero_unused(torch.empty_like(weight), ctx.counts) for weight in (gate_up, down))
        scratch = inner.new_empty(4, max(ctx.counts) * width)
        for expert, part in _parts(ctx.counts):
            count = part.stop - part.start
            activated, hidden = scratch[:2, : count * width].view(2, count, width)
            grad_inner = scratch[2:].view(-1)[: 2 * count * width].view(count, 2 * width)
            gate, up = inner[part].split(width, dim=1)
            incoming = grad[part].to(dtype)
            torch.ops.aten.silu.out(gate, out=activated)
            _product(incoming.t(), torch.mul(activated, up, out=hidden), grad_down[expert])
            grad_hidden = torch.mm(incoming, down[expert].to(dtype), out=hidden)
            swiglu_grad_(gate, activated, up, grad_hidden, grad_inner.split(width, dim=1))
            _product(grad_inner, gate_up[expert].to(dtype), grad_rows[part])
            _product(grad_inner.t(), rows[part].to(dtype), grad_gate_up[expert])
        return grad_rows, grad_gate_up, grad_down, None


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b``, rounded to out's dtype."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _has_grouped_kernel(rows: Tensor, weight: Tensor) -> bool:
    """Whether ``torch._grouped_mm`` takes these: bfloat16 on CUDA, rows of a multiple of 16 bytes."""
    aligned = all(size % 8 == 0 for size in weight.shape[1:])
    return rows.is_cuda and rows.dtype == torch.bfloat16 and aligned and len(rows) > 0


def _ends(counts: list[int], device: torch.device) -> Tensor:
    """Where each expert's rows end."""
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=device)


def _zero_unused(gradient: Tensor, counts: list[int]) -> Tensor:
    """Zero for the experts without rows, which no product writes."""
    for expert, count in enumerate(counts):
        if count == 0:
            gradient[expert].zero_()
    return gradient


def _parts(counts: list[int]) -> list[tuple[int, slice]]:
    """The experts that have rows, each with its slice."""
    parts, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            parts.append((expert, slice(start, start + count)))
        start += count
    return parts
