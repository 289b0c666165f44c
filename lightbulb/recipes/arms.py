"""The arms of a recipe on the corpus's held-out text: ``evaluation/arms.json``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from lightbulb.evaluation.results import reading_bar
from lightbulb.evaluation.runs import EvaluationConfig, Subject, evaluate_ensemble, evaluate_run
from lightbulb.folder import explained, write_atomically
from lightbulb.recipes.plan import Plan

EVALUATION, ARMS = "evaluation", "arms.json"
"""Folder, and the file in it with what was found."""
SEED, DENSE, ENSEMBLE, MIXTURE = "seed", "continued_dense", "ensemble", "moe"
SCORES = ("bpb", "loss", "domain_bpb", "cluster_bpb", "tokens", "bytes")


def arm_runs(plan: Plan) -> dict[str, Path]:
    """The run behind each arm that is one."""
    runs = {SEED: Path(plan.seed.config.run)}
    if plan.recipe.baselines.dense:
        runs[DENSE] = Path(plan.dense.config.run)
    return runs | {MIXTURE: Path(plan.decay.config.run)}


def evaluate_arms(plan: Plan, out: Path) -> None:
    """Evaluate every arm and write what is found; a run's own share is in its ``evaluation.json``.

    Raises:
        CheckpointError, DataError: a run or the corpus cannot be read.
        FolderError: a folder cannot be written.
    """
    corpus, options = plan.recipe.corpus.output, EvaluationConfig()
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, run in arm_runs(plan).items():
        with reading_bar(name) as progress:
            found[name] = evaluate_run(Subject(run, options), corpus, progress=progress)
    if (config := plan.recipe.baselines.ensemble) is not None:
        branches = [Subject(run, options) for run in plan.branch_runs]
        with reading_bar(ENSEMBLE) as progress:
            found[ENSEMBLE] = evaluate_ensemble(branches, corpus, config, out / ENSEMBLE, progress=progress)
    arms = {name: _of_interest(result) for name, result in found.items()}
    write_atomically(out / ARMS, orjson.dumps(arms, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS))


def _of_interest(result: Mapping[str, Any]) -> dict[str, Any]:
    more = {name: result[name] for name in ("flops_per_token", "experts", "members", "weights") if name in result}
    return {name: result[name] for name in SCORES} | more
