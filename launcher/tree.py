"""Draw where runs came from: `lightbulb tree RUN ... [--png FILE]`.

Reads origin.json, summary and metrics of the runs and of all they were made of (branches, decays, upcyclings, imports),
prints the tree with steps, tokens and held-out bits per byte of each, and writes it as a picture on request.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lightbulb.evaluation.run_tree import console_tree, draw_tree, run_tree
from lightbulb.train.manifest import CheckpointError


def main(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    parser = argparse.ArgumentParser(prog="lightbulb tree", description="Draw where runs came from.")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folders of runs; their ancestors are found")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also write the tree as a picture")
    options = parser.parse_args(argv)
    try:
        roots = run_tree(options.runs)
        Console().print(console_tree(roots), highlight=False)
        if options.png is not None:
            draw_tree(roots, options.png)
            print(f"picture: {options.png}")
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
