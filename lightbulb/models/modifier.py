"""What a modifier may change: how blocks and the stack are configured, and the linear layers of the built model.

Modifiers are listed in ``model.modifiers``; their order there does not matter. Blocks and the stack change first, from
config to config (the results subclass what they replace, so that parameter names stay a superset of the plain model's
and a plain checkpoint still loads); then the slots of linear layers are filled.
"""

from abc import ABC
from typing import ClassVar

from torch import nn

from lightbulb.config import Config, Cost
from lightbulb.mixers.base import Facts
from lightbulb.models.block import BlockConfig
from lightbulb.models.stack import StackConfig


class ModifierConfig(Config, ABC):
    """Base of every modifier; each overrides what it changes."""

    facts: ClassVar[Facts]
    type: str

    def block(self, layer: int, config: BlockConfig) -> BlockConfig:
        """The config of one layer."""
        return config

    def stack(self, config: StackConfig) -> StackConfig:
        """The config of the stack."""
        return config

    def convert(self, model: nn.Module) -> None:
        """Fill the slots of the linear layers of a model, or of one stage of it."""

    def converted_cost(self, plain: nn.Module) -> Cost:
        """What :meth:`convert` adds to a whole model (given on the meta device)."""
        return Cost.zero()
