"""The one door to LightBulb's kernels: every operation has its naive twin, and the fastest form the machine allows.

``LIGHTBULB_KERNELS=reference``, or ``kernels: reference`` in a run file, computes all of them by the twins.
"""

from lightbulb.kernels.choice import Kernels, choose
from lightbulb.kernels.native import ABSENT, is_built
from lightbulb.kernels.swiglu import swiglu, swiglu_, swiglu_grad_

__all__ = ["ABSENT", "Kernels", "choose", "is_built", "swiglu", "swiglu_", "swiglu_grad_"]
