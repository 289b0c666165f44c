"""The one door to mamba-ssm's Triton kernels (Dao and Gu 2024, arXiv:2405.21060), preferred on CUDA where installed.

They are its authors' own; elsewhere :func:`lightbulb.ops.linear_recurrence` computes the same. To compare the two:
``python -m lightbulb.kernels.linear_recurrence.benchmark``.
"""

import torch
from torch import Tensor

try:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
except ImportError:
    mamba_chunk_scan_combined = None


def can_scan(values: Tensor) -> bool:
    """Whether :func:`scan` takes such values on this machine."""
    return mamba_chunk_scan_combined is not None and values.is_cuda and values.dtype != torch.float64


def scan(
    values: Tensor,
    steps: Tensor,
    rates: Tensor,
    keys: Tensor,
    queries: Tensor,
    skip: Tensor,
    chunk_size: int,
    starts: Tensor | None,
) -> Tensor:
    """Mamba-2's recurrence from an empty state, with the skip of its input.

    Args:
        values: ``[length, batch, heads, width]``.
        steps: ``[length, batch, heads]``, positive.
        rates: ``[heads]``, negative: the log decay of a step of one.
        keys: ``[length, batch, groups, state]`` (B in the paper).
        queries: as keys (C in the paper).
        skip: ``[heads]`` (D in the paper).
        chunk_size: positions of a chunk.
        starts: ``[batch, length]`` bool, where a document begins; None for one document.

    Returns:
        ``[length, batch, heads, width]``.
    """
    documents = None if starts is None else starts.cumsum(1).to(torch.int32)
    batch_first = [t.transpose(0, 1).contiguous() for t in (values, steps, keys, queries)]
    x, dt, b, c = batch_first
    y = mamba_chunk_scan_combined(x, dt, rates, b, c, chunk_size=chunk_size, D=skip, seq_idx=documents)
    return y.transpose(0, 1)
