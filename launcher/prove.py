"""Prove that every layout trains the same model: `lightbulb prove CONFIG ... [key=value ...] --ranks N`.

Trains a few steps on every choice of tensor, pipeline, Ulysses, expert and data degrees that fits N CPU processes, with
the layout's options and the run file's variants taking turns, and compares losses, every gradient, gradient norm,
clipping, routers, weights and moments with plain PyTorch in one process. Reads run files (their corpora are not
needed); writes certificate.json and certificate.md of each to RUN/proof. The last line of the output is JSON, over all.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightbulb.config import ConfigError
from lightbulb.evaluation.certificate import COLUMNS, cell, summary, write_certificate
from lightbulb.evaluation.proof import BOUNDS, LayoutResult, Proof, Skipped, load_variants, plan, prove, trial_of
from lightbulb.evaluation.trial import Trial
from lightbulb.folder import FolderError, claim
from lightbulb.parallel.workers import JobError, RankPool
from lightbulb.train.config import RunConfig
from lightbulb.train.kernels import use_kernels


class Planned(NamedTuple):
    """What the proof of one run file will train."""

    variants: list[Trial]
    trials: list[Trial]
    skipped: list[Skipped]


def main(argv: Sequence[str]) -> int:
    """Run the command: 0 when every layout passed, 1 when one did not or nothing could be compared."""
    arguments = _parser().parse_intermixed_args(argv)
    overrides = [text for text in arguments.arguments if "=" in text]
    paths = [text for text in arguments.arguments if "=" not in text]
    console = Console(width=None if sys.stdout.isatty() else 180)
    proofs: dict[str, Proof] = {}
    certificates: dict[str, str] = {}
    try:
        if not paths:
            raise ConfigError("no run file given; name one, such as configs/debug/proof.yaml")
        use_kernels("auto")  # the ranks inherit the environment: what is wrong with it is said once, here
        files = {path: load_variants(path, overrides) for path in paths}
        plans = {path: _plan(configs, arguments.ranks, arguments.steps) for path, configs in files.items()}
        with _progress() as progress, _pool(arguments.ranks, progress) as pool:
            for path, configs in files.items():
                output = _output(configs, arguments.output, path if len(files) > 1 else "")
                with claim(output):
                    proofs[path] = _prove(path, plans[path], pool, progress)
                    write_certificate(proofs[path], configs, output)
                certificates[path] = str(output / "certificate.json")
                _show(proofs[path], output, console)
    except (ConfigError, FolderError, JobError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(summary(proofs) | {"certificates": certificates}))
    return 0 if all(proof.ok for proof in proofs.values()) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightbulb prove", description="Prove that all layouts train the same model.")
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="CONFIG",
        help="run files (YAML), and settings such as model.tie_embeddings=true",
    )
    parser.add_argument("--ranks", type=_positive, default=4, help="CPU processes of the largest layouts (default 4)")
    parser.add_argument("--steps", type=_positive, default=3, help="training steps (default 3)")
    parser.add_argument("--output", help="folder of the certificates (default: RUN/proof)")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _plan(configs: Mapping[str, RunConfig], ranks: int, steps: int) -> Planned:
    variants = [trial_of(config, steps, name) for name, config in configs.items()]
    return Planned(variants, *plan(variants, ranks))


def _output(configs: Mapping[str, RunConfig], folder: str | None, path: str) -> Path:
    """The folder of a certificate; with several run files in one folder, a folder for each of them in it."""
    if folder is None:
        return Path(next(iter(configs.values())).run, "proof").expanduser()
    return Path(folder, Path(path).stem if path else "").expanduser()


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


@contextmanager
def _pool(ranks: int, progress: Progress) -> Iterator[RankPool]:
    task = progress.add_task(f"starting {ranks} ranks", total=None)
    with RankPool(ranks) as pool:
        progress.remove_task(task)
        yield pool


def _prove(path: str, planned: Planned, pool: RankPool, progress: Progress) -> Proof:
    task = progress.add_task(path, total=len(planned.trials))

    def done(result: LayoutResult) -> None:
        verdict = "equal" if result.ok else "DIFFERENT"
        line = f"{result.trial.label()}: {verdict}, {result.seconds:.1f} s"
        progress.console.print(line, highlight=False, soft_wrap=True)
        progress.advance(task)

    return prove(*planned, pool, done)


def _show(proof: Proof, output: Path, console: Console) -> None:
    console.print(_table(proof))
    for skipped in proof.skipped:
        console.print(f"skipped {skipped.label}: {skipped.reason}", highlight=False, markup=False)
    console.print(f"certificate: {output / 'certificate.md'}", highlight=False, soft_wrap=True)
    for result in proof.results:
        for failure in result.failures:
            print(f"error: {failure}", file=sys.stderr)


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
