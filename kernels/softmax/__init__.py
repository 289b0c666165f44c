"""Softmax over visible keys, with a sink: one more logit whose share is left out.

With the sink at 0 this is softmax1, ``exp(s_i) / (1 + sum of exp(s_j))`` (Miller 2023, "Attention is off by one");
learned sinks: Xiao et al. 2023, arXiv:2309.17453. A row without a visible key is zero.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightbulb.kernels.choice import HAS_TRITON, is_reference, takes_triton
from lightbulb.kernels.native import takes_native
from lightbulb.kernels.softmax import native, reference
from lightbulb.kernels.softmax.rows import has_even_rows

if HAS_TRITON:
    from lightbulb.kernels.softmax import kernel


def softmax(scores: Tensor, mask: Tensor | None = None, sink: Tensor | None = None) -> Tensor:
    """Weights over the last dimension, computed in float32 (float64 in float64) and rounded once.

    Args:
        scores: ``[..., rows, keys]``, of two to four dimensions.
        mask: bool, broadcastable to scores: true where a key is visible; None for all keys.
        sink: logits, broadcastable to ``[..., rows]``; None for no sink.

    Returns:
        as scores; rows sum to 1, to less with a sink, to 0 without a visible key.
    """
    if scores.numel() == 0:
        return scores if sink is None else scores + sink[..., None].to(scores.dtype)
    if is_reference():
        return reference.softmax(scores, mask, sink)
    return _Softmax.apply(scores, mask, sink)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor | None, sink: Tensor | None) -> Tensor:
        out = torch.empty_like(scores, memory_format=torch.contiguous_format)
        share = _forward(scores, mask, sink, out)
        ctx.save_for_backward(out, share)
        ctx.sink = None if sink is None else (sink.shape, sink.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, share = ctx.saved_tensors
        grad_scores = torch.empty_like(weights)
        dots = _backward(grad, weights, grad_scores)
        if not ctx.needs_input_grad[2]:
            return grad_scores, None, None
        shape, dtype = ctx.sink
        return grad_scores, None, (-share * dots).sum_to_size(shape).to(dtype)


def _forward(scores: Tensor, mask: Tensor | None, sink: Tensor | None, out: Tensor) -> Tensor | None:
    """Write the weights to ``out``; the sink's share ``[..., rows]``."""
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    share = None if sink is None else scores.new_empty(scores.shape[:-1], dtype=wide)
    given = [scores, *([] if mask is None else [mask]), *([] if sink is None else [sink])]
    kernels = takes_triton(*given) and scores.shape[-1] <= kernel.MAX_KEYS, takes_native(*given)
    if kernels[0] or (kernels[1] and native.supports(scores)):
        mask = None if mask is None else _keys_together(mask, scores.shape[-1]).expand(scores.shape)
        sink = None if sink is None else sink.float().expand(scores.shape[:-1])
        four = _four(scores)
        source = four if has_even_rows(four) else four.contiguous()
        target = _four(out) if has_even_rows(_four(out)) else torch.empty_like(source)
        module = kernel if kernels[0] else native
        module.forward(
            source,
            None if mask is None else _four(mask),
            None if sink is None else _four(sink, 3),
            target,
            None if share is None else _four(share, 3),
        )
        if target.data_ptr() != out.data_ptr():
            out.copy_(target.view(out.shape))
        return share
    powers = scores.to(wide) if mask is None else scores.to(wide).masked_fill(~mask, float("-inf"))
    highest = powers.amax(-1, keepdim=True)
    sink = None if sink is None else sink.to(wide)[..., None]
    highest = highest if sink is None else highest.maximum(sink)
    highest = highest.masked_fill(highest == float("-inf"), 0.0)  # a row without a key
    powers = (powers - highest).exp_()
    total = powers.sum(-1, keepdim=True)
    if share is not None and sink is not None:
        power = (sink - highest).exp_()
        total += power
        share.copy_((power / total)[..., 0])
    torch.div(powers, total.masked_fill_(total == 0.0, 1.0), out=powers)
    out.copy_(powers)
    return share


def _backward(grad: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """Write the scores' gradient to ``out``; the sums of ``grad * weights``."""
    wide = torch.float64 if weights.dtype == torch.float64 else torch.float32
    four = [_four(t) for t in (grad, weights, out)]
    if all(has_even_rows(t) for t in four) and grad.numel():
        dots = weights.new_empty(weights.shape[:-1], dtype=wide)
        if takes_triton(grad, weights) and weights.shape[-1] <= kernel.MAX_KEYS:
            kernel.backward(*four, dots)
            return dots
        if takes_native(grad, weights) and native.supports(*four):
            native.backward(*four, dots)
            return dots
    product = grad.to(wide) * weights
    dots = product.sum(-1)
    out.copy_(product.addcmul_(weights.to(wide), dots[..., None], value=-1))
    return dots


def _four(x: Tensor, count: int = 4) -> Tensor:
    """``x`` with axes of size 1 before its own, four in all."""
    return x[(None,) * (count - x.ndim)]


def _keys_together(mask: Tensor, keys: int) -> Tensor:
    mask = mask.expand(*mask.shape[:-1], keys)
    return mask if mask.stride(-1) == 1 else mask.contiguous()
