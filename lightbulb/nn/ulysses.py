"""Ulysses sequence parallelism: positions split outside an attention, heads inside it.

DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv:2309.14509). Between layers each rank of the axis holds consecutive
positions of every sequence; around the attention one all-to-all each way gives it all positions of some heads instead.
The same exchange as ``deepspeed.sequence.layer`` (a test compares them), over torch.distributed: DeepSpeed's own
communication layer compiles an extension at first use, and its exchange takes query, key and value one at a time.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import all_to_all_single

from lightbulb.nn.groups import Axis, mappings


def scatter_heads(parts: list[Tensor], axis: Axis) -> list[Tensor]:
    """Each ``[length / P, batch, heads, width]`` to ``[length, batch, heads / P, width]``, in one exchange.

    The parts (query, key and value) may differ in heads, each a multiple of the axis size P.
    """
    if axis.group is None:
        return parts
    by_rank = [part.unflatten(2, (axis.size, -1)) for part in parts]
    packed = torch.cat(by_rank, dim=3).permute(2, 0, 1, 3, 4)
    whole = _Exchange.apply(packed, axis).flatten(0, 1)
    return list(whole.split([part.shape[3] for part in by_rank], dim=2))


def gather_heads(x: Tensor, axis: Axis) -> Tensor:
    """``[length, batch, heads / P, width]`` back to ``[length / P, batch, heads, width]``."""
    if axis.group is None:
        return x
    parts = _Exchange.apply(x.unflatten(0, (axis.size, -1)), axis)
    return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)


def gather_length(x: Tensor, axis: Axis) -> Tensor:
    """``[length / P, ...]`` to ``[length, ...]`` on every rank, for what all heads share; gradients are summed back."""
    return x if axis.group is None else mappings.gather_from_sequence_parallel_region(x, group=axis.group)


def my_heads(parameter: Tensor, axis: Axis) -> Tensor:
    """The part of ``parameter [heads * ..., ...]`` that belongs to the heads this rank has after
    :func:`scatter_heads`; gradients of the parts are summed over the axis with all others."""
    return parameter.chunk(axis.size)[axis.rank]


class _Exchange(torch.autograd.Function):
    """``out[r]`` on rank p is ``x[p]`` of rank r; the backward is the same exchange."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        all_to_all_single(out, x.contiguous(), group=axis.group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grad, ctx.axis), None
