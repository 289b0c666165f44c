"""Several decays of one stable run: `lightbulb branch-decay`.

A decay forked from step T goes on from the stable run's weights, moments and place in the data; only its learning rate
falls and its mixture is another (MiniCPM, Hu et al. 2024, arXiv:2404.06395, 4 and 5; Hägele et al. 2024,
arXiv:2405.18392: a decay of a tenth to a fifth of the run does what a whole cosine does). So the long stable phase is
paid for once, and mixtures for the end of training are compared for the price of their decays.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightbulb.config import ConfigError, changed
from lightbulb.data.config import Stage
from lightbulb.experts.decay_table import Comparison, compare
from lightbulb.experts.jobs import JobsConfig, run_jobs
from lightbulb.train.config import DETACHED, RunConfig
from lightbulb.train.fork import ForkPoint, fork, stable_point
from lightbulb.train.origin import Origin, parent_of, read_origin
from lightbulb.train.schedule import Shape, decay_start, warmup_end

SAME = "same"
FRACTION = 0.1


class Decays(NamedTuple):
    """What to fork.

    Attributes:
        run: the stable run.
        mixes: of each decay: a file of a mixture, or ``same`` for the mixture in force at the step.
        at: step of the checkpoint; None for the newest that is stable.
        steps: length of each decay; None to take it from ``fraction``.
        fraction: length of each decay as a part of the whole run that ends with it.
        shape: how the learning rate falls; None for the run's own.
        overrides: further settings of all decays, such as ``schedule.final=0.1``.
        out: folder of the decays' folders; None for ``RUN-decay-STEP``.
    """

    run: Path
    mixes: Sequence[str] = (SAME,)
    at: int | None = None
    steps: int | None = None
    fraction: float = FRACTION
    shape: Shape | None = None
    overrides: Sequence[str] = ()
    out: Path | None = None


def prepare(wanted: Decays) -> tuple[Path, list[Path]]:
    """Write the folders of the decays that are not there yet.

    Returns:
        the folder of all of them, and the run file of each.

    Raises:
        CheckpointError: the run has no such stable checkpoint.
        ConfigError: a setting cannot be, or a folder holds another decay already.
        FolderError: a folder cannot be written.
    """
    point = stable_point(wanted.run, wanted.at)
    out = wanted.out or wanted.run.with_name(f"{wanted.run.name}-decay-{point.state.step}")
    names = [Path(mix).stem for mix in wanted.mixes]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--mix: {twice} is there twice; give the mixtures' files different names")
    configs = []
    for name, mix in zip(names, wanted.mixes, strict=True):
        config = decay_config(point, wanted, mix, out / name)
        origin = Origin(kind="decay", parents=[parent_of(point.folder)], detail=_detail(config, mix))
        if not _is_there(out / name, origin):
            fork(point, config, origin)
        configs.append(out / name / "config.yaml")
    return out, configs


def branch_decay(wanted: Decays, jobs: JobsConfig) -> Comparison:
    """Prepare the decays, train those that are not complete, and compare them.

    Raises:
        JobError: some of them failed, or a signal came; the others are complete.
        CheckpointError, ConfigError, FolderError: as of :func:`prepare`.
    """
    out, configs = prepare(wanted)
    run_jobs(configs, jobs)
    return compare(wanted.run, [config.parent for config in configs], out)


def decay_config(point: ForkPoint, wanted: Decays, mix: str, folder: Path) -> RunConfig:
    """The run file of one decay. Warmup and earlier stages stand where they stood, counted in steps.

    Raises:
        ConfigError: a setting cannot be.
    """
    config, done = point.config, point.state.step
    if config.outer is not None:
        raise ConfigError(
            f"{point.run}: meets other branches (outer), which a decay of it alone would wait for; mix the branches "
            "with `lightbulb upcycle`, train the mixture and decay that"
        )
    length = wanted.steps if wanted.steps is not None else round(wanted.fraction * done / (1 - wanted.fraction))
    if length < 1:
        raise ConfigError(
            f"--fraction: {wanted.fraction} of a run of {done} stable steps is no step; say --steps, or a larger one"
        )
    total, warmup = done + length, warmup_end(config.schedule, config.train.steps) / (done + length)
    schedule: dict[str, Any] = {"warmup": warmup, "decay": min(length / total, 1 - warmup)}
    stages = [*_begun(config.data.stages, config, done), *([] if mix == SAME else [{"start": done, "mixture": mix}])]
    changes = {
        **DETACHED,
        "run": str(folder),
        "schedule": schedule | ({"shape": wanted.shape} if wanted.shape else {}),
        "data": {"stages": stages},
        "train": {"steps": total, "batch_stages": _begun(config.train.batch_stages, config, done)},
    }
    return changed(config, changes, wanted.overrides, f"decay {folder.name}")


def _begun(stages: Sequence[Stage], config: RunConfig, step: int) -> list[dict[str, Any]]:
    """The stages of a run that have begun before a step, their starts as steps."""
    steps = config.train.steps
    starts = [stage.first_step(steps, decay_start(config.schedule, steps)) for stage in stages]
    return [
        stage.model_dump(mode="json") | {"start": start}
        for start, stage in zip(starts, stages, strict=True)
        if start < step
    ]


def _detail(config: RunConfig, mix: str) -> dict[str, Any]:
    """What makes this decay another one than its siblings; that it is there already is seen by it."""
    return {
        "mix": Path(mix).stem,
        "steps": config.train.steps,
        "schedule": config.schedule.model_dump(mode="json"),
        "optimizer": config.optimizer.model_dump(mode="json"),
        "batch_stages": config.train.model_dump(mode="json")["batch_stages"],
        "data": config.data.model_dump(mode="json"),
    }


def _is_there(folder: Path, wanted: Origin) -> bool:
    """Whether the folder holds this decay.

    Raises:
        ConfigError: it holds another run.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    found = read_origin(folder)
    if found == wanted:
        return True
    if found is None or found.kind != "decay" or found.parents != wanted.parents:
        raise ConfigError(f"{folder}: holds another run; say another folder with --out")
    other = ", ".join(key for key in wanted.detail if found.detail.get(key) != wanted.detail[key])
    raise ConfigError(f"{folder}: holds a decay with another {other}; say another folder with --out, or remove it")
