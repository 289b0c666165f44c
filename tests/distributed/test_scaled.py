"""Width and depth scaling on layouts: factors follow the logical matrices, whatever part of them a rank holds."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightbulb.evaluation.proof import BOUNDS, compare_layout
from lightbulb.evaluation.trial import RankReport, Reference, Trial, train_layout, train_reference
from lightbulb.parallel import optimizer
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


def test_only_weights_show_that_the_factors_of_the_learning_rate_are_missing(
    ranks: RankPool, referenced: Callable[..., tuple[Trial, Reference, Path]], tmp_path: Path
) -> None:
    """One step: what goes before it, gradients and moments included, is the same without the factors."""
    trial = replace(referenced(scaling=SCALING)[0], steps=1, parallel=ParallelConfig(data=1))
    (reference,) = ranks.run(1, train_reference, trial, tmp_path)
    right, wrong = (compare_layout(trial, reference, tmp_path, ranks, job) for job in (train_layout, train_at_one_rate))
    assert right.ok, "\n".join(right.failures)
    broken = {quantity for quantity, found in wrong.worst.items() if not found.value <= BOUNDS[quantity]}
    assert broken == {"weight"} and "blocks." in wrong.worst["weight"].where, wrong.failures


def train_at_one_rate(rank: int, trial: Trial, reference: Reference, folder: Path) -> RankReport:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "_learning_rates", lambda chunks: {})
        return train_layout(rank, trial, reference, folder)
