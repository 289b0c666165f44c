"""Causal attention on CPUs without matrix units, memory linear in the length (Dao et al. 2022, arXiv:2205.14135).

PyTorch's kernel for CPUs multiplies small blocks by calls to a library; here a block's scores are made, used and
forgotten by one function, in float32, whatever the inputs' layout. PyTorch computes on GPUs, and without C++ kernels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from lightbulb.kernels.causal_attention import native, reference
from lightbulb.kernels.choice import is_reference
from lightbulb.kernels.native import takes_native


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(width)) v``, each position over those up to its own.

    Args:
        query: ``[batch, heads, length, width]``.
        key: ``[batch, kv_heads, length, width]``; each serves ``heads / kv_heads`` consecutive query heads.
        value: as key.

    Returns:
        ``[batch, heads, length, width]``; from the C++ kernel it lies in memory as ``[length, batch, heads, width]``,
        the order an output projection reads.
    """
    if is_reference():
        return reference.causal_attention(query, key, value)
    if has_fast_causal_attention(query, key, value):
        return _CausalAttention.apply(query, key, value)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return scaled_dot_product_attention(query, key, value, is_causal=True)


def has_fast_causal_attention(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the C++ kernel computes these."""
    one_kind = query.dtype == key.dtype == value.dtype and query.dtype in native.DTYPES
    return one_kind and takes_native(query, key, value)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, width = query.shape
        query, key, value = _aligned(query), _aligned(key), _aligned(value)
        out = query.new_empty(length, batch, heads, width).permute(1, 2, 0, 3)
        lse = query.new_empty(batch, heads, length, dtype=torch.float32)
        native.forward(query, key, value, out, lse)
        ctx.save_for_backward(query, key, value, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, lse = ctx.saved_tensors
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        native.backward(query, key, value, _aligned(grad), *grads, lse)
        return grads


def _aligned(x: Tensor) -> Tensor:
    """With features side by side."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
