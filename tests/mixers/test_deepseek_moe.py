"""Fine-grained and shared experts against the layers they are cut from."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightbulb.config import ConfigError, build_config
from lightbulb.mixers.base import Context
from lightbulb.mixers.channel.deepseek_moe import DeepSeekMoEConfig
from lightbulb.mixers.channel.mlp import MLPConfig
from lightbulb.mixers.channel.switch import Switch, SwitchConfig
from lightbulb.nn.parameter import Init, initialise

DIM, HIDDEN, LENGTH, BATCH = 6, 8, 7, 2
V1 = {"top_k": 2}
EXPERT = {"type": "mlp", "hidden_dim": HIDDEN}
V3 = {"top_k": 2, "score": "sigmoid", "normalize_gates": True, "gate_scale": 2.5, "bias_rate": 0.01}


def mixture(router: dict[str, Any] | None = None, **changes: Any) -> Switch:
    values = {"num_experts": 4, "hidden_dim": HIDDEN, "num_shared": 0, "router": V1 if router is None else router}
    module = build_config(DeepSeekMoEConfig, values | changes).build(DIM, Init(0.5, 0.5))
    initialise(module, 0)
    return module.double()


def draw() -> Tensor:
    return torch.randn(LENGTH, BATCH, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def run(module: nn.Module, x: Tensor) -> Tensor:
    return module(x, Context(torch.arange(len(x))))[0]


def ffn(gate: Tensor, up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    return (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()


def routed(module: Switch, expert: int, x: Tensor) -> Tensor:
    return ffn(*module.experts.gate_up.weight[expert], module.experts.down.weight[expert], x)


@pytest.mark.parametrize("num_shared", [0, 1, 3])
@pytest.mark.parametrize("router", [V1, V3], ids=["v1", "v3"])
def test_equality_values_and_gradients_are_the_formula(router: dict[str, Any], num_shared: int) -> None:
    module, x = mixture(router | {"balance_loss": 0.0, "z_loss": 0.0}, num_shared=num_shared), draw().requires_grad_()

    def naive(x: Tensor) -> Tensor:
        logits = x @ module.router.weight.t()
        gates, experts = (logits.softmax(-1) if router is V1 else logits.sigmoid()).topk(2)
        if router is V3:
            gates = 2.5 * gates / gates.sum(-1, keepdim=True)
        weights = torch.zeros_like(logits).scatter(-1, experts, gates)
        mixed = sum(weights[..., e, None] * routed(module, e, x) for e in range(4))
        for s in range(num_shared):  # each of them for itself
            part = slice(s * HIDDEN, (s + 1) * HIDDEN)
            shared = module.shared[0]
            mixed = mixed + ffn(shared.gate.weight[part], shared.up.weight[part], shared.down.weight[:, part], x)
        return mixed

    assert torch.allclose(run(module, x), naive(x), atol=1e-12)
    parameters = [x, *module.parameters()]
    found, wanted = (torch.autograd.grad((f(x) ** 2).sum(), parameters) for f in (lambda x: run(module, x), naive))
    for ours, theirs in zip(found, wanted, strict=True):
        assert theirs.any() and torch.allclose(ours, theirs, atol=1e-10)


def test_equality_without_shared_experts_it_is_a_switch() -> None:
    module = mixture()
    values = {"num_experts": 4, "hidden_dim": HIDDEN, "router": {"top_k": 2, "normalize_gates": False}}
    plain = SwitchConfig.model_validate(values).build(DIM, Init(0.5, 0.5)).double()
    plain.load_state_dict(module.state_dict())
    assert torch.equal(run(module, draw()), run(plain, draw()))


@pytest.mark.parametrize("num_shared", [1, 2])
def test_equality_a_shared_expert_is_a_routed_one_with_gate_one(num_shared: int) -> None:
    """Sigmoids of large logits are 1: experts that all tokens choose, with gates that say nothing."""
    shared = mixture({"top_k": 4}, num_shared=num_shared)
    always = mixture({"top_k": num_shared, "score": "sigmoid", "normalize_gates": False}, num_experts=num_shared)
    rest = mixture({"top_k": 4})
    rest.load_state_dict({name: value for name, value in shared.state_dict().items() if "shared" not in name})
    x = draw()
    x[..., 0] = 1.0
    with torch.no_grad():
        always.router.weight.zero_()[:, 0] = 100.0
        for name in ("gate", "up"):
            parts = getattr(shared.shared[0], name).weight.view(num_shared, HIDDEN, DIM)
            always.experts.gate_up.weight[:, ("gate", "up").index(name)] = parts
        always.experts.down.weight.copy_(shared.shared[0].down.weight.view(DIM, num_shared, HIDDEN).transpose(0, 1))
    assert torch.allclose(run(shared, x), run(always, x) + run(rest, x), atol=1e-12)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_equality_a_layer_cut_into_experts_that_all_run_is_the_layer(shards: int) -> None:
    whole = MLPConfig(hidden_dim=HIDDEN).build(DIM, Init(0.5, 0.5))
    initialise(whole, 0)
    whole = whole.double()
    router = {"top_k": shards, "score": "sigmoid", "normalize_gates": False, "balance_loss": 0.0, "z_loss": 0.0}
    cut = mixture(router, num_experts=shards, hidden_dim=HIDDEN // shards)
    x = draw()
    x[..., 0] = 1.0
    with torch.no_grad():
        cut.router.weight.zero_()[:, 0] = 100.0
        for index, name in enumerate(("gate", "up")):
            cut.experts.gate_up.weight.view(shards, 2, -1, DIM)[:, index] = getattr(whole, name).weight.view(
                shards, -1, DIM
            )
        cut.experts.down.weight.copy_(whole.down.weight.view(DIM, shards, -1).transpose(0, 1))
    assert torch.allclose(run(cut, x), run(whole, x), atol=1e-12)


def test_equality_shared_experts_of_another_kind_are_added_up() -> None:
    module = mixture(num_shared=2, hidden_dim=None, expert=EXPERT)
    alone = mixture(hidden_dim=None, expert=EXPERT)
    alone.load_state_dict({name: value for name, value in module.state_dict().items() if "shared" not in name})
    x = draw()
    assert len(module.shared) == 2
    assert torch.allclose(run(module, x), run(alone, x) + sum(run(part, x) for part in module.shared), atol=1e-12)


def test_equality_names_of_experts_do_not_matter() -> None:
    module, renamed = mixture(V3, num_shared=1), mixture(V3, num_shared=1)
    order = torch.tensor([2, 0, 3, 1])
    module.router.bias.copy_(torch.tensor([0.3, -0.2, 0.0, 0.1]))
    with torch.no_grad():
        for tensor, other in zip(
            (renamed.router.weight, renamed.router.bias, *renamed.experts.parameters()),
            (module.router.weight, module.router.bias, *module.experts.parameters()),
            strict=True,
        ):
            tensor.copy_(other[order])
    assert torch.allclose(run(renamed, draw()), run(module, draw()), atol=1e-12)


def test_balancing_by_bias_evens_loads_while_the_router_trains() -> None:
    """A toy regression that a few experts would take for themselves, once with a bias and once with nothing."""
    peaks = {}
    for bias_rate in (0.0, 0.02):
        router = V3 | {"bias_rate": bias_rate, "balance_loss": 0.0, "z_loss": 0.0}
        module, generator = mixture(router, num_experts=8), torch.Generator().manual_seed(0)
        with torch.no_grad():
            module.router.weight[:2] += 0.5  # a head start
        optimizer, loads = torch.optim.Adam(module.parameters(), 3e-3), []
        for _ in range(200):
            x = torch.randn(16, 4, DIM, dtype=torch.float64, generator=generator) + 0.5
            loss = (run(module, x) - x.roll(1, -1).tanh()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            module.router.set_load(module.router.statistics.take(x.device)[:8])
            loads.append(module.router.load.clone())
        assert loss.isfinite()
        peaks[bias_rate] = 8 * float(torch.stack(loads[-50:]).mean(0).max())
    assert peaks[0.0] > 1.5 and peaks[0.02] < 1.15


@pytest.mark.parametrize("changes", [{}, {"num_shared": 2}, {"hidden_dim": None, "expert": EXPERT}], ids=str)
def test_cost_counts_the_parameters(changes: dict[str, Any]) -> None:
    module = mixture(**changes)
    cost, each = module.config.cost(DIM), module.config.each().cost(DIM).params
    assert cost.params == sum(p.numel() for p in module.parameters())
    assert cost.active_params == cost.params - 2 * each  # two of four
    assert cost.forward_flops == 2.0 * cost.active_params


def test_defaults_are_those_of_the_first_paper() -> None:
    config = build_config(DeepSeekMoEConfig, {"num_experts": 64, "hidden_dim": 8, "router": {"balance_loss": 0.001}})
    assert (config.router.top_k, config.router.normalize_gates, config.router.score) == (6, False, "softmax")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"router": {"top_k": 5}}, "router.top_k 5 exceeds num_experts 4"),
        ({"hidden_dim": None}, "set either hidden_dim"),
        ({"drop": "probability"}, "has no effect without a capacity_factor"),
        (
            {"expert": EXPERT, "hidden_dim": None, "expert_dropout": 0.1},
            "needs SwiGLU experts",
        ),
        (
            {
                "expert": {"type": "deepseek_moe", "num_experts": 2, "hidden_dim": 4, "router": {"top_k": 1}},
                "hidden_dim": None,
            },
            "experts of its own",
        ),
    ],
    ids=str,
)
def test_configs_that_cannot_work_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        mixture(**changes)


def test_splits_that_cannot_work_are_refused() -> None:
    config = mixture(num_shared=2, hidden_dim=3).config
    config.check_tensor_parallel(2)
    with pytest.raises(ValueError, match="num_shared 2 makes an expert whose hidden_dim 6 cannot be split"):
        config.check_tensor_parallel(4)
    with pytest.raises(ValueError, match="num_experts 4 cannot be split over parallel.expert 3"):
        config.check_expert_parallel(3, 1)
