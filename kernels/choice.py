"""Which implementation computes an operation.

``reference`` forces the naive twins everywhere, to find out whether a kernel is to blame; ``auto`` takes the fastest
that the tensors, the machine and the installation allow.
"""

import importlib.util
import os
from typing import Literal, get_args

import torch
from torch import Tensor

Kernels = Literal["auto", "reference"]
VARIABLE = "LIGHTBULB_KERNELS"
"""Environment variable that outranks every config."""

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether Triton is installed; it is for Linux only."""

_chosen: Kernels = "auto"


def choose(kernels: Kernels) -> None:
    """Set what :func:`chosen` gives where the environment says nothing."""
    global _chosen
    _chosen = kernels


def chosen() -> Kernels:
    """The choice in force.

    Raises:
        ValueError: the environment variable has a value that is not a choice.
    """
    wanted = os.environ.get(VARIABLE, "") or _chosen
    for known in get_args(Kernels):
        if wanted == known:
            return known
    raise ValueError(f"{VARIABLE} is {wanted!r}; set it to one of {', '.join(get_args(Kernels))}, or unset it")


def is_reference() -> bool:
    """Whether the naive twins are forced."""
    return chosen() == "reference"


def takes_triton(*tensors: Tensor) -> bool:
    """Whether Triton kernels may compute with these: all on a GPU, none in float64."""
    return HAS_TRITON and not is_reference() and all(t.is_cuda and t.dtype != torch.float64 for t in tensors)
