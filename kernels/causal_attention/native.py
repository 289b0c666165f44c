"""The C++ kernel, for float32 and bfloat16 on the CPU; it multiplies in float32."""

import torch
from torch import Tensor

from lightbulb.kernels.native import FLOAT, INT, POINTER, function

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
DTYPES = tuple(_NAMES)
_TENSOR = (POINTER, INT, INT, INT)
_SIZES = (POINTER, *[INT] * 5, FLOAT, INT)


def forward(query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor) -> None:
    """Write the result, and the scores' log-sum-exp ``[batch, heads, length]`` in float32. Features of every tensor lie
    side by side."""
    call = function(f"causal_attention_{_NAMES[query.dtype]}", *_TENSOR * 4, *_SIZES)
    call(*_places(query, key, value, out), *_sizes(query, key, lse))


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    lse: Tensor,
) -> None:
    """Write the three gradients."""
    call = function(f"causal_attention_grad_{_NAMES[query.dtype]}", *_TENSOR * 7, *_SIZES)
    places = _places(query, key, value, grad, grad_query, grad_key, grad_value)
    call(*places, *_sizes(query, key, lse))


def _places(*tensors: Tensor) -> list[int]:
    """Address, and strides of batch, heads and positions, of each tensor."""
    return [number for tensor in tensors for number in (tensor.data_ptr(), *tensor.stride()[:3])]


def _sizes(query: Tensor, key: Tensor, lse: Tensor) -> tuple[int | float, ...]:
    batch, heads, length, width = query.shape
    return lse.data_ptr(), batch, heads, key.shape[1], length, width, width**-0.5, torch.get_num_threads()
