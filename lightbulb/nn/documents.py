"""Where documents and other runs of positions start."""

import torch
from torch import Tensor


def run_starts(*labels: Tensor) -> Tensor:
    """First index of the run of equal labels that each position lies in.

    Args:
        labels: ``[..., length]`` each; a run ends where any of them changes.

    Returns:
        ``[..., length]`` int64.
    """
    length = labels[0].shape[-1]
    begins = torch.zeros_like(labels[0], dtype=torch.bool)
    for label in labels:
        begins[..., 1:] |= label[..., 1:] != label[..., :-1]
    index = torch.arange(length, device=begins.device)
    return torch.where(begins, index, 0).cummax(-1).values
