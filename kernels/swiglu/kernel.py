"""The Triton kernels: one program per block of a row; sums and products in float32."""

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
    grad,
    gate,
    up,
    grad_gate,
    grad_up,
    hidden,
    grad_stride,
    gate_stride,
    up_stride,
    grad_gate_stride,
    grad_up_stride,
    hidden_stride,
    width,
    BLOCK: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    d = tl.load(grad + row * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(grad_up + row * grad_up_stride + columns, d * g * s, mask=inside)
    tl.store(grad_gate + row * grad_gate_stride + columns, d * u * s * (1.0 + g * (1.0 - s)), mask=inside)
    if HIDDEN:
        tl.store(hidden + row * hidden_stride + columns, g * s * u, mask=inside)


def forward(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """``out = silu(gate) * up``, all ``[rows, width]`` with columns side by side."""
    rows, width = gate.shape
    if gate.numel():
        forward_kernel[rows, triton.cdiv(width, _BLOCK)](
            gate, up, out, gate.stride(0), up.stride(0), out.stride(0), width, BLOCK=_BLOCK
        )


def backward(
    grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, hidden: Tensor | None = None
) -> None:
    """Write both gradients and ``hidden = silu(gate) * up``, ``[rows, width]``; any may lie where an input does."""
    rows, width = gate.shape
    third = grad if hidden is None else hidden
    tensors = (grad, gate, up, grad_gate, grad_up, third)
    if gate.numel():
        backward_kernel[rows, triton.cdiv(width, _BLOCK)](
            *tensors, *(t.stride(0) for t in tensors), width, BLOCK=_BLOCK, HIDDEN=hidden is not None
        )
