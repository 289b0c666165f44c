"""The one door to LightBulb's kernels: every operation has its naive twin, and the fastest form the machine allows.

``LIGHTBULB_KERNELS=reference``, or ``kernels: reference`` in a run file, computes all of them by the twins.
"""

from lightbulb.kernels.choice import Kernels, choose
from lightbulb.kernels.experts import (
    Matrices,
    grouped_linear,
    grouped_swiglu,
    merged_linear,
    merged_swiglu,
    mixture_swiglu,
    spread,
    weighted_sum,
)
from lightbulb.kernels.native import ABSENT, is_built

__all__ = [
    "ABSENT",
    "Kernels",
    "Matrices",
    "choose",
    "grouped_linear",
    "grouped_swiglu",
    "is_built",
    "merged_linear",
    "merged_swiglu",
    "mixture_swiglu",
    "spread",
    "weighted_sum",
]
