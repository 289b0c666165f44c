"""Sequence and channel mixers; importing the package registers them all."""

from lightbulb.mixers.channel import deepseek_moe, kan, lory, mlp, switch
from lightbulb.mixers.token import attention, mamba, moa, retention

__all__ = ["attention", "deepseek_moe", "kan", "lory", "mamba", "mlp", "moa", "retention", "switch"]
