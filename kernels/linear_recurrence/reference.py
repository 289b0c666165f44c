"""The naive twins: token by token, and all pairs of tokens at once."""

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


def parallel(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, starts: Tensor | None = None) -> Tensor:
    """All positions at once, from an empty state: ``((Q K^T) * L) V`` with ``L_ij`` the decay from j to i.

    Returns:
        ``[batch, heads, length, width]``.
    """
    heads, length = value.shape[1:3]
    wide = torch.promote_types(value.dtype, torch.float32)
    query, key = (t.repeat_interleave(heads // t.shape[1], 1).to(wide) for t in (query, key))
    steps = log_decay[:, None].expand(-1, length) if log_decay.ndim == 1 else log_decay
    weights = (query @ key.transpose(-1, -2)) * segment_sum(steps.to(query.dtype)).exp()
    if starts is not None:
        document = starts.cumsum(-1)
        weights = weights * (document[:, :, None] == document[:, None, :])[:, None]
    return (weights @ value.to(query.dtype)).to(value.dtype)


def segment_sum(steps: Tensor) -> Tensor:
    """``[..., length]`` to ``[..., length, length]``: at (i, j) the sum of ``steps`` over ``j < s <= i``, minus
    infinity where j > i. Sums what it says, instead of subtracting sums that lost the small digits."""
    length = steps.shape[-1]
    lower = torch.ones(length, length, dtype=torch.bool, device=steps.device).tril()
    summands = steps[..., :, None].expand(*steps.shape, length).where(lower.tril(-1), 0.0)
    return summands.cumsum(-2).masked_fill(~lower, float("-inf"))
