"""A mixture of experts that was made of dense models is the same model on every layout: loaded, evaluated, trained."""

import sys
from pathlib import Path

import pytest
import torch

from lightbulb.config import build_config
from lightbulb.evaluation.trial import Trial, _my_batches, global_batch
from lightbulb.experts.upcycle import upcycle
from lightbulb.experts.upcycle_config import UpcycleConfig
from lightbulb.nn.cross_entropy import IGNORE
from lightbulb.parallel.engine import Engine
from lightbulb.parallel.optimizer import OptimizerConfig
from lightbulb.parallel.topology import ParallelConfig
from lightbulb.parallel.workers import RankPool
from lightbulb.train.checkpoint import load_into, newest_checkpoint, start_from

sys.path.append(str(Path(__file__).parent.parent / "experts"))
from dense_runs import MODEL, make_run, make_warm_run, model_of  # noqa: E402

ODD = MODEL | {"vocab_size": MODEL["vocab_size"] + 1}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two branches as experts, of their attention too."""
    folder = tmp_path_factory.mktemp("mixture")
    sources = [{"path": str(make_run(folder / name, ODD, seed, 0.1))} for seed, name in enumerate("ab", 1)]
    values = {"run": str(folder / "moe"), "method": "btx+moa", "sources": sources, "num_experts": 4}
    upcycle(build_config(UpcycleConfig, values))
    return folder / "moe"


def trial_of(run: Path, parallel: ParallelConfig) -> Trial:
    model = model_of(run).config
    return Trial(model, OptimizerConfig(lr=1e-3, eps=1e-5), 3, 2, 8, parallel=parallel)


def losses_on(rank: int, run: Path, parallel: ParallelConfig, resume: bool) -> list[float]:
    """Held-out loss of the loaded model, then the losses of two steps."""
    trial = trial_of(run, parallel)
    engine = Engine(trial.model, parallel, trial.optimizer, "fp32", 99, torch.device("cpu"))
    checkpoint, _ = newest_checkpoint(run)
    assert checkpoint is not None
    if resume:
        load_into(engine, checkpoint)
    else:
        assert start_from(engine, checkpoint) == []
    nats, tokens = engine.evaluate(_my_batches(engine, trial, 0))
    found = [nats / tokens]
    for step in range(2):
        engine.forward_backward(_my_batches(engine, trial, step))
        found.append(engine.update(1e-3).loss)
    engine.close()
    return found


def logits_on(rank: int, run: Path, parallel: ParallelConfig) -> torch.Tensor:
    """Logits of the whole model on ranks that share its experts."""
    trial = trial_of(run, parallel)
    engine = Engine(trial.model, parallel, trial.optimizer, "fp32", 99, torch.device("cpu"))
    checkpoint, _ = newest_checkpoint(run)
    assert checkpoint is not None
    start_from(engine, checkpoint)
    with torch.no_grad():
        logits = engine.chunks[0].eval()(global_batch(trial, 0).tokens)
    engine.close()
    return logits


@pytest.mark.parametrize("layout", [{"expert": 1}, {"expert": 2}, {"expert": 4}, {"tensor": 2}], ids=str)
def test_logits_do_not_depend_on_how_the_model_is_spread(
    ranks: RankPool, mixture: Path, layout: dict[str, int]
) -> None:
    parallel = ParallelConfig(**{"data": layout.get("expert", 1)} | layout)  # type: ignore[arg-type]
    expected = model_of(mixture)(global_batch(trial_of(mixture, parallel), 0).tokens)
    assert expected.shape[-1] % 2 == 1  # tensor ranks hold unequal parts of the vocabulary
    for found in ranks.run(max(layout.values()), logits_on, mixture, parallel):
        assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"expert": 2, "data": 2}, {"pipeline": 2}], ids=str)
@pytest.mark.parametrize("resume", [False, True], ids=["start_from", "resume"])
def test_losses_are_those_of_one_process(ranks: RankPool, mixture: Path, layout: dict[str, int], resume: bool) -> None:
    alone = ranks.run(1, losses_on, mixture, ParallelConfig(data=1), False)[0]
    batch = global_batch(trial_of(mixture, ParallelConfig(data=1)), 0)
    losses = model_of(mixture)(batch.tokens, batch.labels)
    assert alone[0] == pytest.approx(float(losses[batch.labels != IGNORE].mean()), abs=1e-5)
    for found in ranks.run(2, losses_on, mixture, ParallelConfig(**{"data": 1} | layout), resume):  # type: ignore[arg-type]
        assert found == pytest.approx(alone, abs=1e-5)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense run with moments, and the mixture of one expert that it is."""
    folder = tmp_path_factory.mktemp("warm")
    dense = make_warm_run(folder, MODEL)
    router = {"top_k": 1, "normalizer_gradient": False, "balance_loss": 0.0}
    values = {"run": str(folder / "moe"), "method": "sparse", "num_experts": 1, "router": router, "moments": "keep"}
    values |= {"router_start": {"std": 1e-9}}  # whose gradient would reach the model
    upcycle(build_config(UpcycleConfig, values | {"sources": [{"path": str(dense)}]}))
    return dense, folder / "moe"


def losses_after(rank: int, run: Path, parallel: ParallelConfig, keeps: bool) -> list[float]:
    """Losses of four steps of a run that starts from another."""
    trial = trial_of(run, parallel)
    engine = Engine(trial.model, parallel, trial.optimizer, "fp32", 99, torch.device("cpu"))
    checkpoint, _ = newest_checkpoint(run)
    assert checkpoint is not None
    start_from(engine, checkpoint, with_moments=keeps)
    found = [engine.train_step(_my_batches(engine, trial, 0), 1e-3).loss for _ in range(4)]
    engine.close()
    return found


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"data": 2}], ids=str)
def test_a_mixture_goes_on_warm(ranks: RankPool, warm: tuple[Path, Path], layout: dict[str, int]) -> None:
    """One expert is the dense model: its losses go on as the dense run's own would, which they do not from zero."""
    dense, moe = warm
    alone = ranks.run(1, losses_after, dense, ParallelConfig(data=1), True)[0]
    parallel = ParallelConfig(**{"data": 1} | layout)  # type: ignore[arg-type]
    for found in ranks.run(parallel.copies * (parallel.data or 1), losses_after, moe, parallel, True):
        assert found == pytest.approx(alone, abs=1e-4)
    cold = ranks.run(1, losses_after, moe, ParallelConfig(data=1), False)[0]
    assert cold[0] == pytest.approx(alone[0], abs=1e-5) and abs(cold[-1] - alone[-1]) > 1e-3
