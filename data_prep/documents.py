"""Documents on disk: the texts, a row of numbers per document, and which documents are still wanted.

Reading writes every document once. Later steps never copy texts: they give the numbers of the documents they drop, or
an array with one value per document. A document's number is its place in the order of sources, paths and places in a
file, whichever tasks the input is cut into.

A task's folder holds ``documents.arrow`` (Arrow IPC, zstd; text, path, answers) and ``index.npy`` (:data:`INDEX`).
"""

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import xxhash

from lightbulb.data_prep.step import Output
from lightbulb.folder import explained

T = TypeVar("T")

TEXTS_NAME = "documents.arrow"
INDEX_NAME = "index.npy"
DROPPED_NAME = "dropped.npy"
BATCH_BYTES = 1 << 22

SCHEMA = pa.schema([("text", pa.large_string()), ("path", pa.string()), ("answers", pa.list_(pa.uint32()))])

INDEX = np.dtype(
    [("content", "<u8", 2), ("path", "<u8"), ("bytes", "<u4"), ("source", "<u2"), ("domain", "<u2")], align=False
)
"""Hash of the text, hash of the path, bytes of the text in UTF-8, number of the source, number of the domain."""


class Document(NamedTuple):
    """One text; ``path`` is relative to the source and names it, ``domain`` is the folder its rows go to, ``answers``
    says where the answers of a conversation begin and end (:mod:`lightbulb.data_prep.conversation`)."""

    path: str
    text: str
    domain: str
    answers: tuple[int, ...] = ()


class DocumentWriter:
    """Appends documents to a task's folder."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._index = bytearray()
        self._batch: list[tuple[str, str, tuple[int, ...]]] = []
        self._batch_bytes = 0
        self.domains: list[str] = []
        options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1))
        with explained(folder):
            self._file = pa.ipc.new_file(str(folder / TEXTS_NAME), SCHEMA, options=options)

    def __enter__(self) -> "DocumentWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with explained(self._folder):
            if kind is None:
                self._flush()
                np.save(self._folder / INDEX_NAME, np.frombuffer(self._index, dtype=INDEX))
            self._file.close()

    def add(self, source: int, document: Document) -> int:
        """Append a document; gives its bytes."""
        content = document.text.encode("utf-8")
        if document.domain not in self.domains:
            self.domains.append(document.domain)
        domain = self.domains.index(document.domain)
        self._index += xxhash.xxh3_128_digest(content)
        self._index += struct.pack("<QIHH", path_hash(document.path), len(content), source, domain)
        self._batch.append((document.text, document.path, document.answers))
        self._batch_bytes += len(content)
        if self._batch_bytes >= BATCH_BYTES:
            with explained(self._folder, self._batch_bytes):
                self._flush()
        return len(content)

    def _flush(self) -> None:
        if self._batch:
            columns = [
                pa.array(values, field.type)
                for values, field in zip(zip(*self._batch, strict=True), SCHEMA, strict=True)
            ]
            self._file.write_batch(pa.record_batch(columns, schema=SCHEMA))
        self._batch, self._batch_bytes = [], 0


@dataclass(frozen=True)
class Documents:
    """All documents that were read, numbered from 0; those of a task are consecutive."""

    read: Output

    def __len__(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def starts(self) -> np.ndarray:
        """``[tasks + 1]``: number of each task's first document, and how many there are."""
        return np.cumsum([0, *(report["documents"] for report in self.read.reports)], dtype=np.int64)

    @cached_property
    def domains(self) -> list[str]:
        """Names of the domains; a document's domain number is its place here."""
        return sorted({name for report in self.read.reports for name in report["domains"]})

    @cached_property
    def index(self) -> np.ndarray:
        """``[documents]`` of :data:`INDEX`."""
        parts = []
        for folder, report in zip(self.read.folders, self.read.reports, strict=True):
            part = np.load(folder / INDEX_NAME)
            numbers = np.array([self.domains.index(name) for name in report["domains"]] or [0], dtype=np.uint16)
            part["domain"] = numbers[part["domain"]]
            parts.append(part)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=INDEX)

    def of_task(self, task: int) -> slice:
        """The numbers of a task's documents."""
        return slice(int(self.starts[task]), int(self.starts[task + 1]))

    def texts(self, task: int, wanted: np.ndarray | None = None) -> Iterator[tuple[int, str]]:
        """Number and text of a task's documents, all or where the mask ``[documents]`` of the whole corpus is set."""
        for number, batch, i in self._places(task, wanted):
            yield number, batch.column(0)[i].as_py()

    def conversations(self, task: int, wanted: np.ndarray | None = None) -> Iterator[tuple[int, str, list[int]]]:
        """As :meth:`texts`, each with where its answers begin and end."""
        for number, batch, i in self._places(task, wanted):
            yield number, batch.column(0)[i].as_py(), batch.column(2)[i].as_py()

    def find(self, numbers: Sequence[int]) -> list[Document]:
        """These documents, wherever they are; for samples and reports."""
        found: dict[int, Document] = {}
        tasks = np.searchsorted(self.starts, numbers, side="right") - 1
        for task in np.unique(tasks):
            wanted = {int(n) for n, t in zip(numbers, tasks, strict=True) if t == task}
            number = int(self.starts[task])
            for batch in self._batches(int(task)):
                for n in sorted(wanted & set(range(number, number + len(batch)))):
                    text, path, answers = (column[n - number].as_py() for column in batch.columns)
                    found[n] = Document(path, text, self.domains[self.index[n]["domain"]], tuple(answers))
                number += len(batch)
                if number > max(wanted):  # the rest need not be unpacked
                    break
        return [found[int(n)] for n in numbers]

    def _places(self, task: int, wanted: np.ndarray | None) -> Iterator[tuple[int, pa.RecordBatch, int]]:
        """Number, batch and place in it of a task's documents."""
        number = int(self.starts[task])
        for batch in self._batches(task):
            for i in range(len(batch)):
                if wanted is None or wanted[number + i]:
                    yield number + i, batch, i
            number += len(batch)

    def _batches(self, task: int) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(self.read.folders[task] / TEXTS_NAME)) as mapped:
            file = pa.ipc.open_file(mapped)
            for i in range(file.num_record_batches):
                yield file.get_batch(i)


def batched(texts: Iterator[tuple[int, str]], characters: int = BATCH_BYTES) -> Iterator[list[tuple[int, str]]]:
    """Numbered texts in lists of about so many characters."""
    return batched_by(texts, lambda item: len(item[1]), characters)


def batched_by(items: Iterator[T], size_of: Callable[[T], int], most: int = BATCH_BYTES) -> Iterator[list[T]]:
    """The items in lists whose sizes add up to about ``most``."""
    batch: list[T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= most:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def path_hash(path: str) -> int:
    """64 bits of a hash of the path, the same on every machine."""
    return int.from_bytes(hashlib.sha256(path.encode("utf-8")).digest()[:8], "big")


def dropped(output: Output) -> np.ndarray:
    """Numbers of the documents that a step dropped, rising."""
    return np.sort(np.concatenate([np.load(folder / DROPPED_NAME) for folder in output.folders]))


def kept(documents: Documents, drops: Sequence[Output]) -> np.ndarray:
    """``[documents]``: which ones no step dropped."""
    mask = np.ones(len(documents), dtype=bool)
    for output in drops:
        mask[dropped(output)] = False
    return mask


def array_hash(array: np.ndarray) -> str:
    """Hash of an array's type and content, for the parts of tasks that depend on it."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array).data) + array.dtype.str


def named(value: Any) -> str:
    """A field's value as the name of a domain: lower case, other signs become ``-``."""
    letters = [c if c.isascii() and (c.isalnum() or c in "_-") else "-" for c in str(value).lower()]
    return "".join(letters).strip("-_")[:64] or "unnamed"
