"""Rotary positions against multiplication by complex numbers."""

import pytest
import torch
from torch import Tensor

from lightbulb.nn.rope import rotary_angles, rotate

THETA = 100.0


def naive(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    width = x.shape[-1]
    frequency = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    turn = torch.polar(torch.ones((), dtype=torch.float64), positions.double()[:, None] * frequency)[:, None, None]
    turned = torch.complex(*x.double().chunk(2, -1)) * turn
    return torch.cat((turned.real, turned.imag), -1)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    return rotate(x, *rotary_angles(positions, x.shape[-1], THETA))


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (5, 2, 3, 6), (7, 1, 4, 10)])
def test_values_and_gradients(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(3, 3 + shape[0])
    assert torch.allclose(rotated(x, positions), naive(x, positions, THETA), atol=1e-6)  # angles are float32
    assert torch.autograd.gradcheck(lambda x: rotated(x, positions), (x,))


def test_scores_depend_on_the_distance_only() -> None:
    query, key = (torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(20, 1, 1, 8) for _ in range(2))
    scores = torch.einsum("iabw,jabw->ij", rotated(query, torch.arange(20)), rotated(key, torch.arange(20)))
    for distance in range(-19, 20):
        diagonal = scores.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5)


def test_position_zero_changes_nothing_and_lengths_are_kept() -> None:
    x = torch.randn(9, 2, 2, 4)
    turned = rotated(x, torch.arange(9))
    assert torch.equal(turned[0], x[0])
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6)


def test_bfloat16_rounds_the_result_and_not_the_angles() -> None:
    x = torch.randn(4, 2, 2, 8).bfloat16()
    positions = torch.tensor([0, 1, 30_000, 30_001])
    assert torch.equal(rotated(x, positions), rotated(x.float(), positions).bfloat16())


def test_the_result_lies_in_the_order_attention_reads() -> None:
    assert rotated(torch.randn(5, 2, 3, 4), torch.arange(5)).permute(1, 2, 0, 3).is_contiguous()
