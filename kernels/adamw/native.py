"""The C++ pass over many tensors, for float32 weights and moments with float32 or bfloat16 gradients on the CPU."""

import torch
from torch import Tensor

from lightbulb.kernels.native import FLOAT, INT, POINTER, function

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
GRADIENTS = tuple(_NAMES)
"""Dtypes of gradients."""


def update(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    copies: list[Tensor | None], factors: list[tuple[float, float]], lr_decay: float, betas: tuple[float, float],
    eps: float,
) -> None:  # fmt: skip
    """One step in place; all contiguous, gradients of one dtype.

    Args:
        params: weights, float32.
        grads: of the weights.
        exp_avgs: first moments, float32.
        exp_avg_sqs: second moments, float32.
        copies: bfloat16 tensors that get the new weights, or None.
        factors: of each tensor ``lr / (1 - beta1^t)`` and ``1 / sqrt(1 - beta2^t)``.
        lr_decay: learning rate x weight decay.
        betas: decay of the moments.
        eps: added to the root of the second moment.
    """
    if not params:
        return
    call = function(f"adamw_{_NAMES[grads[0].dtype]}", POINTER, POINTER, INT, *[FLOAT] * 6, INT)
    tensors = zip(params, grads, exp_avgs, exp_avg_sqs, copies, strict=True)
    places = torch.tensor([[*(0 if t is None else t.data_ptr() for t in row), row[0].numel()] for row in tensors])
    scales = torch.tensor(factors, dtype=torch.float32)
    rest = [number for beta in betas for number in (beta, 1 - beta)]
    call(places.data_ptr(), scales.data_ptr(), len(params), lr_decay, *rest, eps, torch.get_num_threads())
