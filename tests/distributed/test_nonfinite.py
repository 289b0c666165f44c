"""A gradient that is not finite on one rank is a step that no rank takes."""

import math
from typing import Any

import pytest
import torch

from lightbulb.config import build_config
from lightbulb.evaluation.trial import SyntheticBatch
from lightbulb.models.language import LanguageConfig
from lightbulb.parallel.engine import Engine
from lightbulb.parallel.optimizer import OptimizerConfig
from lightbulb.parallel.topology import ParallelConfig
from lightbulb.parallel.workers import RankPool

MODEL = {
    "vocab_size": 64,
    "dim": 16,
    "num_layers": 2,
    "context_length": 12,
    "block_pattern": [
        {
            "token": {"type": "attention", "num_heads": 2},
            "channel": {"type": "switch", "num_experts": 4, "hidden_dim": 16},
        }
    ],
}


def _train(rank: int, parallel: ParallelConfig, poison: float, part: str) -> dict[str, Any]:
    """Three steps; in the second, one gradient of the last rank is not finite."""
    engine = Engine(
        build_config(LanguageConfig, MODEL), parallel, OptimizerConfig(lr=1e-2), "fp32", 0, torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(engine.data_rank)
    applied, states = [], []
    for step in range(3):
        rows = torch.randint(0, 64, (2, 13), generator=generator)
        hooks = []
        if step == 1 and rank == parallel.tensor * parallel.pipeline * (parallel.data or 1) - 1:
            parameter = next(p for name, p in engine.all_parameters() if part in name)
            hooks = [parameter.register_hook(lambda gradient: gradient * poison)]
        result = engine.train_step([SyntheticBatch(rows[:, :-1], rows[:, 1:], None, torch.arange(2))], 1e-2)
        for hook in hooks:
            hook.remove()
        applied.append(result.applied)
        state = {name: engine.read_parameter(parameter) for name, parameter in engine.named_parameters()}
        states.append({f"{name}.{key}": value for name, values in state.items() for key, value in values.items()})
    loads = [router.load.clone() for _, router in engine.routers()]
    engine.close()
    return {"applied": applied, "states": states, "loads": loads, "steps": engine.optimizer_step}


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("degrees", "part"),
    [
        ({"data": 2}, "query"),
        ({"data": 2, "expert": 2}, "experts"),
        ({"pipeline": 2, "data": 1}, "query"),
        ({"tensor": 2, "data": 1}, "router"),
    ],
    ids=["DP2", "EP2", "PP2", "TP2"],
)
def test_all_ranks_skip_and_nothing_is_changed(
    ranks: RankPool, degrees: dict[str, int], part: str, poison: float
) -> None:
    for outcome in ranks.run(2, _train, ParallelConfig(**degrees), poison, part):
        assert outcome["applied"] == [True, False, True]
        assert outcome["steps"] == 2
        first, second, third = outcome["states"]
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert any(not torch.equal(second[name], third[name]) for name in first)
        assert all(torch.isfinite(value).all() for value in third.values())
        assert all(torch.isfinite(load).all() for load in outcome["loads"])
