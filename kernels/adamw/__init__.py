"""AdamW's step ("Decoupled Weight Decay Regularization", Loshchilov and Hutter 2019, arXiv:1711.05101) in one pass.

Weights, both moments, gradients and the copy of the weights that the model multiplies are each touched once.
"""

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from lightbulb.kernels.adamw import native, reference
from lightbulb.kernels.choice import HAS_TRITON, is_reference, takes_triton
from lightbulb.kernels.native import takes_native

if HAS_TRITON:
    from lightbulb.kernels.adamw import kernel


def is_one_pass(param: Tensor) -> bool:
    """Whether :func:`adamw` has a kernel for weights like this one, rather than torch's operations."""
    return takes_triton(param) or (takes_native(param) and param.dtype == torch.float32)


@torch.no_grad()
def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: Sequence[Tensor | None],
    steps: list[float],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step of many tensors, in place; the arithmetic of ``torch.optim.AdamW``, to the last places.

    Args:
        params: weights.
        grads: of the weights' shapes, in any dtype.
        exp_avgs: first moments.
        exp_avg_sqs: second moments.
        copies: of each weight a tensor of its shape and of a narrower dtype that gets the new values, or None.
        steps: of each weight the number of this update, from 1.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled: ``lr x weight_decay`` of each weight is taken off it.
    """
    rows = list(zip(params, grads, exp_avgs, exp_avg_sqs, copies, strict=True))
    if is_reference():
        for row, step in zip(rows, steps, strict=True):
            reference.update(*row, step, lr, betas, eps, weight_decay)
        return
    factors = [(lr / (1 - betas[0] ** step), 1 / math.sqrt(1 - betas[1] ** step)) for step in steps]
    everything = [*chain(params, grads, exp_avgs, exp_avg_sqs), *(copy for copy in copies if copy is not None)]
    is_flat = all(t.is_contiguous() for t in everything)
    if is_flat and takes_triton(*everything):
        for row, own in zip(rows, factors, strict=True):
            kernel.update(*row, own, lr * weight_decay, betas, eps)
    elif is_flat and takes_native(*everything) and _are_native(params, grads, exp_avgs, exp_avg_sqs, copies):
        native.update(params, grads, exp_avgs, exp_avg_sqs, list(copies), factors, lr * weight_decay, betas, eps)
    else:
        for row, own in zip(rows, factors, strict=True):
            _update(*row, own, lr * weight_decay, betas, eps)


def _are_native(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    copies: Sequence[Tensor | None],
) -> bool:  # fmt: skip
    """Whether the dtypes are those of the C++ pass."""
    return (
        all(t.dtype == torch.float32 for t in chain(params, exp_avgs, exp_avg_sqs))
        and all(grad.dtype == grads[0].dtype and grad.dtype in native.GRADIENTS for grad in grads)
        and all(copy is None or copy.dtype == torch.bfloat16 for copy in copies)
    )


def _update(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, copy: Tensor | None,
    factors: tuple[float, float], lr_decay: float, betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """One tensor by torch's operations."""
    grad = grad.to(param.dtype)
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    param.mul_(1 - lr_decay).addcdiv_(exp_avg, exp_avg_sq.sqrt().mul_(factors[1]).add_(eps), value=-factors[0])
    if copy is not None:
        copy.copy_(param)
