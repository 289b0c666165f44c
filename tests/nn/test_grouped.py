"""Products per expert against a loop over rows."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from lightbulb.nn import grouped, precision
from lightbulb.nn.grouped import grouped_swiglu
from lightbulb.ops import grouped_linear

COUNTS = [[4], [2, 3], [0, 5, 0], [1, 0, 2], [0, 0], [0, 1]]
DIM, HIDDEN = 3, 5


def experts_of(counts: list[int]) -> list[int]:
    return [expert for expert, count in enumerate(counts) for _ in range(count)]


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def naive_swiglu(rows: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
    results = [
        down[e] @ (silu(gate_up[e, 0] @ row) * (gate_up[e, 1] @ row))
        for row, e in zip(rows, experts_of(counts), strict=True)
    ]
    return torch.stack(results) if results else rows.new_empty(0, down.shape[1])


def swiglu_inputs(counts: list[int], dim: int = DIM, hidden: int = HIDDEN) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return draw(sum(counts), dim), draw(len(counts), 2, hidden, dim), draw(len(counts), dim, hidden)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_linear_values_and_gradients(counts: list[int]) -> None:
    rows, weight = draw(sum(counts), DIM), draw(len(counts), HIDDEN, DIM)
    wanted = [weight[e] @ row for row, e in zip(rows, experts_of(counts), strict=True)]
    if wanted:
        assert torch.allclose(grouped_linear(rows, weight, counts), torch.stack(wanted), rtol=1e-12)
    assert torch.autograd.gradcheck(lambda r, w: grouped_linear(r, w, counts), (rows, weight))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_swiglu_values_and_gradients(counts: list[int]) -> None:
    inputs = swiglu_inputs(counts)
    assert torch.allclose(grouped_swiglu(*inputs, counts), naive_swiglu(*inputs, counts), rtol=1e-12)
    assert torch.autograd.gradcheck(lambda *inputs: grouped_swiglu(*inputs, counts), inputs)


def test_an_expert_without_rows_has_a_zero_gradient() -> None:
    rows, gate_up, down = swiglu_inputs([2, 0, 1])
    weight = draw(3, HIDDEN, DIM)
    (grouped_swiglu(rows, gate_up, down, [2, 0, 1]).sum() + grouped_linear(rows, weight, [2, 0, 1]).sum()).backward()
    for parameter in (gate_up, down, weight):
        assert parameter.grad is not None
        assert not parameter.grad[1].any()
        assert parameter.grad[0].any() and parameter.grad[2].any()


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_within_rounding(amx: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_amx", lambda: amx)
    counts = [10, 0, 23]
    exact = swiglu_inputs(counts, 17, 33)
    lower = tuple(t.detach().to(dtype).requires_grad_() for t in exact)
    exact = tuple(t.detach().double().requires_grad_() for t in lower)
    wanted, found = grouped_swiglu(*exact, counts), grouped_swiglu(*lower, counts)
    wanted.sum().backward()
    found.sum().backward()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2  # bfloat16 keeps 8 bits
    assert (found - wanted).norm() < tolerance * wanted.norm()
    for ours, theirs in zip(lower, exact, strict=True):
        assert ours.grad.dtype == dtype
        assert (ours.grad - theirs.grad).norm() < tolerance * theirs.grad.norm()


def test_products_are_in_float32_where_bfloat16_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    half, single = torch.zeros(1).bfloat16(), torch.zeros(1)
    monkeypatch.setattr(precision, "has_amx", lambda: False)
    assert (grouped.product_dtype(half), grouped.product_dtype(single)) == (torch.float32, torch.float32)
    monkeypatch.setattr(precision, "has_amx", lambda: True)
    assert (grouped.product_dtype(half), grouped.product_dtype(single.double())) == (torch.bfloat16, torch.float64)


def test_what_is_not_finite_stays_in_its_row() -> None:
    rows, gate_up, down = swiglu_inputs([2, 2])
    clean = grouped_swiglu(rows, gate_up, down, [2, 2])
    broken = rows.detach().clone()
    broken[3] = float("nan")
    found = grouped_swiglu(broken, gate_up, down, [2, 2])
    assert torch.equal(found[:3], clean[:3]) and found[3].isnan().all()
