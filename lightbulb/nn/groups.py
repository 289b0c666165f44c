"""The process groups a layer talks to.

The only file below ``parallel/`` that asks Megatron-core which groups exist. Without initialised groups (a notebook,
inference on one device) every axis has one rank and layers behave as their plain single-process selves.
"""

import warnings
from dataclasses import dataclass

import torch

# Importing Megatron-core warns, once per module, that Apex and Transformer Engine are missing; neither is required.
warnings.filterwarnings("ignore", category=UserWarning, module="megatron")

from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import mappings  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.distributed import ProcessGroup  # noqa: E402


@dataclass(frozen=True)
class Axis:
    """One parallel axis as seen from this rank: its group (None when it has one rank), rank and size."""

    group: ProcessGroup | None = None
    rank: int = 0
    size: int = 1


SINGLE = Axis()


def _axis(group: ProcessGroup) -> Axis:
    return Axis(group, group.rank(), group.size()) if group.size() > 1 else SINGLE


def tensor_axis() -> Axis:
    """Tensor parallelism: weights split by rows or columns, activations between blocks replicated."""
    if not parallel_state.model_parallel_is_initialized():
        return SINGLE
    return _axis(parallel_state.get_tensor_model_parallel_group())


def expert_axis() -> Axis:
    """Expert parallelism: whole experts on different ranks, tokens dispatched between them."""
    if not parallel_state.model_parallel_is_initialized():
        return SINGLE
    return _axis(parallel_state.get_expert_model_parallel_group())


def enter_tensor_region(x: Tensor, axis: Axis) -> Tensor:
    """Before weights split over the tensor axis: identity forward, gradients summed over the axis backward."""
    return x if axis.group is None else mappings.copy_to_tensor_model_parallel_region(x, axis.group)


def exit_tensor_region(x: Tensor, axis: Axis) -> Tensor:
    """After weights split over the tensor axis: partial results summed forward, identity backward."""
    if axis.group is None:
        return x
    # Megatron's reduction works in place on x.contiguous(): on a strided x it would reduce a temporary copy.
    return mappings.reduce_from_tensor_model_parallel_region(x.contiguous(), axis.group)


def gather_last_dim(x: Tensor, axis: Axis) -> Tensor:
    """Concatenate the last dimension over the axis (no gradient): logits of a vocabulary split over ranks."""
    if axis.group is None:
        return x
    parts = [torch.empty_like(x) for _ in range(axis.size)]
    torch.distributed.all_gather(parts, x.contiguous(), group=axis.group)
    return torch.cat(parts, dim=-1)
