"""Sequence and channel mixers; importing the package registers them all."""

from lightbulb.mixers.channel import deepseek_moe, mlp, switch
from lightbulb.mixers.token import attention, moa

__all__ = ["attention", "deepseek_moe", "mlp", "moa", "switch"]
