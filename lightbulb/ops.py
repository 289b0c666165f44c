"""The one door to LightBulb's kernels: every operation has its naive twin, and the fastest form the machine allows.

``LIGHTBULB_KERNELS=reference``, or ``kernels: reference`` in a run file, computes all of them by the twins.
"""

from lightbulb.kernels.causal_attention import causal_attention, has_fast_causal_attention
from lightbulb.kernels.choice import Kernels, choose
from lightbulb.kernels.cross_entropy import IGNORE, linear_cross_entropy
from lightbulb.kernels.native import ABSENT, is_built

__all__ = [
    "ABSENT",
    "IGNORE",
    "Kernels",
    "causal_attention",
    "choose",
    "has_fast_causal_attention",
    "is_built",
    "linear_cross_entropy",
]
