"""The mixture of experts against a dense layer, and against itself with experts renamed, dropped or rounded."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightbulb.mixers.base import Context
from lightbulb.mixers.channel.mlp import MLP, MLPConfig
from lightbulb.mixers.channel.switch import Switch, SwitchConfig
from lightbulb.nn.noise import Noise
from lightbulb.nn.parameter import Init, initialise

DIM, HIDDEN, LENGTH, BATCH = 6, 10, 7, 2


def switch(num_experts: int = 4, router: dict[str, Any] | None = None, **changes: Any) -> Switch:
    values = {"num_experts": num_experts, "hidden_dim": HIDDEN, "router": router or {}} | changes
    module = SwitchConfig.model_validate(values).build(DIM, Init(0.5, 0.5))
    initialise(module, 0)
    return module


def dense(experts: Switch, expert: int = 0) -> MLP:
    """The dense layer that one expert is."""
    module = MLPConfig(hidden_dim=HIDDEN).build(DIM, Init(0.5, 0.5))
    with torch.no_grad():
        module.gate.weight.copy_(experts.experts.gate_up.weight[expert, 0])
        module.up.weight.copy_(experts.experts.gate_up.weight[expert, 1])
        module.down.weight.copy_(experts.experts.down.weight[expert])
    return module


def draw(length: int = LENGTH, batch: int = BATCH) -> Tensor:
    return torch.randn(length, batch, DIM, generator=torch.Generator().manual_seed(1))


def run(module: Switch | MLP, x: Tensor) -> Tensor:
    return module(x, Context(torch.arange(len(x))))[0]


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> bool:
    return bool((found - wanted).norm() <= tolerance * wanted.norm())


def test_values_and_gradients_are_those_of_a_loop_over_tokens() -> None:
    module = switch(router={"balance_loss": 0.0, "z_loss": 0.0})
    x = draw().requires_grad_()

    def naive(x: Tensor) -> Tensor:
        gates, experts = (x @ module.router.weight.t()).topk(2)
        outputs = torch.stack([run(dense_view(module, e), x) for e in range(4)], -2)  # [length, batch, expert, dim]
        chosen = outputs.gather(2, experts[..., None].expand(*experts.shape, DIM))
        return (gates.softmax(-1)[..., None] * chosen).sum(2)

    assert close(run(module, x), naive(x))
    parameters = [x, *module.parameters()]
    for ours, theirs in zip(
        *(torch.autograd.grad((f(x) ** 2).sum(), parameters) for f in (lambda x: run(module, x), naive)), strict=True
    ):
        assert close(ours, theirs, 2e-6)


def dense_view(module: Switch, expert: int) -> Any:
    """One expert as a function of the module's own parameters, so that gradients reach them."""
    gate, up = module.experts.gate_up.weight[expert].unbind(0)
    down = module.experts.down.weight[expert]
    return lambda x, _: ((torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t(), None)


def test_one_expert_is_the_dense_layer() -> None:
    module, x = switch(1, {"top_k": 1, "normalize_gates": False}), draw()
    assert close(run(module, x), run(dense(module), x))


@pytest.mark.parametrize("top_k", [2, 3, 4])
def test_identical_experts_whose_gates_sum_to_one_are_the_dense_layer(top_k: int) -> None:
    module, x = switch(router={"top_k": top_k}), draw()
    with torch.no_grad():
        for weight in module.experts.parameters():
            weight.copy_(weight[:1].expand_as(weight))
    assert close(run(module, x), run(dense(module), x))


def test_one_token() -> None:
    module, x = switch(), draw(1, 1)
    assert run(module, x).shape == (1, 1, DIM)
    assert close(run(module, draw(1, 3))[:, :1], run(module, draw(1, 3)[:, :1]))


def test_a_large_capacity_drops_nothing() -> None:
    dropless, roomy, x = switch(), switch(capacity_factor=4.0), draw()
    assert torch.equal(run(roomy, x), run(dropless, x))


def one_expert_for_all(**changes: Any) -> Switch:
    """Every token with a positive first feature prefers expert 0, then 1."""
    module = switch(**changes)
    with torch.no_grad():
        module.router.weight.zero_()
        module.router.weight[:, 0] = torch.tensor([3.0, 2.0, 1.0, 0.0])
    return module


def test_a_small_capacity_drops_later_tokens_first() -> None:
    x = draw().abs()
    module = one_expert_for_all(capacity_factor=1.0)  # 14 tokens, two choices, four experts: 7 rows each
    flat = run(module, x).flatten(0, 1)
    whole = run(one_expert_for_all(), x).flatten(0, 1)
    assert close(flat[:7], whole[:7])
    assert not flat[7:].any()


def test_capacity_does_not_let_the_future_in() -> None:
    module, x = switch(capacity_factor=0.5), draw(12)
    before = run(module, x)
    for changed_from in range(1, 12):
        changed = x.clone()
        changed[changed_from:] = -changed[changed_from:]
        assert torch.equal(run(module, changed)[:changed_from], before[:changed_from])


@pytest.mark.parametrize("expert", [0, 1])
def test_by_probability_small_gates_are_dropped_first(expert: int) -> None:
    module, x = one_expert_for_all(capacity_factor=1.0, drop="probability"), draw().abs()  # 7 rows each for 14 tokens
    with torch.no_grad():
        module.experts.down.weight[1 - expert].zero_()  # so that the result is what this expert gives
    gates = (x.flatten(0, 1) @ module.router.weight.t())[:, :2].softmax(-1)[:, expert]
    kept = run(module, x).flatten(0, 1).any(-1)
    assert kept.sum() == 7 and gates[kept].min() > gates[~kept].max()


@pytest.mark.parametrize("who", ["later tokens", "another sample"])
def test_by_probability_others_decide_who_is_dropped(who: str) -> None:
    """What `drop` warns of: by position training is strictly causal; by probability later tokens and other samples of
    the micro-batch push a token out. Evaluation drops nothing either way."""
    x = draw(12).abs()
    louder = x.clone()
    louder[(slice(6, None), 0) if who == "later tokens" else (slice(6, None), 1)] *= 10.0
    for drop, is_causal in (("position", True), ("probability", False)):
        module = one_expert_for_all(capacity_factor=0.5, drop=drop)
        assert torch.equal(run(module, x)[:6, 0], run(module, louder)[:6, 0]) == is_causal
        module.eval()
        assert close(run(module, x)[:6, 0], run(module, louder)[:6, 0])


def test_capacity_is_for_training_only() -> None:
    module, x = one_expert_for_all(capacity_factor=0.5), draw().abs()
    whole = run(one_expert_for_all(), x)
    assert not torch.equal(run(module, x), whole)
    with torch.no_grad():
        assert torch.equal(run(module, x), whole)
    assert torch.equal(run(module.eval(), x), whole)


def test_names_of_experts_do_not_matter() -> None:
    module, renamed, x = switch(), switch(), draw()
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for parameter in (renamed.router.weight, *renamed.experts.parameters()):
            parameter.copy_(parameter[order])
    assert close(run(renamed, x), run(module, x))


def auxiliary(module: Switch, x: Tensor) -> Tensor:
    """What routing/balance.py states, from the module's parameters."""
    config, experts = module.router.config, module.config.num_experts
    logits = x.flatten(0, 1) @ module.router.weight.t()
    balance = config.balance_loss * experts * (logits.softmax(-1) * module.router.load).sum()
    return balance + config.z_loss * logits.logsumexp(-1).square().sum()


@pytest.mark.parametrize("normalize_gates", [False, True])
def test_the_balance_and_z_losses_have_the_stated_gradient(normalize_gates: bool) -> None:
    module, x = switch(router={"normalize_gates": normalize_gates, "balance_loss": 0.3, "z_loss": 0.2}), draw()
    x.requires_grad_()
    module.router.set_load(torch.tensor([5.0, 1.0, 1.0, 3.0]))
    found = torch.autograd.grad((run(module, x) * 0.0).sum(), (x, module.router.weight))
    wanted = torch.autograd.grad(auxiliary(module, x), (x, module.router.weight))
    for ours, theirs in zip(found, wanted, strict=True):
        assert theirs.any() and close(ours, theirs, 2e-6)


def test_an_even_load_has_no_balance_gradient() -> None:
    module, x = switch(router={"z_loss": 0.0}), draw()
    (grad,) = torch.autograd.grad((run(module, x) * 0.0).sum(), module.router.weight)
    assert grad.abs().max() < 1e-8


def test_evaluation_has_no_auxiliary_losses_and_counts_nothing() -> None:
    module, x = switch().eval(), draw()
    (grad,) = torch.autograd.grad((run(module, x) * 0.0).sum(), module.router.weight)
    assert not grad.any()
    assert module.router.statistics.sums is None


@pytest.mark.parametrize("router", [{"top_k": 2}, {"top_k": 1, "normalize_gates": False}], ids=str)
def test_the_router_learns_from_the_output(router: dict[str, Any]) -> None:
    module = switch(router=router | {"balance_loss": 0.0, "z_loss": 0.0})
    (run(module, draw()) ** 2).sum().backward()
    assert module.router.weight.grad is not None and module.router.weight.grad.norm() > 1e-3


def test_an_expert_nobody_chose_has_a_zero_gradient() -> None:
    module = one_expert_for_all()
    run(module, draw().abs()).sum().backward()
    for parameter in module.experts.parameters():
        assert parameter.grad is not None
        assert parameter.grad[:2].any() and not parameter.grad[2:].any()


def test_bfloat16_is_close_to_float32_when_both_route_alike() -> None:
    half, x = switch(), draw(40).bfloat16()
    for parameter in half.experts.parameters():
        parameter.data = parameter.data.bfloat16()
    single = switch()
    with torch.no_grad():
        for ours, theirs in zip(single.parameters(), half.parameters(), strict=True):
            ours.copy_(theirs)
    found, wanted = run(half, x), run(single, x.float())
    assert found.dtype == torch.bfloat16 and half.router.weight.dtype == torch.float32
    assert close(found, wanted, 0.01)
    (found.float() ** 2).sum().backward()
    (wanted**2).sum().backward()
    for ours, theirs in zip(half.parameters(), single.parameters(), strict=True):
        assert close(ours.grad.float(), theirs.grad, 0.02)


def test_what_is_not_finite_does_not_hang_and_stays_in_its_token() -> None:
    module, x = switch().eval(), draw()
    broken = x.clone()
    broken[3, 0] = float("nan")
    clean, found = run(module, x).flatten(0, 1), run(module, broken).flatten(0, 1)
    others = torch.arange(LENGTH * BATCH) != 3 * BATCH
    assert close(found[others], clean[others]) and found[~others].isnan().all()


def run_noisy(module: Switch, x: Tensor, samples: list[int], rows: slice | Tensor = slice(None)) -> Tensor:
    noise = Noise(3, torch.tensor(samples), LENGTH)
    return module(x, Context(torch.arange(LENGTH), rows=rows, noise=noise, place="1.channel"))[0]


def test_expert_dropout_is_of_single_hidden_features() -> None:
    """With an expert that writes each hidden feature to one feature of its result, what was dropped can be seen."""
    router = {"top_k": 1, "normalize_gates": False}
    module, x = switch(1, router, hidden_dim=DIM, expert_dropout=0.5), draw()
    with torch.no_grad():
        module.experts.down.weight.copy_(torch.eye(DIM)[None])
    factors = run_noisy(module, x, [5, 9]) / run(module, x)
    kept = factors > 1
    assert torch.allclose(factors, 2.0 * kept, atol=1e-5)
    assert 0.3 < kept.float().mean() < 0.7 and not torch.equal(kept[:, 0], kept[:, 1])


def test_expert_dropout_keeps_the_mean_and_rests_outside_training() -> None:
    module, x = switch(expert_dropout=0.4), draw()
    draws = torch.stack([run_noisy(module, x, [2 * i, 2 * i + 1]) for i in range(600)])
    clean = run(switch(), x)
    error = (draws.mean(0) - clean).norm()
    assert error < 2 * (draws.var(0).sum() / len(draws)).sqrt() and error < 0.1 * (draws[0] - clean).norm()
    assert torch.equal(run(module, x), clean)


def test_equality_expert_dropout_follows_tokens() -> None:
    """The same for a sample alone, in part of the positions, and when experts are renamed."""
    module, renamed, x = switch(expert_dropout=0.4), switch(expert_dropout=0.4), draw()
    whole = run_noisy(module, x, [5, 9])
    assert close(run_noisy(module, x[:, 1:], [9]), whole[:, 1:])
    assert close(run_noisy(module, x[2:5], [5, 9], slice(2, 5)), whole[2:5])
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for parameter in (renamed.router.weight, *renamed.experts.parameters()):
            parameter.copy_(parameter[order])
    assert close(run_noisy(renamed, x, [5, 9]), whole)


def test_equality_expert_dropout_follows_tokens_chosen_per_sample() -> None:
    """As behind a mixture of depths, where the rows of each sample are other positions."""
    module, x = switch(expert_dropout=0.4), draw()
    whole, rows = run_noisy(module, x, [5, 9]), torch.tensor([[0, 1], [2, 3], [5, 6]])
    taken = rows[..., None].expand(-1, -1, DIM)
    assert close(run_noisy(module, x.gather(0, taken), [5, 9], rows), whole.gather(0, taken))
