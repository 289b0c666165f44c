"""A new run that goes on from a step of another one exactly as that one would: weights, moments, place in the data.

The folder of a fork is whole by itself: checkpoint, metrics and sample ledger up to the step. Files of the checkpoint
are linked where the file system can, so that several forks of one step cost no space; nothing ever writes to them.
Resuming is then all that training does. Only forks of the stable phase of a warmup-stable-decay run are made (MiniCPM,
Hu et al. 2024, arXiv:2404.06395): anywhere else the new decay would begin below or before the peak.
"""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from lightbulb.config import ConfigError, build_config, save_config
from lightbulb.folder import built_beside, explained, sync_folder
from lightbulb.train.checkpoint import Checkpoint
from lightbulb.train.config import RunConfig
from lightbulb.train.ledger import FOLDER as LEDGER
from lightbulb.train.ledger import rewind_ledger
from lightbulb.train.manifest import CheckpointError, TrainState, complete_checkpoints, read_state, step_folder
from lightbulb.train.metrics import FILE_NAME as METRICS
from lightbulb.train.metrics import MetricsWriter
from lightbulb.train.origin import Origin, write_origin
from lightbulb.train.schedule import decay_start, warmup_end

TOKENIZER = "tokenizer.json"


class ForkPoint(NamedTuple):
    """A checkpoint of a run and what it was trained with."""

    folder: Path
    state: TrainState
    config: RunConfig

    @property
    def run(self) -> Path:
        """Folder of the run."""
        return self.folder.parent.parent

    @property
    def unstable(self) -> str | None:
        """Why the learning rate is not at its peak here; None where it is."""
        step, steps, schedule = self.state.step, self.config.train.steps, self.config.schedule
        first, last = warmup_end(schedule, steps), decay_start(schedule, steps)
        if self.state.is_untrained:
            return "nobody has trained the run yet"
        if step < first:
            return f"step {step} is in the warmup, which lasts to step {first}"
        if step > last:
            return f"step {step} is in the decay, which begins after step {last} of {steps}"
        return None


def stable_point(run: Path, step: int | None = None) -> ForkPoint:
    """A checkpoint of the stable phase, whole: of a step, or the newest.

    Raises:
        CheckpointError: there is none, or it is damaged, or its step is not stable; those that are stable are named.
    """
    points = {point.state.step: point for point in map(_point, complete_checkpoints(run))}
    if not points:
        raise CheckpointError(f"{run}: has no checkpoint; name the folder of a run that has saved one")
    stable = [number for number in sorted(points) if points[number].unstable is None]
    names = ", ".join(map(str, stable)) or "none"
    advice = f"stable checkpoints here: {names} (train.save_every and train.keep_checkpoints say which there are)"
    if step is None and stable:
        step = stable[-1]
    if step is None:
        raise CheckpointError(f"{run}: {points[max(points)].unstable}; {advice}")
    if step not in points:
        raise CheckpointError(f"{run}: has no checkpoint of step {step}; {advice}")
    if (reason := points[step].unstable) is not None:
        raise CheckpointError(f"{run}: {reason}; {advice}")
    Checkpoint(points[step].folder)  # compares every file with its hash
    return points[step]


def fork(point: ForkPoint, config: RunConfig, origin: Origin) -> None:
    """Write the folder of a run that goes on from a checkpoint, under ``config.run``.

    Raises:
        FolderError: there is something already, or it cannot be written.
    """
    out, step = Path(config.run).expanduser(), point.state.step
    with built_beside(out) as folder, explained(folder):
        _link(point.folder, step_folder(folder, step))
        (folder / "checkpoints" / "latest").write_text(point.folder.name)
        for name in (METRICS, TOKENIZER):
            if (point.run / name).is_file():
                shutil.copyfile(point.run / name, folder / name)
        if (point.run / LEDGER).is_dir():
            shutil.copytree(point.run / LEDGER, folder / LEDGER)
        MetricsWriter(folder, config.train.steps).rewind(step)
        rewind_ledger(folder, step)
        save_config(config, folder / "config.yaml")
        write_origin(folder, origin)
        sync_folder(folder)


def _point(folder: Path) -> ForkPoint:
    state = read_state(folder)
    try:
        return ForkPoint(folder, state, build_config(RunConfig, state.config, str(folder)))
    except ConfigError as error:
        raise CheckpointError(f"{error}; it was written by another version") from None


def _link(source: Path, target: Path) -> None:
    """All files of a folder in another one: linked, or copied across file systems."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copyfile(file, target / file.name)
    sync_folder(target)
