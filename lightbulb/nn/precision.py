"""The dtype in which this machine multiplies matrices fastest."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_MIN_ROWS = 32  # for fewer, converting the weight takes longer than it saves


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype to multiply tensors like ``x`` in.

    Its own, except for bfloat16 on a CPU without AMX: there bfloat16 products run at half the rate of float32 (84
    against 157 GFLOP/s on one core with AVX-512 only), so that converting them pays, and rounds less.
    """
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not has_amx():
        return torch.float32
    return x.dtype


@cache
def has_amx() -> bool:
    """Whether the CPU multiplies bfloat16 tiles."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` of ``x [..., in]`` and ``weight [out, in]``, multiplied in :func:`product_dtype`, in x's dtype."""
    if product_dtype(x) == x.dtype or x.numel() < _MIN_ROWS * x.shape[-1]:
        return torch.nn.functional.linear(x, weight)
    return _ConvertedLinear.apply(x, weight)


class _ConvertedLinear(torch.autograd.Function):
    """Keeps what it was given and converts it again in the backward, so that no activation is kept twice as wide."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        dtype = product_dtype(x)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        # Converted last: what a Function returns as a view could not be changed in place.
        return (rows @ weight.to(dtype).t()).view(*x.shape[:-1], len(weight)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, len(weight)).to(product_dtype(x))
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ weight.to(rows.dtype)).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.t() @ x.reshape(-1, x.shape[-1]).to(rows.dtype)).to(weight.dtype)
        return grad_x, grad_weight
