"""Train one expert for each cluster of a corpus, from one seed: `lightbulb branch CONFIG [key=value ...]`.

Reads a config such as configs/experts/branch.yaml, the seed's run folder and a corpus in clusters. Writes a run folder
and a run file for each cluster, trains them one after the other, several at once or one per node group, and shows what
each gained on its cluster. Complete runs are skipped, others resume. `--prepare-only` writes the run files and prints
the commands. Next: `lightbulb upcycle RUN/upcycle.yaml`, or `lightbulb evaluate` on the branches as an ensemble.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lightbulb.config import ConfigError, load_config
from lightbulb.data.config import DataError
from lightbulb.data.tokenizer import TokenizerError
from lightbulb.experts.branch import NEXT, Branches
from lightbulb.experts.branch_config import BranchConfig
from lightbulb.experts.branch_scores import summarise
from lightbulb.experts.jobs import JobError, JobsStopped, printed, run_jobs
from lightbulb.folder import FolderError
from lightbulb.train.checkpoint import CheckpointError


def main(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code: 130 when a signal stopped it after its runs had saved."""
    parser = argparse.ArgumentParser(prog="lightbulb branch", description="Train one expert for each cluster.")
    parser.add_argument("config", metavar="CONFIG", help="config (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings such as run=runs/branches")
    parser.add_argument("--prepare-only", action="store_true", help="write the run files and print the commands")
    arguments = parser.parse_args(argv)
    try:
        config = load_config(BranchConfig, arguments.config, arguments.overrides)
        branches = Branches(config)
        for sentence in branches.warnings():
            print(f"warning: {sentence}", file=sys.stderr)
        branches.prepare()
        if arguments.prepare_only:
            for number, branch in enumerate(branches.branches):
                print(printed(branch.file, branches.jobs, number % branches.jobs.slots))
            return 0
        run_jobs([branch.file for branch in branches.branches], branches.jobs)
        show(summarise(branches))
    except JobsStopped as stop:
        print(stop, file=sys.stderr)
        return 130
    except (CheckpointError, ConfigError, DataError, FolderError, JobError, TokenizerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"next: lightbulb upcycle {config.run / NEXT}")
    return 0


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print what became of the branches."""
    table = Table("branch", "cluster's leading terms", title="Bits per byte of each cluster's held-out text")
    for name in ("tokens in it", "trained on", "seed", "branch"):
        table.add_column(name, justify="right")
    for row in rows:
        scores = ["-" if row[key] is None else f"{row[key]:.4f}" for key in ("before_bpb", "after_bpb")]
        words = " ".join(row["words"][:5]) or "-"
        table.add_row(str(row["cluster"]), words, f"{row['size']:,}", f"{row['tokens']:,}", *scores)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
