"""The one door to LightBulb's kernels: every operation has its naive twin, and the fastest form the machine allows.

``LIGHTBULB_KERNELS=reference``, or ``kernels: reference`` in a run file, computes all of them by the twins.
"""

from lightbulb.kernels.adamw import adamw, is_one_pass
from lightbulb.kernels.choice import Kernels, choose
from lightbulb.kernels.native import ABSENT, is_built
from lightbulb.kernels.ternary_matmul.training import takes_ternary_linear, ternary_linear

__all__ = ["ABSENT", "Kernels", "adamw", "choose", "is_built", "is_one_pass", "takes_ternary_linear", "ternary_linear"]
