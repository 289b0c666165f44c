"""Grow a mixture of experts from a corpus: `lightbulb recipe CONFIG [key=value ...] [--plan]`.

Reads a recipe such as configs/experts/cbtx-quick.yaml. Prepares the corpus in clusters, trains the seed, a branch for
each cluster, mixes them, tunes and decays the mixture, and compares it with the seed trained on for the same FLOPs.
Writes everything into one folder, with summary.json and report.html at the end. Run again, it goes on: what is done is
skipped, what a changed setting affects is done anew. `--plan` only prints lengths and costs. Next: `lightbulb generate
RUN/decay`. See docs/recipe.md.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightbulb.config import ConfigError
from lightbulb.data.config import DataError
from lightbulb.data.tokenizer import TokenizerError
from lightbulb.data_prep.counts import CorpusError
from lightbulb.data_prep.executor import ExecutorError
from lightbulb.experts.hf.family import InteropError
from lightbulb.experts.jobs import JobError
from lightbulb.experts.receipt import ReceiptError
from lightbulb.folder import FolderError
from lightbulb.recipes.config import load_recipe
from lightbulb.recipes.cost_table import Machine, cost_table
from lightbulb.recipes.engine import StageError
from lightbulb.recipes.pictures import NAMES
from lightbulb.recipes.plan import Plan
from lightbulb.recipes.stages import run_recipe
from lightbulb.train.checkpoint import CheckpointError

REFUSALS = (
    CheckpointError, ConfigError, CorpusError, DataError, ExecutorError, FolderError, InteropError, JobError,
    ReceiptError, StageError, TokenizerError,
)  # fmt: skip

WIDTH = 140
"""Columns of a table in a file."""


def main(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    options = _parser().parse_args(argv)
    try:
        plan = Plan(load_recipe(options.config, options.overrides))
        plan.check()
        if options.plan:
            console().print(cost_table(plan, Machine(options.mfu, options.tflops * 1e12)))
            return 0
        summary = run_recipe(plan)
    except REFUSALS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    show(summary, plan.recipe.run)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightbulb recipe", description="Grow a mixture of experts from a corpus.")
    parser.add_argument("config", metavar="CONFIG", help="recipe (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings such as branch.share=0.1")
    parser.add_argument("--plan", action="store_true", help="print stages, tokens, FLOPs, sizes and hours; do nothing")
    parser.add_argument("--mfu", type=_positive, default=0.4, metavar="SHARE", help="with --plan: of the peak (0.4)")
    parser.add_argument("--tflops", type=_positive, default=989.0, metavar="N", help="with --plan: of a device (989)")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def console() -> Console:
    """As wide as the terminal, or wide enough for the tables where there is none."""
    wide = Console()
    return wide if wide.is_terminal else Console(width=WIDTH)


def show(summary: Mapping[str, Any], run: Path) -> None:
    """Print what came out."""
    table = Table("", *("bits per byte", "training FLOPs", "FLOPs per predicted token", "parameters"))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, flops in summary["total_flops"].items():
        inference, parameters = summary["inference_flops_per_token"][name], summary["parameters"][name]
        table.add_row(
            NAMES[name], f"{summary[f'{name}_bpb']:.4f}", f"{flops:.4g}", f"{inference:.4g}", f"{parameters:,}"
        )
    console().print(table)
    print(f"report: {run / 'report.html'}")
    print(f"next: lightbulb generate {run / 'decay'} --prompt TEXT")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
