"""The one door to LightBulb's kernels: every operation has its naive twin, and the fastest form the machine allows.

``LIGHTBULB_KERNELS=reference``, or ``train.kernels: reference`` in a run file, computes all of them by the twins.
"""

from lightbulb.kernels import describe
from lightbulb.kernels.adamw import adamw, is_one_pass
from lightbulb.kernels.block_sparse_attention import Sight, Tiles, block_sparse_attention, takes_tiles
from lightbulb.kernels.causal_attention import causal_attention, has_fast_causal_attention
from lightbulb.kernels.choice import VARIABLE, Kernels, choose, chosen
from lightbulb.kernels.cross_entropy import IGNORE, linear_cross_entropy
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
from lightbulb.kernels.linear_recurrence import linear_recurrence, state_dtype
from lightbulb.kernels.native import is_built
from lightbulb.kernels.rms_norm import add_rms_norm, rms_norm
from lightbulb.kernels.rope import rotate
from lightbulb.kernels.softmax import softmax
from lightbulb.kernels.swiglu import swiglu
from lightbulb.kernels.ternary_matmul import Quantisation, TernaryWeight, made_ready, ternary_linear, ternary_matmul
from lightbulb.kernels.ternary_matmul.packing import FORMATS, PER_BYTE, PackFormat, as_rows, pack_codes
from lightbulb.kernels.ternary_matmul.training import takes_ternary_training, ternary_training_linear

__all__ = [
    "FORMATS",
    "IGNORE",
    "PER_BYTE",
    "VARIABLE",
    "Kernels",
    "Matrices",
    "PackFormat",
    "Quantisation",
    "Sight",
    "TernaryWeight",
    "Tiles",
    "adamw",
    "add_rms_norm",
    "as_rows",
    "block_sparse_attention",
    "causal_attention",
    "choose",
    "chosen",
    "describe",
    "grouped_linear",
    "grouped_swiglu",
    "has_fast_causal_attention",
    "is_built",
    "is_one_pass",
    "linear_cross_entropy",
    "linear_recurrence",
    "made_ready",
    "merged_linear",
    "merged_swiglu",
    "mixture_swiglu",
    "pack_codes",
    "rms_norm",
    "rotate",
    "softmax",
    "spread",
    "state_dtype",
    "swiglu",
    "takes_ternary_training",
    "takes_tiles",
    "ternary_linear",
    "ternary_matmul",
    "ternary_training_linear",
    "weighted_sum",
]
