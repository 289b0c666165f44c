"""The Triton kernels as functions with gradients."""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightbulb.kernels.experts import kernel
from lightbulb.kernels.experts.permute import sort_pairs, sum_rows
from lightbulb.kernels.experts.schedule import Schedule, schedule


class GroupedLinear(torch.autograd.Function):
    """``y[r] = weight[expert of r] @ rows[r]``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        rows = rows.contiguous()
        plan = _scheduled(counts, rows)
        ctx.save_for_backward(rows, weight, *plan[:2])
        ctx.tile = plan.tile
        return kernel.linear(plan, rows, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, *plan = ctx.saved_tensors
        plan, grad = Schedule(*plan, ctx.tile), grad.contiguous()
        grad_rows = kernel.linear(plan, grad, weight.transpose(1, 2)) if ctx.needs_input_grad[0] else None
        return grad_rows, kernel.weight_grad(plan, grad, rows) if ctx.needs_input_grad[1] else None, None


class GroupedSwiGLU(torch.autograd.Function):
    """Keeps the rows and the inputs of the activation."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
        rows, gate_up, down = rows.contiguous(), gate_up.contiguous(), down.contiguous()
        plan = _scheduled(counts, rows)
        inner, hidden = kernel.swiglu(plan, rows, gate_up)
        ctx.save_for_backward(rows, gate_up, down, inner, *plan[:2])
        ctx.tile = plan.tile
        return kernel.linear(plan, hidden, down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate_up, down, inner, *plan = ctx.saved_tensors
        plan, grad = Schedule(*plan, ctx.tile), grad.contiguous()
        grad_inner, hidden, _ = kernel.swiglu_grad(plan, grad, down, inner)
        grad_down = kernel.weight_grad(plan, grad, hidden) if ctx.needs_input_grad[2] else None
        grad_gate_up = kernel.weight_grad(plan, grad_inner, rows) if ctx.needs_input_grad[1] else None
        return kernel.linear(plan, grad_inner, gate_up.transpose(1, 2)), grad_gate_up, grad_down, None


class MixtureSwiGLU(torch.autograd.Function):
    """Keeps the tokens and the inputs of the activation: rows are gathered again where they are multiplied again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        x, gate_up, down = x.contiguous(), gate_up.contiguous(), down.contiguous()
        order, inverse, ends = sort_pairs(experts, len(gate_up))
        plan = schedule(ends.int(), len(order))
        inner, hidden = kernel.swiglu(plan, x, gate_up, order // experts.shape[1])
        ctx.save_for_backward(x, gates, gate_up, down, inner, order, inverse, *plan[:2])
        ctx.tile = plan.tile
        return sum_rows(kernel.linear(plan, hidden, down), inverse.view(gates.shape), gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, gate_up, down, inner, order, inverse, *plan = ctx.saved_tensors
        plan, grad, tokens = Schedule(*plan, ctx.tile), grad.contiguous(), order // gates.shape[1]
        row_gates = gates.flatten().index_select(0, order)
        grad_inner, hidden, grad_row_gates = kernel.swiglu_grad(plan, grad, down, inner, row_gates, tokens)
        grad_down = kernel.weight_grad(plan, grad, hidden, grad_index=tokens) if ctx.needs_input_grad[4] else None
        grad_gate_up = kernel.weight_grad(plan, grad_inner, x, a_index=tokens) if ctx.needs_input_grad[3] else None
        grad_rows = kernel.linear(plan, grad_inner, gate_up.transpose(1, 2))
        grad_x = sum_rows(grad_rows, inverse.view(gates.shape), None)
        grad_gates = grad_row_gates.index_select(0, inverse).view(gates.shape).to(gates.dtype)
        return grad_x, grad_gates, None, grad_gate_up, grad_down


def _scheduled(counts: list[int], rows: Tensor) -> Schedule:
    ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=rows.device)
    return schedule(ends, len(rows))
