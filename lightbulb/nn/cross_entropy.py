"""Cross-entropy of a linear head, with the vocabulary split over the tensor axis.

The logits exist once, in the model's dtype; their gradient overwrites them. Log-sum-exp and the softmax are computed
in float32, a few rows at a time, so that no float32 copy of the logits is ever made.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp, all_reduce

from lightbulb.nn.groups import Axis

IGNORE = -100
"""Label of a position that is not predicted."""

_ROWS = 64  # rows of 8k float32 logits that stay in a core's cache


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, axis: Axis) -> Tensor:
    """Negative log-likelihood in nats, ``[tokens]`` float32, zero where the label is :data:`IGNORE`.

    Args:
        hidden: ``[tokens, dim]``, replicated over the tensor axis (its gradient is summed over it).
        weight: ``[vocab / axis size, dim]``, this rank's rows of the head.
        labels: ``[tokens]`` token ids, or :data:`IGNORE`.
        axis: the tensor axis.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, axis)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, axis: Axis) -> Tensor:
        logits = hidden @ weight.t()
        vocab = weight.shape[0]
        local = labels - axis.rank * vocab
        is_mine = (local >= 0) & (local < vocab)
        local = local.clamp(0, vocab - 1)
        lse = torch.cat([chunk.float().logsumexp(-1) for chunk in logits.split(_ROWS)])
        target = logits.gather(1, local[:, None])[:, 0].float().masked_fill(~is_mine, 0.0)
        if axis.group is not None:
            lse, target = _combine(lse, target, axis)
        ctx.save_for_backward(hidden, weight, logits, lse, local, is_mine, labels)
        ctx.axis = axis
        return (lse - target).masked_fill(labels == IGNORE, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, logits, lse, local, is_mine, labels = ctx.saved_tensors
        grad = grad.masked_fill(labels == IGNORE, 0.0)
        for start in range(0, len(logits), _ROWS):
            rows = slice(start, start + _ROWS)
            chunk = (logits[rows].float() - lse[rows, None]).exp_()
            chunk.scatter_add_(1, local[rows, None], -is_mine[rows, None].float())
            logits[rows] = chunk.mul_(grad[rows, None])
        grad_hidden = logits @ weight
        if ctx.axis.group is not None:
            all_reduce(grad_hidden, group=ctx.axis.group)
        return grad_hidden, logits.t() @ hidden, None, None


def _combine(lse: Tensor, target: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over all ranks' parts of the vocabulary, and the label's logit from the rank that holds it."""
    largest = lse.clone()
    all_reduce(largest, op=ReduceOp.MAX, group=axis.group)
    sums = torch.stack([(lse - largest).exp(), target])
    all_reduce(sums, group=axis.group)
    return largest + sums[0].log(), sums[1]
