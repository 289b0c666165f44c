"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-split pairing as in Llama.

Feature ``i`` is paired with feature ``i + head_dim / 2``. Angles are computed in float32 from integer positions, also
for bfloat16 models: rounding the frequencies would change the model.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines in float32: ``[length, 1, 1, head_dim / 2]`` for ``positions [length]``, ``[length, batch, 1,
    head_dim / 2]`` for ``[length, batch]``."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    places = positions[:, None] if positions.ndim == 1 else positions
    angles = places.to(torch.float32)[:, :, None, None] * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [length, batch, heads, head_dim]`` by its positions; computed in float32, returned in x's dtype.

    The result lies in memory as ``[batch, heads, length, head_dim]``, the order attention reads.
    """
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    """Rotating moves the data to attention's order at no extra pass, and the gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        length, batch, heads, width = x.shape
        out = x.new_empty(batch, heads, length, width).permute(2, 0, 1, 3)
        return _rotate_into(out, x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate_into(grad.new_empty(grad.shape), grad, cos, -sin), None, None


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    result = out if out.dtype == wide.dtype else torch.empty_like(out, dtype=wide.dtype)
    (first, second), (to_first, to_second) = wide.chunk(2, dim=-1), result.chunk(2, dim=-1)
    cos, sin = cos.to(wide.dtype), sin.to(wide.dtype)
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin)
    return out if result is out else out.copy_(result)
