"""A bank of experts against its experts one by one."""

import pytest
import torch

from lightbulb.mixers.base import Context
from lightbulb.mixers.channel.kan import KANConfig
from lightbulb.mixers.channel.mlp import MLPConfig
from lightbulb.nn.bank import ExpertBank
from lightbulb.nn.groups import Axis
from lightbulb.nn.linear import leave_region
from lightbulb.nn.parameter import Init, initialise

DIM = 6
EXPERTS = [KANConfig(hidden_dim=4), MLPConfig(hidden_dim=8, activation="gelu"), MLPConfig(hidden_dim=8, bias=True)]
CONTEXT = Context(torch.arange(1))


def bank(config: KANConfig | MLPConfig) -> ExpertBank:
    module = ExpertBank(3, lambda: config.build(DIM, Init(0.3, 0.3)))
    initialise(module, 1)
    return module.double()


@pytest.mark.parametrize("config", EXPERTS, ids=["kan", "gelu", "bias"])
def test_equality_each_expert_has_its_own_parameters(config: KANConfig | MLPConfig) -> None:
    module, counts = bank(config), [3, 0, 2]
    rows = torch.randn(5, DIM, dtype=torch.float64, requires_grad=True)
    found = module(rows, counts, CONTEXT)
    one = config.build(DIM, Init(0.3, 0.3)).double()
    for expert, part in ((0, slice(0, 3)), (2, slice(3, 5))):
        one.load_state_dict({name: p[expert] for name, p in module.each.named_parameters()})
        assert torch.allclose(found[part], one(rows[part][:, None], CONTEXT)[0][:, 0], atol=1e-12)
    found.square().sum().backward()
    for parameter in module.parameters():
        assert parameter.grad[0].any() and parameter.grad[2].any() and not parameter.grad[1].any()


@pytest.mark.parametrize("config", EXPERTS, ids=["kan", "gelu", "bias"])
def test_without_rows_every_parameter_still_gets_a_gradient(config: KANConfig | MLPConfig) -> None:
    module = bank(config)
    result = module(torch.empty(0, DIM, dtype=torch.float64), [0, 0, 0], CONTEXT)
    assert result.shape == (0, DIM) and result.requires_grad
    result.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in module.parameters())


def test_equality_parts_of_an_expert_add_its_bias_once() -> None:
    """Results of three ranks, which the owner sums: every rank's gradient of the bias is that of the whole."""
    parts = torch.randn(3, 5, DIM, dtype=torch.float64)
    whole = torch.randn(DIM, dtype=torch.float64)
    biases = [whole.clone().requires_grad_() for _ in parts]
    found = [leave_region(part, Axis(size=3, inside=True), bias) for part, bias in zip(parts, biases, strict=True)]
    assert torch.allclose(sum(found), parts.sum(0) + whole, atol=1e-12)
    grad = torch.randn(5, DIM, dtype=torch.float64)
    for result, bias in zip(found, biases, strict=True):
        result.backward(grad)
        assert torch.allclose(bias.grad, grad.sum(0), atol=1e-12)
