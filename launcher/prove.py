"""Prove that every layout trains the same model: `lightbulb prove CONFIG [key=value ...] --ranks N`.

Trains a few steps on every choice of tensor, pipeline, Ulysses, expert and data degrees that fits N CPU processes, with
the layout's options and the run file's variants taking turns, and compares losses, every gradient, gradient norm,
clipping, routers, weights and moments with plain PyTorch in one process. Reads a run file (its corpus is not needed);
writes certificate.json and certificate.md to RUN/proof. The last line of the output is JSON.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightbulb.config import ConfigError
from lightbulb.evaluation.certificate import COLUMNS, cell, summary, write_certificate
from lightbulb.evaluation.proof import BOUNDS, LayoutResult, Proof, load_variants, plan, prove, trial_of
from lightbulb.folder import FolderError, claim
from lightbulb.parallel.workers import JobError, RankPool
from lightbulb.train.config import RunConfig


def main(argv: Sequence[str]) -> int:
    """Run the command: 0 when every layout passed, 1 when one did not or nothing could be compared."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        configs = load_variants(arguments.config, arguments.overrides)
        run = next(iter(configs.values())).run
        output = Path(arguments.output or Path(run, "proof")).expanduser()
        with claim(output):
            proof = _prove(configs, arguments.ranks, arguments.steps)
            write_certificate(proof, configs, output)
    except (ConfigError, FolderError, JobError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(_table(proof))
    for skipped in proof.skipped:
        console.print(f"skipped {skipped.label}: {skipped.reason}", highlight=False, markup=False)
    console.print(f"certificate: {output / 'certificate.md'}", highlight=False, soft_wrap=True)
    for result in proof.results:
        for failure in result.failures:
            print(f"error: {failure}", file=sys.stderr)
    print(json.dumps(summary(proof) | {"certificate": str(output / "certificate.json")}))
    return 0 if proof.ok else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightbulb prove", description="Prove that all layouts train the same model.")
    parser.add_argument("config", help="run file (YAML)")
    parser.add_argument("overrides", nargs="*", help="settings such as model.tie_embeddings=true")
    parser.add_argument("--ranks", type=_positive, default=4, help="CPU processes of the largest layouts (default 4)")
    parser.add_argument("--steps", type=_positive, default=3, help="training steps (default 3)")
    parser.add_argument("--output", help="folder of the certificate (default: RUN/proof)")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _prove(configs: Mapping[str, RunConfig], ranks: int, steps: int) -> Proof:
    variants = [trial_of(config, steps, name) for name, config in configs.items()]
    trials, skipped = plan(variants, ranks)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"starting {ranks} ranks", total=len(trials))
        with RankPool(ranks) as pool:
            progress.update(task, description="layouts")

            def done(result: LayoutResult) -> None:
                verdict = "equal" if result.ok else "DIFFERENT"
                progress.console.print(
                    f"{result.trial.label()}: {verdict}, {result.seconds:.1f} s", highlight=False, soft_wrap=True
                )
                progress.advance(task)

            return prove(variants, trials, skipped, pool, done)


def _table(proof: Proof) -> Table:
    """The largest differences of each layout, red where a bound is broken."""
    table = Table("layout", "model", "micro", *COLUMNS.values(), "s", title="largest differences from one process")
    for column in table.columns[2:]:
        column.justify = "right"
    for result in proof.results:
        cells = []
        for quantity in COLUMNS:
            text = cell(result, quantity)
            broken = quantity in result.worst and not result.worst[quantity].value <= BOUNDS[quantity]
            cells.append(f"[red]{text}[/red]" if broken else text)
        label = result.trial.parallel.label()
        name = label if result.ok else f"[red]{label}[/red]"
        table.add_row(name, result.trial.variant, str(result.trial.micro_batch_size), *cells, f"{result.seconds:.1f}")
    table.add_section()
    table.add_row("allowed", "", "", *(f"{BOUNDS[quantity]:.0e}" for quantity in COLUMNS), "")
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
