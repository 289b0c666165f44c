"""The step that writes bfloat16 weights itself: against torch's with Megatron's copy, and through its state."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightbulb.evaluation.trial import Reference, Trial, global_batch
from lightbulb.ops import is_built
from lightbulb.parallel.engine import Engine
from lightbulb.parallel.one_pass import OnePassAdamW
from lightbulb.parallel.optimizer import parts
from lightbulb.parallel.topology import ParallelConfig
from lightbulb.parallel.workers import RankPool

pytestmark = pytest.mark.skipif(not is_built(), reason="no C++ compiler here when LightBulb was installed")

Referenced = Callable[..., tuple[Trial, Reference, Path]]
STEPS = 4


def build(trial: Trial, kernels: str) -> Engine:
    """An engine whose optimizer is made with these kernels; all else computes with the best."""
    os.environ["LIGHTBULB_KERNELS"] = kernels
    try:
        return Engine(trial.model, trial.parallel, trial.optimizer, "bf16", 0, torch.device("cpu"))
    finally:
        del os.environ["LIGHTBULB_KERNELS"]


def train(engine: Engine, trial: Trial, first: int, last: int) -> list[float]:
    samples = [global_batch(trial, step) for step in range(first, last)]
    return [engine.train_step([samples[step - first]], 1e-2).loss for step in range(first, last)]


def both_ways(rank: int, trial: Trial) -> tuple[list[list[float]], list[bool], bool]:
    """Losses with torch's optimizer and with ours, which of them are ours, and whether weights are masters, rounded."""
    losses, are_ours = [], []
    for kernels in ("reference", "auto"):
        engine = build(trial, kernels)
        losses.append(train(engine, trial, 0, STEPS))
        links = [link.optimizer for link in engine.optimizer.chained_optimizers if link.optimizer is not None]
        are_ours.append(all(isinstance(link, OnePassAdamW) for link in links))
        same = True
        for _, parameter in engine.named_parameters():
            part = parts(engine.optimizer, parameter)
            if part is not None:
                mine = parameter.detach().view(-1)[part.start : part.stop]
                same &= torch.equal(mine, part.master.detach().flatten().to(parameter.dtype))
        engine.close()
    return losses, are_ours, same


@pytest.mark.parametrize("distributed", [False, True])
def test_the_same_updates(ranks: RankPool, referenced: Referenced, distributed: bool) -> None:
    trial = replace(referenced()[0], parallel=ParallelConfig(expert=2, data=2, distributed_optimizer=distributed))
    for (theirs, ours), are_ours, is_rounded in ranks.run(2, both_ways, trial):
        assert are_ours == [False, True] and is_rounded
        assert theirs[0] > theirs[-1]
        # A master's last place may move a bfloat16 weight by one of its own.
        assert ours == pytest.approx(theirs, rel=2e-3)


def continue_in_another(rank: int, trial: Trial, kinds: tuple[str, str]) -> tuple[list[float], list[float]]:
    """Losses of steps 3 and 4 of one engine, and of a second one that took over its state after step 2."""
    first = build(trial, kinds[0])
    train(first, trial, 0, 2)
    state = {name: first.read_parameter(parameter) for name, parameter in first.named_parameters()}
    loads = {name: router.load.clone() for name, router in first.routers()}
    expected = train(first, trial, 2, 4)
    first.close()
    second = build(trial, kinds[1])
    second.optimizer_step = 2
    for name, parameter in second.named_parameters():
        second.write_parameter(parameter, state[name])
    for name, router in second.routers():
        router.load.copy_(loads[name])
    losses = train(second, trial, 2, 4)
    second.close()
    return losses, expected


@pytest.mark.parametrize("kinds", [("auto", "auto"), ("reference", "auto"), ("auto", "reference")], ids=str)
def test_state_goes_from_one_to_the_other(ranks: RankPool, referenced: Referenced, kinds: tuple[str, str]) -> None:
    trial = replace(referenced()[0], parallel=ParallelConfig(data=2, distributed_optimizer=True))
    for losses, expected in ranks.run(2, continue_in_another, trial, kinds):
        assert losses == (expected if kinds[0] == kinds[1] else pytest.approx(expected, rel=2e-3))
