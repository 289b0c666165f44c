"""Make a mixture of experts of dense models: `lightbulb upcycle CONFIG [key=value ...]`.

Reads a config such as configs/experts/*.yaml (or a mergekit file: base_model, experts, gate_mode; add run=FOLDER), the
runs or Hugging Face folders it names, and corpora for routers that are learned. Writes a run folder with a checkpoint
of step 0 and a receipt of what went in and came out; where the result must equal the dense model and does not, nothing
is left behind. With `method: fuse` it writes distributions for the rows of a corpus, and the run of a student that
learns from them. Next: `lightbulb pretrain` with that run's config, or with `start_from:` its folder.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lightbulb.config import ConfigError, load_config
from lightbulb.data.config import DataError
from lightbulb.data.tokenizer import TokenizerError
from lightbulb.experts.fuse import fuse
from lightbulb.experts.fuse_config import FuseConfig, is_fuse
from lightbulb.experts.hf.family import InteropError
from lightbulb.experts.receipt import Receipt, ReceiptError
from lightbulb.experts.upcycle import upcycle
from lightbulb.experts.upcycle_config import load_upcycle_config
from lightbulb.folder import FolderError
from lightbulb.train.checkpoint import CheckpointError


def main(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    parser = argparse.ArgumentParser(prog="lightbulb upcycle", description="Make a mixture of experts of dense models.")
    parser.add_argument("config", metavar="CONFIG", help="config (YAML), of our own or in mergekit's shape")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings such as run=runs/moe")
    arguments = parser.parse_args(argv)
    try:
        if is_fuse(arguments.config, arguments.overrides):
            fusing = load_config(FuseConfig, arguments.config, arguments.overrides)
            receipt, run = _fuse(fusing), fusing.run
        else:
            config = load_upcycle_config(arguments.config, arguments.overrides)
            receipt, run = upcycle(config), config.run
    except (
        CheckpointError, ConfigError, DataError, FolderError, InteropError, ReceiptError, TokenizerError
    ) as error:  # fmt: skip
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(receipt, run)
    return 0


def _fuse(config: FuseConfig) -> Receipt:
    """With a bar for each source."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def show_rows(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        return fuse(config, show_rows)


def show(receipt: Receipt, out: Path) -> None:
    """Print what was made."""
    count, before = len(receipt.sources), receipt.parameters_in / 1e6
    print(f"{out}: {receipt.parameters_out / 1e6:.2f} M parameters, from {before:.2f} M in {count} model(s)")
    if receipt.comparison is not None:
        found = receipt.comparison
        print(f"greatest difference of a logit {found.greatest_difference:.2g} from {found.reference}")
    for name, record in receipt.routers.items():
        loads = f"loads {min(record.load):.1%} to {max(record.load):.1%}"
        print(f"{name}: entropy {record.entropy:.3f} of the greatest, {loads}")
    for note in receipt.notes:
        print(note)
    print(f"receipt: {out / 'receipt.json'}")
    print(f"next: lightbulb pretrain {out / 'config.yaml'}, or another config with start_from: {out}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
