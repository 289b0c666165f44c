"""The naive twin."""

import torch
from torch import Tensor


@torch.no_grad()
def update(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, copy: Tensor | None, step: float, lr: float,
    betas: tuple[float, float], eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """One tensor's update number ``step``, in the dtype of the parameter."""
    beta1, beta2 = betas
    grad = grad.to(param.dtype)
    exp_avg.copy_(beta1 * exp_avg + (1 - beta1) * grad)
    exp_avg_sq.copy_(beta2 * exp_avg_sq + (1 - beta2) * grad * grad)
    mean, square = exp_avg / (1 - beta1**step), exp_avg_sq / (1 - beta2**step)
    param.copy_(param - lr * weight_decay * param - lr * mean / (square.sqrt() + eps))
    if copy is not None:
        copy.copy_(param)
