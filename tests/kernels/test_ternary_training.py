"""Training with ternary products: equal to fake quantisation, whose product a float64 reference computes."""

import pytest
import torch
from torch import Tensor

from lightbulb.kernels.ternary_matmul.training import ternary_training_linear
from lightbulb.nn.groups import SINGLE
from lightbulb.nn.lowbit import quantisation, quantise_tokens, quantise_weight, weight_codes

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2**-6}
"""Of the largest value: bfloat16 rounds codes x scale of both factors, and the gradient."""
NORMED = quantisation(8, 1e-6, False)[:4]


def leaves(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(x_shape) + sum(w_shape))
    x, weight = (torch.randn(shape, generator=generator).to(device, dtype) for shape in (x_shape, w_shape))
    return [x.requires_grad_(), weight.requires_grad_()]


def faked(x: Tensor, weight: Tensor, norm_eps: float | None, counts: list[int] | None) -> Tensor:
    """The plain path in the dtype of x: quantised, multiplied out, multiplied."""
    x, weight = quantise_tokens(x, 8, SINGLE, norm_eps), quantise_weight(weight, "ternary", SINGLE)
    if counts is None:
        return torch.nn.functional.linear(x, weight.flatten(0, -2))
    parts = zip(x.split(counts), weight.flatten(1, -2), strict=True)
    return torch.cat([torch.nn.functional.linear(rows, matrix) for rows, matrix in parts])


def compare(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], dtype: torch.dtype, norm_eps: float | None,
    counts: list[int] | None, device: torch.device,
) -> None:  # fmt: skip
    x, weight = leaves(x_shape, w_shape, dtype, device)
    _, scale = weight_codes(weight, "ternary", SINGLE)
    y = ternary_training_linear(x, weight, scale, quantisation(8, norm_eps, False)[:4], counts)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    found = [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]
    # Codes from the same float32 numbers; only what follows is wider.
    twins = [t.detach().double().requires_grad_() for t in (x, weight)]
    wanted_y = faked(*twins, norm_eps, counts)
    wanted = [wanted_y.detach(), *torch.autograd.grad(wanted_y, twins, grad.double())]
    assert y.dtype == dtype
    for mine, exact in zip(found, wanted, strict=True):
        assert mine.shape == exact.shape
        bound = BOUNDS[dtype] * (exact.abs().max() if exact.numel() else 1)
        torch.testing.assert_close(mine.double(), exact, rtol=BOUNDS[dtype], atol=float(bound))


@pytest.mark.parametrize("norm_eps", [None, 1e-6], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    ("x_shape", "w_shape"),
    [((7, 30), (9, 30)), ((3, 2, 65), (2, 5, 65)), ((1, 1, 260), (70, 260)), ((0, 8), (4, 8))],
    ids=str,
)
def test_equals_fake_quantisation(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], dtype: torch.dtype, norm_eps: float | None, device: torch.device
) -> None:
    compare(x_shape, w_shape, dtype, norm_eps, None, device)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("counts", [[4, 0, 3], [0, 1, 0], [2, 2, 2]], ids=str)
def test_experts_equal_fake_quantisation(counts: list[int], dtype: torch.dtype, device: torch.device) -> None:
    compare((sum(counts), 34), (3, 2, 6, 34), dtype, 1e-6, counts, device)


def test_turned_inputs_and_gradients(device: torch.device) -> None:
    x, weight = leaves((12, 6), (5, 12), torch.float32, device)
    _, scale = weight_codes(weight, "ternary", SINGLE)
    turned = ternary_training_linear(x.t(), weight, scale, NORMED)
    straight = ternary_training_linear(x.t().contiguous(), weight, scale, NORMED)
    assert torch.equal(turned, straight)
    grad = torch.ones(5, 6, device=device).t()
    mine = torch.autograd.grad(turned, (x, weight), grad)
    for a, b in zip(mine, torch.autograd.grad(straight, (x, weight), grad.contiguous()), strict=True):
        torch.testing.assert_close(a, b)


def test_only_wanted_gradients(device: torch.device) -> None:
    x, weight = leaves((4, 12), (5, 12), torch.float32, device)
    _, scale = weight_codes(weight, "ternary", SINGLE)
    both = torch.autograd.grad(ternary_training_linear(x, weight, scale, NORMED).sum(), (x, weight))
    (grad_x,) = torch.autograd.grad(ternary_training_linear(x, weight.detach(), scale, NORMED).sum(), x)
    (grad_weight,) = torch.autograd.grad(ternary_training_linear(x.detach(), weight, scale, NORMED).sum(), weight)
    assert torch.equal(grad_x, both[0]) and torch.equal(grad_weight, both[1])


def test_parts_of_a_matrix_take_its_scale(device: torch.device) -> None:
    """Column-parallel: each rank's outputs, with the whole matrix's scale, are those of the whole matrix."""
    x, weight = leaves((4, 12), (6, 12), torch.float32, device)
    _, scale = weight_codes(weight, "ternary", SINGLE)
    whole = ternary_training_linear(x, weight, scale, NORMED)
    parts = [ternary_training_linear(x, part, scale, NORMED) for part in weight.split(3)]
    assert torch.equal(torch.cat(parts, -1), whole)
