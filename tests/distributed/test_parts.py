"""Every part's run file on the layout that splits it in most ways.

`lightbulb prove configs/debug/parts/*.yaml` does all layouts; the slow tests beside this one each part's options.
"""

from pathlib import Path

import pytest

from lightbulb.evaluation.proof import compare_layout, load_variants, plan, trial_of
from lightbulb.evaluation.trial import Trial, train_reference
from lightbulb.parallel.workers import RankPool

FILES = sorted((Path(__file__).parents[2] / "configs/debug/parts").glob("*.yaml"))
STEPS = 2


def ways(trial: Trial) -> int:
    """In how many ways a layout splits the model and its training."""
    parallel = trial.parallel
    degrees = (parallel.tensor, parallel.pipeline, parallel.ulysses, parallel.expert, parallel.data or 1)
    return sum(degree > 1 for degree in degrees) + parallel.sequence + (parallel.interleave > 1)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_equality_of_every_part_on_the_most_split_layout(path: Path, ranks: RankPool, tmp_path: Path) -> None:
    variants = [trial_of(config, STEPS, name) for name, config in load_variants(str(path)).items()]
    trial = max(plan(variants, 4)[0], key=ways)
    assert ways(trial) >= 2
    (reference,) = ranks.run(1, train_reference, trial, tmp_path)
    result = compare_layout(trial, reference, tmp_path, ranks)
    assert result.ok, "\n".join(result.failures)
