"""Linear layers in the dtype that the machine multiplies fastest."""

import pytest
import torch

from lightbulb.nn import precision
from lightbulb.nn.precision import linear


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 50])  # few rows are not converted
def test_products_and_gradients(rows: int, dtype: torch.dtype, amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_amx", lambda: amx)
    torch.manual_seed(0)
    leaves = [torch.randn(size).to(dtype).requires_grad_() for size in ((rows, 2, 9), (5, 9))]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    found, wanted = linear(*leaves), torch.nn.functional.linear(*exact)
    grad = torch.randn(rows, 2, 5).to(dtype)
    results = [found, *torch.autograd.grad(found, leaves, grad)]
    exacts = [wanted, *torch.autograd.grad(wanted, exact, grad.double())]
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    for ours, theirs in zip(results, exacts, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        assert (ours - theirs).norm() < bound * theirs.norm()


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_a_frozen_side_gets_no_gradient(needed: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_amx", lambda: False)
    sides = [
        torch.ones(size).bfloat16().requires_grad_(need) for size, need in zip(((64, 3), (2, 3)), needed, strict=True)
    ]
    linear(*sides).sum().backward()
    assert [side.grad is not None for side in sides] == list(needed)
    assert all((side.grad == (2 if side is sides[0] else 64)).all() for side in sides if side.grad is not None)
