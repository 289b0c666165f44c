"""Every part's run file on the layout that splits it in most ways.

`lightbulb prove configs/debug/parts/*.yaml` does all layouts; the slow tests beside this one each part's options.
"""

from pathlib import Path

import pytest
import torch

from lightbulb.evaluation.proof import compare_layout, load_variants, plan, trial_of
from lightbulb.evaluation.trial import Trial, train_reference
from lightbulb.models.language import LanguageConfig
from lightbulb.parallel.engine import Engine
from lightbulb.parallel.optimizer import OptimizerConfig, parts
from lightbulb.parallel.topology import ParallelConfig
from lightbulb.parallel.workers import RankPool

FOLDER = Path(__file__).parents[2] / "configs/debug/parts"
FILES = sorted(FOLDER.glob("*.yaml"))
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


def decays(rank: int, model: LanguageConfig) -> dict[str, float]:
    """The weight decay of every parameter."""
    engine = Engine(model, ParallelConfig(), OptimizerConfig(weight_decay=0.25), "fp32", 1, torch.device("cpu"))
    found = {}
    for name, parameter in engine.named_parameters():
        part = parts(engine.optimizer, parameter)
        assert part is not None
        (group,) = (g for g in part.optimizer.param_groups if any(part.master is held for held in g["params"]))
        found[name] = group["weight_decay"]
    engine.close()
    return found


def test_vectors_are_not_decayed_nor_those_of_experts(ranks: RankPool) -> None:
    (found,) = ranks.run(1, decays, load_variants(str(FOLDER / "gpt2.yaml"))["gpt2"].model)
    vectors = {name for name in found if name.endswith((".bias", "norm.weight"))}
    assert "blocks.1.channel.experts.each.down.bias" in vectors  # [experts, dim]
    assert {name: decay for name, decay in found.items() if decay == 0.0}.keys() == vectors
    assert {found[name] for name in found.keys() - vectors} == {0.25} and "positions.weight" in found
