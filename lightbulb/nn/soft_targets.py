"""Distributions that a model learns from besides its text; a file of its own so that who reads them needs no layers."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class SoftTargets(NamedTuple):
    """The likeliest next tokens at every position, as another model sees them.

    Attributes:
        ids: ``[batch, length, k]`` tokens, each at most once at a position.
        probabilities: ``[batch, length, k]``; 0 where there is no token. What they lack to 1 is the probability of all
            other tokens together. Positions with zeros only have no target.
        language_share: weight of the language-modelling loss; the divergence has the rest.
    """

    ids: Tensor
    probabilities: Tensor
    language_share: float

    def to(self, device: torch.device) -> "SoftTargets":
        """On another device."""
        return self.mapped(lambda x: x.to(device))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "SoftTargets":
        """With both tensors changed alike."""
        return SoftTargets(change(self.ids), change(self.probabilities), self.language_share)
