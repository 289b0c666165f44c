"""The small model of every family trains twenty steps on two ranks as it does in one process.

Not the ternary ones: in twenty steps some weight's or input's code flips on one layout and not on another, and what
follows differs. They are proven step by step, in float64 (configs/debug/parts).
"""

from dataclasses import replace
from pathlib import Path

import pytest

from lightbulb.config import load_config
from lightbulb.evaluation.proof import compare_layout
from lightbulb.evaluation.trial import Reference, Trial, train_reference
from lightbulb.parallel.optimizer import OptimizerConfig
from lightbulb.parallel.topology import ParallelConfig
from lightbulb.parallel.workers import RankPool
from lightbulb.train.config import RunConfig

FOLDER = Path(__file__).parents[2] / "configs/pretrain"
FAMILIES = ["retnet-small", "mamba2-small", "jetmoe-small", "deepseek-moe-small", "lory-small"]
STEPS = 20
LAYOUTS = {
    "DP2": {"data": 2},
    "TP2": {"tensor": 2, "data": 1},
    "PP2": {"pipeline": 2, "data": 1},
    "EP2": {"expert": 2, "data": 2},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, ranks: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trial, Reference, Path]:
    model = load_config(RunConfig, FOLDER / f"{request.param}.yaml").model
    # Shorter contexts and a smaller vocabulary: the layers are the family's own.
    model = model.model_copy(update={"vocab_size": 512, "context_length": 128})
    trial = Trial(model, OptimizerConfig(lr=1e-4, eps=1e-5), 5, STEPS, 2)
    folder = tmp_path_factory.mktemp(request.param)
    (reference,) = ranks.run(1, train_reference, trial, folder)
    return trial, reference, folder


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equality_of_twenty_steps(layout: str, family: tuple[Trial, Reference, Path], ranks: RankPool) -> None:
    trial, reference, folder = family
    parallel = ParallelConfig(**LAYOUTS[layout])
    try:
        trial.model.check_parallel(parallel.degrees())
    except ValueError as error:
        assert "has no effect" in str(error)  # a family without experts on an expert layout
        pytest.skip(str(error))
    result = compare_layout(replace(trial, parallel=parallel), reference, folder, ranks)
    assert reference.results[-1].loss < reference.results[0].loss
    assert result.worst["loss"].value <= 1e-5, result.worst["loss"]
    assert result.worst["grad_norm"].value <= 1e-3, result.worst["grad_norm"]
