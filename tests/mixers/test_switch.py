"""Top-k mixture of experts: limit cases that must equal a dense layer, dropping, balance, gradients."""

import pytest
import torch

from lightbulb.config import ConfigError, build_config
from lightbulb.mixers.base import Context
from lightbulb.mixers.channel.mlp import MLPConfig
from lightbulb.mixers.channel.switch import SwitchConfig
from lightbulb.nn.parameter import Init, initialise

DIM, HIDDEN, LENGTH, BATCH = 12, 20, 7, 3


def build(seed=0, **values):
    router = {"top_k": 2} | values.pop("router", {})
    config = build_config(SwitchConfig, {"num_experts": 4, "hidden_dim": HIDDEN, "router": router} | values)
    module = config.build(DIM, Init(0.3, 0.3))
    initialise(module, seed)
    return module.double()


def inputs(seed=1):
    return torch.randn(LENGTH, BATCH, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def context():
    return Context(torch.arange(LENGTH))


def dense_like(switch, expert=0):
    """A dense layer with one expert's weights."""
    mlp = MLPConfig(hidden_dim=HIDDEN).build(DIM, Init(0.3, 0.3)).double()
    with torch.no_grad():
        mlp.gate.weight.copy_(switch.experts.gate_up[expert, 0])
        mlp.up.weight.copy_(switch.experts.gate_up[expert, 1])
        mlp.down.weight.copy_(switch.experts.down[expert])
    return mlp


def make_experts_identical(switch):
    with torch.no_grad():
        switch.experts.gate_up.copy_(switch.experts.gate_up[:1].expand_as(switch.experts.gate_up))
        switch.experts.down.copy_(switch.experts.down[:1].expand_as(switch.experts.down))


def test_one_expert_is_a_dense_layer():
    switch = build(num_experts=1, router={"top_k": 1, "normalize_gates": False})
    x = inputs()
    torch.testing.assert_close(switch(x, context()), dense_like(switch)(x, context()))


def test_identical_experts_with_normalised_gates_are_a_dense_layer():
    switch = build(router={"top_k": 3})
    make_experts_identical(switch)
    x = inputs()
    torch.testing.assert_close(switch(x, context()), dense_like(switch)(x, context()))


def test_every_token_gets_its_experts_weighted_by_its_gates():
    switch, x = build(router={"normalize_gates": False}), inputs()
    tokens = x.reshape(-1, DIM)
    gates, experts = (tokens @ switch.router.weight.t()).softmax(-1).topk(2)
    denses = [dense_like(switch, expert) for expert in range(4)]
    expected = torch.stack(
        [sum(gates[t, k] * denses[experts[t, k]](tokens[t], context()) for k in range(2)) for t in range(len(tokens))]
    )
    torch.testing.assert_close(switch(x, context()).reshape(-1, DIM), expected)


def test_gradients_match_a_loop_over_tokens():
    switch, x = build(router={"balance_loss": 0, "z_loss": 0}), inputs().requires_grad_()
    probe = torch.randn(LENGTH, BATCH, DIM, dtype=torch.float64)
    (switch(x, context()) * probe).sum().backward()
    found = {name: p.grad.clone() for name, p in switch.named_parameters()} | {"x": x.grad.clone()}
    switch.zero_grad()
    x.grad = None
    tokens = x.reshape(-1, DIM)
    scores, experts = (tokens @ switch.router.weight.t()).topk(2)
    gates = scores.softmax(-1)
    total = 0.0
    for t in range(len(tokens)):
        for k in range(2):
            gate, up = switch.experts.gate_up[experts[t, k]]
            hidden = torch.nn.functional.silu(gate @ tokens[t]) * (up @ tokens[t])
            result = switch.experts.down[experts[t, k]] @ hidden
            total = total + gates[t, k] * (result * probe.reshape(-1, DIM)[t]).sum()
    total.backward()
    for name, p in [*switch.named_parameters(), ("x", x)]:
        torch.testing.assert_close(found[name], p.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_ample_capacity_drops_nothing():
    free, bounded = build(), build(capacity_factor=4.0)
    torch.testing.assert_close(free(inputs(), context()), bounded(inputs(), context()))


def test_capacity_drops_later_tokens_first_and_gives_them_nothing():
    switch = build(num_experts=2, capacity_factor=0.5, router={"top_k": 1, "normalize_gates": False})
    x = inputs()
    with torch.no_grad():
        switch.router.weight.zero_()  # a tie: every token goes to the same expert
    y = switch(x, context()).reshape(-1, DIM)
    accepted = -(-len(y) // 4)
    assert (y[:accepted].abs().sum(-1) > 0).all()
    assert (y[accepted:] == 0).all()


@pytest.mark.parametrize("factor", [None, 0.5])
def test_the_past_does_not_depend_on_the_future(factor):
    switch, x = build(capacity_factor=factor), inputs()
    changed = x.clone()
    changed[4:] += 1.0
    torch.testing.assert_close(switch(x, context())[:4], switch(changed, context())[:4], rtol=0, atol=0)


def test_permuting_the_experts_changes_nothing_but_their_names():
    switch, x = build(), inputs()
    y = switch(x, context())
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for parameter in (switch.router.weight, switch.experts.gate_up, switch.experts.down):
            parameter.copy_(parameter[order])
    torch.testing.assert_close(switch(x, context()), y)


def test_balance_and_z_loss_gradients_are_those_of_their_formulas():
    switch, x = build(router={"balance_loss": 0.3, "z_loss": 0.2}), inputs()
    with torch.no_grad():
        switch.router.load.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]))
        switch.experts.down.zero_()  # leaves nothing but the auxiliary losses
    switch(x, context()).sum().backward()
    found = switch.router.weight.grad.clone()
    switch.router.weight.grad = None
    logits = x.reshape(-1, DIM) @ switch.router.weight.t()
    balance = 4 * (logits.softmax(-1) * switch.router.load).sum()
    (0.3 * balance + 0.2 * logits.logsumexp(-1).square().sum()).backward()
    torch.testing.assert_close(found, switch.router.weight.grad)


def test_router_and_every_expert_receive_gradient_and_statistics_count_every_choice():
    switch, x = build(), inputs()
    switch(x, context()).square().sum().backward()
    sums = switch.router.statistics.take(torch.device("cpu"))
    assert sums[:4].sum() == 2 * LENGTH * BATCH
    assert sums[-1] == LENGTH * BATCH
    assert switch.router.weight.grad.abs().sum() > 0
    used = sums[:4] > 0
    assert (switch.experts.down.grad.abs().sum((1, 2)) > 0).equal(used)


def test_statistics_are_left_alone_in_evaluation():
    switch = build().eval()
    switch(inputs(), context())
    assert switch.router.statistics.sums is None


def test_bfloat16_is_close_to_float32():
    switch, x = build().float(), inputs().float()
    low = build().to(torch.bfloat16)
    low.router.weight.data = low.router.weight.data.float()
    with torch.no_grad():
        for a, b in zip(low.parameters(), switch.parameters(), strict=True):
            b.copy_(a.float())
        exact, rounded = switch(x.bfloat16().float(), context()), low(x.bfloat16(), context()).float()
    assert (exact - rounded).norm() / exact.norm() < 0.02  # bfloat16 keeps 8 bits: 0.4 % per rounding, a few in a row


def test_a_router_without_gradient_is_refused():
    with pytest.raises(ConfigError, match="normalize_gates: false"):
        build_config(SwitchConfig, {"num_experts": 4, "hidden_dim": 8, "router": {"top_k": 1}})
    with pytest.raises(ConfigError, match="top_k 5 exceeds num_experts 4"):
        build_config(SwitchConfig, {"num_experts": 4, "hidden_dim": 8, "router": {"top_k": 5}})
