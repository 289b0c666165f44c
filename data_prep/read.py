"""Sources to documents: what is read, and what is dropped and why.

datatrove's readers are not used: they log and skip lines that do not parse, give up the rest of a file at its first
byte that is not UTF-8, drop empty documents uncounted, and hold a line in memory whatever its length. Here every
dropped document is counted under its reason and the first of each reason is named.
"""

import io
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data import topics
from typing import Any, BinaryIO, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from lightbulb.data_prep.config import (
    FileSourceConfig,
    JsonlConfig,
    ParquetConfig,
    PydocConfig,
    PythonStdlibConfig,
    SourceConfig,
    TextConfig,
)

MAX_DOCUMENT_BYTES = 1 << 24
READ_BYTES = 1 << 20

# Tests are long, repetitive and full of deliberately broken text; pydoc_data is the `pydoc` source once more, and
# would put its held-out topics into the training split.
SKIPPED_STDLIB_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}


class CorpusError(ValueError):
    """A corpus that cannot be built; the message names the source or file, what was found and the fix."""


class Document(NamedTuple):
    """One text; ``path`` is relative to the source and unique in it."""

    path: str
    text: str


@dataclass
class Counts:
    """What one source gave and what was dropped from it."""

    documents: int = 0
    bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    first_dropped: dict[str, str] = field(default_factory=dict)

    def drop(self, reason: str, path: str) -> None:
        """Count a dropped document; the first of each reason is kept by name."""
        self.dropped[reason] += 1
        self.first_dropped.setdefault(reason, path)

    def describe_dropped(self) -> str:
        """For example ``3 not_utf8 (first: a/b.txt), 1 empty (first: c.txt)``."""
        return ", ".join(f"{n} {why} (first: {self.first_dropped[why]})" for why, n in sorted(self.dropped.items()))


def read_source(source: SourceConfig, counts: Counts) -> Iterator[Document]:
    """All usable documents of a source, in the order of their paths.

    Raises:
        CorpusError: nothing to read, a damaged archive, or no usable document at all.
    """
    for document in _READERS[type(source)](source, counts):
        if not document.text.strip():
            counts.drop("empty", document.path)
            continue
        if "\0" in document.text:
            counts.drop("not_text", document.path)
            continue
        counts.documents += 1
        counts.bytes += len(document.text.encode("utf-8"))
        yield document
    if counts.documents == 0:
        fix = "set sources.delimiter for long files" if isinstance(source, TextConfig) else "check what it holds"
        dropped = counts.describe_dropped() or "nothing"
        raise CorpusError(f"source {describe_source(source)}: no usable document; dropped {dropped}; {fix}")


def describe_source(source: SourceConfig) -> str:
    """The source's type, and its path if it has one."""
    return f"{source.type} {source.path}" if isinstance(source, FileSourceConfig) else source.type


def source_digest(source: SourceConfig) -> tuple[str, int]:
    """Hash of everything the source would read, names and contents, and its size in bytes."""
    hasher = xxhash.xxh3_128()
    size = 0
    if isinstance(source, PydocConfig):
        content = repr(sorted(topics.topics.items())).encode()
        hasher.update(content)
        return hasher.hexdigest(), len(content)
    root, files = _stdlib_files() if isinstance(source, PythonStdlibConfig) else _files(source)
    for file in files:
        hasher.update(f"\0{_name(file, root)}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(READ_BYTES):
                hasher.update(block)
                size += len(block)
    return hasher.hexdigest(), size


def _files(source: SourceConfig) -> tuple[Path, list[Path]]:
    """The folder that paths are relative to, and the files in the order of their names."""
    assert isinstance(source, FileSourceConfig)
    path = source.path.expanduser()
    if path.is_file():
        return path.parent, [path]
    if not path.is_dir():
        raise CorpusError(f"source {describe_source(source)}: no such file or folder; check sources.path")
    files = [
        Path(folder, name)
        for folder, _, names in os.walk(path, onerror=_refuse)
        for name in names
        if name.endswith(source.suffixes) and not name.startswith(".")
    ]
    if not files:
        raise CorpusError(
            f"source {describe_source(source)}: no file ends in {', '.join(source.suffixes)}; "
            "name one file, or set sources.suffixes"
        )
    return path, sorted(files)


def _refuse(error: OSError) -> None:
    """A folder that cannot be listed is an error; os.walk by itself passes over it."""
    raise error


def _stdlib_files() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path for path in root.rglob("*.py") if not SKIPPED_STDLIB_FOLDERS.intersection(path.relative_to(root).parts)
    ]
    return root, sorted(files)


def _name(file: Path, root: Path) -> str:
    """The relative path as text; bytes of a name that are not UTF-8 are spelled out."""
    return file.relative_to(root).as_posix().encode("utf-8", "backslashreplace").decode("utf-8")


def _read_stdlib(source: PythonStdlibConfig, counts: Counts) -> Iterator[Document]:
    root, files = _stdlib_files()
    for file in files:
        yield from _read_whole(file, _name(file, root), counts)


def _read_pydoc(source: PydocConfig, counts: Counts) -> Iterator[Document]:
    for name, text in sorted(topics.topics.items()):
        yield Document(f"topics/{name}", text)


def _read_text(source: TextConfig, counts: Counts) -> Iterator[Document]:
    root, files = _files(source)
    for file in files:
        name = _name(file, root)
        if source.delimiter is None:
            yield from _read_whole(file, name, counts)
        else:
            yield from _read_delimited(file, name, source.delimiter.encode("utf-8"), counts)


def _read_whole(file: Path, name: str, counts: Counts) -> Iterator[Document]:
    with file.open("rb") as stream:
        content = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        counts.drop("too_long", name)
    else:
        yield from _decoded(content, name, counts)


def _read_delimited(file: Path, name: str, delimiter: bytes, counts: Counts) -> Iterator[Document]:
    lines: list[bytes] = []
    first, size = 1, 0
    with file.open("rb") as stream:
        for number, line in _lines(stream):
            if line is None:
                counts.drop("too_long", f"{name}:{number}")
                continue
            is_end = line.rstrip(b"\r\n") == delimiter
            if is_end or size + len(line) > MAX_DOCUMENT_BYTES:
                yield from _decoded(b"".join(lines), f"{name}:{first}", counts)
                lines, first, size = [], number + is_end, 0
            if not is_end:
                lines.append(line)
                size += len(line)
    yield from _decoded(b"".join(lines), f"{name}:{first}", counts)


def _decoded(content: bytes, name: str, counts: Counts) -> Iterator[Document]:
    # A document with one bad byte is more often another encoding than a slip, and a repaired one is not its text.
    try:
        yield Document(name, content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        counts.drop("not_text" if b"\0" in content else "not_utf8", name)


def _read_jsonl(source: JsonlConfig, counts: Counts) -> Iterator[Document]:
    root, files = _files(source)
    for file in files:
        name = _name(file, root)
        try:
            # Arrow unpacks by the file name's ending. Python's zstandard takes a frame that is cut short for its end.
            with io.BufferedReader(pa.input_stream(file, compression="detect"), READ_BYTES) as stream:
                for number, line in _lines(stream):
                    yield from _json_document(line, source.text_field, f"{name}:{number}", counts)
        except OSError as error:
            raise CorpusError(f"{file}: unreadable, damaged or cut short ({error}); fetch the file again") from None


def _json_document(line: bytes | None, text_field: str, name: str, counts: Counts) -> Iterator[Document]:
    if line is None:
        counts.drop("too_long", name)
        return
    if not line.strip():
        return
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        counts.drop("not_json", name)
        return
    text = record.get(text_field) if isinstance(record, dict) else None
    if isinstance(text, str):
        yield Document(name, text)
    else:
        counts.drop(f"no_field_{text_field}", name)


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines; a line longer than a document may be is read past in pieces and given as None."""
    number = 0
    while line := stream.readline(MAX_DOCUMENT_BYTES):
        number += 1
        if len(line) < MAX_DOCUMENT_BYTES or line.endswith(b"\n"):
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(READ_BYTES)
        yield number, None


def _read_parquet(source: ParquetConfig, counts: Counts) -> Iterator[Document]:
    root, files = _files(source)
    for file in files:
        name = _name(file, root)
        try:
            with pq.ParquetFile(file) as table:
                if source.text_field not in table.schema_arrow.names:
                    raise CorpusError(
                        f"{file}: no column {source.text_field!r}; set sources.text_field to one of "
                        f"{', '.join(table.schema_arrow.names)}"
                    )
                rows = (row for batch in table.iter_batches(256, columns=[source.text_field]) for row in batch[0])
                for number, row in enumerate(rows):
                    yield from _parquet_document(row.as_py(), f"{name}:{number}", counts)
        except (pa.ArrowException, OSError) as error:
            raise CorpusError(f"{file}: not a readable parquet file ({error}); fetch the file again") from None


def _parquet_document(text: Any, name: str, counts: Counts) -> Iterator[Document]:
    if not isinstance(text, str):
        counts.drop("not_text", name)
    elif len(text) > MAX_DOCUMENT_BYTES:
        counts.drop("too_long", name)
    else:
        yield Document(name, text)


_READERS: dict[type, Callable[[Any, Counts], Iterator[Document]]] = {
    PythonStdlibConfig: _read_stdlib,
    PydocConfig: _read_pydoc,
    TextConfig: _read_text,
    JsonlConfig: _read_jsonl,
    ParquetConfig: _read_parquet,
}
