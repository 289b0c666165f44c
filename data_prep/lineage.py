"""Where every document went: ``lineage/documents.parquet``, and from every row back to its documents.

``documents.parquet`` has a line per document that was read: its number, source, path, bytes and tokens, and either the
split, domain and cluster whose rows it is in, or the reason why it was dropped. ``rows/<split>/<group>.parquet`` has a
line per piece of a document in a row: the row's number in its folder (the sample a training run counts), the document,
its first token there and how many. Together they answer which documents a run, or an expert, was trained on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lightbulb.data_prep.documents import TEXTS_NAME, Documents, dropped
from lightbulb.data_prep.split import DROPPED, SPLITS, load_split
from lightbulb.data_prep.step import Output, Step, Task
from lightbulb.data_prep.tokenise import token_lengths
from lightbulb.data_prep.write import CLUSTERS_NAME
from lightbulb.folder import explained

LINEAGE_FOLDER = "lineage"
DOCUMENTS_NAME = "documents.parquet"
ROWS_FOLDER = "rows"
BLOCK = 1 << 16

DOCUMENTS = pa.schema(
    [
        ("document", pa.int64()),
        ("source", pa.uint16()),
        ("path", pa.string()),
        ("domain", pa.string()),
        ("split", pa.string()),
        ("cluster", pa.int32()),
        ("dropped", pa.string()),
        ("bytes", pa.uint32()),
        ("tokens", pa.uint32()),
    ]
)
ROWS = pa.schema([("row", pa.int64()), ("document", pa.int64()), ("start", pa.uint32()), ("length", pa.uint32())])


@dataclass(frozen=True)
class Lineage(Step):
    """Writes both tables from what the steps before left; ``drops`` gives each reason and its step."""

    documents: Documents
    split: Output
    drops: tuple[tuple[str, Output], ...]
    clusters: Output | None
    tokens: Output
    pack: Output

    name = "lineage"
    title = "Lineage"

    def settings(self) -> Any:
        return [reason for reason, _ in self.drops]

    def parts(self) -> Sequence[Any]:
        outputs = [self.split, *(output for _, output in self.drops), self.tokens, self.pack]
        clusters = self.clusters and self.clusters.keys
        return [[self.documents.read.keys, clusters, *(output.keys for output in outputs)]]

    def sizes(self) -> Sequence[int]:
        return [len(self.documents)]

    def run_task(self, rank: int, task: Task) -> dict[str, Any]:
        split = load_split(self.split)
        starts, lengths = token_lengths(self.documents, split, self.tokens)
        clusters = None if self.clusters is None else np.load(self.clusters.folders[0] / CLUSTERS_NAME)
        names, index = self.documents.domains, self.documents.index
        reasons = self._reasons()
        labels: list[str | None] = [None, *(reason for reason, _ in self.drops)]
        sides: list[str | None] = [*SPLITS, None]  # the last one is that of DROPPED
        with explained(task.out), pq.ParquetWriter(task.out / DOCUMENTS_NAME, DOCUMENTS, compression="zstd") as writer:
            for first, paths in self._paths():
                part = slice(first, first + len(paths))
                columns = [
                    np.arange(part.start, part.stop),
                    index["source"][part],
                    paths,
                    [names[i] for i in index["domain"][part]],
                    [None if why else sides[i] for i, why in zip(split[part], reasons[part], strict=True)],
                    [None] * len(paths) if clusters is None else pa.array(clusters[part], mask=split[part] == DROPPED),
                    [labels[i] for i in reasons[part]],
                    index["bytes"][part],
                    lengths[part],
                ]
                writer.write_table(_table(columns, DOCUMENTS))
                task.advance(len(paths))
        for group in self.pack.reports[0]["groups"]:
            self._write_rows(group, starts, task.out / ROWS_FOLDER / group["split"] / f"{group['name']}.parquet")
        return {"documents": len(self.documents)}

    def _reasons(self) -> np.ndarray:
        """``[documents]``: 0 where a document is kept, else the place of the reason among ``drops`` from 1."""
        reasons = np.zeros(len(self.documents), dtype=np.int16)
        for number, (_, output) in enumerate(self.drops, start=1):
            reasons[dropped(output)] = number
        return reasons

    def _paths(self) -> Iterator[tuple[int, list[str]]]:
        """The documents' paths in blocks of one size, however they were cut into tasks, each with its first number."""
        options = pa.ipc.IpcReadOptions(included_fields=[1])
        first, paths = 0, []
        for folder in self.documents.read.folders:
            with pa.memory_map(str(folder / TEXTS_NAME)) as mapped:
                file = pa.ipc.open_file(mapped, options=options)
                for i in range(file.num_record_batches):
                    paths += file.get_batch(i).column(0).to_pylist()
                    while len(paths) >= BLOCK:
                        yield first, paths[:BLOCK]
                        first, paths = first + BLOCK, paths[BLOCK:]
        if paths:
            yield first, paths

    def _write_rows(self, group: dict[str, Any], starts: np.ndarray, path: Path) -> None:
        prefix = f"{group['number']:05}"
        ends = np.load(self.pack.folders[0] / f"{prefix}.ends.npy", mmap_mode="r")
        segments = np.load(self.pack.folders[0] / f"{prefix}.segments.npy", mmap_mode="r")
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with pq.ParquetWriter(path, ROWS, compression="zstd") as writer:
                for first in range(0, len(segments), BLOCK):
                    part = segments[first : first + BLOCK]
                    rows = np.searchsorted(ends, np.arange(first, first + len(part)), side="right")
                    begins = part["start"] - starts[part["document"]].astype(np.uint64)
                    writer.write_table(_table([rows, part["document"], begins, part["length"]], ROWS))


def _table(columns: Sequence[Any], schema: pa.Schema) -> pa.Table:
    arrays = [pa.array(column).cast(field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.table(arrays, schema=schema)
