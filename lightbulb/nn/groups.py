"""The process groups a layer talks to.

The only file below ``parallel/`` that asks Megatron-core which groups exist. Without initialised groups (a notebook,
inference on one device) every axis has one rank and layers behave as their plain single-process selves.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

# Importing Megatron-core warns, once per module, that Apex and Transformer Engine are missing; neither is required.
warnings.filterwarnings("ignore", category=UserWarning, module="megatron")

from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import mappings  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.distributed import ProcessGroup  # noqa: E402
from torch.nn.functional import pad  # noqa: E402


@dataclass(frozen=True)
class Axis:
    """One parallel axis as seen from this rank.

    Attributes:
        group: its process group, None when it has one rank.
        rank: this rank's place on it.
        size: its ranks.
        sequence: on a tensor axis: outside tensor regions every rank holds its own part of the sequence (Megatron's
            sequence parallelism, Korthikanti et al. 2022, arXiv:2205.05198).
        inside: the layer lives inside a tensor region that its owner enters and leaves (an expert).
    """

    group: ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    sequence: bool = False
    inside: bool = False

    def parts(self, size: int) -> list[slice]:
        """Consecutive parts of ``size`` rows, one for each rank; they differ by one row at most."""
        return [slice(size * rank // self.size, size * (rank + 1) // self.size) for rank in range(self.size)]

    def part(self, size: int) -> slice:
        """This rank's part of ``size`` rows."""
        return self.parts(size)[self.rank]


SINGLE = Axis()

_sequence_parallel = False
_inside_experts = False


def set_sequence_parallel(value: bool) -> None:
    """Whether the tensor axis of layers built from now on splits the sequence; ``parallel/topology.py`` calls this
    when it makes the groups."""
    global _sequence_parallel
    _sequence_parallel = value


@contextmanager
def inside_experts() -> Iterator[None]:
    """Layers built here are experts: their tensor axis is the expert tensor axis, and the regions around them are
    entered and left by the mixer that owns the experts."""
    global _inside_experts
    before, _inside_experts = _inside_experts, True
    try:
        yield
    finally:
        _inside_experts = before


def _axis(group: ProcessGroup, sequence: bool = False) -> Axis:
    return Axis(group, group.rank(), group.size(), sequence) if group.size() > 1 else SINGLE


def tensor_axis() -> Axis:
    """Tensor parallelism: weights split by rows or columns; activations between blocks replicated, or split by
    position under sequence parallelism."""
    if not parallel_state.model_parallel_is_initialized():
        return SINGLE
    if _inside_experts:
        axis = expert_tensor_axis()
        return axis if axis.group is None else replace(axis, sequence=False, inside=True)
    return _axis(parallel_state.get_tensor_model_parallel_group(), _sequence_parallel)


def ulysses_axis() -> Axis:
    """Ulysses: ranks that hold consecutive parts of each sequence, and of the heads inside an attention."""
    if not parallel_state.model_parallel_is_initialized():
        return SINGLE
    return _axis(parallel_state.get_context_parallel_group())


def expert_axis() -> Axis:
    """Expert parallelism: whole experts on different ranks, tokens dispatched between them."""
    if not parallel_state.model_parallel_is_initialized():
        return SINGLE
    return _axis(parallel_state.get_expert_model_parallel_group())


def expert_tensor_axis() -> Axis:
    """Expert tensor parallelism: each expert's hidden features split over the tensor axis, or (one rank) not at all,
    so that tensor ranks send their tokens to whole experts."""
    if not parallel_state.model_parallel_is_initialized():
        return SINGLE
    return _axis(parallel_state.get_expert_tensor_parallel_group(), _sequence_parallel)


def enter_tensor_region(x: Tensor, axis: Axis) -> Tensor:
    """Before weights split over the tensor axis: ``x [length, ...]`` whole on every rank, gradients summed backward.

    Without sequence parallelism the identity; with it, all-gather forward and reduce-scatter backward.
    """
    if axis.group is None or axis.inside:
        return x
    if axis.sequence:
        return mappings.gather_from_sequence_parallel_region(x, group=axis.group)
    return share_in_tensor_region(x, axis)


def share_in_tensor_region(x: Tensor, axis: Axis) -> Tensor:
    """What every tensor rank holds whole (a replicated weight) but uses on its own part of the data: identity forward,
    gradients summed over the axis backward."""
    if axis.group is None:
        return x
    return _ContiguousGradient.apply(mappings.copy_to_tensor_model_parallel_region(x, axis.group))


def exit_tensor_region(x: Tensor, axis: Axis) -> Tensor:
    """After weights split over the tensor axis: partial results summed; with sequence parallelism each rank keeps its
    part of the positions."""
    if axis.group is None or axis.inside:
        return x
    if axis.sequence:
        return mappings.reduce_scatter_to_sequence_parallel_region(x, group=axis.group)
    # Megatron's reduction works in place on x.contiguous(): on a strided x it would reduce a temporary copy.
    return mappings.reduce_from_tensor_model_parallel_region(x.contiguous(), axis.group)


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """Inside a tensor region: partial values (a statistic over split features) summed over the axis, for use by each
    rank on its own part; gradients are partial too, and summed backward."""
    return x if axis.group is None else _SumOver.apply(x, axis.group)


def max_over(x: Tensor, axis: Axis) -> Tensor:
    """The elementwise maximum over the axis (no gradient)."""
    if axis.group is None:
        return x.detach()
    x = x.detach().clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX, group=axis.group)
    return x


def gather_positions(x: Tensor, axis: Axis) -> Tensor:
    """Concatenate ``x [length, ...]`` over the parts of a sequence-parallel tensor axis (no gradient)."""
    if axis.group is None or not axis.sequence:
        return x
    whole = x.new_empty(len(x) * axis.size, *x.shape[1:])
    torch.distributed.all_gather_into_tensor(whole, x.contiguous(), group=axis.group)
    return whole


def gather_last_dim(x: Tensor, size: int, axis: Axis) -> Tensor:
    """Concatenate the last dimension over the axis to ``size`` (no gradient): logits of a vocabulary split over
    ranks."""
    if axis.group is None:
        return x
    widths = [part.stop - part.start for part in axis.parts(size)]
    x = pad(x, (0, max(widths) - x.shape[-1])).contiguous()  # a gather's parts are equal
    parts = [torch.empty_like(x) for _ in widths]
    torch.distributed.all_gather(parts, x, group=axis.group)
    return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1)


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SumOver.apply(grad, ctx.group), None


class _ContiguousGradient(torch.autograd.Function):
    """Megatron's backward sums ``grad.contiguous()`` in place, returns ``grad``: a strided one would stay partial."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()
