"""Sequence and channel mixers; importing the package registers them all."""

from lightbulb.mixers.channel import mlp, switch
from lightbulb.mixers.token import attention, block_sparse, infini

__all__ = ["attention", "block_sparse", "infini", "mlp", "switch"]
