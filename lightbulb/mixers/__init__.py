"""Sequence and channel mixers; importing the package registers them all."""

from lightbulb.mixers.channel import mlp, switch
from lightbulb.mixers.token import attention, mamba, retention

__all__ = ["attention", "mamba", "mlp", "retention", "switch"]
