"""The norms against their formulas in float64."""

import pytest
import torch
from torch import Tensor

from lightbulb.nn.norm import LayerNorm, Norms, RMSNorm

SHAPES = [(1, 1), (1, 7), (3, 2, 5), (2, 3, 4, 9)]


def naive(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def norm(dim: int, dtype: torch.dtype = torch.float64, eps: float = 1e-6) -> RMSNorm:
    module = RMSNorm(dim, eps)
    torch.manual_seed(0)
    module.weight.data = (torch.rand(dim) + 0.5).to(dtype)
    return module


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, ...]) -> None:
    module = norm(shape[-1])
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(module(x), naive(x, module.weight, 1e-6), rtol=1e-12)
    assert torch.autograd.gradcheck(lambda x, w: module(x, w), (x, module.weight))


def test_a_row_of_zeros_has_finite_gradients() -> None:
    x = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm(6, eps=0.1), (x,))
    module = norm(6)
    module(x).sum().backward()
    assert torch.allclose(x.grad, module.weight.expand(2, 6) / 1e-3)


def test_float32_is_within_rounding_of_float64() -> None:
    x = torch.randn(50, 33, dtype=torch.float64, requires_grad=True)
    grad, exact = torch.randn(50, 33, dtype=torch.float64), norm(33)
    exact(x).backward(grad)
    single, x32 = norm(33, torch.float32), x.detach().float().requires_grad_()
    single(x32).backward(grad.float())
    for ours, wanted in ((single(x32), exact(x)), (x32.grad, x.grad), (single.weight.grad, exact.weight.grad)):
        assert (ours - wanted).norm() < 1e-6 * wanted.norm()


def test_bfloat16_rounds_once() -> None:
    x = torch.randn(50, 32).bfloat16()
    module = norm(32, torch.bfloat16)
    assert torch.equal(module(x), norm(32, torch.bfloat16)(x.float(), module.weight.float()).bfloat16())


def test_a_view_that_is_not_contiguous_is_normalised_like_its_copy() -> None:
    x = torch.randn(6, 4, 5, dtype=torch.float64).transpose(0, 1).requires_grad_()
    assert torch.equal(norm(5)(x), norm(5)(x.contiguous()))
    assert torch.autograd.gradcheck(norm(5), (x,))


def test_a_row_that_is_not_finite_leaves_the_others_alone() -> None:
    x = torch.randn(3, 4)
    broken = x.clone()
    broken[1, 2] = float("nan")
    module = norm(4, torch.float32)
    assert torch.equal(module(broken)[[0, 2]], module(x)[[0, 2]])
    assert module(broken)[1].isnan().all()


def layer(dim: int, dtype: torch.dtype = torch.float64) -> LayerNorm:
    module = LayerNorm(dim, 1e-5)
    torch.manual_seed(0)
    module.weight.data, module.bias.data = (torch.rand(dim) + 0.5).to(dtype), torch.randn(dim).to(dtype)
    return module


@pytest.mark.parametrize("shape", SHAPES)
def test_equality_of_the_norm_by_mean_and_variance(shape: tuple[int, ...]) -> None:
    module = layer(shape[-1])
    x = (torch.randn(shape, dtype=torch.float64) + 3).requires_grad_()
    centred = x - x.mean(-1, keepdim=True)
    wanted = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight + module.bias
    assert torch.allclose(module(x), wanted, rtol=1e-10)
    inputs = [x, *module.parameters()]
    grad = torch.randn(shape, dtype=torch.float64)
    found, expected = (torch.autograd.grad(y, inputs, grad) for y in (module(x), wanted))
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(found, expected, strict=True))


def test_the_norm_by_mean_and_variance_has_statistics_in_float32() -> None:
    """Of a mean far from zero nothing is left in bfloat16."""
    module, x = layer(64, torch.bfloat16), (torch.randn(50, 64) / 2 + 8).bfloat16()
    exact = layer(64)
    exact.weight.data, exact.bias.data = module.weight.data.double(), module.bias.data.double()
    assert ((module(x) - exact(x.double())).abs() <= 2**-7 * exact(x.double()).abs() + 1e-3).all()


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_equality_of_the_step_to_the_next_part_of_a_block(kind: str) -> None:
    norms = Norms(kind, 1e-5)
    module = norms.build(6)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    assert norms.params(6) == sum(parameter.numel() for parameter in module.parameters())
    x, delta = torch.randn(2, 4, 6)
    normed, total = module.add(x, delta)
    assert torch.equal(total, x + delta) and torch.allclose(normed, module(x + delta), atol=1e-6)
