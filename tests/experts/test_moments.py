"""Moments go where the weights go."""

import pytest
import torch
from dense_runs import MODEL, make_run, make_warm_run, model_of, tensor, tensors, write_run

from lightbulb.config import ConfigError, build_config
from lightbulb.experts.pieces import dropped_units
from lightbulb.experts.upcycle import upcycle
from lightbulb.experts.upcycle_config import UpcycleConfig
from lightbulb.parallel.optimizer import MOMENTS
from lightbulb.train.checkpoint import Checkpoint
from lightbulb.train.manifest import step_folder


def mixed(out, sources, **settings):
    values = {"run": str(out), "method": "btx", "sources": [{"path": str(path)} for path in sources], "moments": "keep"}
    upcycle(build_config(UpcycleConfig, values | settings))
    return out


def gradients(run, tokens):
    """Of the summed loss of a run's model, by name."""
    model = model_of(run).train().requires_grad_(True)
    model(tokens, tokens.roll(-1, 1)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


BIASED = {"bias": True, "activation": "gelu_tanh", "type": "mlp", "hidden_dim": 24}
BIASES = {
    "norm": "layer",
    "block_pattern": [{"token": MODEL["block_pattern"][0]["token"] | {"bias": "all"}, "channel": BIASED}],
}


@pytest.mark.parametrize("changes", [{}, BIASES], ids=["plain", "biases"])
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "sparse", "num_experts": 1, "router": {"top_k": 1, "normalizer_gradient": False, "balance_loss": 0}},
        {"method": "virtual-group", "num_experts": 4, "shards": 4, "router": {"top_k": 4, "balance_loss": 0}},
    ],
    ids=["sparse", "virtual-group"],
)
def test_equality_with_the_gradients_of_the_mixture(tmp_path, dense, tokens, settings, changes):
    """With one copy, and routers that are nearly zero, the mixture is the dense model rearranged: moments that are the
    dense model's gradient become the mixture's."""
    cold = dense("cold", drift=0.1, **changes)
    found = gradients(cold, tokens)
    moments = {f"{name}:exp_avg": g for name, g in found.items()}
    moments |= {f"{name}:exp_avg_sq": g.square() for name, g in found.items()}
    warm = write_run(tmp_path / "warm", MODEL | changes, tensors(cold), moments, 7)
    out = mixed(tmp_path / "moe", [warm], router_start={"std": 1e-9}, **settings)
    for name, gradient in gradients(out, tokens).items():
        if ".router." in name:
            assert not tensor(out, f"{name}:exp_avg").any()
            continue
        torch.testing.assert_close(tensor(out, f"{name}:exp_avg"), gradient, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(tensor(out, f"{name}:exp_avg_sq"), gradient.square(), atol=1e-5, rtol=1e-3)
    assert Checkpoint(step_folder(out, 0)).state.optimizer_step == 7


def test_averages_and_experts_of_branches(tmp_path):
    sources = [make_warm_run(tmp_path / name, MODEL, seed, updates) for seed, (name, updates) in enumerate(
        [("a", 20), ("b", 15)]
    )]  # fmt: skip
    out = mixed(tmp_path / "moe", sources)
    for moment in MOMENTS:
        experts = tensor(out, f"blocks.1.channel.experts.down.weight:{moment}")
        for expert, source in zip(experts, sources, strict=True):
            assert torch.equal(expert, tensor(source, f"blocks.1.channel.down.weight:{moment}"))
        parts = [tensor(source, f"embedding.weight:{moment}").double() for source in sources]
        assert torch.equal(tensor(out, f"embedding.weight:{moment}"), (sum(parts) / 2).float())
    assert Checkpoint(step_folder(out, 0)).state.optimizer_step == 15


def test_new_units_begin_at_zero(tmp_path):
    source = make_warm_run(tmp_path / "dense", MODEL)
    out = mixed(tmp_path / "moe", [source], method="drop", num_experts=2, drop_ratio=0.25)
    gate, down = (tensor(source, f"blocks.0.channel.{name}.weight:exp_avg_sq") for name in ("gate", "down"))
    for expert in range(2):
        units = dropped_units(24, 0.25, 1234, 0, expert)
        kept = torch.ones(24).index_fill(0, units, 0.0)
        found = tensor(out, "blocks.0.channel.experts.gate_up.weight:exp_avg_sq")[expert, 0]
        assert len(units) == 6 and torch.equal(found, gate * kept[:, None])
        assert torch.equal(tensor(out, "blocks.0.channel.experts.down.weight:exp_avg_sq")[expert], down * kept)


def test_outputs_of_zero_have_none(tmp_path):
    source = make_warm_run(tmp_path / "dense", MODEL)
    out = mixed(tmp_path / "moe", [source], method="sparse", num_experts=2, shared_expert=True)
    assert not tensor(out, "blocks.0.channel.experts.down.weight:exp_avg").any()
    shared = tensor(out, "blocks.0.channel.shared.0.down.weight:exp_avg")
    assert torch.equal(shared, tensor(source, "blocks.0.channel.down.weight:exp_avg"))


def test_sources_without_moments_are_named(tmp_path):
    sources = [make_warm_run(tmp_path / "a", MODEL), make_run(tmp_path / "b", MODEL, 1)]
    with pytest.raises(ConfigError, match=r"moments: keep: .*/b has none .* set moments: zero"):
        mixed(tmp_path / "moe", sources)
    assert not (tmp_path / "moe").exists()


def test_a_source_that_trained_a_part_of_itself_is_named(tmp_path):
    whole = tensors(make_warm_run(tmp_path / "a", MODEL))
    values = {name: value for name, value in whole.items() if ":" not in name}
    frozen = "blocks.0.token.query.weight"
    moments = {name: value for name, value in whole.items() if ":" in name and not name.startswith(frozen)}
    source = write_run(tmp_path / "b", MODEL, values, moments, 20)
    with pytest.raises(ConfigError, match=rf"/b has none of '{frozen}' \(1 in all\), which was frozen"):
        mixed(tmp_path / "moe", [tmp_path / "a" / "warm", source])
