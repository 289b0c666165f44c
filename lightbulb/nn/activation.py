"""The gated activation ``silu(gate) * up`` (SwiGLU, Shazeer 2020, arXiv:2002.05202) and the squared ReLU."""

import torch
from torch import Tensor
from torch.nn.functional import relu

from lightbulb.ops import swiglu

__all__ = ["squared_relu", "swiglu", "swiglu_grad_"]


def squared_relu(x: Tensor) -> Tensor:
    """``max(x, 0)^2``, elementwise (So et al. 2021, arXiv:2109.08668)."""
    return relu(x).square()


def swiglu_grad_(gate: Tensor, activated: Tensor, up: Tensor, grad: Tensor, out: tuple[Tensor, Tensor]) -> None:
    """Write the gradients of gate and up to ``out``; ``activated`` is ``silu(gate)`` and ``grad`` is overwritten."""
    grad_gate, grad_up = out
    torch.mul(grad, activated, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
