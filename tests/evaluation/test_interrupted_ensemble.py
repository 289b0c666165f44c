"""An ensemble whose evaluation was interrupted goes on branch by branch, and ends with the same result."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Command
from small_models import MODEL
from training_runs import wait_for, write_run_file

from lightbulb.config import load_config
from lightbulb.data.config import DataError
from lightbulb.evaluation.ensemble import EnsembleConfig
from lightbulb.evaluation.kept_losses import FOLDER
from lightbulb.evaluation.results import FILE
from lightbulb.evaluation.runs import EvaluationConfig, Subject, evaluate_ensemble
from lightbulb.folder import FolderInUse, claim
from lightbulb.launcher import evaluate
from lightbulb.parallel.host import process_group
from lightbulb.train.config import RunConfig
from lightbulb.train.loop import open_trainer

BRANCHES = 4


@pytest.fixture(scope="module")
def trained_branches(clustered: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs from different seeds."""
    root, device = tmp_path_factory.mktemp("branches"), torch.device("cpu")
    train = {"steps": 2, "global_batch_size": 8, "micro_batch_size": 4, "precision": "fp32"}
    for seed in range(BRANCHES):
        file = write_run_file(root, clustered, f"branch-{seed}", model=MODEL, train=train, seed=seed)
        with process_group(device), open_trainer(load_config(RunConfig, file), device) as trainer:
            assert trainer.run()
    return [root / f"branch-{seed}" for seed in range(BRANCHES)]


@pytest.fixture
def branches(trained_branches: list[Path], tmp_path: Path) -> list[Path]:
    """Copies that may be changed."""
    return [Path(shutil.copytree(run, tmp_path / run.name)) for run in trained_branches]


def lose_weights(runs: list[Path]) -> None:
    """From here on nothing can be read by these branches."""
    for run in runs:
        for path in (run / "checkpoints").glob("step-*/model-*.safetensors"):
            path.unlink()


def losses_in(out: Path) -> list[Path]:
    return sorted((out / FOLDER).glob("*.safetensors"))


def result_of(out: Path) -> dict[str, Any]:
    return json.loads((out / FILE).read_text())


def test_killed_between_branches(
    branches: list[Path], clustered: Path, tmp_path: Path, start: Callable[..., Command]
) -> None:
    argv = [*map(str, branches), "--data", str(clustered), "--ensemble", "likelihood", "--batch-size", "1"]
    argv += ["--max-contexts", "40"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert evaluate.main([*argv, "--out", str(whole)]) == 0
    command = start("evaluate", [*argv, "--out", str(out)])
    wait_for(lambda: losses_in(out), seconds=240)
    command.kill()
    finished = losses_in(out)
    assert 1 <= len(finished) < BRANCHES and not (out / FILE).exists()
    assert {path.name for path in finished} < {path.name for path in losses_in(whole)}
    lose_weights(branches[: len(finished)])
    times = [path.stat().st_mtime_ns for path in finished]
    assert evaluate.main([*argv, "--out", str(out)]) == 0
    assert result_of(out) == result_of(whole)
    assert [path.stat().st_mtime_ns for path in finished] == times
    assert [path.read_bytes() for path in losses_in(out)] == [path.read_bytes() for path in losses_in(whole)]


def ensemble_of(runs: list[Path], corpus: Path, out: Path, contexts: int | None = None, **settings) -> dict[str, Any]:
    """Evaluate few contexts; ``progress`` and ``again`` are arguments, what else is given is the ensemble's."""
    more = {name: settings.pop(name) for name in ("progress", "again") if name in settings}
    subjects = [Subject(run, EvaluationConfig(max_contexts=contexts)) for run in runs]
    return evaluate_ensemble(subjects, corpus, EnsembleConfig(weights="likelihood", **settings), out, **more)


def test_other_settings_of_the_same_branches_read_nothing(
    branches: list[Path], clustered: Path, tmp_path: Path
) -> None:
    first, out = ensemble_of(branches[:2], clustered, tmp_path / "out", 6), tmp_path / "out"
    lose_weights(branches[:2])
    cold = ensemble_of(branches[:2], clustered, out, 6, temperature=0.1)
    assert cold["members"] == first["members"] and cold["bpb"] != first["bpb"] and len(losses_in(out)) == 2
    (out / FOLDER / "other.partial").write_text("of a run that was killed")
    ensemble_of(branches[2:], clustered, out, 6)
    assert sorted((out / FOLDER).iterdir()) == losses_in(out) and len(losses_in(out)) == 2  # those of the others went


def test_progress_counts_every_branch_and_the_ensemble(branches: list[Path], clustered: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    ensemble_of(branches[:2], clustered, tmp_path / "out", 12, progress=lambda *facts: seen.append(facts))
    assert seen == [(8, 36), (12, 36), (20, 36), (24, 36), (32, 36), (36, 36)]
    del seen[:]
    ensemble_of(branches[:3], clustered, tmp_path / "out", 12, progress=lambda *facts: seen.append(facts))
    assert seen == [(24, 48), (32, 48), (36, 48), (44, 48), (48, 48)]
    del seen[:]
    ensemble_of(branches[:2], clustered, tmp_path / "out", 12, progress=lambda *facts: seen.append(facts), again=True)
    assert seen[0] == (8, 36)


def test_kept_losses_that_are_damaged_are_named(branches: list[Path], clustered: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ensemble_of(branches[:1], clustered, out, 4)
    (path,) = losses_in(out)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"safetensors: damaged: .* remove the file"):
        ensemble_of(branches[:1], clustered, out, 4, temperature=2.0)


def test_two_evaluations_do_not_share_a_folder(branches: list[Path], clustered: Path, tmp_path: Path) -> None:
    with claim(tmp_path / "out"), pytest.raises(FolderInUse, match="in use by"):
        ensemble_of(branches[:1], clustered, tmp_path / "out", 4)
