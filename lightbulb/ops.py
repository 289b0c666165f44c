"""The one door to LightBulb's kernels: every operation has its naive twin, and the fastest form the machine allows.

``LIGHTBULB_KERNELS=reference``, or ``kernels: reference`` in a run file, computes all of them by the twins.
"""

from lightbulb.kernels.choice import Kernels, choose
from lightbulb.kernels.linear_recurrence import linear_recurrence, state_dtype
from lightbulb.kernels.native import ABSENT, is_built

__all__ = ["ABSENT", "Kernels", "choose", "is_built", "linear_recurrence", "state_dtype"]
