"""Width and depth scaling on layouts: factors follow the logical matrices, whatever part of them a rank holds."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightbulb.evaluation.proof import compare_layout
from lightbulb.evaluation.trial import Reference, Trial
from lightbulb.models.scaling import ScalingConfig
from lightbulb.parallel.topology import ParallelConfig
from lightbulb.parallel.workers import RankPool

SCALING = {"base_dim": 4, "scale_emb": 3.0, "scale_depth": 0.7}
LAYOUTS: list[dict[str, Any]] = [
    {"tensor": 2, "data": 1},
    {"pipeline": 2, "data": 1},
    {"expert": 2, "data": 2},
    {"expert": 2, "data": 2, "distributed_optimizer": False},
]


@pytest.mark.parametrize("options", LAYOUTS, ids=lambda options: ParallelConfig(**options).label())
@pytest.mark.parametrize("tied", [False, True])
def test_a_scaled_model_trains_the_same_on_two_ranks(
    ranks: RankPool, referenced: Callable[..., tuple[Trial, Reference, Path]], options: dict[str, Any], tied: bool
) -> None:
    trial, reference, folder = referenced(scaling=SCALING, tie_embeddings=tied)
    trial = replace(trial, parallel=ParallelConfig(**options), micro_batch_size=2)
    result = compare_layout(trial, reference, folder, ranks)
    assert result.ok, "\n".join(result.failures)


def test_without_the_factors_of_the_learning_rate_it_would_be_noticed(
    ranks: RankPool, referenced: Callable[..., tuple[Trial, Reference, Path]]
) -> None:
    """The layout's model has a base of its own width, which changes what its hidden matrices learn at."""
    trial, reference, folder = referenced(scaling=SCALING)
    scaling = ScalingConfig.model_validate(SCALING | {"base_dim": trial.model.dim})
    other = trial.model.model_copy(update={"scaling": scaling})
    result = compare_layout(replace(trial, model=other, parallel=ParallelConfig(data=1)), reference, folder, ranks)
    assert not result.ok
