"""The Triton kernels: one program per block of a row; sums and products in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def forward_kernel(gate, up, out, gate_stride, up_stride, out_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    g = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + columns, g * tl.sigmoid(g) * u, mask=inside)


@triton.jit
def backward_kernel(
    grad, gate, up, grad_gate, grad_up, grad_stride, gate_stride, up_stride, out_stride, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    d = tl.load(grad + row * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(grad_up + row * out_stride + columns, d * g * s, mask=inside)
    tl.store(grad_gate + row * out_stride + columns, d * u * s * (1.0 + g * (1.0 - s)), mask=inside)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, ``[rows, width]``."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    rows, width = gate.shape
    forward_kernel[rows, triton.cdiv(width, _BLOCK)](
        gate, up, out, gate.stride(0), up.stride(0), out.stride(0), width, BLOCK=_BLOCK
    )
    return out


def backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, ``[rows, width]``."""
    grad_gate, grad_up = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))
    rows, width = gate.shape
    backward_kernel[rows, triton.cdiv(width, _BLOCK)](
        grad,
        gate,
        up,
        grad_gate,
        grad_up,
        grad.stride(0),
        gate.stride(0),
        up.stride(0),
        grad_gate.stride(0),
        width,
        BLOCK=_BLOCK,
    )
    return grad_gate, grad_up
