"""Write a Hugging Face model as a run: `lightbulb import FOLDER RUN [--data CORPUS]`.

Reads a local folder with config.json, safetensors and tokenizer.json; pickled weights are refused. Writes a run folder
with one checkpoint, which any layout reads, and receipt.json: digests of all tensors, and our logits against those of
transformers. When one differs by more than the bound, nothing is left behind. Next: `lightbulb generate RUN`, or
`start_from: RUN` in the config of a run.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightbulb.experts.hf.convert import Options, import_model
from lightbulb.launcher.export import ERRORS, add_shared_options, show


def main(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    parser = argparse.ArgumentParser(prog="lightbulb import", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="Hugging Face folder")
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder to write")
    add_shared_options(parser)
    options = parser.parse_args(argv)
    try:
        chosen = Options(data=options.data, bound=options.bound)
        receipt = import_model(options.folder, options.run, chosen)
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(receipt, options.run)
    print(f"next: lightbulb generate {options.run}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
