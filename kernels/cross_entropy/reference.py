"""The naive twin: all logits at once."""

import torch
from torch import Tensor


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0) -> Tensor:
    """``lse - logit of the label + z_loss * lse^2``, zero where the label is -100: ``[tokens]``."""
    logits = hidden @ weight.t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    lse = logits.logsumexp(-1)
    target = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return (lse - target + z_loss * lse.square()).masked_fill(labels == -100, 0.0)
