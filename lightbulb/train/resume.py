"""Going on from a checkpoint with settings that may have changed since.

The config in force is always the one the run is started with; nothing of the checkpoint overrides it. Whether a change
is possible at all, worth a word, or nobody's business is written in :data:`RULES`.
"""

import logging
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import torch

from lightbulb.config import ConfigError, build_config, flatten
from lightbulb.parallel.host import Precision, pick_precision
from lightbulb.train.checkpoint import Checkpoint, CheckpointError, newest_checkpoint
from lightbulb.train.config import RunConfig

log = logging.getLogger(__name__)


class Rule(Enum):
    """What a changed setting means for a run that goes on."""

    FIXED = "it would be another run: refused"
    SAID = "allowed and honoured from the next step on, with a warning"
    FREE = "changes neither model nor losses: nothing is said"


RULES = {
    "model": Rule.FIXED,
    "seed": Rule.FIXED,
    "data.shuffle": Rule.FIXED,
    "data.part": Rule.FIXED,
    "train.global_batch_size": Rule.FIXED,
    "train.precision": Rule.FIXED,
    "train.trainable": Rule.FIXED,  # what was frozen has no moments; start_from another run goes on with another choice
    "optimizer": Rule.SAID,  # also the betas: a lower learning rate or other betas are how spikes are cured
    "schedule": Rule.SAID,
    "train.steps": Rule.SAID,  # the schedule counts in fractions of it
    "train.batch_stages": Rule.SAID,  # those that have begun are held to what they were, by the samples read
    "train.max_skipped_steps": Rule.SAID,
    "train.kernels": Rule.SAID,  # the same function, rounded otherwise
    "data.document_mask": Rule.SAID,
    "data.mixture": Rule.SAID,  # also a first one: every group goes on where it stood
    "data.stages": Rule.SAID,
    "data.path": Rule.SAID,  # the same corpus elsewhere: its digest is compared when the loader resumes
    "run": Rule.FREE,
    "start_from_moments": Rule.FREE,
    "start_from": Rule.FREE,  # where weights came from before there was a checkpoint
    "distil": Rule.SAID,
    "outer": Rule.FIXED,  # rounds are counted by it
    "outer.lr": Rule.SAID,
    "outer.momentum": Rule.SAID,
    "outer.nesterov": Rule.SAID,
    "outer.folder": Rule.FREE,
    "outer.wait_seconds": Rule.FREE,
    "prompts": Rule.FREE,
    "parallel": Rule.FREE,
    "train": Rule.FREE,  # how often and how: micro-batches, saving, evaluating, logging
}
"""Setting to rule; the longest name that a setting's path begins with counts. What is not here is SAID."""

MAX_NAMED = 8


def find_checkpoint(run: Path, config: RunConfig) -> Checkpoint | None:
    """What a run goes on from, with a warning for each damaged checkpoint and each changed setting (a collective).

    Returns:
        None where the run has not saved yet.

    Raises:
        CheckpointError: none is whole, or a change is not allowed.
    """
    checkpoint, problems = newest_checkpoint(run, together=True)
    for problem in problems:
        log.warning("passed over a checkpoint: %s", problem)
    if checkpoint is not None:
        for change in check_resumable(checkpoint, config):
            log.warning("resuming with a changed setting: %s", change)
    elif problems:
        raise CheckpointError(
            f"{run}: no checkpoint is intact ({problems[0]}); restore one, or remove the checkpoints folder to start "
            "anew"
        )
    return checkpoint


def check_resumable(checkpoint: Checkpoint, config: RunConfig) -> list[str]:
    """Compare with the config the checkpoint was trained with; of a conversion's, only the model is given.

    Returns:
        one sentence per change that is allowed and worth saying.

    Raises:
        CheckpointError: some changes are not allowed; all of them are named with both values.
    """
    before, now = flatten(_completed(checkpoint.state.config)), flatten(config.model_dump(mode="json"))
    untrained = checkpoint.state.is_untrained
    said, refused = [], []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old == new or (key == "train.precision" and new == "auto"):
            continue
        if untrained and not key.startswith("model."):
            continue  # no step was taken with it
        rule = rule_of(key)
        if rule is Rule.FIXED:
            refused.append(f"{key} = {old}, this config has {new}")
        elif rule is Rule.SAID:
            said.append(f"{key} was {old}, is now {new}")
    if refused:
        more = f" (and {len(refused) - MAX_NAMED} more)" if len(refused) > MAX_NAMED else ""
        raise CheckpointError(
            f"{checkpoint.folder}: trained with {'; '.join(refused[:MAX_NAMED])}{more}; use the run's own config.yaml, "
            "or another run folder for the changed one"
        )
    _check_samples(checkpoint, config)
    return said


def settle_precision(config: RunConfig, checkpoint: Checkpoint | None, device: torch.device) -> RunConfig:
    """Fix the precision: the checkpoint's when resuming, the device's best when the config leaves it open."""
    precision: Precision | Literal["auto"] = config.train.precision
    if precision == "auto":
        precision = pick_precision(device, config.model.dim)
        if checkpoint is not None:
            precision = checkpoint.state.config["train"]["precision"]
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})


def _check_samples(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Whether the batch sizes up to the checkpoint are those it was trained with."""
    state = checkpoint.state
    read, wanted = state.loader.get("samples_consumed"), config.batch_sizes().samples(state.step)
    if not state.is_untrained and read != wanted:
        raise CheckpointError(
            f"{checkpoint.folder}: {read} contexts were read up to step {state.step}, with this config's "
            f"train.batch_stages it would be {wanted}; only stages after that step may change (a start that is a step "
            "stays where it is when train.steps changes)"
        )


def rule_of(key: str) -> Rule:
    """The rule for a setting's path, such as ``optimizer.lr``."""
    names = key.split(".")
    for length in range(len(names), 0, -1):
        if rule := RULES.get(".".join(names[:length])):
            return rule
    return Rule.SAID


def _completed(values: dict[str, Any]) -> dict[str, Any]:
    """A stored config with the settings that came after it at their defaults."""
    try:
        return build_config(RunConfig, values).model_dump(mode="json")
    except ConfigError:
        return values  # of a version that knew other settings: they show as differences
