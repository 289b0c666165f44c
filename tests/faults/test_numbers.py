"""Numbers that go wrong: not finite, spikes, collapsed routers, settings outside their range.

Numbers of the fault catalogue: 36 here through the command (one rank's gradient), in one expert's gradient and on every
kind of layout in tests/distributed/test_nonfinite.py; 37 spikes, 38 routers without balance, 39 large router logits,
here; the alarms of 38 also in tests/train/test_metrics.py; 40 here for values outside their range, in
tests/integration/test_pretrain.py for what does not divide, tests/mixers/ for heads and experts.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Command
from training_runs import TRAIN, write_run_file

from lightbulb.config import ConfigError, build_config, load_config
from lightbulb.evaluation.trial import SyntheticBatch
from lightbulb.models.language import LanguageConfig
from lightbulb.nn.groups import SINGLE
from lightbulb.parallel.engine import Engine
from lightbulb.parallel.optimizer import OptimizerConfig
from lightbulb.parallel.topology import ParallelConfig
from lightbulb.parallel.workers import RankPool
from lightbulb.routing.dispatch import combine, dispatch
from lightbulb.routing.router import Router, RouterConfig, Routing
from lightbulb.train.config import RunConfig
from lightbulb.train.metrics import router_alarms
from lightbulb.train.spikes import MIN_STEPS, WINDOW, SpikeRule

Start = Callable[..., Command]
RunFile = Callable[..., Path]
NUM_EXPERTS = 4


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(2, timeout_seconds=60.0, preload=None) as pool:
        yield pool


def records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


def test_nan_on_one_rank_is_skipped_on_all_counted_and_its_samples_named(
    start: Start, run_file: RunFile, tmp_path: Path
) -> None:
    command = start("pretrain", [str(run_file())], world_size=2, LIGHTBULB_FAULT="nan:rank=1:step=5")
    assert command.wait() == 0, command.text()
    assert "step 5 skipped on all ranks, not finite" in command.text()
    assert "(samples 32 to 39)" in command.text()
    found = records(tmp_path / "run")
    assert [record["skipped_steps"] for record in found] == [0] * 4 + [1] * (len(found) - 4)
    assert all(record["loss"] is not None for record in found)
    assert [record["step"] for record in found if record["grad_norm"] is None] == [5]


def test_a_run_whose_steps_are_all_skipped_stops_and_keeps_its_checkpoint(
    start: Start, run_file: RunFile, tmp_path: Path
) -> None:
    path = run_file(train=TRAIN | {"max_skipped_steps": 3})
    fault = ";".join(f"nan:rank=0:step={step}" for step in (7, 8, 9))
    command = start("pretrain", [str(path)], world_size=2, LIGHTBULB_FAULT=fault)
    assert command.wait() == 1
    assert "3 steps in a row were skipped for non-finite gradients" in command.text()
    assert "optimizer.lr" in command.text() and "Traceback" not in command.text()
    assert (tmp_path / "run" / "checkpoints" / "step-00000006" / "manifest.json").exists()


def test_a_spike_is_over_six_deviations_of_enough_steps() -> None:
    rule = SpikeRule(6.0)
    for step in range(MIN_STEPS - 1):
        rule.add(3.0 + 0.1 * (-1) ** step, 1.0)
        assert rule.limits() == (math.inf, math.inf)
    rule.add(3.0 - 0.1, 1.0)
    max_loss, max_norm = rule.limits()
    assert 3.55 < max_loss < 3.65  # 6 x 0.1 over the mean of 3
    assert max_norm == pytest.approx(1.0)
    assert SpikeRule(0.0).limits() == (math.inf, math.inf)


def test_a_level_that_stays_is_accepted_and_what_is_not_finite_is_forgotten() -> None:
    rule, same = SpikeRule(6.0), SpikeRule(6.0)
    steps = [(3.0 + 0.1 * (-1) ** step, 1.0 + 0.01 * step) for step in range(WINDOW)]
    for loss, norm in steps:
        rule.add(loss, norm)
    rule.add(math.nan, math.inf)
    same.restore([(None, None), *steps, (None, 1.0)])
    assert rule.limits() == same.limits()
    skipped = 0
    while rule.limits().max_loss < 30.0:
        rule.add(30.0, 1.0)
        skipped += 1
    assert 0 < skipped < 20  # TrainConfig.max_skipped_steps: the run need not stop


MODEL: dict[str, Any] = {
    "vocab_size": 64,
    "dim": 16,
    "num_layers": 2,
    "context_length": 12,
    "block_pattern": [
        {
            "token": {"type": "attention", "num_heads": 2},
            "channel": {"type": "switch", "num_experts": NUM_EXPERTS, "hidden_dim": 16},
        }
    ],
}


def _engine(model: dict[str, Any], parallel: ParallelConfig, precision: Any = "fp32") -> Engine:
    config = build_config(LanguageConfig, model)
    return Engine(config, parallel, OptimizerConfig(lr=1e-2), precision, 0, torch.device("cpu"))


def _batches(rank: int) -> list[SyntheticBatch]:
    rows = torch.randint(0, 64, (2, 13), generator=torch.Generator().manual_seed(rank))
    return [SyntheticBatch(rows[:, :-1], rows[:, 1:], None, torch.arange(2))]


def _spike(rank: int, parallel: ParallelConfig) -> list[Any]:
    """Steps with limits that the loss, then the norm, then neither exceeds; weights after each."""
    engine = _engine(MODEL, parallel)
    outcomes = []
    for max_loss, max_norm in ((0.5, math.inf), (math.inf, 1e-3), (100.0, 100.0)):
        result = engine.train_step(_batches(rank), 1e-2, max_loss, max_norm)
        weights = torch.cat([p.detach().flatten() for _, p in engine.named_parameters()])
        outcomes.append((result.applied, result.loss, result.grad_norm, weights))
    engine.close()
    return outcomes


def test_a_step_over_the_limits_changes_nothing_on_any_rank(ranks: RankPool) -> None:
    for outcomes in ranks.run(2, _spike, ParallelConfig(data=2, expert=2)):
        by_loss, by_norm, taken = outcomes
        assert [applied for applied, *_ in outcomes] == [False, False, True]
        assert torch.equal(by_loss[3], by_norm[3]) and not torch.equal(by_norm[3], taken[3])
        assert by_loss[1:3] == by_norm[1:3] == taken[1:3]  # nothing of a skipped step is left in the next


def _collapse(rank: int, parallel: ParallelConfig, capacity_factor: float | None) -> dict[str, Any]:
    """Two steps in which every token chooses experts 0 and 1."""
    channel = MODEL["block_pattern"][0]["channel"] | {"capacity_factor": capacity_factor}
    pattern = [MODEL["block_pattern"][0] | {"channel": channel}]
    engine = _engine(MODEL | {"block_pattern": pattern}, parallel)
    for _, router in engine.routers():
        router.register_forward_hook(_choose_first_experts)
    results = [engine.train_step(_batches(rank), 1e-2) for _ in range(2)]
    experts = [p for name, p in engine.named_parameters() if "experts" in name]
    gradients = [p.main_grad.flatten(1).norm(dim=1) for p in experts]
    engine.close()
    return {"losses": [r.loss for r in results], "applied": [r.applied for r in results], "gradients": gradients}


def _choose_first_experts(router: Router, inputs: Any, routing: Routing) -> Routing:
    return Routing(routing.gates, torch.arange(2).expand_as(routing.experts).contiguous())


@pytest.mark.parametrize("capacity_factor", [None, 0.01], ids=["dropless", "nearly all dropped"])
def test_experts_without_tokens_have_zero_gradients_and_the_exchange_does_not_hang(
    ranks: RankPool, capacity_factor: float | None
) -> None:
    outcomes = ranks.run(2, _collapse, ParallelConfig(data=2, expert=2), capacity_factor)
    for rank, outcome in enumerate(outcomes):
        assert all(math.isfinite(loss) for loss in outcome["losses"]) and outcome["applied"] == [True, True]
        for norms in outcome["gradients"]:  # experts 0 and 1 live on rank 0, 2 and 3 on rank 1
            assert torch.isfinite(norms).all()
            assert (norms > 0).any() if rank == 0 else (norms == 0).all()


def test_when_all_tokens_are_dropped_the_layer_adds_nothing() -> None:
    x = torch.randn(6, 4, requires_grad=True)
    gates = torch.full((6, 2), 0.5, requires_grad=True)
    receive, plan = dispatch(x, torch.zeros(6, 2, dtype=torch.long), NUM_EXPERTS, SINGLE, 0)
    y = combine(receive(), gates, plan)
    y.sum().backward()
    assert plan.counts == [0] * NUM_EXPERTS and torch.equal(y, torch.zeros(6, 4))
    assert torch.equal(x.grad, torch.zeros(6, 4)) and torch.equal(gates.grad, torch.zeros(6, 2))


def test_a_collapsed_router_is_warned_about() -> None:
    said = router_alarms({"1": [1.0, 0.0, 0.0, 0.0]}, NUM_EXPERTS)
    assert "layer 1: dead experts" in said[0]
    assert router_alarms({"1": [0.25] * NUM_EXPERTS}, NUM_EXPERTS) == []


def test_large_router_logits_stay_finite_in_bf16() -> None:
    config = RouterConfig(top_k=2)
    router = build_config(LanguageConfig, MODEL).build().blocks["0"].channel.router
    assert router.config == config and router.weight.dtype == torch.float32
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(0)) * 1e4)
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).requires_grad_()
    gates, experts = router.train()(x)
    gates.sum().backward()
    assert gates.dtype == torch.float32 and torch.isfinite(gates).all()
    assert torch.allclose(gates.sum(-1), torch.ones(32))
    assert torch.isfinite(x.grad).all() and torch.isfinite(router.weight.grad).all()
    statistics = router.statistics.take(torch.device("cpu"))
    assert torch.isfinite(statistics).all()


@pytest.mark.parametrize(
    ("override", "key", "limit"),
    [
        ("optimizer.lr=0", "optimizer.lr", "greater than 0"),
        ("optimizer.lr=-1", "optimizer.lr", "greater than 0"),
        ("optimizer.lr=.inf", "optimizer.lr", "less than or equal to 10"),
        ("optimizer.lr=.nan", "optimizer.lr", "less than or equal to 10"),
        ("optimizer.lr=1000", "optimizer.lr", "less than or equal to 10"),
        ("optimizer.beta2=1", "optimizer.beta2", "less than 1"),
        ("train.global_batch_size=0", "train.global_batch_size", "greater than or equal to 1"),
        ("train.micro_batch_size=3", "train.micro_batch_size 3", "choose a divisor"),
        ("train.steps=0", "train.steps", "greater than or equal to 1"),
        ("train.spike_sigma=-1", "train.spike_sigma", "greater than or equal to 0"),
        ("train.hang_seconds=-1", "train.hang_seconds", "greater than or equal to 0"),
        ("model.context_length=1", "model.context_length", "greater than or equal to 2"),
        ("model.num_layers=0", "model.num_layers", "greater than or equal to 1"),
        ("model.block_pattern.0.channel.router.top_k=5", "top_k 5 exceeds num_experts 4", "lower top_k"),
        ("model.block_pattern.0.token.num_heads=6", "num_heads 6", "dim 32"),
        ("parallel.tensor=0", "parallel.tensor", "greater than or equal to 1"),
    ],
)
def test_values_outside_their_range_are_refused_with_key_and_range(
    tmp_path: Path, override: str, key: str, limit: str
) -> None:
    path = write_run_file(tmp_path, tmp_path)
    with pytest.raises(ConfigError) as refused:
        load_config(RunConfig, path, [override])
    assert key in str(refused.value) and limit in str(refused.value)
