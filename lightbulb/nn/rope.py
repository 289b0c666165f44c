"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-split pairing as in Llama.

Feature ``i`` is paired with feature ``i + head_dim / 2``. Angles are computed in float32 from integer positions, also
for bfloat16 models: rounding the frequencies would change the model.
"""

import torch
from torch import Tensor

from lightbulb.ops import rotate

__all__ = ["rotary_angles", "rotate"]


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines in float32: ``[length, 1, 1, head_dim / 2]`` for ``positions [length]``, ``[length, batch, 1,
    head_dim / 2]`` for ``[length, batch]``."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    places = positions[:, None] if positions.ndim == 1 else positions
    angles = places.to(torch.float32)[:, :, None, None] * theta**-exponents
    return angles.cos(), angles.sin()
