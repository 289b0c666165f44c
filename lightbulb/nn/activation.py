"""The gated activation ``silu(gate) * up`` (SwiGLU, Shazeer 2020, arXiv:2002.05202) and the squared ReLU."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import relu, silu


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, elementwise."""
    return _SwiGLU.apply(gate, up)


def squared_relu(x: Tensor) -> Tensor:
    """``max(x, 0)^2``, elementwise (So et al. 2021, arXiv:2109.08668)."""
    return relu(x).square()


def swiglu_grad_(gate: Tensor, activated: Tensor, up: Tensor, grad: Tensor, out: tuple[Tensor, Tensor]) -> None:
    """Write the gradients of gate and up to ``out``; ``activated`` is ``silu(gate)`` and ``grad`` is overwritten."""
    grad_gate, grad_up = out
    torch.mul(grad, activated, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)


class _SwiGLU(torch.autograd.Function):
    """Keeps its two inputs and nothing else."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grads = torch.empty_like(gate), torch.empty_like(up)
        swiglu_grad_(gate, silu(gate), up, grad.clone(), grads)
        return grads
