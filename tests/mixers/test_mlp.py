"""The feed-forward layer's activations and biases, alone and as experts."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu

from lightbulb.config import ConfigError, build_config
from lightbulb.mixers.base import Context
from lightbulb.mixers.channel.mlp import MLPConfig, SwiGLUExperts
from lightbulb.nn.bank import ExpertBank
from lightbulb.nn.parameter import Init, initialise

DIM, HIDDEN = 6, 10
ACTIVATIONS = ("swiglu", "gelu", "gelu_tanh", "squared_relu")
each = pytest.mark.parametrize("activation", ACTIVATIONS)
with_or_without_bias = pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])


def config(activation: str, bias: bool = False) -> MLPConfig:
    return build_config(MLPConfig, {"hidden_dim": HIDDEN, "activation": activation, "bias": bias})


def filled(module: nn.Module) -> nn.Module:
    """In float64, the biases too with values."""
    initialise(module, 0)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in module.named_parameters():
        if name.endswith(".bias"):
            assert not parameter.any()
            nn.init.normal_(parameter, generator=generator)
    return module.double()


def mlp(activation: str, bias: bool = False) -> nn.Module:
    return filled(config(activation, bias).build(DIM, Init(0.5, 0.5)))


def naive(x: Tensor, activation: str, own: dict[str, Tensor]) -> Tensor:
    def product(x: Tensor, name: str) -> Tensor:
        return x @ own[f"{name}.weight"].t() + own.get(f"{name}.bias", 0.0)

    up = product(x, "up")
    hidden: Any = {
        "swiglu": lambda: silu(product(x, "gate")) * up,
        "gelu": lambda: gelu(up),
        "gelu_tanh": lambda: 0.5 * up * (1 + torch.tanh((2 / math.pi) ** 0.5 * (up + 0.044715 * up**3))),
        "squared_relu": lambda: relu(up) ** 2,
    }
    return product(hidden[activation](), "down")


def draw() -> Tensor:
    x = torch.randn(7, 2, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.requires_grad_()


def agree(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    assert torch.allclose(ours, theirs, atol=1e-12)
    grad = torch.randn_like(theirs)
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True):
        assert b.any() and torch.allclose(a, b, atol=1e-10)


@with_or_without_bias
@each
def test_equality_values_and_gradients_are_the_formula(activation: str, bias: bool) -> None:
    module, x = mlp(activation, bias), draw()
    found = module(x, Context(torch.arange(len(x))))[0]
    agree(found, naive(x, activation, dict(module.named_parameters())), [x, *module.parameters()])


@with_or_without_bias
@each
def test_equality_cost_is_what_is_built(activation: str, bias: bool) -> None:
    cost, parameters = config(activation, bias).cost(DIM), list(mlp(activation, bias).parameters())
    assert cost.params == sum(p.numel() for p in parameters)
    assert cost.forward_flops == 2 * sum(p.numel() for p in parameters if p.dim() == 2)


@pytest.mark.parametrize(
    ("activation", "bias"), [("gelu", False), ("squared_relu", False), ("gelu_tanh", True), ("swiglu", True)]
)
def test_equality_experts_are_the_layer_once_each(activation: str, bias: bool) -> None:
    experts = filled(config(activation, bias).build_experts(3, DIM, Init(0.5, 0.5)))
    assert isinstance(experts, ExpertBank)
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
