"""Say what a run was trained on: `lightbulb ledger RUN [--document X | --step N | --domain D] [--data DIR] [--json]`.

Without a question: rows seen and epochs of every group. `--document` takes a document's path as the corpus knows it, a
part of one, or a piece of its text, and says at which steps it was trained on; `--step` lists the documents of a step.
Reads the run's ledger and newest checkpoint and the corpus's lineage, writes nothing. `lightbulb verify RUN --data`
proves that the ledger is right.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightbulb.data.config import DataError
from lightbulb.data.tokenizer import TokenizerError
from lightbulb.train.history import History, Lineage, document_uses, documents_with_text, step_documents
from lightbulb.train.ledger import LedgerError
from lightbulb.train.manifest import CheckpointError

MAX_SHOWN = 20


def main(argv: Sequence[str]) -> int:
    """Run the command; 1 when the question cannot be answered."""
    parser = argparse.ArgumentParser(prog="lightbulb ledger", description="Say what a run was trained on, and when.")
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run that lightbulb pretrain wrote")
    question = parser.add_mutually_exclusive_group()
    question.add_argument("--document", metavar="X", help="path of a document, part of one, or a piece of its text")
    question.add_argument("--step", type=int, metavar="N", help="documents of a step")
    question.add_argument("--domain", metavar="D", help="only the groups of this domain")
    parser.add_argument("--data", type=Path, metavar="DIR", help="where the corpus is now, if it was moved")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    try:
        history = History(options.run, options.data)
        if options.document is not None:
            answer, show = _document(history, options.document), _show_documents
        elif options.step is not None:
            answer, show = step_documents(history, options.step), _show_step
        else:
            answer, show = _groups(history, options.domain), _show_groups
    except (CheckpointError, DataError, LedgerError, TokenizerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(answer)) if options.json else show(answer)
    return 0


def _groups(history: History, domain: str | None) -> dict[str, Any]:
    groups = history.summary()
    chosen = [group for group in groups if domain in (None, group["domain"], group["group"])]
    if not chosen:
        known = ", ".join(sorted({group["domain"] for group in groups}))
        raise DataError(f"--domain: {domain!r} is none of the corpus's; known are {known}")
    return {"steps": history.steps, "groups": chosen}


def _document(history: History, name: str) -> dict[str, Any]:
    lineage = Lineage(history.path)
    documents = lineage.by_path(name) or documents_with_text(history, lineage, name)
    if not documents:
        raise DataError(f"--document: no document's path and no training row of {history.path} has {name!r}")
    return {"steps": history.steps, "documents": [document_uses(history, lineage, found) for found in documents]}


def _show_groups(answer: dict[str, Any]) -> None:
    table = Table("group", "rows", "rows seen", "epochs", "steps", title=f"Up to step {answer['steps']}")
    for group in answer["groups"]:
        steps = "never" if group["first_step"] is None else f"{group['first_step']} to {group['last_step']}"
        table.add_row(group["group"], f"{group['rows']:,}", f"{group['rows_seen']:,}", f"{group['epochs']:.3f}", steps)
    Console().print(table)


def _show_step(answer: dict[str, Any]) -> None:
    print(f"step {answer['step']}: {answer['samples']} samples of {answer['documents']} documents")
    for piece in answer["pieces"]:
        last = piece["start"] + piece["length"]
        print(f"  {piece['group']} row {piece['row']}: {piece['path']}, tokens {piece['start']} to {last - 1}")


def _show_documents(answer: dict[str, Any]) -> None:
    for document in answer["documents"][:MAX_SHOWN]:
        print(f"{document['path']} ({document['domain']}, {document['tokens']} tokens): {_verdict(document)}")
        for use in document["uses"]:
            skipped = ", a skipped step" if use["skipped"] else ""
            print(f"  step {use['step']}: {use['group']} row {use['row']}, epoch {use['epoch']}{skipped}")
    if (more := len(answer["documents"]) - MAX_SHOWN) > 0:
        print(f"and {more} more; name one by its whole path")


def _verdict(document: dict[str, Any]) -> str:
    if document["dropped"] is not None:
        return f"dropped by preprocess, {document['dropped']}"
    if document["split"] != "train":
        return "held out, never trained on"
    steps = sorted({use["step"] for use in document["uses"]})
    if not document["rows"]:
        return "in no row, never trained on"
    return f"trained on in {len(steps)} steps" if steps else "not trained on yet"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
