"""The C++ chunks and steps, for float32 and bfloat16 on the CPU; products in float32."""

import ctypes

import torch
from torch import Tensor

from lightbulb.kernels.native import POINTER, function

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
DTYPES = tuple(_NAMES)
FEW = 8
"""Most tokens that :func:`steps` takes faster than chunks do."""

_MOST_ROWS = 64  # of a chunk: its tiles stay in the second cache


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    state: Tensor,
    starts: Tensor | None,
    chunk_size: int,
    is_kept: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Result, last state and, if kept for :func:`backward`, the states before each chunk ``[batch, heads, chunks,
    state, width]``."""
    rows = _rows(chunk_size, value.shape[2])
    result, last = torch.empty_like(value), torch.empty_like(state, memory_format=torch.contiguous_format)
    entering = None
    if is_kept:
        chunks = -(-value.shape[2] // rows)
        entering = state.new_empty(*state.shape[:2], chunks, *state.shape[2:])
    states = (state.contiguous(), last, entering, result)
    _call("forward", (query, key, value, _decay(value, log_decay), starts, *states, *[None] * 7), rows)
    return result, last, entering


def backward(
    grad: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    starts: Tensor | None,
    entering: Tensor,
    chunk_size: int,
    needs_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of query, key, value, log decay (float32, if needed) and first state."""
    (batch, heads, length), groups, rows = value.shape[:3], query.shape[1], _rows(chunk_size, value.shape[2])
    parts = -(-(heads // groups) // 4)  # of a group's heads, as in C++: each has sums of its own
    d_keys = [entering.new_empty(batch, groups * parts, length, query.shape[3]) for _ in range(2)]
    dv = torch.empty_like(value)
    d_decay = entering.new_empty(batch, heads, length) if needs_decay else None
    d_first = torch.empty_like(grad_state, memory_format=torch.contiguous_format)
    inputs = (query, key, value, _decay(value, log_decay), starts, None, None, entering, None)
    _call("backward", (*inputs, grad, grad_state.contiguous(), *d_keys, dv, d_decay, d_first), rows)
    dq, dk = (t.unflatten(1, (groups, parts)).sum(2) if parts > 1 else t for t in d_keys)
    return dq.to(query.dtype), dk.to(key.dtype), dv, d_decay, d_first


def steps(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Result and last state, token by token."""
    result, last = torch.empty_like(value), torch.empty_like(state, memory_format=torch.contiguous_format)
    states = (state.contiguous(), last, None, result)
    _call("steps", (query, key, value, _decay(value, log_decay), starts, *states, *[None] * 7), 1)
    return result, last


def _rows(chunk_size: int, length: int) -> int:
    """Of a chunk: a multiple of 16 that the sequence fills."""
    return max(16, min(_MOST_ROWS, chunk_size // 16 * 16, -(-length // 16) * 16))


def _decay(value: Tensor, log_decay: Tensor) -> Tensor:
    steps = log_decay[:, None] if log_decay.ndim == 1 else log_decay
    return steps.detach().double().expand(value.shape[:3])


def _call(name: str, tensors: tuple[Tensor | None, ...], rows: int) -> None:
    """Tensors in the order of ``Arguments`` in native.cpp; the first and the third give the sizes."""
    query, value = tensors[0], tensors[2]
    assert query is not None and value is not None
    numbers = [number for tensor in tensors for number in _place(tensor)]
    batch, heads, length, width = value.shape
    numbers += [batch, heads, query.shape[1], length, query.shape[3], width, rows, torch.get_num_threads()]
    function(f"linear_recurrence_{name}_{_NAMES[value.dtype]}", POINTER)((ctypes.c_int64 * len(numbers))(*numbers))


def _place(tensor: Tensor | None) -> list[int]:
    """Address and the strides of the first three dimensions, which are batch, head and position; documents' starts
    have no heads."""
    if tensor is None:
        return [0] * 4
    strides = tensor.stride()
    return [tensor.data_ptr(), strides[0], *((0, strides[1]) if tensor.ndim == 2 else strides[1:3])]
