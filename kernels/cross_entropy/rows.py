"""What is done to rows of logits, by the fastest means there is."""

import torch
from torch import Tensor

from lightbulb.kernels.choice import HAS_TRITON, takes_triton
from lightbulb.kernels.cross_entropy import native
from lightbulb.kernels.native import takes_native

if HAS_TRITON:
    from lightbulb.kernels.cross_entropy import kernel

IGNORE = -100
"""Label of a position that is not predicted."""

_CPU_ROWS, _GPU_ROWS = 32, 4096  # at once in plain torch: 8k columns in a core's cache; enough to fill a GPU


def run(
    logits: Tensor, labels: Tensor, first: int, lse: Tensor, target: Tensor, z_loss: float, measures: bool, writes: bool
) -> None:
    """Measure rows of logits, and write the gradient over them.

    Args:
        logits: ``[rows, width]``, the columns ``first`` to ``first + width`` of the vocabulary.
        labels: ``[rows]`` token ids, contiguous; rows of :data:`IGNORE` get the gradient zero.
        first: the first column's token id.
        lse: ``[rows]`` log-sum-exp, over the columns here where it is measured, over all where it is read.
        target: ``[rows]`` the label's logit, zero where the label is none of the columns here; measured or read.
        z_loss: coefficient of the squared log-sum-exp.
        measures: fill ``lse`` and ``target`` (anything where the label is IGNORE).
        writes: overwrite the logits with the gradient of ``lse - target + z_loss * lse^2``.
    """
    if takes_triton(logits):
        kernel.run(logits, labels, first, lse, target, z_loss, measures, writes)
    elif takes_native(logits) and logits.dtype in native.DTYPES:
        native.run(logits, labels, first, lse, target, z_loss, measures, writes)
    else:
        _run(logits, labels, first, lse, target, z_loss, measures, writes)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in the total's precision."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif takes_triton(total, a, b):
        kernel.add_product(total, a, b)
    else:
        total += a @ b


def _run(
    logits: Tensor, labels: Tensor, first: int, lse: Tensor, target: Tensor, z_loss: float, measures: bool, writes: bool
) -> None:
    size = _GPU_ROWS if logits.is_cuda else _CPU_ROWS
    for part in (slice(start, start + size) for start in range(0, len(logits), size)):
        x = logits[part].to(lse.dtype)
        ignored, column = labels[part] == IGNORE, labels[part] - first
        mine = ((column >= 0) & (column < x.shape[1]) & ~ignored)[:, None]
        column = column.clamp(0, x.shape[1] - 1)[:, None]
        if measures:
            lse[part] = x.logsumexp(-1)
            target[part] = x.gather(1, column).masked_fill(~mine, 0.0)[:, 0]
        if writes:
            whole = lse[part][:, None]
            log_probability, pull = target[part][:, None] - whole, 2 * z_loss * whole
            # Not from the stored probability, which may be rounded to 1.
            at_label = log_probability.expm1() + pull * log_probability.exp()
            gradient = (x - whole).exp_().mul_(1 + pull)
            gradient.scatter_(1, column, torch.where(mine, at_label, gradient.gather(1, column)))
            logits[part] = gradient.masked_fill_(ignored[:, None], 0.0)
