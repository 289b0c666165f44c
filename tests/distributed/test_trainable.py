"""Frozen parameters on split layouts: the same training as in one process, nothing kept of what is frozen."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import MODEL

from lightbulb.config import build_config
from lightbulb.evaluation.proof import compare_layout
from lightbulb.evaluation.trial import Reference, Trial, train_reference
from lightbulb.models.language import LanguageConfig
from lightbulb.models.trainable import Trainable
from lightbulb.parallel.optimizer import OptimizerConfig
from lightbulb.parallel.topology import ParallelConfig
from lightbulb.parallel.workers import RankPool

LAYOUTS: list[dict[str, Any]] = [
    {"expert": 2, "data": 2},
    {"pipeline": 2, "data": 1},
    {"tensor": 2, "sequence": True, "data": 1},
]
MORE: list[dict[str, Any]] = [
    {"pipeline": 2, "stages": [1, 3], "data": 1},  # the first stage has no router: nothing of it is trained
    {"pipeline": 4, "data": 1},
    {"pipeline": 2, "interleave": 2, "data": 2, "recompute": "full"},
    {"tensor": 2, "sequence": True, "expert_tensor": 1, "expert": 2, "data": 1},
    {"tensor": 2, "expert": 2, "data": 2, "distributed_optimizer": False},
    {"ulysses": 2, "data": 1},
]
CHOICES: list[Trainable] = ["routers", "routers+experts", ["blocks.3.channel.*", "norm.*"], ["embedding.*"]]
References = dict[str, tuple[Trial, Reference, Path]]


def name_of(value: Any) -> str:
    return ParallelConfig(**value).label() if isinstance(value, dict) else str(value)


@pytest.fixture(scope="module")
def references(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> References:
    found: References = {}
    for choice in CHOICES:
        folder = tmp_path_factory.mktemp("reference")
        # a tied table that is trained, and one that is frozen on both stages that hold it
        model = build_config(LanguageConfig, MODEL | {"tie_embeddings": choice in CHOICES[2:]})
        trial = Trial(model, OptimizerConfig(lr=1e-3, eps=1e-5), 8, 3, 8, trainable=choice)
        (reference,) = ranks.run(1, train_reference, trial, folder)
        found[str(choice)] = trial, reference, folder
    return found


def check(ranks: RankPool, trial: tuple[Trial, Reference, Path], options: dict[str, Any]) -> None:
    wanted, reference, folder = trial
    wanted = replace(wanted, parallel=ParallelConfig(**options), micro_batch_size=2)
    result = compare_layout(wanted, reference, folder, ranks)
    assert result.ok, "\n".join(result.failures)


@pytest.mark.parametrize("options", [*LAYOUTS, MORE[0]], ids=name_of)
def test_equality_of_router_tuning(ranks: RankPool, references: References, options: dict[str, Any]) -> None:
    check(ranks, references["routers"], options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [*LAYOUTS, *MORE], ids=name_of)
@pytest.mark.parametrize("choice", CHOICES, ids=name_of)
def test_equality_of_every_choice(
    ranks: RankPool, references: References, choice: Trainable, options: dict[str, Any]
) -> None:
    check(ranks, references[str(choice)], options)
