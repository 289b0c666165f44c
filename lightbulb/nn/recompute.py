"""Activation recompute: keep a part's inputs, run its forward again in the backward (Chen et al. 2016,
arXiv:1604.06174)."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

Recompute = Literal["none", "selective", "full"]
"""What is run again in the backward: nothing, the cores of the mixers (what is large to keep and cheap to repeat;
Korthikanti et al. 2022, arXiv:2205.05198), or every block."""


def recompute(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, whose intermediate results are not kept when gradients are wanted.

    Noise needs no care: it is a function of ids (:mod:`lightbulb.nn.noise`), not of a generator's state. Nor do router
    statistics: they are shares, which counting a micro-batch twice leaves as they are.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
