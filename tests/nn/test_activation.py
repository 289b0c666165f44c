"""The gated activation against its formula."""

import pytest
import torch
from torch.nn.functional import silu

from lightbulb.nn.activation import swiglu


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 7)])
def test_values_and_gradients(shape: tuple[int, ...]) -> None:
    gate, up = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.allclose(swiglu(gate, up), silu(gate) * up, rtol=1e-12)
    assert torch.autograd.gradcheck(swiglu, (gate, up))


def test_halves_of_one_tensor() -> None:
    both = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: swiglu(*x.chunk(2, -1)), (both,))


def test_the_incoming_gradient_is_left_alone() -> None:
    gate, up = (torch.randn(5, requires_grad=True) for _ in range(2))
    grad = torch.ones(5)
    swiglu(gate, up).backward(grad)
    assert torch.equal(grad, torch.ones(5))
