"""The stages of a recipe: what each reads and writes, and the library functions that do it.

::

    RUN/recipe.yaml            the settings in force
        corpus/                prepare    shards in clusters
        seed/                  seed       the dense model, warmup and constant learning rate
        branches/              branch     one run for each cluster
        mixture/               mix        their mixture, at step 0
        tune/                  tune       the mixture, constant learning rate
        decay/                 decay      the mixture, its last steps: the model
        dense/                 dense      the seed going on alone (baseline)
        evaluation/            evaluate   bits per byte of every arm, experts by domain
        summary.json *.png report.html    report
        files/                 run files of the trainings, for `lightbulb pretrain`
        stages/  replaced/     what was done with which settings; what changed settings have replaced
"""

from pathlib import Path
from typing import Any

import orjson

from lightbulb.data_prep.pipeline import preprocess
from lightbulb.experts.branch import branch
from lightbulb.experts.upcycle import upcycle
from lightbulb.recipes.engine import Stage, file_digest, run_stages
from lightbulb.recipes.evaluate import evaluate_arms
from lightbulb.recipes.plan import Plan
from lightbulb.recipes.report import PICTURES
from lightbulb.train.manifest import MANIFEST, step_folder

FILES, EVALUATION, SUMMARY, PAGE = "files", "evaluation", "summary.json", "report.html"
NOT_IN_CORPUS = ("executor", "output", "keep_work", "task_bytes")
"""Settings of a corpus that do not change what is in it."""


def run_recipe(plan: Plan) -> dict[str, Any]:
    """Do what of a recipe is not done yet; gives the summary.

    Raises:
        FolderError, StageError: as of :func:`run_stages`.
        JobError: a training failed or was stopped; the same call goes on from there.
        CheckpointError, ConfigError, CorpusError, DataError, ReceiptError, TokenizerError: as of the stages' functions.
    """
    run_stages(plan.recipe.run, stages_of(plan), lambda: _write_files(plan))
    return orjson.loads((plan.recipe.run / SUMMARY).read_bytes())


def stages_of(plan: Plan) -> list[Stage]:
    """All stages, in an order in which they can be done."""
    recipe, run = plan.recipe, plan.recipe.run
    corpus, mixture = recipe.corpus.output, plan.upcycle.run
    branches = [Path(config.run) for config in plan.branch_runs]
    arms = ["seed", "branch", "decay", *(["dense"] if recipe.baselines.dense else [])]
    found = [
        Stage(
            "prepare", f"{corpus}: {recipe.num_clusters} clusters", _corpus_settings(recipe.corpus), (), (corpus,),
            lambda: _ignore(preprocess(recipe.corpus)), lambda: _corpus_digest(corpus),
        ),
        _training(plan, plan.seed, ("prepare",)),
        Stage(
            "branch", f"{len(branches)} x {plan.branch.steps:,} steps", _branch_settings(plan), ("prepare", "seed"),
            (run / "branches",), lambda: _ignore(branch(plan.branch_config)), lambda: _runs_digest(plan.branch_runs),
        ),
        Stage(
            "mix", f"{mixture}: {plan.upcycle.method}", _mix_settings(plan), ("branch",), (mixture,),
            lambda: _ignore(upcycle(plan.upcycle)), lambda: file_digest(step_folder(mixture, 0) / MANIFEST),
        ),
        _training(plan, plan.tune, ("prepare", "mix")),
        _training(plan, plan.decay, ("prepare", "tune"), after=plan.tune),
    ]  # fmt: skip
    if recipe.baselines.dense:
        found.append(_training(plan, plan.dense, ("prepare", "seed"), after=plan.seed))
    results = run / EVALUATION
    found.append(
        Stage(
            "evaluate", "bits per byte of every arm", recipe.baselines.model_dump(mode="json"), ("prepare", *arms),
            (results,), lambda: evaluate_arms(plan, results), lambda: file_digest(results / "arms.json"),
        )
    )  # fmt: skip
    outputs = (run / SUMMARY, run / PAGE, *(run / name for name in PICTURES))
    found.append(
        Stage("report", str(run / PAGE), {"run": str(run)}, ("evaluate",), outputs, lambda: _report(plan), lambda: file_digest(*outputs))
    )
    return found
