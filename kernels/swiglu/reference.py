"""The naive twin."""

from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``gate * sigmoid(gate) * up``, elementwise."""
    return gate * gate.sigmoid() * up
