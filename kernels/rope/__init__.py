"""Rotary positions (Su et al. 2021, arXiv:2104.09864), half-split pairing as in Llama, into attention's order."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightbulb.kernels.choice import HAS_TRITON, is_reference, takes_triton
from lightbulb.kernels.native import takes_native
from lightbulb.kernels.rope import native, reference

if HAS_TRITON:
    from lightbulb.kernels.rope import kernel


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [length, batch, heads, width]`` by its positions; computed in float32, returned in x's dtype.

    Args:
        x: the features of the heads, of which ``i`` and ``i + width / 2`` are a pair.
        cos: cosines of the angles, broadcastable to ``[length, batch, heads, width / 2]``.
        sin: sines, of the same shape; neither gets a gradient.

    Returns:
        as x; it lies in memory as ``[batch, heads, length, width]``, the order attention reads.
    """
    if is_reference():
        return reference.rotate(x, cos, sin).permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    """Rotating moves the data to attention's order at no extra pass, and the gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        length, batch, heads, width = x.shape
        out = x.new_empty(batch, heads, length, width).permute(2, 0, 1, 3)
        return _rotate_into(out, x, cos, sin, backwards=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate_into(grad.new_empty(grad.shape), grad, cos, sin, backwards=True), None, None


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, backwards: bool) -> Tensor:
    tensors = (x, cos, sin)
    kernels = takes_triton(*tensors), takes_native(*tensors) and native.supports(*tensors)
    if any(kernels):
        half = (*x.shape[:3], x.shape[3] // 2)
        expanded = [_features_together(t).expand(half) for t in (cos, sin)]
        if expanded[0].stride() != expanded[1].stride():
            expanded = [t.contiguous() for t in expanded]
        module = kernel if kernels[0] else native
        module.rotate(_features_together(x), *expanded, out, backwards)
        return out
    wide = x if x.dtype == torch.float64 else x.float()
    result = out if out.dtype == wide.dtype else torch.empty_like(out, dtype=wide.dtype)
    (first, second), (to_first, to_second) = wide.chunk(2, dim=-1), result.chunk(2, dim=-1)
    cos, sin = cos.to(wide.dtype), -sin.to(wide.dtype) if backwards else sin.to(wide.dtype)
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin)
    return out if result is out else out.copy_(result)


def _features_together(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
