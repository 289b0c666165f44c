"""The one door to LightBulb's kernels: every operation has its naive twin, and the fastest form the machine allows.

``LIGHTBULB_KERNELS=reference``, or ``kernels: reference`` in a run file, computes all of them by the twins.
"""

from lightbulb.kernels.adamw import adamw, is_one_pass
from lightbulb.kernels.choice import Kernels, choose
from lightbulb.kernels.native import ABSENT, is_built
from lightbulb.kernels.swiglu import swiglu, swiglu_, swiglu_grad_
from lightbulb.kernels.ternary_matmul import TernaryWeight, ternary_matmul
from lightbulb.kernels.ternary_matmul.packing import FORMATS, PackFormat, pack_codes, unpack_codes
from lightbulb.kernels.ternary_matmul.training import takes_ternary_training, ternary_training_linear

__all__ = [
    "ABSENT",
    "FORMATS",
    "Kernels",
    "PackFormat",
    "TernaryWeight",
    "adamw",
    "choose",
    "is_built",
    "is_one_pass",
    "pack_codes",
    "swiglu",
    "swiglu_",
    "swiglu_grad_",
    "takes_ternary_training",
    "ternary_matmul",
    "ternary_training_linear",
    "unpack_codes",
]
