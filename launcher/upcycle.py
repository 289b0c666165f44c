"""Make a mixture of experts of dense models: `lightbulb upcycle CONFIG [key=value ...]`.

Reads a config such as configs/experts/*.yaml (or a mergekit file: base_model, experts, gate_mode; add run=FOLDER), the
runs or Hugging Face folders it names, and corpora for routers that are learned. Writes a run folder with a checkpoint
of step 0 and a receipt of what went in and came out; where the result must equal the dense model and does not, nothing
is left behind. Next: `lightbulb pretrain` with `start_from:` that folder.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightbulb.config import ConfigError
from lightbulb.data.config import DataError
from lightbulb.data.tokenizer import TokenizerError
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
        config = load_upcycle_config(arguments.config, arguments.overrides)
        receipt = upcycle(config)
    except (
        CheckpointError, ConfigError, DataError, FolderError, InteropError, ReceiptError, TokenizerError
    ) as error:  # fmt: skip
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(receipt, config.run)
    return 0


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
    print(f"next: lightbulb pretrain with start_from: {out}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
