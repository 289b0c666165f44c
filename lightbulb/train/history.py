"""Which documents a run was trained on, and when: the sample ledger joined with the corpus's lineage.

The ledger gives every step its places in the run's sequences, the loader turns places into rows, and the lineage tables
that `lightbulb preprocess` wrote name the documents in every row. Both directions are answered, up to the newest
checkpoint.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from lightbulb.config import ConfigError, build_config
from lightbulb.data.config import DataError
from lightbulb.data.mixture import domain_of
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.train.config import RunConfig
from lightbulb.train.ledger import LedgerError, Line, read_ledger
from lightbulb.train.manifest import CheckpointError, complete_checkpoints, read_state
from lightbulb.train.verify import open_loader, rows_of

LINEAGE = "lineage"  # with documents.parquet and rows/<split>/<group>.parquet, as data_prep/lineage.py writes them
MAX_DOCUMENTS = 1000


class Use(NamedTuple):
    """A row of a group that was trained on: in which of the group's epochs (from 1) and at which step."""

    group: str
    row: int
    epoch: int
    step: int
    skipped: bool


@dataclass(frozen=True)
class Document:
    """A document of the corpus; ``dropped`` is the reason why it is in no row, or None."""

    number: int
    path: str
    domain: str
    split: str | None
    dropped: str | None
    tokens: int


class Piece(NamedTuple):
    """Consecutive tokens of a document in a row."""

    group: str
    row: int
    document: int
    start: int
    length: int


class History:
    """What a run has trained on up to its newest checkpoint.

    Args:
        run: folder of the run.
        data: where its corpus is now, if not where it was.

    Raises:
        CheckpointError: the run has no checkpoint that can be read.
        DataError: the corpus is not there, or is not the one that the run was trained on.
        LedgerError: the ledger is damaged.
    """

    def __init__(self, run: Path, data: Path | None = None):
        folders = complete_checkpoints(run)
        if not folders:
            raise CheckpointError(f"{run}: has no checkpoint; name the folder of a run that has saved one")
        state = read_state(folders[0])
        try:
            config = build_config(RunConfig, state.config, str(run))
        except ConfigError as error:
            raise CheckpointError(f"{folders[0]}: {error}; it was written by another version") from None
        if data is not None:
            config = config.model_copy(update={"data": config.data.model_copy(update={"path": data})})
        self.steps = state.step
        try:
            self.loader = open_loader(config, state)
        except DataError as error:
            raise DataError(f"{error} (if the corpus was moved, say where it is now with --data DIR)") from None
        self.sequence = self.loader.sequence
        self.path = self.loader.corpus.path
        self._step_at = config.batch_sizes().step_at
        self._lines: dict[int, list[Line]] = defaultdict(list)
        for _, line in read_ledger(run, self.steps):
            self._lines[line.step].append(line)
        self._runs = self._group_runs()

    def rows_at(self, step: int) -> list[tuple[str, int]]:
        """Group and row of every sample of a step.

        Raises:
            LedgerError: the ledger does not have the step.
        """
        if step not in self._lines:
            raise LedgerError(f"step {step}: not in the ledger, which has steps 1 to {self.steps}")
        rows = np.array([row for line in self._lines[step] for row in rows_of(line, self.loader)])
        groups = self.sequence.groups_of(rows)
        return [
            (self.sequence.names[group], int(row) - self.sequence.first_row(group))
            for group, row in zip(groups.tolist(), rows, strict=True)
        ]

    def uses(self, group: str, rows: Sequence[int]) -> list[Use]:
        """When these rows of a group were trained on."""
        number = self.sequence.names.index(group)
        wanted = np.array(sorted(rows)) + self.sequence.first_row(number)
        found = [*self._plain_uses(number, wanted), *self._mixed_uses(number, wanted)]
        return sorted(found, key=lambda use: use.step)

    def summary(self) -> list[dict[str, Any]]:
        """Every group's rows, how many were trained on, how often, and in which steps."""
        steps: dict[str, list[int]] = defaultdict(list)
        for step in sorted(self._lines):
            for line in self._lines[step]:
                for name in line.groups if line.groups is not None else self._plain_groups(line):
                    steps[name].append(step)
        drawn = self.loader.drawn.tolist()
        return [
            {
                "group": name,
                "domain": domain_of(name),
                "rows": rows,
                "rows_seen": min(samples, rows),  # every epoch of a group visits each row once
                "samples": samples,
                "epochs": samples / max(rows, 1),
                "first_step": steps[name][0] if steps[name] else None,
                "last_step": steps[name][-1] if steps[name] else None,
            }
            for name, rows, samples in zip(self.sequence.names, self.sequence.sizes.tolist(), drawn, strict=True)
        ]

    def _plain_groups(self, line: Line) -> set[str]:
        numbers = np.unique(self.sequence.groups_of(np.array(rows_of(line, self.loader))))
        return {self.sequence.names[number] for number in numbers}

    def _group_runs(self) -> dict[str, np.ndarray]:
        """``[runs, 3]`` by group: first place, last + 1 and step, rising."""
        runs: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
        for step, lines in self._lines.items():
            for line in lines:
                for name, (first, stop) in (line.groups or {}).items():
                    runs[name].append((first, stop, step))
        return {name: np.array(sorted(found)) for name, found in runs.items()}

    def _plain_samples(self) -> int:
        return self.sequence.plain_samples if self.sequence.stages else self.loader.samples_consumed

    def _plain_uses(self, number: int, rows: np.ndarray) -> Iterator[Use]:
        """In the steps before the run had a mixture."""
        samples, size = self._plain_samples(), int(self.sequence.sizes.sum())
        for epoch in range(-(-samples // size)):
            places = np.flatnonzero(np.isin(self.sequence.plain_order(epoch), rows))
            for place in places[places + epoch * size < samples]:
                row = int(self.sequence.plain_order(epoch)[place])
                yield self._use(number, row, epoch, self._step_at(int(epoch * size + place)) + 1)

    def _mixed_uses(self, number: int, rows: np.ndarray) -> Iterator[Use]:
        runs = self._runs.get(self.sequence.names[number])
        if runs is None:
            return
        size = int(self.sequence.sizes[number])
        for epoch in range(int(runs[0, 0]) // size, -(-int(runs[-1, 1]) // size)):
            order = self.sequence.group_order(number, epoch)
            for within in np.flatnonzero(np.isin(order, rows)):
                place = epoch * size + int(within)
                run = int(np.searchsorted(runs[:, 0], place, side="right")) - 1
                if run >= 0 and place < runs[run, 1]:
                    yield self._use(number, int(order[within]), epoch, int(runs[run, 2]))

    def _use(self, number: int, row: int, epoch: int, step: int) -> Use:
        skipped = any(line.skipped for line in self._lines[step])
        return Use(self.sequence.names[number], row - self.sequence.first_row(number), epoch + 1, step, skipped)


class Lineage:
    """The lineage tables of a corpus.

    Raises:
        DataError: the corpus has none.
    """

    def __init__(self, corpus: Path):
        self.folder = corpus / LINEAGE
        if not (self.folder / "documents.parquet").is_file():
            raise DataError(
                f"{self.folder}: missing, so nobody knows which documents the rows hold; copy it beside the shards, or "
                "write the corpus again with `lightbulb preprocess`, which gives the same rows and adds it"
            )
        self._documents = pads.dataset(self.folder / "documents.parquet")

    def by_path(self, path: str) -> list[Document]:
        """The document with this path, or those whose paths contain it."""
        column = pads.field("path")
        return self._read(column == path) or self._read(pc.match_substring(column, path))

    def by_number(self, numbers: Sequence[int]) -> list[Document]:
        """These documents."""
        return self._read(pads.field("document").isin(list(numbers)), len(numbers))

    def pieces(self, group: str, where: str, values: Sequence[int]) -> list[Piece]:
        """What a group's training rows hold of these documents, or in these rows (``where`` names the column)."""
        path = self.folder / "rows" / "train" / f"{group}.parquet"
        if not path.is_file():
            raise DataError(f"{path}: missing; copy the lineage folder again")
        table = self._table(pads.dataset(path), pads.field(where).isin(list(values)))
        columns = (table[name].to_pylist() for name in ("row", "document", "start", "length"))
        return [Piece(group, *values) for values in zip(*columns, strict=True)]

    def _read(self, which: pc.Expression, most: int = MAX_DOCUMENTS) -> list[Document]:
        rows = self._table(self._documents, which).slice(0, most).to_pylist()
        return [
            Document(row["document"], row["path"], row["domain"], row["split"], row["dropped"], row["tokens"])
            for row in rows
        ]

    def _table(self, data: pads.Dataset, which: pc.Expression) -> pa.Table:
        try:
            return data.to_table(filter=which)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.folder}: cannot be read ({error}); copy it again") from None


def step_documents(history: History, step: int) -> dict[str, Any]:
    """The documents of a step's samples, piece by piece.

    Raises:
        LedgerError: the ledger does not have the step.
        DataError: the corpus has no lineage.
    """
    lineage, rows = Lineage(history.path), history.rows_at(step)
    pieces = []
    for name in sorted({group for group, _ in rows}):
        pieces += lineage.pieces(name, "row", [row for group, row in rows if group == name])
    documents = {found.number: found for found in lineage.by_number(sorted({piece.document for piece in pieces}))}
    found = [piece._asdict() | {"path": documents[piece.document].path} for piece in pieces]
    return {"step": step, "samples": len(rows), "documents": len(documents), "pieces": found}


def document_uses(history: History, lineage: Lineage, document: Document) -> dict[str, Any]:
    """A document, the rows it is in by group, and when they were trained on."""
    rows: dict[str, list[int]] = {}
    for name in history.sequence.names if document.split == "train" else []:
        is_own = domain_of(name) == document.domain
        if is_own and (pieces := lineage.pieces(name, "document", [document.number])):
            rows[name] = sorted({piece.row for piece in pieces})
    uses = [use._asdict() for name in rows for use in history.uses(name, rows[name])]
    return asdict(document) | {"rows": rows, "uses": uses}


def documents_with_text(history: History, lineage: Lineage, text: str) -> list[Document]:
    """Documents with a text inside one training row; reads all of them.

    A text that a row's end cuts in two is not found: a short one is more likely to be.
    """
    corpus, tokenizer = history.loader.corpus, Tokenizer.load(history.path / "tokenizer.json")
    numbers: set[int] = set()
    for group, shards in corpus.domains.items():
        found: dict[int, list[int]] = {}
        for row in range(len(shards)):
            tokens, owners, _ = shards[row]
            if text in tokenizer.decode(tokens.tolist()):
                places = (np.unique(owners[owners > 0], return_index=True)[1]).tolist()
                parts = np.split(tokens, places[1:])
                found[row] = [i for i, part in enumerate(parts) if text in tokenizer.decode(part.tolist())]
        if found:
            numbers |= _owners(lineage.pieces(group, "row", list(found)), found)
    return lineage.by_number(sorted(numbers))


def _owners(pieces: Sequence[Piece], wanted: Mapping[int, Sequence[int]]) -> set[int]:
    """Documents of the wanted pieces of each row, which are counted from 0."""
    by_row: dict[int, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_row[piece.row].append(piece)
    return {by_row[row][i].document for row, numbers in wanted.items() for i in numbers}
