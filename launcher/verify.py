"""Check what LightBulb wrote: `lightbulb verify DIR [--json]`, for a corpus or a run (`lightbulb verify RUN --help`).

Of a corpus, reads every file its manifest lists and compares it with its hash, and the manifest with its own. Changes
nothing. Exits with 1 and names every damaged file when something is wrong; write the corpus again with
`lightbulb preprocess`, which replaces it, or copy the files again.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lightbulb.data_prep.verify import CorpusReport, is_corpus, verify_corpus


def main(argv: Sequence[str]) -> int:
    """Run the command: 0 when everything is as it was written, 1 when not."""
    folders = [argument for argument in argv if not argument.startswith("-")]
    if len(folders) != 1 or not is_corpus(Path(folders[0])):
        # Checking a run needs torch, which takes seconds to import.
        return importlib.import_module("lightbulb.launcher.verify_run").main(argv)
    parser = argparse.ArgumentParser(prog="lightbulb verify", description="Check a corpus against its manifest.")
    parser.add_argument("corpus", metavar="DIR", type=Path, help="folder that lightbulb preprocess wrote")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    report = verify_corpus(arguments.corpus)
    if arguments.json:
        print(json.dumps(report.to_json()))
    else:
        _show(report)
    return 1 if report.problems else 0


def _show(report: CorpusReport) -> None:
    verdict = "DAMAGED" if report.problems else "good"
    print(f"{report.corpus}: {verdict}, {report.files} files, {report.bytes / 1e6:.1f} MB")
    for problem in report.problems:
        print(f"error: {problem}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
