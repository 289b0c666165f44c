"""Cross-entropy of a linear head, with the vocabulary split over the tensor axis.

The logits exist once; the forward turns them, a few rows at a time and in float32, into their own gradient, softmax
minus one-hot. The backward is two matrix products: the gradient of a row's loss scales that row of the hidden states
and of their gradient, which are far narrower than the logits.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ReduceOp, all_reduce

from lightbulb.nn.groups import Axis
from lightbulb.nn.precision import product_dtype

IGNORE = -100
"""Label of a position that is not predicted."""

_CPU_ROWS = 32  # rows of 8k float32 logits that stay in a core's cache
_GPU_ROWS = 4096  # enough to fill the device, few enough that float32 copies stay small


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, axis: Axis) -> Tensor:
    """Negative log-likelihood in nats, ``[tokens]`` float32, zero where the label is :data:`IGNORE`.

    Args:
        hidden: ``[tokens, dim]``, inside the tensor region (its gradient is this rank's share).
        weight: ``[vocab / axis size, dim]``, this rank's rows of the head.
        labels: ``[tokens]`` token ids, or :data:`IGNORE`.
        axis: the tensor axis.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, axis)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, axis: Axis) -> Tensor:
        dtype, vocab = product_dtype(hidden), weight.shape[0]
        logits = hidden.to(dtype) @ weight.to(dtype).t()
        local = labels - axis.rank * vocab
        is_mine = (local >= 0) & (local < vocab)
        local = local.clamp(0, vocab - 1)
        target = logits.gather(1, local[:, None])[:, 0].to(_wide(logits)).masked_fill(~is_mine, 0.0)
        lse = _softmax_(logits, local)
        if axis.group is not None:
            local_lse = lse
            lse, target = _combine(lse, target, axis)
            logits *= (local_lse - lse).exp()[:, None].to(dtype)
        losses = (lse - target).masked_fill(labels == IGNORE, 0.0)
        _subtract_one_hot_(logits, local, is_mine, losses)
        ctx.save_for_backward(hidden, weight, logits, labels)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, logits_grad, labels = ctx.saved_tensors
        grad = grad.masked_fill(labels == IGNORE, 0.0)[:, None]
        dtype = logits_grad.dtype
        grad_hidden = ((logits_grad @ weight.to(dtype)) * grad).to(hidden.dtype)
        grad_weight = logits_grad.t() @ (hidden * grad).to(dtype)
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def _softmax_(logits: Tensor, column: Tensor) -> Tensor:
    """Overwrite the logits with their softmax; their log-sum-exp, from any one finite ``column`` of each row."""
    rows = _CPU_ROWS if logits.device.type == "cpu" else _GPU_ROWS
    lse = []
    for part, index in zip(logits.split(rows), column[:, None].split(rows), strict=True):
        wide = part.to(_wide(part))
        log_probabilities = wide.log_softmax(-1)
        lse.append(wide.gather(1, index) - log_probabilities.gather(1, index))
        torch.exp(log_probabilities, out=part)
    return torch.cat(lse)[:, 0]


def _subtract_one_hot_(softmax: Tensor, labels: Tensor, is_mine: Tensor, losses: Tensor) -> None:
    """Subtract 1 at the labels this rank holds, from the exact probability: the stored one may be rounded."""
    rows = torch.arange(len(labels), device=labels.device)
    softmax[rows, labels] = torch.where(is_mine, torch.expm1(-losses).to(softmax.dtype), softmax[rows, labels])


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _combine(lse: Tensor, target: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over all ranks' parts of the vocabulary, and the label's logit from the rank that holds it."""
    largest = lse.clone()
    all_reduce(largest, op=ReduceOp.MAX, group=axis.group)
    sums = torch.stack([(lse - largest).exp(), target])
    all_reduce(sums, group=axis.group)
    return largest + sums[0].log(), sums[1]
