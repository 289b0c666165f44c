"""The feed-forward layer's activations, alone and as experts."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from lightbulb.config import ConfigError, build_config
from lightbulb.mixers.base import Context
from lightbulb.mixers.channel.mlp import MLP, MLPConfig, SwiGLUExperts
from lightbulb.nn.bank import ExpertBank
from lightbulb.nn.parameter import Init, initialise

DIM, HIDDEN = 6, 10
ACTIVATIONS = ("swiglu", "gelu", "squared_relu")
each = pytest.mark.parametrize("activation", ACTIVATIONS)


def config(activation: str) -> MLPConfig:
    return build_config(MLPConfig, {"hidden_dim": HIDDEN, "activation": activation})


def mlp(activation: str) -> MLP:
    module = config(activation).build(DIM, Init(0.5, 0.5))
    initialise(module, 0)
    return module.double()


def naive(x: Tensor, activation: str, own: dict[str, Tensor]) -> Tensor:
    up = x @ own["up.weight"].t()
    hidden: Any = {
        "swiglu": lambda: silu(x @ own["gate.weight"].t()) * up,
        "gelu": lambda: gelu(up),
        "squared_relu": lambda: relu(up) ** 2,
    }
    return hidden[activation]() @ own["down.weight"].t()


def draw() -> Tensor:
    x = torch.randn(7, 2, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.requires_grad_()


def agree(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    assert torch.allclose(ours, theirs, atol=1e-12)
    grad = torch.randn_like(theirs)
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True):
        assert b.any() and torch.allclose(a, b, atol=1e-10)


@each
def test_equality_values_and_gradients_are_the_formula(activation: str) -> None:
    module, x = mlp(activation), draw()
    found = module(x, Context(torch.arange(len(x))))[0]
    agree(found, naive(x, activation, dict(module.named_parameters())), [x, *module.parameters()])


@each
def test_equality_cost_is_what_is_built(activation: str) -> None:
    cost = config(activation).cost(DIM)
    assert cost.params == sum(p.numel() for p in mlp(activation).parameters())
    assert cost.forward_flops == 2 * cost.params


@pytest.mark.parametrize("activation", ["gelu", "squared_relu"])
def test_equality_experts_are_the_layer_once_each(activation: str) -> None:
    experts = config(activation).build_experts(3, DIM, Init(0.5, 0.5))
    assert isinstance(experts, ExpertBank)
    initialise(experts, 0)
    experts.double()
    rows, counts = draw()[:, 0], [4, 0, 3]
    own = [{name: value[e] for name, value in experts.each.named_parameters()} for e in range(3)]
    wanted = [naive(part, activation, own[e]) for e, part in enumerate(rows.split(counts))]
    found = experts(rows, counts, Context(torch.arange(7)))
    agree(found, torch.cat(wanted), [*experts.parameters()])


def test_swiglu_experts_are_the_fused_ones() -> None:
    assert isinstance(config("swiglu").build_experts(2, DIM, Init(0.5, 0.5)), SwiGLUExperts)


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ConfigError, match=r"activation: .*'gelu'.*\(got 'tanh'\)"):
        config("tanh")
