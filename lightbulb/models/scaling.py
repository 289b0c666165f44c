"""Width and depth scaling: the best learning rate of a small model stays the best of a large one.

The rules of MiniCPM (Hu et al. 2024, arXiv:2404.06395, 3.1 and table 7), after those of Yang et al. (width: 2022,
arXiv:2203.03466; depth: 2023, arXiv:2310.02244). With the width ``m = dim / base_dim``:

- the embedding's output times ``scale_emb``;
- what each mixer adds to the residual stream times ``scale_depth / sqrt(num_layers)``;
- hidden matrices begin with a standard deviation of that of ``base_dim`` divided by ``sqrt(m)``, and learn at the
  learning rate divided by ``m``;
- logits divided by ``m``.

Hidden matrices are those of the blocks that are drawn from a normal distribution, routers included (their inputs grow
with the width); embedding, head, vectors and matrices with initial values of their own keep deviation and rate. Of
low-rank updates ``A`` learns at the divided rate, ``B``, which reads the rank, at the whole one. What counts is the
shape of the logical tensor, whatever part of it a rank holds. With ``m = 1``, ``scale_emb = 1`` and ``scale_depth =
sqrt(num_layers)`` the model is the one without these rules.
"""

import math

from pydantic import Field
from torch import Tensor, nn

from lightbulb.config import Config
from lightbulb.nn.parameter import Logical, logical_of

LR_SCALE = "lr_scale"
"""Attribute of a parameter: factor of its learning rate."""


class ScalingConfig(Config):
    """MiniCPM's width and depth scaling; best learning rate and ``init_std`` are those of a model of ``base_dim``."""

    base_dim: int = Field(256, ge=1)
    """Width at which nothing but the two factors below differs from a model without scaling."""
    scale_emb: float = Field(12.0, gt=0)
    """Factor of the embedding's output."""
    scale_depth: float = Field(1.4, gt=0)
    """What mixers add is multiplied by this over sqrt(num_layers)."""

    def width(self, dim: int) -> float:
        """How many times as wide as the base a model is."""
        return dim / self.base_dim

    def residual(self, num_layers: int) -> float:
        """Factor of what each mixer adds."""
        return self.scale_depth / math.sqrt(num_layers)


def is_hidden_matrix(name: str, logical: Logical) -> bool:
    """Whether a parameter is a matrix (one per expert, if it has experts) whose deviation and rate follow the width."""
    dimensions = len(logical.shape) - logical.is_expert
    return name.startswith("blocks.") and dimensions >= 2 and logical.fill is None and logical.std is not None


def mark_learning_rates(model: nn.Module, factor: float) -> None:
    """Give the hidden matrices of a model, or of a stage of it, a factor of their learning rate."""
    for name, parameter in model.named_parameters():
        if is_hidden_matrix(name, logical_of(parameter)):
            setattr(parameter, LR_SCALE, factor)


def scaled(x: Tensor, factor: float) -> Tensor:
    """``factor * x``, without a product where it is 1."""
    return x if factor == 1.0 else x * factor
