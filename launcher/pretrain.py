"""Pretrain a model from a run file, on one process or many.

::

    deepspeed --num_gpus 8 launcher/pretrain.py configs/pretrain/NAME.yaml train.steps=1000
    deepspeed --hostfile hosts launcher/pretrain.py configs/pretrain/NAME.yaml      # several machines
    torchrun --nproc-per-node 8 launcher/pretrain.py configs/pretrain/NAME.yaml
    srun --ntasks-per-node 8 python launcher/pretrain.py configs/pretrain/NAME.yaml
    python launcher/pretrain.py configs/debug/quickstart.yaml                        # one process
    lightbulb pretrain configs/debug/quickstart.yaml                                 # the same
    lightbulb pretrain configs/pretrain/NAME.yaml --restart 3 --num_gpus 8           # deepspeed, again when it fails

Reads a corpus written by `lightbulb preprocess`; writes the run folder (config, metrics, checkpoints, samples,
report). Run again, it resumes. Next: `lightbulb generate RUN`.
"""

import sys
from pathlib import Path

if sys.path and Path(sys.path[0]) == Path(__file__).parent:
    del sys.path[0]  # as a script, its neighbours would answer to `import report` or `import schema`

import argparse
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch.distributed as dist

from lightbulb.config import ConfigError, load_config
from lightbulb.data.config import DataError
from lightbulb.data.mixture import OutOfRows
from lightbulb.evaluation.finish import finish_run
from lightbulb.folder import FolderError, FolderInUse
from lightbulb.parallel.collective import RankError
from lightbulb.parallel.host import pick_device, process_group, share_cores, tune_allocator
from lightbulb.parallel.rendezvous import LaunchError, adopt_environment
from lightbulb.train.ancestry import LauncherWatch
from lightbulb.train.config import RunConfig
from lightbulb.train.ending import Announced, announce, write_outcome
from lightbulb.train.exchange import ExchangeError
from lightbulb.train.loop import TrainingError, open_trainer
from lightbulb.train.manifest import CheckpointError, step_folder
from lightbulb.train.output import outlive_readers
from lightbulb.train.restart import Job, default_ranks, supervise

REFUSALS = (ConfigError, DataError, FolderError, CheckpointError, TrainingError, RankError, LaunchError, ExchangeError)
AGREED = (ConfigError, OutOfRows, TrainingError, RankError)


class Prepared(NamedTuple):
    """A run to train, and what is done when it is complete (on one process; it gives the exit code)."""

    config: RunConfig
    finish: Callable[[], int] = lambda: 0


def main(argv: list[str]) -> int:
    """Run the command; 0 when the run is complete or was stopped by a signal after saving."""
    parser = make_parser("pretrain", "Pretrain a model from a run file.")
    return train(argv, parser, lambda path, overrides: Prepared(load_config(RunConfig, path, overrides)), __file__)


def train(
    argv: list[str],
    parser: argparse.ArgumentParser,
    prepare: Callable[[str, list[str]], Prepared],
    script: str,
) -> int:
    """What commands that train have in common.

    Args:
        argv: arguments.
        parser: of :func:`make_parser`.
        prepare: makes a run of the path of its config and overrides.
        script: file that a launcher is to start.
    """
    options = parser.parse_args(argv)
    outlive_readers()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("lightbulb").setLevel(logging.INFO)
    try:
        config, finish = prepare(options.config, options.overrides)
        if options.restart is not None:
            ranks = default_ranks(options.num_gpus)
            arguments = [options.config, *options.overrides]
            fewest = min(options.min_ranks or ranks, ranks)
            return supervise(Job(Path(script), arguments, ranks, fewest, options.restart, options.hostfile), config)
        adopt_environment()
        code = pretrain(config, options.outcome)
        is_first = os.environ.get("RANK", "0") == "0"
        is_complete = step_folder(Path(config.run).expanduser(), config.train.steps).exists()
        return finish() if code == 0 and is_first and is_complete else code
    except Announced:
        return 1
    except REFUSALS as error:
        announce(error, REFUSALS)
        return 1


def make_parser(name: str, about: str) -> argparse.ArgumentParser:
    """The arguments of a command that trains."""
    parser = argparse.ArgumentParser(prog=f"lightbulb {name}", description=about)
    parser.add_argument("config", help="run file (YAML)")
    parser.add_argument("overrides", nargs="*", help="settings such as train.steps=100")
    parser.add_argument("--restart", type=int, metavar="N", help="start by deepspeed, again up to N times in a row")
    parser.add_argument("--num_gpus", type=int, metavar="K", help="with --restart: ranks (default: the machine's GPUs)")
    parser.add_argument("--min_ranks", type=int, metavar="M", help="with --restart: go on with fewer ranks, M at least")
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="with --restart: machines, as for deepspeed")
    parser.add_argument("--outcome", type=Path, help=argparse.SUPPRESS)  # from the supervisor of --restart
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # some launchers add it
    return parser


def pretrain(config: RunConfig, outcome: Path | None = None) -> int:
    """Train, evaluate on everything held out, and write what the run learned.

    Raises:
        Announced: the run failed, and this rank has said why.
    """
    tune_allocator()
    share_cores()
    watch = LauncherWatch()
    device = pick_device()
    with process_group(device, (config.train.hang_seconds or 86_400.0) * 4):
        logging.getLogger("lightbulb").setLevel(logging.INFO if dist.get_rank() == 0 else logging.ERROR)
        try:
            with open_trainer(config, device) as trainer:
                if not (finished := trainer.run()):
                    watch.stand_down()
                held_out = trainer.evaluate() if finished else None
                facts = trainer.facts()
                settled, folder = trainer.config, trainer.folder
            if dist.get_rank() == 0 and held_out is not None:
                finish_run(folder, settled, facts | held_out)
            elif dist.get_rank() == 0:
                print(f"stopped at step {facts['steps']} of {settled.train.steps}; run the same command to go on")
            dist.barrier()
        except Exception as error:
            if isinstance(error, REFUSALS) and not isinstance(error, FolderInUse):
                write_outcome(outcome, "refused")
            raise announce(error, REFUSALS, AGREED) from None
    if finished or watch.gone() is None:
        write_outcome(outcome, "finished" if finished else "stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
