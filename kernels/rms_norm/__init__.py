"""Root-mean-square normalisation (Zhang and Sennrich, 2019, arXiv:1910.07467), also of a sum that is wanted besides."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightbulb.kernels.choice import HAS_TRITON, is_reference, takes_triton
from lightbulb.kernels.native import takes_native
from lightbulb.kernels.rms_norm import native, reference

if HAS_TRITON:
    from lightbulb.kernels.rms_norm import kernel


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension; same inputs, same bits.

    Args:
        x: ``[..., dim]``.
        weight: ``[dim]`` of any dtype; None for ones.
        eps: added to the mean square.

    Returns:
        as x: computed in float32 (float64 in float64), rounded once.
    """
    if is_reference():
        return reference.rms_norm(x, weight, eps)
    return _RMSNorm.apply(x, None, weight, eps)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """``(rms_norm(x + delta), x + delta)``, the pre-norm residual's step, in one pass each way; arguments as of
    :func:`rms_norm`, delta of x's shape and dtype."""
    if is_reference():
        total = x + delta
        return reference.rms_norm(total, weight, eps), total
    return _RMSNorm.apply(x, delta, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps the rows, and one number for each."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor | None, eps: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        added = None if delta is None else _rows(delta)
        y, total, scale = _forward(_rows(x), added, weight, eps)
        y, total = y.view(x.shape), x if delta is None else total.view(x.shape)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, scale)
        return y if delta is None else (y, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        has_delta = ctx.needs_input_grad[1]
        if grad is None:  # the normalised rows were not used
            return grad_total, grad_total if has_delta else None, None, None
        more = None if grad_total is None else _rows(grad_total)
        needs_weight = weight is not None and ctx.needs_input_grad[2]
        grad_x, grad_weight = _backward(_rows(grad), more, _rows(x), weight, scale, needs_weight)
        grad_x = grad_x.view(x.shape)
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_x, grad_x if has_delta else None, grad_weight, None


def _forward(x: Tensor, delta: Tensor | None, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised rows, the sums and what each was multiplied by; arguments ``[rows, dim]``."""
    tensors = (x,) if delta is None else (x, delta)
    if takes_triton(*tensors) and x.shape[1] <= kernel.MAX_DIM:
        return kernel.forward(x, delta, weight, eps)
    if takes_native(*tensors) and native.supports(*tensors):
        return native.forward(x, delta, None if weight is None else weight.float(), eps)
    total = x if delta is None else x + delta
    wide = _wide(total)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = (norm.square_() / wide.shape[1] + eps).rsqrt_()
    unit = wide * scale
    return (unit if weight is None else unit.mul_(_wide(weight))).to(x.dtype), total, scale[:, 0]


def _backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor | None, scale: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the rows and of the weight, if needed; arguments ``[rows, dim]``."""
    tensors = (grad, x) if grad_total is None else (grad, x, grad_total)
    if takes_triton(*tensors) and x.shape[1] <= kernel.MAX_DIM:
        return kernel.backward(grad, grad_total, x, weight, scale, needs_weight)
    if takes_native(*tensors) and native.supports(*tensors):
        wide_weight = None if weight is None else weight.float()
        return native.backward(grad, grad_total, x, wide_weight, scale, needs_weight)
    unit, wide = _wide(x) * scale[:, None], _wide(grad)
    product = wide * unit
    grad_weight = product.sum(0) if needs_weight else None
    if weight is not None:
        product, wide = product.mul_(_wide(weight)), wide * _wide(weight)
    along = product.sum(1, keepdim=True).div_(x.shape[1])
    grad_x = torch.addcmul(wide, unit, along, value=-1).mul_(scale[:, None])
    if grad_total is not None:
        grad_x += grad_total
    return grad_x.to(x.dtype), grad_weight


def _rows(x: Tensor) -> Tensor:
    """``[rows, dim]`` with columns side by side, without a copy where the layout allows."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _wide(x: Tensor) -> Tensor:
    """``x`` in the dtype of the statistics: float32, or float64 when it is."""
    return x if x.dtype == torch.float64 else x.float()
