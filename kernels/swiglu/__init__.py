"""``silu(gate) * up`` (SwiGLU, Shazeer 2020, arXiv:2002.05202), elementwise, keeping its inputs and nothing else."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightbulb.kernels.choice import HAS_TRITON, is_reference, takes_triton
from lightbulb.kernels.native import takes_native
from lightbulb.kernels.swiglu import native, reference

if HAS_TRITON:
    from lightbulb.kernels.swiglu import kernel


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` of two tensors ``[..., width]`` of one shape and dtype; same inputs, same bits."""
    if is_reference():
        return reference.swiglu(gate, up)
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        gate_rows, up_rows = _rows(gate), _rows(up)
        if takes_triton(gate, up):
            return kernel.forward(gate_rows, up_rows).view(gate.shape)
        if takes_native(gate, up) and gate.dtype in native.DTYPES:
            out = torch.empty_like(gate_rows, memory_format=torch.contiguous_format)
            native.forward(gate_rows, up_rows, out)
            return out.view(gate.shape)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        rows = [_rows(t) for t in (grad, gate, up)]
        if takes_triton(gate, up):
            grads = kernel.backward(*rows)
        elif takes_native(gate, up) and gate.dtype in native.DTYPES:
            grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in rows[1:])
            native.backward(*rows, *grads)
        else:
            grads = _backward(grad, gate, up)
        return grads[0].view(gate.shape), grads[1].view(up.shape)


def _backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return grad_gate, grad * torch.nn.functional.silu(gate)


def _rows(x: Tensor) -> Tensor:
    """``[rows, width]`` with columns side by side, without a copy where the layout allows."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
