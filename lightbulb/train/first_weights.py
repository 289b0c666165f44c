"""Where a run's first weights come from when it starts from another run (``start_from``)."""

import logging
from pathlib import Path

import torch.distributed as dist

from lightbulb.parallel.collective import agree, on_rank_zero
from lightbulb.parallel.engine import Engine
from lightbulb.train.checkpoint import Checkpoint, CheckpointError, first_whole, newest_checkpoint, start_from
from lightbulb.train.manifest import MANIFEST
from lightbulb.train.origin import note_start

log = logging.getLogger(__name__)


def take_first_weights(engine: Engine, path: Path, with_moments: bool, run: Path) -> None:
    """Weights, and moments if wanted, from a run's newest checkpoint or from one that is named (a collective).

    Args:
        engine: new; what the checkpoint lacks keeps its initial values.
        path: a run folder, or ``RUN/checkpoints/step-00001000``.
        with_moments: take the optimizer's moments and step count too.
        run: the run that starts; its folder notes where it came from.

    Raises:
        CheckpointError: there is no whole checkpoint, or it is of another model.
        RankError: another rank has that error.
    """
    missing: list[str] = []
    error: Exception | None = None
    checkpoint, problems = _find(path)
    try:
        if checkpoint is None:
            raise CheckpointError(f"start_from: {path}: {problems[0] if problems else 'has no checkpoint'}")
        missing = start_from(engine, checkpoint, with_moments)
    except CheckpointError as caught:
        error = caught
    agree(error)
    assert checkpoint is not None
    everywhere: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, missing)
    own = ", ".join(sorted({name for names in everywhere for name in names}))
    log.info("initial weights from %s; parameters of its own: %s", checkpoint.folder, own or "none")
    source = checkpoint.folder
    on_rank_zero(lambda: note_start(run, source))


def _find(path: Path) -> tuple[Checkpoint | None, list[str]]:
    if on_rank_zero((path / MANIFEST).is_file):
        return first_whole([path], together=True)
    return newest_checkpoint(path, together=True)
