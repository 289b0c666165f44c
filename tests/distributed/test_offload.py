"""DeepSpeed's CPU Adam against torch's, on the layouts and through a save and load of its state."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightbulb.evaluation.proof import compare_layout
from lightbulb.evaluation.trial import Reference, Trial, global_batch
from lightbulb.parallel.engine import Engine
from lightbulb.parallel.topology import ParallelConfig
from lightbulb.parallel.workers import RankPool

pytestmark = pytest.mark.slow  # the first use compiles for a minute

Referenced = Callable[..., tuple[Trial, Reference, Path]]


@pytest.fixture
def offloaded(referenced: Referenced) -> tuple[Trial, Reference, Path]:
    trial, reference, folder = referenced()
    return replace(trial, optimizer=trial.optimizer.model_copy(update={"offload": True})), reference, folder


@pytest.mark.timeout(300)
@pytest.mark.parametrize("distributed", [False, True])
def test_the_same_updates(ranks: RankPool, offloaded: tuple[Trial, Reference, Path], distributed: bool) -> None:
    trial, reference, folder = offloaded
    parallel = ParallelConfig(expert=2, data=2, distributed_optimizer=distributed)
    result = compare_layout(replace(trial, parallel=parallel), reference, folder, ranks)
    assert result.ok, "\n".join(result.failures)


def continue_elsewhere(rank: int, trial: Trial) -> list[list[float]]:
    """Losses of steps 3 and 4 of one engine, then of a second one that took over its state after step 2."""
    first = build(trial, seed=0)
    for step in (0, 1):
        first.train_step([global_batch(trial, step)], 1e-2)
    state = {name: first.read_parameter(parameter) for name, parameter in first.named_parameters()}
    loads = {name: router.load.clone() for name, router in first.routers()}
    expected = [first.train_step([global_batch(trial, step)], 1e-2).loss for step in (2, 3)]
    first.close()
    second = build(trial, seed=1)
    second.optimizer_step = 2
    for name, parameter in second.named_parameters():
        second.write_parameter(parameter, state[name])
    for name, router in second.routers():
        router.load.copy_(loads[name])
    losses = [second.train_step([global_batch(trial, step)], 1e-2).loss for step in (2, 3)]
    second.close()
    return [losses, expected]


def build(trial: Trial, seed: int) -> Engine:
    return Engine(trial.model, ParallelConfig(data=1), trial.optimizer, "fp32", seed, torch.device("cpu"))


@pytest.mark.timeout(300)
def test_state_read_from_one_engine_continues_in_another(
    ranks: RankPool, offloaded: tuple[Trial, Reference, Path]
) -> None:
    ((losses, expected),) = ranks.run(1, continue_elsewhere, offloaded[0])
    assert losses == expected
