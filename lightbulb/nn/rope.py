"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-split pairing as in Llama.

Feature ``i`` is paired with feature ``i + head_dim / 2``. Angles are computed in float32 from integer positions, also
for bfloat16 models: rounding the frequencies would change the model.
"""

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each ``[length, 1, 1, head_dim / 2]`` in float32, for ``positions [length]``."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.to(torch.float32)[:, None] * theta**-exponents
    return angles.cos()[:, None, None, :], angles.sin()[:, None, None, :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [length, batch, heads, head_dim]`` by its positions; computed in float32, returned in x's dtype."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
