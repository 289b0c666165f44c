"""The stages of a recipe: what each reads and writes, and the library functions that do it.

::

    RUN/corpus/       prepare    shards in clusters
        seed/         seed       the dense model: warmup and constant learning rate
        branches/     branch     a run for each cluster
        mixture/      mix        their mixture, at step 0
        tune/         tune       the mixture: warmup and constant learning rate
        decay/        decay      the mixture's last steps: the model
        dense/        dense      the seed going on alone (baseline)
        evaluation/   evaluate   bits per byte of every arm
        report.html   report     with summary.json and pictures
        recipe.yaml, files/      the settings in force, and the trainings' run files
        stages/, replaced/       what was done with which settings; what changed settings have replaced
"""

import sys
from collections.abc import Sequence, Set
from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson

from lightbulb.config import Config, ConfigError, flatten, save_config
from lightbulb.data.corpus import Corpus
from lightbulb.data.mixture import resolve
from lightbulb.data_prep.manifest import config_hash, read_manifest
from lightbulb.data_prep.pipeline import preprocess
from lightbulb.experts.branch import Branches
from lightbulb.experts.branch_config import BranchConfig
from lightbulb.experts.branch_scores import summarise
from lightbulb.experts.jobs import run_jobs
from lightbulb.experts.upcycle import upcycle
from lightbulb.folder import explained
from lightbulb.recipes.arms import ARMS, EVALUATION, evaluate_arms
from lightbulb.recipes.engine import Stage, file_digest, run_stages
from lightbulb.recipes.plan import Plan, Training
from lightbulb.recipes.report import OUTPUTS, write_report
from lightbulb.train.config import RunConfig
from lightbulb.train.fork import fork, stable_point
from lightbulb.train.manifest import MANIFEST, step_folder
from lightbulb.train.origin import Origin, parent_of
from lightbulb.train.resume import Rule, rule_of

FILES = "files"
FREE_OF_CORPUS = {"output", "executor", "task_bytes", "keep_work"}
"""Settings of a corpus that do not change its rows."""
FREE_OF_BRANCHES = {"run", "seed_run", "corpus", "jobs"}
FREE_OF_MIXTURES = {"run", "sources", "seed_model", "data", "train"}


def run_recipe(plan: Plan) -> dict[str, Any]:
    """Do what of a recipe is not done yet; gives its summary.

    Raises:
        FolderError, StageError: as of :func:`run_stages`.
        JobError: a training failed or was stopped; the same call goes on from there.
        ConfigError: a hostfile is missing; nothing was begun.
        CheckpointError, ConfigError, CorpusError, DataError, ReceiptError, TokenizerError: as of the stages' work.
    """
    run = plan.recipe.run
    _check_hostfiles(plan)
    run_stages(run, stages_of(plan), lambda: save_config(plan.recipe, run / "recipe.yaml"))
    return orjson.loads((run / OUTPUTS[0]).read_bytes())


def stages_of(plan: Plan) -> list[Stage]:
    """All stages, in an order in which they can be done."""
    recipe = plan.recipe
    stages = [
        _prepare(plan),
        _training(plan, plan.seed, ("prepare",)),
        _branch(plan),
        _mix(plan),
        _training(plan, plan.tune, ("prepare", "mix")),
        _training(plan, plan.decay, ("prepare", "tune"), after=plan.tune),
    ]
    if recipe.baselines.dense:
        stages.append(_training(plan, plan.dense, ("prepare", "seed"), after=plan.seed))
    return [*stages, _evaluate(plan), _report(plan)]


def _prepare(plan: Plan) -> Stage:
    """The corpus: the recipe's own, or one that others use too and that must be as the recipe wants it."""
    config = plan.recipe.corpus
    is_own = config.output.resolve().is_relative_to(plan.recipe.run.resolve())

    def work() -> None:
        found = read_manifest(config.output.expanduser())
        if found is not None and not is_own and found["config_hash"] != config_hash(config):
            raise ConfigError(
                f"corpus.output: {config.output} holds a corpus of other settings; leave output out, or name a folder "
                "that is not there yet"
            )
        preprocess(config)

    def digest() -> str | None:
        found = read_manifest(config.output.expanduser())
        if found is None or found["config_hash"] != config_hash(config):
            return None
        return str(found["digest"])

    settings = _settings(config, FREE_OF_CORPUS)
    title = f"{config.output}, in {plan.recipe.num_clusters} clusters"
    return Stage("prepare", title, settings, (), (config.output,) if is_own else (), work, digest, _defaults(config))


def _training(plan: Plan, training: Training, needs: Sequence[str], after: Training | None = None) -> Stage:
    """A run of its own, which may go on from another one's last step."""
    config, folder = training.config, Path(training.config.run)

    def work() -> None:
        _check_mixtures(plan)
        if after is not None and not folder.exists():
            point = stable_point(Path(after.config.run), after.config.train.steps)
            detail = {"steps": config.train.steps, "schedule": config.schedule.model_dump(mode="json")}
            fork(point, config, Origin(kind="decay", parents=[parent_of(point.folder)], detail=detail))
        run_jobs([_write(plan, training.name, config)], plan.recipe.jobs)

    def digest() -> str | None:
        return run_digest(folder, config.train.steps)

    title = f"{folder}: {training.steps:,} steps, {training.tokens / 1e6:,.2f} M tokens"
    return Stage(training.name, title, run_settings(config), needs, (folder,), work, digest, _defaults(config))


def _check_hostfiles(plan: Plan) -> None:
    """Whether the machines of every stage are named: those of the branches are not first looked for after the seed."""
    for name, jobs in (("jobs", plan.recipe.jobs), ("branch.jobs", plan.recipe.branch.jobs)):
        for path in jobs.hostfiles:
            if not path.is_file():
                raise ConfigError(f"{name}.hostfiles: {path} is no file; write a line for each machine: NAME slots=8")


def _check_mixtures(plan: Plan) -> None:
    """Whether the corpus has what every training will draw: a decay's names are not first read after months.

    Raises:
        DataError: a name matches nothing.
    """
    model = plan.recipe.seed.model
    groups = Corpus(plan.recipe.corpus.output.expanduser(), "train", model.context_length, model.vocab_size).groups
    for training in plan.trainings:
        for _, mixture in training.config.mixtures():
            resolve(mixture, groups)


def _branch(plan: Plan) -> Stage:
    config, training = plan.branch_config, plan.branch

    def work() -> None:
        branches = Branches(config)
        for sentence in branches.warnings():
            print(f"warning: {sentence}", file=sys.stderr)
        branches.prepare()
        run_jobs([branch.file for branch in branches.branches], branches.jobs)
        summarise(branches)

    def digest() -> str | None:
        found = [run_digest(run, training.steps) for run in plan.branch_runs]
        return None if None in found else sha256("".join(map(str, found)).encode()).hexdigest()

    title = f"{training.runs} runs of {training.steps:,} steps, {training.tokens / 1e6:,.2f} M tokens together"
    return Stage(
        "branch", title, branch_settings(config), ("prepare", "seed"), (config.run,), work, digest, _defaults(config)
    )


def _mix(plan: Plan) -> Stage:
    config = plan.upcycle

    def digest() -> str | None:
        return file_digest(step_folder(config.run, 0) / MANIFEST)

    title = f"{config.run}: {config.method}, {config.experts} experts"
    settings, work = _settings(config, FREE_OF_MIXTURES), lambda: _done(upcycle(config))
    return Stage("mix", title, settings, ("branch",), (config.run,), work, digest, _defaults(config))


def _evaluate(plan: Plan) -> Stage:
    out, baselines = plan.recipe.run / EVALUATION, plan.recipe.baselines
    arms = ["seed", "branch", "decay", *(["dense"] if baselines.dense else [])]
    return Stage(
        "evaluate", f"held-out text of {plan.recipe.corpus.output}", _settings(baselines, set()),
        ("prepare", *arms), (out,), lambda: evaluate_arms(plan, out), lambda: file_digest(out / ARMS),
        _defaults(baselines),
    )  # fmt: skip


def _report(plan: Plan) -> Stage:
    run = plan.recipe.run
    paths = [run / name for name in OUTPUTS]
    needs = ("evaluate", "mix", "tune")
    return Stage("report", str(paths[1]), {}, needs, paths, lambda: write_report(plan), lambda: file_digest(*paths))


def run_settings(config: RunConfig) -> dict[str, Any]:
    """What of a run file decides the weights at its end, by the rules for resuming a run."""
    free = ("run", "start_from", "data.path")
    flat = flatten(config.model_dump(mode="json"))
    return {key: value for key, value in flat.items() if rule_of(key) is not Rule.FREE and key not in free}


def branch_settings(config: BranchConfig) -> dict[str, Any]:
    """The same of branches: by those rules for their runs' settings, and for when they meet."""
    flat = flatten(config.model_dump(mode="json", exclude=FREE_OF_BRANCHES))
    runs = {key: "outer." + key.removeprefix("sync.") if key.startswith("sync.") else key for key in flat}
    return {key: value for key, value in flat.items() if rule_of(runs[key]) is not Rule.FREE}


def run_digest(run: Path, steps: int) -> str | None:
    """Hash of a run's last checkpoint; None until it has trained all steps and written its summary."""
    try:
        done = orjson.loads((run / "summary.json").read_bytes())["steps"]
    except (OSError, ValueError, KeyError):
        return None
    return file_digest(step_folder(run, steps) / MANIFEST) if done == steps else None


def _defaults(config: Config) -> Set[str]:
    """Paths of the settings that have their default."""
    whole, given = (config.model_dump(mode="json", exclude_defaults=exclude) for exclude in (False, True))
    return flatten(whole).keys() - flatten(given).keys()


def _settings(config: Config, free: set[str]) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=free)


def _write(plan: Plan, name: str, config: RunConfig) -> Path:
    """The run file of a training."""
    path = plan.recipe.run / FILES / f"{name}.yaml"
    with explained(path):
        path.parent.mkdir(exist_ok=True)
    save_config(config, path)
    return path


def _done(result: object) -> None:
    """A stage's result is what lies in its folder."""
