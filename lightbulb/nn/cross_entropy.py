"""Cross-entropy of a linear head, with the vocabulary split over the tensor axis."""

from functools import partial

import torch
from torch import Tensor
from torch.distributed import ReduceOp, all_reduce

from lightbulb import ops
from lightbulb.nn.groups import Axis
from lightbulb.nn.precision import product_dtype

IGNORE = ops.IGNORE
"""Label of a position that is not predicted."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, axis: Axis, first: int, z_loss: float = 0.0
) -> Tensor:
    """Negative log-likelihood in nats, ``[tokens]`` float32, zero where the label is :data:`IGNORE`.

    Args:
        hidden: ``[tokens, dim]``, inside the tensor region (its gradient is this rank's share).
        weight: ``[rows, dim]``, this rank's rows of the head.
        labels: ``[tokens]`` token ids, or :data:`IGNORE`.
        axis: the tensor axis.
        first: token id of this rank's first row.
        z_loss: coefficient of the squared log-sum-exp of the logits, which is added.
    """
    combine = None if axis.group is None else partial(_combine, axis=axis)
    return ops.linear_cross_entropy(hidden, weight, labels, z_loss, first, combine, product_dtype(hidden))


def _combine(lse: Tensor, target: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over all ranks' parts of the vocabulary, and the label's logit from the rank that holds it."""
    largest = lse.clone()
    all_reduce(largest, op=ReduceOp.MAX, group=axis.group)
    sums = torch.stack([(lse - largest).exp(), target])
    all_reduce(sums, group=axis.group)
    return largest + sums[0].log(), sums[1]
