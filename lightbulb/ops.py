"""The one door to LightBulb's kernels: every operation has its naive twin, and the fastest form the machine allows.

``LIGHTBULB_KERNELS=reference``, or ``kernels: reference`` in a run file, computes all of them by the twins.
"""

from lightbulb.kernels.block_sparse_attention import Sight, Tiles, block_sparse_attention, takes_tiles
from lightbulb.kernels.choice import Kernels, choose
from lightbulb.kernels.native import ABSENT, is_built

__all__ = ["ABSENT", "Kernels", "Sight", "Tiles", "block_sparse_attention", "choose", "is_built", "takes_tiles"]
