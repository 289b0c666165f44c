"""The one door to LightBulb's kernels: every operation has its naive twin, and the fastest form the machine allows.

``LIGHTBULB_KERNELS=reference``, or ``train.kernels: reference`` in a run file, computes all of them by the twins.
"""

from lightbulb.kernels import describe
from lightbulb.kernels.choice import VARIABLE, Kernels, choose, chosen
from lightbulb.kernels.native import ABSENT, is_built
from lightbulb.kernels.rms_norm import add_rms_norm, rms_norm
from lightbulb.kernels.rope import rotate
from lightbulb.kernels.softmax import softmax, softmax_, softmax_grad_
from lightbulb.kernels.swiglu import swiglu, swiglu_, swiglu_grad_

__all__ = [
    "ABSENT",
    "VARIABLE",
    "Kernels",
    "add_rms_norm",
    "choose",
    "chosen",
    "describe",
    "is_built",
    "rms_norm",
    "rotate",
    "softmax",
    "softmax_",
    "softmax_grad_",
    "swiglu",
    "swiglu_",
    "swiglu_grad_",
]
