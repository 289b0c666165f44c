"""Write a run's model as a Hugging Face folder: `lightbulb export RUN OUT [--dtype bf16] [--data CORPUS]`.

Reads the newest checkpoint of a run. Writes config.json, safetensors, tokenizer and generation config, in a stock
architecture when the model is one, else with a modelling file for `trust_remote_code=True`; and receipt.json: digests
of all tensors, and the logits that transformers computes against ours. When a logit differs by more than the bound,
nothing is left behind. Next: `AutoModelForCausalLM.from_pretrained(OUT)`.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from lightbulb.config import ConfigError
from lightbulb.data.config import DataError
from lightbulb.data.tokenizer import TokenizerError
from lightbulb.experts.hf.convert import Options, export
from lightbulb.experts.hf.family import InteropError
from lightbulb.experts.receipt import Receipt, ReceiptError
from lightbulb.folder import FolderError
from lightbulb.train.checkpoint import CheckpointError

ERRORS = (CheckpointError, ConfigError, DataError, FolderError, InteropError, ReceiptError, TokenizerError)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def main(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    parser = argparse.ArgumentParser(prog="lightbulb export", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default fp32)")
    size = "bytes of a file at most, such as 500M; so much memory is used (default 4G)"
    parser.add_argument("--shard-size", type=parse_size, default=Options.shard_bytes, help=size)
    add_shared_options(parser)
    options = parser.parse_args(argv)
    try:
        chosen = Options(DTYPES[options.dtype], options.shard_size, options.data, options.bound)
        receipt = export(options.run, options.out, chosen)
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(receipt, options.out)
    print(f'next: AutoModelForCausalLM.from_pretrained("{options.out}")')
    return 0


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """What export and import have both."""
    text = "corpus whose held-out text the models are compared on (default: the source of a module of Python's)"
    parser.add_argument("--data", metavar="CORPUS", type=Path, help=text)
    bound = f"greatest difference of a logit that is let through (default {Options.bound:g})"
    parser.add_argument("--bound", type=float, default=Options.bound, help=bound)


def parse_size(text: str) -> int:
    """``"500M"`` as 500,000,000."""
    match = re.fullmatch(r"(\d+)([KMG]?)B?", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it like 500M or 4G")
    return int(match[1]) * UNITS[match[2]]


def show(receipt: Receipt, out: Path) -> None:
    """Print a receipt."""
    found = receipt.comparison
    assert found is not None  # exports and imports always compare
    print(f"{out}: {receipt.architecture}, {receipt.parameters_out:,} parameters in {len(receipt.tensors_out)} tensors")
    for note in receipt.notes:
        print(f"note: {note}")
    count = sum(map(len, found.text.token_ids))
    print(
        f"against {found.reference} on {count} tokens ({found.text.source}): greatest difference of a logit "
        f"{found.greatest_difference:.2g} (bound {found.bound:g}), the same choice for {found.same_choices:.1%}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
