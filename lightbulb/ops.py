"""The one door to LightBulb's kernels: every operation has its naive twin, and the fastest form the machine allows.

``LIGHTBULB_KERNELS=reference``, or ``kernels: reference`` in a run file, computes all of them by the twins.
"""

from lightbulb.kernels.choice import Kernels, choose
from lightbulb.kernels.native import ABSENT, is_built
from lightbulb.kernels.ternary_matmul import Quantisation, TernaryWeight, made_ready, ternary_linear, ternary_matmul
from lightbulb.kernels.ternary_matmul.packing import FORMATS, PER_BYTE, PackFormat, as_rows, pack_codes, unpack_codes

__all__ = [
    "ABSENT",
    "FORMATS",
    "PER_BYTE",
    "Kernels",
    "PackFormat",
    "Quantisation",
    "TernaryWeight",
    "as_rows",
    "choose",
    "is_built",
    "made_ready",
    "pack_codes",
    "ternary_linear",
    "ternary_matmul",
    "unpack_codes",
]
