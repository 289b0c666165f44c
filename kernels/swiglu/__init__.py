"""``silu(gate) * up`` (SwiGLU, Shazeer 2020, arXiv:2002.05202), elementwise, keeping its inputs and nothing else."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

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


def swiglu_(gate: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """Write ``silu(gate) * up`` to ``out`` and return it; without autograd, for use inside a Function.

    Args:
        gate: ``[rows, width]``; rows may lie apart in memory.
        up: as gate.
        out: as gate, and may be gate or up itself.
    """
    if is_reference():
        return out.copy_(reference.swiglu(gate, up))
    columns = all(_has_columns_together(t) for t in (gate, up, out))
    if columns and takes_triton(gate, up, out):
        kernel.forward(gate, up, out)
    elif columns and takes_native(gate, up, out) and native.supports(gate, up, out):
        native.forward(gate, up, out)
    else:
        torch.mul(silu(gate), up, out=out)
    return out


def swiglu_grad_(
    grad: Tensor, gate: Tensor, up: Tensor, out: tuple[Tensor, Tensor], hidden: Tensor | None = None
) -> None:
    """Write the gradients of gate and up to ``out``; without autograd, for use inside a Function.

    Args:
        grad: ``[rows, width]``, the gradient of ``silu(gate) * up``; rows may lie apart in memory.
        gate: as grad.
        up: as grad.
        out: as grad each; they may be gate and up, or grad, themselves.
        hidden: takes ``silu(gate) * up`` in the same pass, for the gradient of the product that follows; may be grad.
    """
    tensors = (grad, gate, up, *out, *([] if hidden is None else [hidden]))
    if is_reference():
        _write_reference(grad, gate, up, out, hidden)
    elif not all(_has_columns_together(t) for t in tensors):
        _write(grad, gate, up, out, hidden)
    elif takes_triton(*tensors):
        kernel.backward(grad, gate, up, *out, hidden)
    elif takes_native(*tensors) and native.supports(*tensors):
        native.backward(grad, gate, up, *out, hidden)
    else:
        _write(grad, gate, up, out, hidden)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        rows = _rows(gate), _rows(up)
        return swiglu_(*rows, _empty(rows[0])).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_rows, gate_rows, up_rows = (_rows(t) for t in (grad, gate, up))
        grads = _empty(gate_rows), _empty(up_rows)
        swiglu_grad_(grad_rows, gate_rows, up_rows, grads)
        return grads[0].view(gate.shape), grads[1].view(up.shape)


def _write(grad: Tensor, gate: Tensor, up: Tensor, out: tuple[Tensor, Tensor], hidden: Tensor | None) -> None:
    """The gradients in plain operations; all are computed before the first is written, which may be an input."""
    activated = silu(gate)
    grad_gate, grad_up = torch.ops.aten.silu_backward(grad * up, gate), grad * activated
    if hidden is not None:
        torch.mul(activated, up, out=hidden)
    out[0].copy_(grad_gate)
    out[1].copy_(grad_up)


def _write_reference(grad: Tensor, gate: Tensor, up: Tensor, out: tuple[Tensor, Tensor], hidden: Tensor | None) -> None:
    leaves = gate.detach().clone().requires_grad_(), up.detach().clone().requires_grad_()
    with torch.enable_grad():
        y = reference.swiglu(*leaves)
        grads = torch.autograd.grad(y, leaves, grad.clone())
    if hidden is not None:
        hidden.copy_(y.detach())
    for target, found in zip(out, grads, strict=True):
        target.copy_(found)


def _rows(x: Tensor) -> Tensor:
    """``[rows, width]`` with columns side by side, without a copy where the layout allows."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if _has_columns_together(rows) else rows.contiguous()


def _has_columns_together(rows: Tensor) -> bool:
    return rows.stride(1) == 1 or rows.shape[1] == 1


def _empty(rows: Tensor) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)
