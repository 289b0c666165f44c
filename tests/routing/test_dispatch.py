"""Dispatch and combine against a sum over choices, token by token."""

import pytest
import torch
from torch import Tensor

from lightbulb.nn.groups import SINGLE
from lightbulb.routing.dispatch import capacity, carry, combine, dispatch, sort_by_expert, sort_by_token
from lightbulb.routing.router import Routing

DIM = 3


def routing(tokens: int, num_experts: int, top_k: int) -> Routing:
    torch.manual_seed(0)
    gates, experts = torch.randn(tokens, num_experts, dtype=torch.float64).softmax(-1).topk(top_k)
    return Routing(gates.requires_grad_(), experts)


def mixed(x: Tensor, gates: Tensor, experts: Tensor, scales: Tensor, limit: int | None = None) -> Tensor:
    """Experts that multiply their rows, feature by feature, by ``scales[expert]``."""
    receive, plan = dispatch(x, experts, len(scales), SINGLE, limit)
    expert_of_row = torch.arange(len(scales)).repeat_interleave(torch.tensor(plan.counts))
    return combine(receive() * scales[expert_of_row], gates, plan)


def naive(x: Tensor, gates: Tensor, experts: Tensor, scales: Tensor, limit: int | None = None) -> Tensor:
    accepted, results = [0] * len(scales), []
    for token in range(len(x)):
        total = torch.zeros_like(x[token])
        for gate, expert in zip(gates[token], experts[token].tolist(), strict=True):
            accepted[expert] += 1
            if limit is None or accepted[expert] <= limit:
                total = total + gate * scales[expert] * x[token]
        results.append(total)
    return torch.stack(results)


@pytest.mark.parametrize("limit", [None, 1, 2, 100])
@pytest.mark.parametrize(("tokens", "num_experts", "top_k"), [(1, 1, 1), (1, 5, 2), (7, 3, 1), (9, 4, 2), (6, 7, 3)])
def test_values_and_gradients(tokens: int, num_experts: int, top_k: int, limit: int | None) -> None:
    gates, experts = routing(tokens, num_experts, top_k)
    x, scales = (torch.randn(n, DIM, dtype=torch.float64, requires_grad=True) for n in (tokens, num_experts))
    assert torch.allclose(mixed(x, gates, experts, scales, limit), naive(x, gates, experts, scales, limit), atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, g, s: mixed(x, g, experts, s, limit), (x, gates, scales))


def test_rows_are_sorted_by_expert_and_in_time_order_within_one() -> None:
    experts = torch.tensor([[2, 0], [0, 3], [2, 3], [0, 2]])
    x = torch.arange(4.0)[:, None]
    receive, plan = dispatch(x, experts, 5, SINGLE, None)
    assert plan.counts == [3, 0, 3, 2, 0]
    assert receive()[:, 0].tolist() == [0, 1, 3, 0, 2, 3, 1, 2]
    assert plan.kept is None


def test_a_full_expert_drops_later_tokens_first() -> None:
    experts = torch.tensor([[0], [1], [0], [0], [1]])
    x = torch.arange(1.0, 6.0)[:, None]
    receive, plan = dispatch(x, experts, 2, SINGLE, 2)
    assert plan.counts == [2, 2]
    assert combine(receive(), torch.ones(5, 1), plan)[:, 0].tolist() == [1, 2, 3, 0, 5]


def test_dropping_does_not_depend_on_the_future() -> None:
    gates, experts = routing(12, 3, 2)
    x, scales = torch.randn(12, DIM).double(), torch.randn(3, DIM).double()
    whole = mixed(x, gates, experts, scales, limit=4)
    for known in range(1, 12):
        assert torch.equal(mixed(x[:known], gates[:known], experts[:known], scales, limit=4), whole[:known])


def test_by_priority_a_full_expert_drops_its_smallest() -> None:
    experts, priority = torch.tensor([[0], [1], [0], [0], [1]]), torch.tensor([[0.2], [0.1], [0.9], [0.5], [0.3]])
    x = torch.arange(1.0, 6.0)[:, None]
    receive, plan = dispatch(x, experts, 2, SINGLE, 2, priority)
    assert plan.counts == [2, 2] and receive()[:, 0].tolist() == [3, 4, 2, 5]  # still in time order
    assert combine(receive(), torch.ones(5, 1), plan)[:, 0].tolist() == [0, 2, 3, 4, 5]


def test_equality_equal_priorities_drop_by_position() -> None:
    gates, experts = routing(12, 3, 2)
    x = torch.randn(12, DIM).double()
    plans = [dispatch(x, experts, 3, SINGLE, 4, priority)[1] for priority in (None, torch.ones_like(gates))]
    assert torch.equal(plans[0].kept, plans[1].kept) and not plans[0].kept.all()


@pytest.mark.parametrize("limit", [None, 2])
def test_values_of_choices_go_where_their_rows_go(limit: int | None) -> None:
    _, experts = routing(9, 4, 2)
    marks = torch.arange(18).view(9, 2)
    receive, plan = dispatch(torch.arange(9.0)[:, None], experts, 4, SINGLE, limit)
    carried = carry(marks, plan)
    assert torch.equal(receive()[:, 0], (carried // 2).float())
    assert torch.equal(experts.flatten()[carried], torch.arange(4).repeat_interleave(torch.tensor(plan.counts)))


def test_sorting_by_token_and_back() -> None:
    _, experts = routing(9, 4, 2)
    receive, plan = dispatch(torch.arange(9.0, dtype=torch.float64)[:, None], experts, 4, SINGLE, None)
    rows = receive().requires_grad_()
    pairs = sort_by_token(rows, plan)
    assert torch.equal(pairs[:, 0].detach(), torch.arange(9.0, dtype=torch.float64).repeat_interleave(2))
    assert torch.equal(sort_by_expert(pairs, plan), rows)
    assert torch.autograd.gradcheck(lambda r: sort_by_token(r.square(), plan), rows)


def test_capacity_is_an_even_share_rounded_up() -> None:
    assert capacity(tokens=10, top_k=2, num_experts=8, factor=1.0) == 3
    assert capacity(tokens=8, top_k=2, num_experts=8, factor=1.25) == 3
    assert capacity(tokens=1, top_k=1, num_experts=64, factor=1.0) == 1


def test_gates_stay_float32_and_get_float32_gradients_in_bfloat16() -> None:
    gates, experts = routing(20, 4, 2)
    gates = gates.detach().float().requires_grad_()
    x, scales = torch.randn(20, 16).bfloat16(), torch.randn(4, 16).bfloat16()
    result = mixed(x, gates, experts, scales)
    (grad,) = torch.autograd.grad(result.float().sum(), gates)
    exact_gates = gates.detach().double().requires_grad_()
    exact = naive(x.double(), exact_gates, experts, scales.double())
    (exact_grad,) = torch.autograd.grad(exact.sum(), exact_gates)
    assert result.dtype == torch.bfloat16 and grad.dtype == torch.float32
    assert (result - exact).norm() < 0.01 * exact.norm()
    assert (grad - exact_grad).norm() < 0.01 * exact_grad.norm()
