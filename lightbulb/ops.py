"""The one door to LightBulb's kernels: every operation has its naive twin, and the fastest form the machine allows.

``LIGHTBULB_KERNELS=reference``, or ``kernels: reference`` in a run file, computes all of them by the twins.
"""

from lightbulb.kernels.block_sparse_attention import Sight, Tiles, block_sparse_attention, takes_tiles
from lightbulb.kernels.choice import Kernels, choose
from lightbulb.kernels.linear_recurrence import linear_recurrence, state_dtype
from lightbulb.kernels.native import ABSENT, is_built
from lightbulb.kernels.swiglu import swiglu, swiglu_, swiglu_grad_
from lightbulb.kernels.ternary_matmul import TernaryWeight, ternary_matmul
from lightbulb.kernels.ternary_matmul.packing import FORMATS, PackFormat, pack_codes, unpack_codes

__all__ = [
    "ABSENT",
    "FORMATS",
    "Kernels",
    "PackFormat",
    "Sight",
    "TernaryWeight",
    "Tiles",
    "block_sparse_attention",
    "choose",
    "is_built",
    "linear_recurrence",
    "pack_codes",
    "state_dtype",
    "swiglu",
    "swiglu_",
    "swiglu_grad_",
    "takes_tiles",
    "ternary_matmul",
    "unpack_codes",
]
