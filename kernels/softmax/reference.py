"""The naive twin."""

import torch
from torch import Tensor


def softmax(scores: Tensor, mask: Tensor | None = None, sink: Tensor | None = None) -> Tensor:
    """``exp(s_i) / (exp(sink) + sum of exp(s_j))`` over the visible keys of the last dimension."""
    wide = scores if scores.dtype == torch.float64 else scores.float()
    if mask is not None:
        wide = wide.masked_fill(~mask, float("-inf"))
    highest = wide.detach().amax(-1, keepdim=True)
    if sink is not None:
        sink = sink.to(wide.dtype)[..., None]
        highest = highest.maximum(sink.detach())
    highest = highest.masked_fill(highest == float("-inf"), 0.0)  # a row without a key
    powers = (wide - highest).exp()
    total = powers.sum(-1, keepdim=True)
    total = total if sink is None else total + (sink - highest).exp()
    return (powers / total.masked_fill(total == 0.0, 1.0)).to(scores.dtype)
