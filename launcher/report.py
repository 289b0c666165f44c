"""Draw a run: `lightbulb report RUN` writes report.html, loss.png, experts.png and throughput.png into its folder.

Works while the run is training, too: the page shows what has been measured so far.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightbulb.train.report import write_report


def main(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    parser = argparse.ArgumentParser(prog="lightbulb report", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run that lightbulb pretrain wrote")
    run = parser.parse_args(argv).run
    try:
        print(write_report(run))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
