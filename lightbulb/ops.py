"""The one door to LightBulb's kernels: every operation has its naive twin, and the fastest form the machine allows.

``LIGHTBULB_KERNELS=reference``, or ``kernels: reference`` in a run file, computes all of them by the twins.
"""

from lightbulb.kernels.choice import Kernels, choose
from lightbulb.kernels.experts import grouped_linear, grouped_swiglu, mixture_swiglu, spread, weighted_sum
from lightbulb.kernels.native import ABSENT, is_built

__all__ = [
    "ABSENT",
    "Kernels",
    "choose",
    "grouped_linear",
    "grouped_swiglu",
    "is_built",
    "mixture_swiglu",
    "spread",
    "weighted_sum",
]
