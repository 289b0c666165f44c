"""The language model as a whole: cost, decoding, causality, documents, stages, errors."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightbulb.config import ConfigError, build_config
from lightbulb.models.language import Degrees, LanguageConfig, LanguageModel
from lightbulb.nn.cross_entropy import IGNORE
from lightbulb.nn.parameter import initialise
from lightbulb.parallel.pipeline_cut import language_stages

ATTENTION = {"type": "attention", "num_heads": 4, "num_kv_heads": 2}
MLP = {"type": "mlp", "hidden_dim": 24}
SWITCH = {"type": "switch", "num_experts": 4, "hidden_dim": 12, "router": {"top_k": 2}}
TOP_ONE = {"type": "switch", "num_experts": 3, "hidden_dim": 12, "router": {"top_k": 1, "normalize_gates": False}}

MODELS: dict[str, dict[str, Any]] = {
    "dense": {"block_pattern": [{"token": ATTENTION, "channel": MLP}]},
    "moe": {"block_pattern": [{"token": ATTENTION, "channel": MLP}, {"token": ATTENTION, "channel": SWITCH}]},
    "top1": {"block_pattern": [{"token": ATTENTION, "channel": TOP_ONE}]},
    "tied": {"block_pattern": [{"token": ATTENTION, "channel": SWITCH}], "tie_embeddings": True},
    "qk_norm": {"block_pattern": [{"token": ATTENTION | {"qk_norm": True, "head_dim": 6}, "channel": MLP}]},
}

BIASED = {"type": "mlp", "hidden_dim": 24, "activation": "gelu_tanh", "bias": True}
LEARNED = {"type": "attention", "num_heads": 4, "rope_theta": None, "bias": "all"}
MODELS["learned"] = {
    "block_pattern": [
        {"token": LEARNED, "channel": BIASED},
        {"token": LEARNED, "channel": {"type": "switch", "num_experts": 4, "expert": BIASED}},
    ],
    "norm": "layer",
    "learned_positions": True,
    "tie_embeddings": True,
}

every_model = pytest.mark.parametrize("name", MODELS)


def config_of(name: str, **changes: Any) -> LanguageConfig:
    values = {"vocab_size": 40, "dim": 16, "num_layers": 4, "context_length": 10}
    return build_config(LanguageConfig, values | MODELS[name] | changes)


def model_of(name: str) -> LanguageModel:
    model = config_of(name).build()
    initialise(model, 0)
    return model.eval()


def tokens_of(batch: int = 2, length: int = 10) -> Tensor:
    return torch.randint(0, 40, (batch, length), generator=torch.Generator().manual_seed(1))


@every_model
def test_cost_counts_the_parameters_that_are_built(name: str) -> None:
    config = config_of(name)
    cost = config.cost()
    assert cost.params == sum(p.numel() for p in config.build().parameters())
    assert 0 < cost.active_params <= cost.params
    assert cost.train_flops == 3 * cost.forward_flops > 2 * cost.active_params  # attention comes on top


def test_active_parameters_of_experts() -> None:
    dense = config_of("dense", block_pattern=[{"token": ATTENTION, "channel": {"type": "mlp", "hidden_dim": 24}}])
    routed = config_of("dense", block_pattern=[{"token": ATTENTION, "channel": SWITCH}])
    router = 4 * 4 * 16
    assert routed.cost().active_params == dense.cost().active_params + router  # two experts of half the width
    assert routed.cost().params > dense.cost().params


@every_model
@torch.no_grad()
def test_prefill_and_single_steps_equal_one_full_pass(name: str) -> None:
    model, tokens = model_of(name), tokens_of()
    full = model(tokens)
    state = model.init_state(2, 10)
    logits, state = model.decode(tokens[:, :4], state)
    parts = [logits]
    for position in range(4, 10):
        logits, state = model.decode(tokens[:, position : position + 1], state)
        parts.append(logits)
    assert state["position"] == 10
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-5)


@every_model
@torch.no_grad()
def test_the_future_does_not_leak(name: str) -> None:
    model, tokens = model_of(name), tokens_of()
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 40
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :6], before[:, :6], rtol=0, atol=1e-5)
    assert (after[:, 6:] - before[:, 6:]).abs().amax(-1).min() > 1e-4


@every_model
@torch.no_grad()
def test_packed_documents_do_not_leak(name: str) -> None:
    model, tokens = model_of(name), tokens_of()
    documents = (torch.arange(10) >= 4).long().expand(2, -1)
    changed = tokens.clone()
    changed[:, :4] = (changed[:, :4] + 1) % 40
    before, after = model(tokens, None, documents), model(changed, None, documents)
    torch.testing.assert_close(after[:, 4:], before[:, 4:], rtol=0, atol=1e-5)
    assert (model(tokens)[:, 4:] - before[:, 4:]).abs().max() > 1e-3  # without ids the documents see each other


@every_model
def test_losses_are_those_of_the_logits(name: str) -> None:
    model, tokens = model_of(name), tokens_of()
    labels = tokens.roll(-1, 1).masked_fill(torch.arange(10) >= 8, IGNORE)
    expected = torch.nn.functional.cross_entropy(model(tokens).transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(model(tokens, labels), expected, rtol=1e-4, atol=1e-5)


def test_the_z_loss_is_part_of_the_loss_in_training_only() -> None:
    plain, model = model_of("dense"), config_of("dense", z_loss=0.1).build()
    initialise(model, 0)
    tokens, labels = tokens_of(), tokens_of().roll(-1, 1)
    labels[0, 3] = IGNORE
    wanted = plain(tokens, labels)
    assert torch.equal(model.eval()(tokens, labels), wanted)
    added = (0.1 * plain(tokens).logsumexp(-1).square()).masked_fill(labels == IGNORE, 0.0)
    assert torch.allclose(model.train()(tokens, labels), wanted + added, atol=1e-5)


@every_model
def test_every_parameter_gets_a_finite_gradient(name: str) -> None:
    model, tokens = model_of(name).train(), tokens_of(8)
    model(tokens, tokens.roll(-1, 1)).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@every_model
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_stages_together_are_the_whole_model(name: str, stages: int) -> None:
    config = config_of(name)
    whole = {n: tuple(p.shape) for n, p in config.build().named_parameters()}
    parts = [config.build(stage) for stage in language_stages(config, stages)]
    names = [n for part in parts for n, p in part.named_parameters() if not getattr(p, "shared", False)]
    assert sorted(names) == sorted(whole)
    assert all(whole[n] == tuple(p.shape) for part in parts for n, p in part.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", ["moe", "tied", "learned"])
def test_stages_in_a_row_compute_what_the_whole_model_computes(name: str) -> None:
    config, tokens = config_of(name), tokens_of()
    x = None
    for stage in language_stages(config, 3):
        part = config.build(stage).eval()
        initialise(part, 0)
        part.set_input_tensor([x])
        x = part(tokens)
    torch.testing.assert_close(x, model_of(name)(tokens))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dimm": 3}, "unknown key 'dimm', did you mean 'dim'"),
        ({"num_layers": 3, **MODELS["moe"]}, "block_pattern has 2 blocks, which does not divide num_layers 3"),
        (
            {"block_pattern": [{"token": ATTENTION | {"heads": 2}, "channel": MLP}]},
            r"block_pattern\.0\.token: unknown key 'heads'.*valid keys: .*num_heads",
        ),
        (
            {"block_pattern": [{"token": {"type": "atention", "num_heads": 2}, "channel": MLP}]},
            r"block_pattern\.0\.token: unknown token_mixer 'atention', did you mean 'attention'",
        ),
        (
            {"block_pattern": [{"token": ATTENTION, "channel": {"hidden_dim": 4}}]},
            r"block_pattern\.0\.channel: expected a mapping with 'type: <name>'",
        ),
        (
            {"block_pattern": [{"token": ATTENTION, "channel": MLP, "chanel": MLP}]},
            r"block_pattern\.0: unknown key 'chanel', did you mean 'channel'",
        ),
        (
            {"block_pattern": [{"token": ATTENTION, "channel": SWITCH | {"router": {"top_k": 9}}}]},
            r"block_pattern\.0\.channel: router.top_k 9 exceeds num_experts 4",
        ),
        (
            {"block_pattern": [{"token": {"type": "attention", "num_heads": 5}, "channel": MLP}]},
            "dim 16 does not divide into num_heads 5 heads",
        ),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of("dense", **changes)


@pytest.mark.parametrize(
    ("name", "degrees", "message"),
    [
        ("dense", {"tensor": 41}, r"vocab_size 40 is less than parallel.tensor 41; lower parallel.tensor to 40"),
        (
            "dense",
            {"stages": 5},
            r"parallel.pipeline x parallel.interleave makes 5 stages, more than model.num_layers 4",
        ),
        ("dense", {"ulysses": 2, "tensor": 2, "sequence": True}, r"context_length \d+ cannot be split over 4 ranks"),
        ("dense", {"ulysses": 4}, r"context_length \d+ cannot be split over 4 ranks"),
        ("dense", {"ulysses": 5}, r"num_.*heads \d cannot be split over parallel.tensor 1 x parallel.ulysses 5"),
        ("dense", {"expert": 2}, r"parallel.expert 2 has no effect"),
        ("moe", {"expert": 3}, r"model.block_pattern.1.channel.num_experts 4 cannot be split over parallel.expert 3"),
        ("moe", {"tensor": 8}, r"model.block_pattern.0.token.num_.*heads . cannot be split over parallel.tensor 8"),
    ],
)
def test_layouts_that_do_not_fit_are_named(name: str, degrees: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(name).check_parallel(Degrees(**degrees))


@torch.no_grad()
def test_learned_positions_tell_places_apart_and_end_with_the_context() -> None:
    model, same = model_of("learned"), torch.full((1, 10), 7)
    logits = model(same)
    assert (logits[:, 1:] - logits[:, :-1]).abs().amax(-1).min() > 1e-4
    model.positions.weight.zero_()  # and nothing else does
    logits = model(same)
    torch.testing.assert_close(logits, logits[:, :1].expand_as(logits))
    with pytest.raises(ValueError, match="a sequence of 11 tokens: learned_positions end at context_length 10"):
        model(tokens_of(length=11))
    state = model.decode(tokens_of(), model.init_state(2, 11))[1]
    with pytest.raises(ValueError, match="a sequence of 11 tokens"):
        model.decode(tokens_of(length=1), state)


def test_first_blocks_come_before_the_pattern() -> None:
    dense, routed = {"token": ATTENTION, "channel": MLP}, {"token": ATTENTION, "channel": SWITCH}
    config = config_of("dense", num_layers=5, first_blocks=[dense], block_pattern=[routed, dense])
    kinds = [config.layer(layer).channel.type for layer in range(5)]  # type: ignore[union-attr]
    assert kinds == ["mlp", "switch", "mlp", "switch", "mlp"]
    assert config.routers() == {"blocks.1.channel.router": 4, "blocks.3.channel.router": 4}
    with pytest.raises(ConfigError, match="num_layers 4 less the 1 of first_blocks"):
        config_of("dense", first_blocks=[dense], block_pattern=[routed, dense])
    wide = {"token": ATTENTION, "channel": MLP | {"hidden_dim": 25}}
    with pytest.raises(ValueError, match=r"model.first_blocks.0.channel.hidden_dim 25 cannot be split"):
        config_of("dense", num_layers=5, first_blocks=[wide]).check_parallel(Degrees(tensor=2))


def test_a_block_may_do_without_a_channel_mixer() -> None:
    config = config_of("dense", block_pattern=[{"token": ATTENTION}])
    model = config.build()
    initialise(model, 0)
    assert config.cost().params == sum(p.numel() for p in model.parameters())
    assert not any("channel" in name for name, _ in model.named_parameters())
    tokens = tokens_of()
    with torch.no_grad():
        state, parts = model.init_state(2, 10), []
        for chunk in tokens.split([4, 1, 5], dim=1):
            logits, state = model.decode(chunk, state)
            parts.append(logits)
        assert torch.allclose(torch.cat(parts, 1), model.eval()(tokens), atol=1e-5)
    config.check_parallel(Degrees(tensor=2))
    with pytest.raises(ValueError, match="parallel.expert 2 has no effect"):
        config.check_parallel(Degrees(expert=2))


@pytest.mark.parametrize(
    "token", [ATTENTION | {"causal": False}, {"type": "mamba", "head_dim": 8, "bidirectional": True}]
)
def test_a_mixer_that_sees_the_future_makes_no_language_model(token: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"block_pattern.0.token: \w+ is set to see the future"):
        config_of("dense", block_pattern=[{"token": token, "channel": MLP}])


def test_gist_tokens_want_parts_that_carry_nothing_past_them() -> None:
    dense = {"token": ATTENTION, "channel": MLP}
    config_of("dense", gist_token_id=3)
    mamba = {"token": {"type": "mamba", "head_dim": 8}, "channel": MLP}
    with pytest.raises(ConfigError, match="first_blocks.0.token of type 'mamba' carries a prompt past"):
        config_of("dense", num_layers=5, first_blocks=[mamba], gist_token_id=3)
    lory = {"token": ATTENTION, "channel": {"type": "lory", "num_experts": 2, "hidden_dim": 8}}
    with pytest.raises(ConfigError, match="block_pattern.1.channel of type 'lory' carries a prompt past"):
        config_of("dense", block_pattern=[dense, lory], gist_token_id=3)


def test_heads_that_follow_from_the_width_are_checked() -> None:
    config = config_of("dense", block_pattern=[{"token": {"type": "mamba", "head_dim": 32}, "channel": MLP}])
    for degrees in (Degrees(tensor=2), Degrees(ulysses=2)):
        with pytest.raises(ValueError, match="block_pattern.0.token.head_dim 32 makes 1 heads"):
            config.check_parallel(degrees)


def test_more_first_blocks_than_layers() -> None:
    with pytest.raises(ConfigError, match="first_blocks has 5 blocks, more than num_layers 4; remove some"):
        config_of("dense", first_blocks=[{"token": ATTENTION, "channel": MLP}] * 5)
