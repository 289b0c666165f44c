"""Cross-entropy of a linear head, a chunk of tokens at a time, with z-loss (Chowdhery et al. 2022, arXiv:2204.02311).

The logits of a chunk exist for as long as it takes to turn them into their gradient and to multiply that with the
weight and the hidden states, in the forward already (the idea of Liger, Hsu et al. 2024, arXiv:2410.10989). The losses
come out per token, with gradients of their own: the gradient of the hidden states is scaled row by row, exactly; that
of the weight by one number, if all tokens were given the same gradient, as sums and means do. Otherwise the backward
makes the logits once more.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightbulb.kernels.choice import is_reference
from lightbulb.kernels.cross_entropy import reference, rows
from lightbulb.kernels.cross_entropy.rows import IGNORE

Combine = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Log-sum-exps and labels' logits ``[rows]`` of this part of the vocabulary, to those of the whole."""

_CPU_CHUNK_BYTES = 16 << 20
_MIN_ROWS = 256  # fewer, and the products are slower


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    z_loss: float = 0.0,
    first: int = 0,
    combine: Combine | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``lse - logit of the label + z_loss * lse^2`` with ``lse`` the log-sum-exp of ``weight @ hidden``, in nats.

    Args:
        hidden: ``[tokens, dim]``.
        weight: ``[width, dim]``: the vocabulary, or the part of it from ``first`` on.
        labels: ``[tokens]`` token ids, or :data:`IGNORE`.
        z_loss: coefficient, not negative.
        first: token id of the weight's first row.
        combine: where the weight is a part of the vocabulary, what puts the parts together; called once for every
            chunk, of which there are as many on every rank.
        dtype: to multiply in; None for the inputs' own.

    Returns:
        ``[tokens]`` in float32 (float64 of float64), zero where the label is IGNORE. The gradient of ``hidden`` is that
        through this part of the vocabulary.
    """
    if is_reference() and combine is None:
        return reference.linear_cross_entropy(hidden, weight, labels, z_loss)
    learns = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(
        hidden, weight, labels.contiguous(), z_loss, first, combine, dtype or hidden.dtype, learns
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        z_loss: float,
        first: int,
        combine: Combine | None,
        dtype: torch.dtype,
        learns: bool,
    ) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        h, w = hidden.to(dtype), weight.to(dtype)
        lse, target = (torch.empty(len(h), dtype=wide, device=h.device) for _ in range(2))
        needs_hidden, needs_weight = (learns and needs for needs in ctx.needs_input_grad[:2])
        writes = needs_hidden or needs_weight
        grad_hidden = torch.empty_like(h) if needs_hidden else None
        grad_weight = _total(h, w) if needs_weight else None
        for part, logits in _chunks(h, w):
            own = (logits, labels[part], first, lse[part], target[part], z_loss)
            rows.run(*own, measures=True, writes=writes and combine is None)
            if combine is not None:
                lse[part], target[part] = combine(lse[part], target[part])
                if writes:
                    rows.run(*own, measures=False, writes=True)
            if grad_hidden is not None:
                torch.mm(logits, w, out=grad_hidden[part])
            if grad_weight is not None:
                rows.add_product(grad_weight, logits.t(), h[part])
        ctx.save_for_backward(hidden, weight, labels, lse, target, grad_hidden, grad_weight)
        ctx.z_loss, ctx.first, ctx.dtype = z_loss, first, dtype
        return (lse - target + z_loss * lse.square()).masked_fill_(labels == IGNORE, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, lse, target, grad_hidden, grad_weight = ctx.saved_tensors
        ignored = labels == IGNORE
        grad = grad.masked_fill(ignored, 0.0)
        if grad_hidden is not None:
            grad_hidden = torch.mul(grad_hidden, grad[:, None]).to(hidden.dtype)
        if grad_weight is not None:
            scale = _one_value(grad, ignored)
            if scale is None:
                grad_weight = _weighted(ctx, grad).to(weight.dtype)
            else:
                grad_weight = torch.mul(grad_weight, scale, out=torch.empty_like(weight))
        return grad_hidden, grad_weight, *[None] * 6


def _weighted(ctx: Any, grad: Tensor) -> Tensor:
    """The weight's gradient where tokens have different ones, from new logits."""
    hidden, weight, labels, lse, target, *_ = ctx.saved_tensors
    h, w = hidden.to(ctx.dtype), weight.to(ctx.dtype)
    total = _total(h, w)
    for part, logits in _chunks(h, w):
        rows.run(logits, labels[part], ctx.first, lse[part], target[part], ctx.z_loss, measures=False, writes=True)
        rows.add_product(total, logits.t(), (hidden[part] * grad[part, None]).to(ctx.dtype))
    return total


def _one_value(grad: Tensor, ignored: Tensor) -> Tensor | None:
    """The gradient of every token that counts, or None when they differ (or are not finite). On a GPU this waits."""
    if not len(grad):
        return grad.new_zeros(())
    least = grad.masked_fill(ignored, float("inf")).amin()
    most = grad.masked_fill(ignored, float("-inf")).amax()
    return least if bool((least == most) & least.isfinite()) else None


def _total(hidden: Tensor, weight: Tensor) -> Tensor:
    """Zeros for the weight's gradient; in float32 at least where several chunks are added up."""
    many = len(hidden) > chunk_rows(hidden, weight) and weight.dtype == torch.bfloat16
    return torch.zeros_like(weight, dtype=torch.float32 if many else weight.dtype)


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the tokens, each with its logits, which lie where the last chunk's did."""
    size = chunk_rows(hidden, weight)
    buffer = hidden.new_empty(min(size, len(hidden)), len(weight))
    for start in range(0, len(hidden), size):
        part = slice(start, min(start + size, len(hidden)))
        yield part, torch.mm(hidden[part], weight.t(), out=buffer[: part.stop - start])


def chunk_rows(hidden: Tensor, weight: Tensor) -> int:
    """Tokens of a chunk. On a GPU the chunk's logits take about as many bytes as all hidden states; on a CPU as many as
    stay in its last cache."""
    per_row = len(weight) * hidden.element_size()
    if hidden.is_cuda:
        wanted = hidden.numel() * hidden.element_size() // per_row
        return max(_MIN_ROWS, 1 << max(wanted - 1, 0).bit_length())
    return max(_MIN_ROWS, _CPU_CHUNK_BYTES // per_row)
