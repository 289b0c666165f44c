"""How the output of one layer becomes the input of the next."""

from dataclasses import dataclass

from torch import Tensor, nn

from lightbulb.config import Config, Cost


@dataclass(frozen=True)
class Stage:
    """The part of a model one pipeline stage holds: layers ``first`` to ``last - 1``, embedding, head."""

    first: int
    last: int
    has_embedding: bool
    has_head: bool


class StackConfig(Config):
    """Layers one after the other: each takes the output of the one before."""

    def carried(self, layer: int, num_layers: int) -> int:
        """Tensors ``[length, batch, dim]`` that go into a layer (or, at ``num_layers``, into the head): the input, and
        what later layers need."""
        return 1

    def cost(self, num_layers: int, dim: int) -> Cost:
        """What the stack adds to the layers."""
        return Cost.zero()

    def build(self, num_layers: int, stage: Stage) -> "Stack":
        """The module of one pipeline stage, uninitialised."""
        return Stack()


class Stack(nn.Module):
    """The plain stack. ``carried`` is what goes into the next layer; its first tensor is the layer's input."""

    def start(self, embedded: Tensor) -> list[Tensor]:
        """What goes into layer 0."""
        return [embedded]

    def after(self, layer: int, output: Tensor, carried: list[Tensor]) -> list[Tensor]:
        """What goes into the layer after ``layer``, from its output and what went into it."""
        return [output]
