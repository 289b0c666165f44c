"""A model run layer by layer is the model."""

import weakref
from contextlib import contextmanager

import pytest
import torch
from dense_runs import MODEL, make_run

from lightbulb.config import ConfigError
from lightbulb.experts.memory import check_memory
from lightbulb.experts.receipt import watched_logits, watching_routers
from lightbulb.experts.source import RunSource, build_model, layered

MIXTURE = {"type": "switch", "num_experts": 4, "hidden_dim": 16, "router": {"score": "sigmoid", "bias_rate": 1e-3}}
MODELS = {
    "plain": {},
    "tied": {"tie_embeddings": True, "num_layers": 3},
    "mixture": {"block_pattern": [{"token": MODEL["block_pattern"][0]["token"], "channel": MIXTURE}]},
    "depth averages": {"modifiers": [{"type": "denseformer"}], "num_layers": 4},
    "depth routers": {"modifiers": [{"type": "mixture_of_depths", "capacity": 0.5, "every": 2}], "num_layers": 4},
}


@pytest.mark.parametrize("kind", MODELS)
def test_equality_with_the_whole_model(dense, tokens, kind):
    source = RunSource(dense(kind.replace(" ", "-"), **MODELS[kind]))
    model = build_model(source)
    for name, buffer in model.named_buffers():
        assert not name.endswith("bias") or torch.equal(buffer, source.read(name))
    with watching_routers(model) as wanted, torch.no_grad():
        expected = model(tokens)
    found, routers = watched_logits(layered(source), tokens)
    assert torch.equal(found, expected)
    assert routers == wanted


def test_few_layers_are_in_memory(tmp_path, tokens):
    stages: list[weakref.ref] = []

    @contextmanager
    def around(stage):
        stages.append(weakref.ref(stage))
        assert sum(stage() is not None for stage in stages) <= 2
        yield

    layered(RunSource(make_run(tmp_path / "deep", MODEL | {"num_layers": 8}))).run_blocks([tokens], around)
    assert len(stages) == 8


def test_what_does_not_fit_is_said_before():
    check_memory(1000, "this")
    with pytest.raises(ConfigError, match=r"this needs 4000000\.0 GB of memory for the model, .* are available"):
        check_memory(10**15, "this")
