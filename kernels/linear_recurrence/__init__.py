"""Linear recurrences with decay: retention and Mamba-2 in one.

``S_t = exp(a_t) S_{t-1} + k_t^T v_t`` and ``y_t = q_t S_t``, with a state ``S [state, width]`` per head and a log decay
``a_t <= 0`` that is constant per head (retention, Sun et al. 2023, arXiv:2307.08621) or depends on the token (Mamba-2,
Dao and Gu 2024, arXiv:2405.21060). All tiers but the twin are quadratic inside chunks and pass states between them; all
forget at a document's first token, exactly and with finite gradients.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightbulb.kernels.choice import HAS_TRITON, is_reference, takes_triton
from lightbulb.kernels.linear_recurrence import native, plain, reference
from lightbulb.kernels.native import takes_native

if HAS_TRITON:
    from lightbulb.kernels.linear_recurrence import decays, kernel


def linear_recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The results and the state after the last token; same inputs, same bits.

    Args:
        query: ``[batch, groups, length, state]``; a group serves ``heads / groups`` consecutive heads.
        key: as query.
        value: ``[batch, heads, length, width]``.
        log_decay: ``[batch, heads, length]``, or ``[heads]`` for a constant one, which gets no gradient.
        state: ``[batch, heads, state, width]`` before the first token, in :func:`state_dtype`; None for an empty one.
        starts: ``[batch, length]`` bool, true where a document begins; None for one document.
        chunk_size: positions that meet directly, at most; the rest meets through the state. Changes the speed, and
            results by rounding only.

    Returns:
        ``[batch, heads, length, width]`` in the dtype of value, and the state as ``state``.
    """
    batch, heads, length, width = value.shape
    if state is None:
        state = value.new_zeros(batch, heads, query.shape[3], width, dtype=state_dtype(value.dtype))
    if length == 0:
        return torch.empty_like(value), state
    if is_reference():
        return reference.linear_recurrence(query, key, value, log_decay, state, starts)
    if takes_triton(value) and length > 1 and max(query.shape[3], width) <= kernel.MAX_WIDTH:
        return _Triton.apply(*_rows(query, key, value), log_decay, state, starts, chunk_size)
    if takes_native(value) and value.dtype in native.DTYPES:
        rows = _rows(query, key, value)
        if length <= native.FEW and not _needs_grad(query, key, value, log_decay, state):
            return native.steps(*rows, log_decay, state, starts)
        return _Native.apply(*rows, log_decay, state, starts, chunk_size)
    if length == 1:
        return reference.linear_recurrence(query, key, value, log_decay, state, starts)
    return plain.linear_recurrence(query, key, value, log_decay, state, starts, chunk_size)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states: float32, or float64 for a float64 model."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Triton(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor,
        state: Tensor,
        starts: Tensor | None,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        starts = None if starts is None else starts.view(torch.uint8)
        sums = decays.decays(value, log_decay, starts, chunk_size)
        ctx.save_for_backward(query, key, value, log_decay, state, starts, *sums[:3])
        ctx.rows = sums.rows
        return kernel.forward(query, key, value, state, sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, log_decay, state, starts, *sums = ctx.saved_tensors
        (grad,) = _rows(grad)
        needed = ctx.needs_input_grad[3] and log_decay.ndim == 3
        dq, dk, dv, d_decay, d_state = kernel.backward(
            grad, grad_state, query, key, value, state, decays.Decays(*sums, ctx.rows), starts, needed
        )
        return dq, dk, dv, _decay_gradient(d_decay, log_decay), d_state, None, None


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor,
        state: Tensor,
        starts: Tensor | None,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        is_kept = any(ctx.needs_input_grad)
        results, last, entering = native.forward(query, key, value, log_decay, state, starts, chunk_size, is_kept)
        ctx.save_for_backward(query, key, value, log_decay, starts, entering)
        ctx.chunk_size = chunk_size
        return results, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, log_decay, starts, entering = ctx.saved_tensors
        (grad,) = _rows(grad)
        needed = ctx.needs_input_grad[3] and log_decay.ndim == 3
        dq, dk, dv, d_decay, d_state = native.backward(
            grad, grad_state, query, key, value, log_decay, starts, entering, ctx.chunk_size, needed
        )
        return dq, dk, dv, _decay_gradient(d_decay, log_decay), d_state, None, None


def _decay_gradient(grad: Tensor | None, log_decay: Tensor) -> Tensor | None:
    """In the shape and dtype of ``log_decay``, which may be one for all samples; None for a constant one."""
    return None if grad is None or log_decay.ndim == 1 else grad.sum_to_size(log_decay.shape).to(log_decay.dtype)


def _rows(*tensors: Tensor) -> list[Tensor]:
    """All in the dtype of the last one and with a row's columns side by side, without a copy where that is so."""
    same = [t.to(tensors[-1].dtype) for t in tensors]
    return [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in same]


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
