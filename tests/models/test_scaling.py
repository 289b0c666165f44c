"""MiniCPM's width and depth scaling: neutral constants change nothing, others do what the rules say."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightbulb.modifiers  # noqa: F401  (registers denseformer)
from lightbulb.config import ConfigError, build_config
from lightbulb.experts.hf.families import family_of
from lightbulb.experts.hf.family import InteropError
from lightbulb.models.language import LanguageConfig, LanguageModel
from lightbulb.models.scaling import LR_SCALE
from lightbulb.nn.parameter import initialise, logical_of

DIM, LAYERS = 16, 4
NEUTRAL = {"base_dim": DIM, "scale_emb": 1, "scale_depth": math.sqrt(LAYERS)}
BLOCKS = [
    {"token": {"type": "attention", "num_heads": 4, "num_kv_heads": 2, "qk_norm": True},
     "channel": {"type": "mlp", "hidden_dim": 24}},
    {"token": {"type": "mamba", "state_dim": 8, "head_dim": 8}, "channel": {
        "type": "switch", "num_experts": 4, "hidden_dim": 12, "router": {"top_k": 2}}},
]  # fmt: skip


def model_of(**changes) -> LanguageModel:
    values = {"vocab_size": 40, "dim": DIM, "num_layers": LAYERS, "context_length": 16, "block_pattern": BLOCKS}
    model = build_config(LanguageConfig, values | changes).build()
    initialise(model, 0)
    return model.eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 40, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"modifiers": [{"type": "denseformer"}]}])
def test_equality_with_the_standard_model_at_the_base(tokens: torch.Tensor, changes: dict) -> None:
    plain, scaled = model_of(**changes), model_of(scaling=NEUTRAL, **changes)
    assert plain.state_dict().keys() == scaled.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, scaled.state_dict()[name]), name
    assert all(getattr(parameter, LR_SCALE, 1.0) == 1.0 for parameter in scaled.parameters())
    assert torch.equal(plain(tokens), scaled(tokens))
    assert plain.config.cost() == scaled.config.cost()


def test_the_factors_are_where_the_rules_put_them(tokens: torch.Tensor) -> None:
    """The same function from the plain model's code: factors multiplied into a copy of its weights."""
    rules = {"base_dim": 4, "scale_emb": 3.0, "scale_depth": 0.5}
    scaled = model_of(scaling=rules, block_pattern=BLOCKS[:1])
    plain = model_of(block_pattern=BLOCKS[:1])
    values = {name: parameter.detach().clone() for name, parameter in scaled.named_parameters()}
    values["embedding.weight"] *= 3.0
    values["head"] /= DIM / 4
    for name in values:
        if name.endswith(("token.output.weight", "channel.down.weight")):
            values[name] *= 0.5 / math.sqrt(LAYERS)
    assert sum(name.endswith(("token.output.weight", "channel.down.weight")) for name in values) == 2 * LAYERS
    plain.load_state_dict(values, strict=False)
    assert (plain(tokens) - scaled(tokens)).abs().max() < 1e-5  # the factors round at other places
    labels = tokens.roll(-1, 1)
    assert (plain(tokens, labels) - scaled(tokens, labels)).abs().max() < 1e-5


def test_hidden_matrices_and_no_others_follow_the_width() -> None:
    base, wide = model_of(scaling={"base_dim": DIM}), model_of(scaling={"base_dim": DIM}, dim=4 * DIM)
    small, large = dict(base.named_parameters()), dict(wide.named_parameters())
    marked = {name for name, parameter in large.items() if getattr(parameter, LR_SCALE, 1.0) != 1.0}
    assert all(getattr(large[name], LR_SCALE) == 0.25 for name in marked)
    for name, parameter in large.items():
        ours, theirs = logical_of(small[name]), logical_of(parameter)
        if name in marked:
            assert len(theirs.shape) - theirs.is_expert >= 2  # gate and up lie in one
            assert theirs.std == pytest.approx(ours.std / 2), name
        else:
            assert theirs.std == ours.std, name
    assert {"blocks.0.token.output.weight", "blocks.1.channel.router.weight"} <= marked
    assert not {"embedding.weight", "head", "norm.weight", "blocks.0.token_norm.weight"} & marked


def test_of_low_rank_updates_what_reads_the_width_follows_it() -> None:
    """``a`` has as many inputs as the layer; ``b`` reads the rank, and begins at zero."""
    model = model_of(scaling={"base_dim": 4}, modifiers=[{"type": "lora", "rank": 2, "match": "blocks.0.token.query"}])
    rates = {name: getattr(p, LR_SCALE, 1.0) for name, p in model.named_parameters() if ".adapter." in name}
    assert rates == {"blocks.0.token.query.adapter.a": 0.25, "blocks.0.token.query.adapter.b": 1.0}


def test_decoding_gives_the_logits_of_the_forward_pass(tokens: torch.Tensor) -> None:
    model = model_of(scaling={"base_dim": 4, "scale_emb": 3.0, "scale_depth": 0.5})
    whole, state, parts = model(tokens), model.init_state(2, 16), []
    for position in range(16):
        logits, state = model.decode(tokens[:, position : position + 1], state)
        parts.append(logits)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-4


def test_what_it_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="scaling.scale_depth"):
        model_of(scaling={"scale_depth": 0})
    with pytest.raises(InteropError, match="width and depth scaling is in no stock architecture"):
        family_of(model_of(scaling={}, block_pattern=BLOCKS[:1]).config)


@pytest.mark.slow
def test_the_best_learning_rate_stays_put_when_a_model_gets_wider() -> None:
    """Real trainings at four rates: measured 1.04 with scaling, 2.6 without."""
    script = Path(__file__).parents[2] / "benchmarks" / "width_scaling.py"
    options = ["--widths", "32", "128", "--rates", "-9", "-6", "--steps", "100"]
    done = subprocess.run(
        [sys.executable, script, *options], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["shift_with"] < 1.4 and found["shift_without"] > 1.9
