"""Dispatch and combine on one rank: every row reaches its expert and comes back. (All-to-all: tests/distributed.)"""

import pytest
import torch

from lightbulb.nn.groups import SINGLE
from lightbulb.routing.dispatch import capacity, combine, dispatch
from lightbulb.routing.router import Routing


def routing(tokens, top_k, num_experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    experts = torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(tokens)])
    return Routing(torch.rand(tokens, top_k, generator=generator, dtype=torch.float64), experts.view(tokens, top_k))


@pytest.mark.parametrize(("tokens", "top_k", "num_experts"), [(1, 1, 1), (1, 2, 8), (13, 2, 5), (40, 3, 4)])
def test_rows_are_sorted_by_expert_and_counted(tokens, top_k, num_experts):
    x, choice = torch.arange(tokens, dtype=torch.float64)[:, None].expand(-1, 3), routing(tokens, top_k, num_experts)
    rows, plan = dispatch(x, choice, num_experts, SINGLE, None)
    assert plan.counts == [int((choice.experts == e).sum()) for e in range(num_experts)]
    start = 0
    for expert, count in enumerate(plan.counts):
        chosen = [t for t in range(tokens) if expert in choice.experts[t]]
        assert sorted(rows[start : start + count, 0].tolist()) == chosen
        start += count


@pytest.mark.parametrize("limit", [None, 3, 0])
def test_there_and_back_weighs_each_kept_choice_and_its_gradients_are_exact(limit):
    x = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    choice = routing(11, 2, 3)
    gates = choice.gates.clone().requires_grad_()

    def through(x, gates):
        rows, plan = dispatch(x, choice, 3, SINGLE, limit)
        return combine(rows * rows, gates, plan)

    kept, taken = torch.ones(11, 2, dtype=torch.float64), [0, 0, 0]
    for t in range(11):
        for k in range(2):
            expert = int(choice.experts[t, k])
            kept[t, k] = limit is None or taken[expert] < limit
            taken[expert] += 1
    expected = (gates * kept).sum(1, keepdim=True) * x * x
    torch.testing.assert_close(through(x, gates), expected)
    assert torch.autograd.gradcheck(through, (x, gates))


def test_capacity_is_rounded_up():
    assert capacity(10, 2, 8, 1.0) == 3
    assert capacity(8, 2, 8, 1.25) == 3
