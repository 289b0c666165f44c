"""Fork a stable run into several decays: `lightbulb branch-decay RUN --at STEP --mix M1 M2 ... [key=value ...]`.

Reads a checkpoint of the run's stable phase and mixtures (files such as configs/mixes/*.yaml, or `same`). Writes a run
folder for each decay, RUN-decay-STEP/MIXTURE, which goes on with the run's weights, moments and place in the data while
its learning rate falls; trains those that are not complete; and compares them: a table, comparison.json and decays.png.
Run again, it goes on. Next: `lightbulb tree RUN-decay-STEP/*`, `lightbulb generate` or `export` with the best one.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console

from lightbulb.config import ConfigError, build_config
from lightbulb.experts.decays import FRACTION, SAME, Decays, branch_decay, prepare
from lightbulb.experts.jobs import JobError, JobsConfig, printed
from lightbulb.folder import FolderError
from lightbulb.train.manifest import CheckpointError
from lightbulb.train.schedule import Shape


def main(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    options = _parser().parse_intermixed_args(argv)
    words = options.mix or [SAME]
    settings = [*options.settings, *(word for word in words if "=" in word)]  # behind --mix they look like mixtures
    mixes = [word for word in words if "=" not in word] or [SAME]
    wanted = Decays(
        options.run, mixes, options.at, options.steps, options.fraction, options.shape, settings, options.out
    )  # fmt: skip
    try:
        values = {"ranks": options.ranks, "at_once": options.at_once, "restarts": options.restarts}
        jobs = build_config(JobsConfig, values | {"hostfiles": options.hostfile}, "jobs")
        if options.prepare_only:
            for number, config in enumerate(prepare(wanted)[1]):
                print(printed(config, jobs, number % jobs.slots))
            return 0
        found = branch_decay(wanted, jobs)
    except (CheckpointError, ConfigError, FolderError, JobError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    Console().print(found.table())
    print(f"curves: {found.picture}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightbulb branch-decay", description="Fork a stable run into decays.")
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run with a stable phase")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of all decays: schedule.final=0.1")
    parser.add_argument("--at", type=int, metavar="STEP", help="a stable checkpoint (default: the newest)")
    parser.add_argument(
        "--mix", action="extend", nargs="+", metavar="M", help=f"files of mixtures, or {SAME!r} (default: {SAME})"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=_positive, metavar="N", help="steps of each decay")
    length.add_argument(
        "--fraction", type=_fraction, default=FRACTION, metavar="F",
        help=f"or their part of the whole run (default {FRACTION})",
    )  # fmt: skip
    parser.add_argument("--shape", choices=get_args(Shape), help="how the learning rate falls (default: the run's)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the decays (default RUN-decay-STEP)")
    parser.add_argument("--prepare-only", action="store_true", help="write the folders, print the commands, stop")
    parser.add_argument("--ranks", type=_positive, metavar="K", help="processes of each decay, started by deepspeed")
    parser.add_argument("--at-once", type=_positive, default=1, metavar="J", help="decays at the same time")
    parser.add_argument("--restarts", type=int, default=0, metavar="N", help="as `lightbulb pretrain --restart`")
    parser.add_argument("--hostfile", type=Path, action="append", default=[], metavar="FILE", help="a node group each")
    return parser


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _fraction(text: str) -> float:
    if not 0 < (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
