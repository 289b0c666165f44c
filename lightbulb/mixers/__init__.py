"""Sequence and channel mixers; importing the package registers them all."""

from lightbulb.mixers.channel import kan, lory, mlp, switch
from lightbulb.mixers.token import attention

__all__ = ["attention", "kan", "lory", "mlp", "switch"]
