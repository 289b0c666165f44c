"""The naive twin: token by token."""

import torch
from torch import Tensor


def linear_recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    state: Tensor,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As :func:`lightbulb.kernels.linear_recurrence.linear_recurrence`."""
    heads, length = value.shape[1:3]
    query, key = (t.repeat_interleave(heads // t.shape[1], 1).to(state.dtype) for t in (query, key))
    decay = log_decay.to(state.dtype).exp()
    results = []
    for t in range(length):
        kept = decay[:, None, None] if decay.ndim == 1 else decay[:, :, t, None, None]
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None, None], 0.0)
        state = kept * state + key[:, :, t, :, None] * value[:, :, t, None, :]
        results.append(query[:, :, t, None, :] @ state)
    return torch.cat(results, dim=2).to(value.dtype), state
