"""Check a run folder: `lightbulb verify RUN [--data] [--json]`.

Reads every file of every checkpoint and compares it with its hash, and proves from the sample ledger that steps 1 to
the newest checkpoint used every sample once, in order, over all resumes and layouts. With --data it also checks every
shard of the corpus, and that the tokens trained on were those of the corpus. Changes nothing; may run beside the run.
Exits with 1 and names every damaged file when something is wrong.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lightbulb.train.manifest import CheckpointError
from lightbulb.train.verify import Report, verify_run


def main(argv: Sequence[str]) -> int:
    """Run the command: 0 when everything is as it was written, 1 when not."""
    parser = argparse.ArgumentParser(prog="lightbulb verify", description="Check a run's checkpoints and ledger.")
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run that lightbulb pretrain wrote")
    parser.add_argument("--data", action="store_true", help="also check the corpus the run was trained on")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    try:
        report = verify_run(arguments.run, arguments.data)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(report.to_json()))
    else:
        _show(report)
    return 1 if report.problems else 0


def _show(report: Report) -> None:
    for checkpoint in report.checkpoints:
        verdict = "DAMAGED" if checkpoint.problems else "good"
        print(f"{checkpoint.folder}: {verdict}, {checkpoint.files} files, {checkpoint.bytes / 1e6:.1f} MB")
    if report.ledger is not None:
        verdict = "WRONG" if report.ledger.problems else "every sample once"
        skipped = f", {report.ledger.skipped_steps} steps skipped" if report.ledger.skipped_steps else ""
        print(f"ledger: {verdict}, {report.ledger.samples} samples in {report.ledger.steps} steps{skipped}")
    if report.data is not None:
        verdict = "DAMAGED" if report.data.problems else "good"
        print(f"{report.data.path}: {verdict}, {report.data.shards} shards, {report.data.lines} ledger lines compared")
    for problem in report.problems:
        print(f"error: {problem}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
