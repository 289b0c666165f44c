"""The Triton kernel: one program per block of a tensor; computed in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def update_kernel(
    param, grad, exp_avg, exp_avg_sq, copy, size, step_size, root, lr_decay, beta1, first, beta2, second, eps,
    COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    p = tl.load(param + place, mask=inside)
    g = tl.load(grad + place, mask=inside).to(tl.float32)
    m = tl.load(exp_avg + place, mask=inside)
    v = tl.load(exp_avg_sq + place, mask=inside)
    m = m * beta1 + first * g
    v = v * beta2 + second * g * g
    p -= lr_decay * p
    p -= step_size * m / (tl.sqrt_rn(v) * root + eps)
    tl.store(exp_avg + place, m, mask=inside)
    tl.store(exp_avg_sq + place, v, mask=inside)
    tl.store(param + place, p, mask=inside)
    if COPY:
        tl.store(copy + place, p, mask=inside)


def update(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, copy: Tensor | None,
    factors: tuple[float, float], lr_decay: float, betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """One tensor's step in place, as in :func:`lightbulb.kernels.adamw.native.update`; all contiguous."""
    size = param.numel()
    if size == 0:
        return
    with torch.no_grad():
        update_kernel[triton.cdiv(size, _BLOCK),](
            param, grad, exp_avg, exp_avg_sq, param if copy is None else copy, size, *factors, lr_decay,
            betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps,
            COPY=copy is not None, BLOCK=_BLOCK,
        )  # fmt: skip
