"""Gates, choices and auxiliary losses of the router against their formulas, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightbulb.config import ConfigError, build_config
from lightbulb.nn.parameter import Init, initialise
from lightbulb.routing.balance import summarise
from lightbulb.routing.router import Router, RouterConfig, Routing, greatest

DIM, EXPERTS, TOKENS = 5, 6, 40
PLAIN = {"balance_loss": 0.0, "z_loss": 0.0}
FORMS = [
    {"score": score, "top_k": top_k} | gates
    for score in ("softmax", "sigmoid")
    for top_k in (1, 3)
    for gates in ({"normalize_gates": False}, {"normalizer_gradient": False}, {"gate_scale": 2.5})
    if top_k > 1 or "gate_scale" not in gates
]


def router(**changes: Any) -> Router:
    module = Router(build_config(RouterConfig, PLAIN | changes), EXPERTS, DIM, Init(0.7, 0.7))
    initialise(module, 0)
    return module.double()


def draw(tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def scores_of(module: Router, x: Tensor) -> Tensor:
    logits = x @ module.weight.t()
    return logits.softmax(-1) if module.config.score == "softmax" else 1 / (1 + (-logits).exp())


def naive(module: Router, x: Tensor) -> Routing:
    config, scores = module.config, scores_of(module, x)
    biased = scores.detach() + (module.bias if config.bias_rate else 0.0)
    experts = biased.argsort(dim=-1, descending=True)[:, : config.top_k]
    gates = scores.gather(-1, experts)
    if config.normalize_gates:
        total = gates.sum(-1, keepdim=True)
        gates = gates / (total if config.normalizer_gradient else total.detach())
    return Routing(config.gate_scale * gates, experts)


@pytest.mark.parametrize("bias_rate", [0.0, 0.1])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_equality_gates_and_their_gradients_are_the_formula(form: dict[str, Any], bias_rate: float) -> None:
    module, x = router(**form, bias_rate=bias_rate), draw().requires_grad_()
    if bias_rate:
        module.bias.copy_(torch.linspace(-0.3, 0.3, EXPERTS))
    found, wanted = module(x), naive(module, x)
    assert torch.equal(found.experts, wanted.experts)
    assert torch.allclose(found.gates, wanted.gates, atol=1e-12)
    if form.get("normalize_gates", True):
        assert torch.allclose(found.gates.sum(-1), torch.full((TOKENS,), form.get("gate_scale", 1.0)).double())
    pull = torch.randn_like(wanted.gates)
    for ours, theirs in zip(
        torch.autograd.grad(found.gates, (x, module.weight), pull),
        torch.autograd.grad(wanted.gates, (x, module.weight), pull),
        strict=True,
    ):
        assert theirs.any() and torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_equality_auxiliary_losses_have_the_stated_gradient(score: str) -> None:
    module, x = router(score=score, balance_loss=0.3, z_loss=0.2), draw().requires_grad_()
    module.set_load(torch.tensor([5.0, 1.0, 1.0, 3.0, 0.0, 2.0]))
    scores = scores_of(module, x)
    probabilities = scores / scores.sum(-1, keepdim=True)
    log_z = (x @ module.weight.t()).logsumexp(-1)
    loss = 0.3 * EXPERTS * (probabilities @ module.load).sum() + 0.2 * log_z.square().sum()
    wanted = torch.autograd.grad(loss, (x, module.weight))
    found = torch.autograd.grad((module(x).gates * 0.0).sum(), (x, module.weight))
    for ours, theirs in zip(found, wanted, strict=True):
        assert theirs.any() and torch.allclose(ours, theirs, atol=1e-11)
    statistics = summarise(module.statistics.take(torch.device("cpu")), EXPERTS)
    share = torch.bincount(naive(module, x).experts.flatten(), minlength=EXPERTS) / (2 * TOKENS)
    assert statistics["load"] == pytest.approx(share.tolist())
    assert statistics["balance_loss"] == pytest.approx(EXPERTS * float(share.double() @ probabilities.detach().mean(0)))
    assert statistics["entropy"] == pytest.approx(float(-(probabilities * probabilities.log()).sum() / TOKENS))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_extreme_logits_give_finite_gates_and_gradients(score: str) -> None:
    module = Router(build_config(RouterConfig, {"score": score}), EXPERTS, DIM, Init(0.7, 0.7))
    with torch.no_grad():
        module.weight.zero_()[:, 0] = torch.tensor([200.0, 199.0, 198.0, -200.0, -201.0, -202.0])
    x = torch.zeros(2, DIM)
    x[:, 0] = torch.tensor([1.0, -1.0])
    gates, experts = module(x)
    assert experts.tolist() == [[0, 1], [5, 4]]  # also where the scores are equal after rounding
    assert torch.allclose(gates.sum(-1), torch.ones(2))
    gates[:, 0].sum().backward()
    assert module.weight.grad.isfinite().all()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_bias_moves_loads_toward_even_and_carries_no_gradient(score: str) -> None:
    """A router whose scores prefer some experts by far; nothing but the bias changes."""
    module, generator = router(score=score, bias_rate=0.003), torch.Generator().manual_seed(0)
    with torch.no_grad():
        module.weight[:, 0] += torch.linspace(-2.0, 2.0, EXPERTS)
    loads = []
    for _ in range(400):
        x = torch.randn(256, DIM, dtype=torch.float64, generator=generator)
        x[:, 0] = 1.0
        module.set_load(torch.bincount(module(x).experts.flatten(), minlength=EXPERTS).double())
        loads.append(EXPERTS * module.load)
    assert loads[0].max() > 2 and loads[0].min() < 0.1
    assert (torch.stack(loads[-50:]).mean(0) - 1).abs().max() < 0.15
    assert [name for name, _ in module.named_parameters()] == ["weight"] and not module.bias.requires_grad


def test_the_bias_moves_by_the_rate_whatever_was_counted_twice() -> None:
    once, twice = router(bias_rate=0.01), router(bias_rate=0.01)
    selections = torch.tensor([5.0, 1.0, 3.0, 3.0, 0.0, 6.0], dtype=torch.float64)  # 3 on average
    once.set_load(selections)
    twice.set_load(2 * selections)
    wanted = torch.tensor([-0.01, 0.01, 0.0, 0.0, 0.01, -0.01], dtype=torch.float64)
    assert torch.equal(once.bias, wanted) and torch.equal(twice.bias, wanted)


def test_the_bias_is_state_only_where_it_is_used() -> None:
    assert {name for name, _ in router().named_buffers()} == {"load"}
    assert {name for name, _ in router(bias_rate=0.1).named_buffers()} == {"load", "bias"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 1}, "set normalize_gates: false"),
        ({"top_k": 1, "score": "sigmoid"}, "the router no gradient"),
        ({"normalize_gates": False, "normalizer_gradient": False}, "normalizer_gradient false has no effect"),
        ({"score": "tanh"}, "score"),
        ({"gate_scale": 0.0}, "gate_scale"),
        ({"bias_rate": -1.0}, "bias_rate"),
    ],
    ids=str,
)
def test_configs_that_cannot_work_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        router(**changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_equal_scores_the_lower_expert_is_taken(dtype: torch.dtype) -> None:
    scores = torch.randn(500, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(greatest(scores, 3), scores.topk(3).indices)
    inf = float("inf")
    ties = torch.tensor([[0.0, -0.0, 0.0], [-1.0, -1.0, -2.0], [1.0, inf, inf], [-inf, -inf, -inf]], dtype=dtype)
    assert greatest(ties, 2).tolist() == [[0, 1], [0, 1], [1, 2], [0, 1]]
    rounded = (scores * 2).round()  # of few values
    chosen = greatest(rounded, 3)
    expected = sorted(range(7), key=lambda e: (-rounded[0, e], e))[:3]
    assert chosen[0].tolist() == expected


def test_parts_that_share_a_row_are_chosen_together_where_rows_are_equal() -> None:
    """A virtual group's copies: of two equal rows one copy's parts are taken, not one part of each."""
    row = torch.randn(1, 8, generator=torch.Generator().manual_seed(1))
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(2)) @ row.repeat(6, 1).t()
    assert greatest(logits, 2).tolist() == [[0, 1]] * 64
