"""What mixers with a linear recurrence (:func:`lightbulb.ops.linear_recurrence`) share: documents and cost."""

import torch
from torch import Tensor


def document_starts(document_ids: Tensor | None) -> Tensor | None:
    """``[batch, length]`` bool: where the id differs from the one before."""
    if document_ids is None:
        return None
    starts = torch.zeros_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return starts


def chunk_flops(heads: int, groups: int, state: int, width: int, length: int, chunk_size: int) -> float:
    """FLOPs per token of :func:`lightbulb.ops.linear_recurrence`, averaged over ``length``: pairs inside a chunk, and
    from the second chunk on what is written to and read from the state."""
    chunk = min(chunk_size, length)
    inside = (chunk + 1) / 2 * 2.0 * (groups * state + heads * width)
    return inside + (4.0 * heads * state * width if length > chunk else 0.0)
