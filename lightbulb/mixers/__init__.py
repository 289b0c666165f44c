"""Sequence and channel mixers; importing the package registers them all."""

from lightbulb.mixers.channel import deepseek_moe, kan, lory, mlp, switch
from lightbulb.mixers.token import attention, block_sparse, infini, mamba, moa, retention

__all__ = [
    "attention",
    "block_sparse",
    "deepseek_moe",
    "infini",
    "kan",
    "lory",
    "mamba",
    "mlp",
    "moa",
    "retention",
    "switch",
]
