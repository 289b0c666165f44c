"""Learning from text and from other models' distributions, as FuseLLM does (Wan et al. 2024, arXiv:2401.10491).

The loss of a token is ``share * CE + (1 - share) * KL(target || model)``. A target names the k likeliest tokens; all
others are one outcome, of the probability that is left, in the target and in the model. So the divergence is zero for
the model that the target was made of, whatever k is, and never above that of the whole distributions.

Only k logits of a token are needed besides the cross-entropy: they are made of their rows of the head, and with the
vocabulary split over the tensor axis by the rank that has the row.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightbulb.nn.cross_entropy import IGNORE, linear_cross_entropy
from lightbulb.nn.groups import Axis, exit_tensor_region
from lightbulb.nn.precision import product_dtype
from lightbulb.nn.soft_targets import SoftTargets

_LEAST = 2.0**-24  # what is left of 1 in float32
_CHUNK_BYTES = 64 << 20


def distilled_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, targets: SoftTargets, axis: Axis, first: int, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the labels, with the gradient of the mixed loss; and the divergence, without one.

    Args:
        hidden: ``[tokens, dim]``, inside the tensor region.
        weight: ``[rows, dim]``, this rank's rows of the head.
        labels: ``[tokens]`` token ids, or :data:`IGNORE`, whose positions have no target either.
        targets: ``[tokens, k]``.
        axis: the tensor axis.
        first: token id of this rank's first row.
        z_loss: coefficient of the squared log-sum-exp of the logits.

    Returns:
        ``[tokens]`` each, in nats. The value of the first is the cross-entropy (and z-loss) alone, so that it compares
        with that of other runs.
    """
    losses = linear_cross_entropy(hidden, weight, labels, axis, first)
    ignored = labels == IGNORE
    ids = torch.cat([labels.masked_fill(ignored, 0)[:, None], targets.ids], dim=1)
    logits = chosen_logits(hidden, weight, ids, axis, first)
    lse = losses + logits[:, 0]
    divergence = coarse_divergence(targets.probabilities, logits[:, 1:] - lse[:, None]).masked_fill(ignored, 0.0)
    share = targets.language_share
    regular = (z_loss * lse.square()).masked_fill(ignored, 0.0)
    mixed = share * losses + (1 - share) * divergence + regular
    return (losses + regular).detach() + (mixed - mixed.detach()), divergence.detach()


def coarse_divergence(probabilities: Tensor, log_probabilities: Tensor) -> Tensor:
    """KL divergence ``[tokens]`` of a model from targets, over the named tokens and all others as one.

    Args:
        probabilities: ``[tokens, k]`` of the targets; 0 names nothing.
        log_probabilities: ``[tokens, k]`` of the model for the same tokens.
    """
    is_named = probabilities > 0
    ours = log_probabilities.masked_fill(~is_named, 0.0)
    named = (probabilities * (probabilities.clamp_min(_LEAST).log() - ours)).sum(-1)
    rest = (1 - probabilities.sum(-1)).clamp_min(_LEAST)
    our_rest = (1 - ours.exp().masked_fill(~is_named, 0.0).sum(-1)).clamp_min(_LEAST)
    return named + rest * (rest.log() - our_rest.log())


def chosen_logits(hidden: Tensor, weight: Tensor, ids: Tensor, axis: Axis, first: int) -> Tensor:
    """Logits ``[tokens, n]`` of the tokens ``ids [tokens, n]``, the same on all ranks of the tensor axis; ``first`` is
    the id of this rank's first row."""
    column = ids - first
    is_mine = (column >= 0) & (column < len(weight))
    logits = _ChosenLogits.apply(hidden, weight, column.clamp(0, len(weight) - 1), is_mine, product_dtype(hidden))
    return exit_tensor_region(logits, replace(axis, sequence=False))


class _ChosenLogits(torch.autograd.Function):
    """Rows of the head are looked up a chunk of tokens at a time, and once more for the gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, rows: Tensor, is_mine: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden, weight, rows, is_mine)
        ctx.dtype = dtype
        parts = [
            torch.bmm(weight[rows[part]].to(dtype), hidden[part].to(dtype)[:, :, None])[:, :, 0]
            for part in _chunks(rows, weight)
        ]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.cat(parts).to(wide).masked_fill_(~is_mine, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, rows, is_mine = ctx.saved_tensors
        grad = grad.masked_fill(~is_mine, 0.0)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype)
        for part in _chunks(rows, weight):
            grad_hidden[part] = torch.bmm(grad[part, None], weight[rows[part]].to(grad.dtype))[:, 0].to(hidden.dtype)
            products = grad[part, :, None] * hidden[part, None].to(grad.dtype)
            grad_weight.index_put_((rows[part],), products, accumulate=True)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _chunks(rows: Tensor, weight: Tensor) -> Iterator[slice]:
    size = max(1, _CHUNK_BYTES // (rows.shape[1] * weight.shape[1] * 4))
    return (slice(start, start + size) for start in range(0, len(rows), size))
