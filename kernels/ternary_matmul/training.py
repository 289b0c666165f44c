"""Linear layers with ternary weights and 8-bit inputs in training: the product in whole numbers, gradients straight
through (Bengio et al. 2013, arXiv:1308.3432; BitNet b1.58, Ma et al. 2024, arXiv:2402.17764).

Forward is what fake quantisation rounds towards: sums of products of codes without error, scaled once. Backward is
that of ``fake(x) @ fake(W)^T`` in the inputs' dtype, the rounding taken for the identity. Kept for it are the codes, 1
byte an input and 1/4 byte a weight, beside the inputs themselves where a norm needs them.
"""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightbulb.kernels.choice import HAS_TRITON, takes_triton

if HAS_TRITON:
    from lightbulb.kernels.ternary_matmul import kernel


Rule = tuple[int, float, float, float | None]
"""``levels``, ``factor``, ``least`` and ``norm_eps`` of :func:`lightbulb.kernels.ternary_matmul.kernel.quantise`."""


def takes_ternary_training(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`ternary_training_linear` may compute with these here."""
    return takes_triton(x, weight)


def ternary_training_linear(
    x: Tensor, weight: Tensor, scale: Tensor, rule: Rule, counts: list[int] | None = None
) -> Tensor:
    """``quantised(x) @ ternary(weight)^T``, of several matrices side by side, or row by row of its expert's.

    Args:
        x: ``[..., in]``, all features of each token; with ``counts`` ``[rows, in]``, sorted by expert.
        weight: ``[..., out, in]`` of any values; with ``counts`` ``[experts, ..., out, in]``.
        scale: ``[..., 1, 1]`` of each whole matrix, the mean of its magnitudes, agreed on by the ranks that share it.
        rule: how inputs are quantised.
        counts: rows of each expert; zeros are fine, the sum is ``rows``.

    Returns:
        ``[..., out of all matrices]`` in the dtype of x.
    """
    return _TernaryLinear.apply(x, weight, scale, rule, counts)


class _TernaryLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, rule: Rule, counts: list[int] | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        rows = rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
        ends = None if counts is None else ends_of(counts, x.device)
        tokens, packed = kernel.quantise(rows, *rule), kernel.pack(weight, scale)
        y = kernel.multiply(tokens, packed, scale, x.dtype, ends)
        kept = x if tokens.inverse_root is not None else None
        ctx.save_for_backward(kept, tokens.inverse_root, tokens.codes, tokens.scale, packed, scale)
        ctx.shape, ctx.counts, ctx.dtypes = x.shape, counts, (x.dtype, weight.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse_root, codes, token_scale, packed, scale = ctx.saved_tensors
        width, dtype = ctx.shape[-1], ctx.dtypes[0]
        grad = grad.reshape(-1, grad.shape[-1]).contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            weight = _matrices(_weights(packed, scale, width, dtype), ctx.counts)
            grad_x = _along(grad, weight, ctx.counts)
            if x is not None:
                grad_x = _through_norm(grad_x, x.reshape(-1, width), inverse_root)
            grad_x = grad_x.view(ctx.shape)
        if ctx.needs_input_grad[1]:
            rows = (codes.mT.flatten(1)[:, :width] * token_scale[:, None]).to(dtype)
            grad_weight = _across(grad, rows, ctx.counts).view(*packed.shape[:-1], width).to(ctx.dtypes[1])
        return grad_x, grad_weight, None, None, None


def _weights(packed: Tensor, scale: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Codes x scale ``[..., out, in]``, rounded to a dtype, of the bytes."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)
    digits = (packed[..., None] >> shifts).bitwise_and_(3).flatten(-2)[..., :width]
    return (digits.to(torch.int8) - 1) * scale.to(dtype)


def _matrices(weight: Tensor, counts: list[int] | None) -> Tensor:
    """Several matrices of one input as one: ``[out, in]``, or ``[experts, out, in]``."""
    return weight.flatten(0, -2) if counts is None else weight.flatten(1, -2)


def _along(grad: Tensor, weight: Tensor, counts: list[int] | None) -> Tensor:
    """``grad [rows, out]`` times each row's matrix: ``[rows, in]``."""
    if counts is None:
        return grad @ weight
    if _has_grouped_kernel(grad, weight):
        return torch._grouped_mm(grad, weight, offs=ends_of(counts, grad.device))
    parts = zip(grad.split(counts), weight, strict=True)
    return torch.cat([part @ matrix for part, matrix in parts])


def _across(grad: Tensor, rows: Tensor, counts: list[int] | None) -> Tensor:
    """Gradient of the matrices, ``[out, in]`` or ``[experts, out, in]``; zero of an expert without rows."""
    if counts is None:
        return grad.mT @ rows
    if _has_grouped_kernel(grad, rows):
        result = torch._grouped_mm(grad.mT, rows, offs=ends_of(counts, grad.device))
        result[[expert for expert, count in enumerate(counts) if not count]] = 0  # which the kernel does not write
        return result
    parts = zip(grad.split(counts), rows.split(counts), strict=True)
    return torch.stack([part.mT @ mine for part, mine in parts])


def ends_of(counts: list[int], device: torch.device) -> Tensor:
    """Where each expert's rows end."""
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=device)


def _has_grouped_kernel(*tensors: Tensor) -> bool:
    """Whether ``torch._grouped_mm`` takes these: bfloat16 on CUDA, rows of a multiple of 16 bytes."""
    return all(t.is_cuda and t.dtype == torch.bfloat16 and t.numel() and t.shape[-1] % 8 == 0 for t in tensors)


def _through_norm(grad: Tensor, x: Tensor, inverse_root: Tensor) -> Tensor:
    """Gradient of x from that of ``x / sqrt(mean(x^2) + eps)``."""
    root = inverse_root[:, None]
    unit, wide = x.float() * root, grad.float()
    # The part of the gradient along the token changes only its length, which the norm removes.
    along = (wide * unit).mean(-1, keepdim=True)
    return torch.addcmul(wide, unit, along, value=-1).mul_(root).to(x.dtype)
