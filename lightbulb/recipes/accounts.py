"""What every arm of a finished recipe scored and cost: ``summary.json``.

Training FLOPs are those of the tokens that were trained on, by the runs' own counts, times the model's FLOPs per token.
The seed's belong to every arm. The ensemble is of the branches as they are: it has spent no more than these. Its
inference runs every branch that has a weight.
"""

from pathlib import Path
from typing import Any, NamedTuple

import orjson

from lightbulb.recipes.arms import DENSE, ENSEMBLE, MIXTURE, SEED
from lightbulb.recipes.engine import STAGES, read_record
from lightbulb.recipes.plan import Plan, Training


class Spent(NamedTuple):
    """What one stage's training took."""

    tokens: int
    flops: float


def summarise(plan: Plan, arms: dict[str, Any]) -> dict[str, Any]:
    """The summary of a recipe.

    Args:
        plan: of the recipe.
        arms: what was found on the held-out text, as arms.py writes it.

    Raises:
        ValueError: a run has no readable summary.
    """
    stages = spent_by_stage(plan)
    by_arm = {name: {stage: stages[stage].flops for stage in stages_of_arm(plan, name)} for name in arms}
    dense, mixture = plan.seed.cost, plan.decay.cost
    inference = dict.fromkeys(arms, dense.forward_flops) | {MIXTURE: mixture.forward_flops}
    parameters = dict.fromkeys(arms, dense.params) | {MIXTURE: mixture.params}
    active = dict.fromkeys(arms, dense.active_params) | {MIXTURE: mixture.active_params}
    if ENSEMBLE in arms:
        inference[ENSEMBLE] = arms[ENSEMBLE]["flops_per_token"]
        parameters[ENSEMBLE] = active[ENSEMBLE] = dense.params * plan.branch.runs
    return {
        **{f"{name}_bpb": arms[name]["bpb"] if name in arms else None for name in (SEED, DENSE, ENSEMBLE, MIXTURE)},
        "total_flops": {name: sum(parts.values()) for name, parts in by_arm.items()},
        "flops_by_stage": by_arm,
        "tokens_by_stage": {name: spent.tokens for name, spent in stages.items()},
        "inference_flops_per_token": inference,
        "parameters": parameters,
        "active_parameters": active,
        "domain_bpb": {name: arm["domain_bpb"] for name, arm in arms.items()},
        "cluster_bpb": {name: arm["cluster_bpb"] for name, arm in arms.items()},
        "held_out": {key: arms[SEED][key] for key in ("tokens", "bytes")},
        "seconds_by_stage": seconds_by_stage(plan),
    }


def stages_of_arm(plan: Plan, arm: str) -> list[str]:
    """The trainings behind an arm."""
    later = {SEED: [], DENSE: [plan.dense.name], ENSEMBLE: [plan.branch.name]}
    return [SEED, *later.get(arm, [plan.branch.name, plan.tune.name, plan.decay.name])]


def spent_by_stage(plan: Plan) -> dict[str, Spent]:
    """Tokens and FLOPs of each training, from its runs' summaries.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    spent = {}
    for training in plan.trainings:
        runs = plan.branch_runs if training.name == plan.branch.name else [Path(training.config.run)]
        tokens = sum(map(_tokens, runs)) - _tokens_before(plan, training)
        spent[training.name] = Spent(tokens, tokens * training.flops_per_token)
    return spent


def seconds_by_stage(plan: Plan) -> dict[str, float]:
    """Time spent on each stage that is done, in the order in which they were; not on one that is switched off since."""
    is_off = set() if plan.recipe.baselines.dense else {plan.dense.name}
    paths = (path for path in (plan.recipe.run / STAGES).glob("*.json") if path.stem not in is_off)
    records = {path.stem: read_record(path) for path in paths}
    done = sorted(
        (record.finished, name, record.seconds) for name, record in records.items() if record and record.finished
    )
    return {name: round(seconds, 1) for _, name, seconds in done}


def _tokens_before(plan: Plan, training: Training) -> int:
    """Tokens that a run's count has from the run it goes on from."""
    parents = {plan.decay.name: plan.tune.config, plan.dense.name: plan.seed.config}
    return _tokens(Path(parents[training.name].run)) if training.name in parents else 0


def _tokens(run: Path) -> int:
    path = run.expanduser() / "summary.json"
    try:
        return int(orjson.loads(path.read_bytes())["tokens"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: no summary of a finished run ({error!r}); train it again") from None
