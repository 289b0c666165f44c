"""Files to documents: every format, and every reason to drop a document.

datatrove's readers are not used: they log and skip lines that do not parse, give up the rest of a file at its first
byte that is not UTF-8, drop empty documents uncounted, and hold a line in memory whatever its length. Here every
dropped document is counted under its reason and the first of each reason is named, and a line or file longer than a
document may be is read past without being held.
"""

import csv
import io
import json
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pydoc_data import topics
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from lightbulb.data_prep.config import (
    ArrowConfig,
    CleanConfig,
    CsvConfig,
    FileSourceConfig,
    JsonConfig,
    JsonlConfig,
    ParquetConfig,
    PydocConfig,
    PythonStdlibConfig,
    RecordSourceConfig,
    SourceConfig,
    TextConfig,
)
from lightbulb.data_prep.conversation import Rendered, render
from lightbulb.data_prep.counts import EXCERPT, CorpusError, Counts
from lightbulb.data_prep.documents import Document, named
from lightbulb.data_prep.files import READ_BYTES, InputFile, opened

MAX_DOCUMENT_BYTES = 1 << 24
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Reading:
    """One file of a source while it is read."""

    source: SourceConfig
    file: InputFile
    clean: CleanConfig
    counts: Counts

    @property
    def domain(self) -> str:
        """Of documents that do not say their own."""
        depth = self.source.domain_folder if isinstance(self.source, FileSourceConfig) else None
        folders = self.file.name.split("/")[:-1]
        return named(folders[depth - 1]) if depth is not None and len(folders) >= depth else self.source.domain

    def drop(self, reason: str, place: str = "", text: str | bytes = "") -> None:
        """Count what is dropped at a place of the file."""
        self.counts.drop(reason, self.file.name + place, text)

    def document(self, text: str, place: str = "") -> Document:
        """A document at a place of the file."""
        return Document(self.file.name + place, text, self.domain)

    def decoded(self, content: bytes, place: str = "") -> Iterator[Document]:
        """The bytes as a document, unless they are not text."""
        # A document with one bad byte is more often another encoding than a slip, so repair is asked for, not given.
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            if self.clean.encoding == "drop":
                self.drop("not_text" if b"\0" in content else "not_utf8", place, content)
                return
            self.counts.repaired["encoding"] += 1
            text = content.decode("utf-16" if content.startswith(UTF16_MARKS) else "utf-8", errors="replace")
        yield self.document(text, place)


def read_file(source: SourceConfig, file: InputFile, clean: CleanConfig, counts: Counts) -> Iterator[Document]:
    """All documents of one file, in its order; what cannot be read as one is counted.

    Raises:
        CorpusError: the file is damaged, or does not have the fields it should.
    """
    return _READERS[type(source)](source, Reading(source, file, clean, counts))


def _read_pydoc(source: PydocConfig, reading: Reading) -> Iterator[Document]:
    for name, text in sorted(topics.topics.items()):
        yield reading.document(text, f"/{name}")


def _read_stdlib(source: PythonStdlibConfig, reading: Reading) -> Iterator[Document]:
    yield from _read_whole(reading)


def _read_text(source: TextConfig, reading: Reading) -> Iterator[Document]:
    if source.delimiter is None:
        yield from _read_whole(reading)
    else:
        yield from _read_delimited(reading, source.delimiter.encode("utf-8"))


def _read_whole(reading: Reading) -> Iterator[Document]:
    with opened(reading.file) as stream:
        content = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        reading.drop("too_long")
    else:
        yield from reading.decoded(content)


def _read_delimited(reading: Reading, delimiter: bytes) -> Iterator[Document]:
    lines: list[bytes] = []
    first, size = 1, 0
    with opened(reading.file) as stream:
        for number, line in _lines(stream):
            if line is None:
                reading.drop("too_long", f":{number}")
                continue
            is_end = line.rstrip(b"\r\n") == delimiter
            if is_end or size + len(line) > MAX_DOCUMENT_BYTES:
                yield from reading.decoded(b"".join(lines), f":{first}")
                lines, first, size = [], number + is_end, 0
            if not is_end:
                lines.append(line)
                size += len(line)
    yield from reading.decoded(b"".join(lines), f":{first}")


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


def _read_jsonl(source: JsonlConfig, reading: Reading) -> Iterator[Document]:
    with opened(reading.file) as stream:
        for number, line in _lines(stream):
            if line is None:
                reading.drop("too_long", f":{number}")
            elif line.strip():
                for record in _parsed(line, reading, f":{number}"):
                    yield from _from_record(source, record, reading, f":{number}")


def _read_json(source: JsonConfig, reading: Reading) -> Iterator[Document]:
    with opened(reading.file) as stream:
        content = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        reading.drop("too_long")
        return
    for value in _parsed(content, reading, ""):
        if isinstance(value, list):
            for number, record in enumerate(value):
                yield from _from_record(source, record, reading, f":{number}")
        else:
            yield from _from_record(source, value, reading, "")


def _parsed(content: bytes, reading: Reading, place: str) -> Iterator[Any]:
    try:
        yield orjson.loads(content)
    except orjson.JSONDecodeError:
        # Python's parser takes lone surrogates and bytes that were replaced; orjson, rightly, does not.
        if reading.clean.encoding == "repair":
            try:
                value = json.loads(content.decode("utf-8", errors="replace"))
            except (ValueError, RecursionError):
                reading.drop("not_json", place, content)
            else:
                reading.counts.repaired["encoding"] += 1
                yield value
        else:
            reading.drop("not_json", place, content)


def _read_csv(source: CsvConfig, reading: Reading) -> Iterator[Document]:
    separator = source.separator or ("\t" if ".tsv" in reading.file.name else ",")
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    with opened(reading.file) as stream:
        rows = csv.reader(_text_lines(reading, stream), delimiter=separator)
        try:
            names = next(rows, [])
            _check_columns(source, names, reading)
            for row in rows:
                place = f":{rows.line_num}"
                if len(row) != len(names):
                    reading.drop("not_a_row", place, ",".join(row))
                else:
                    yield from _from_record(source, dict(zip(names, row, strict=True)), reading, place)
        except csv.Error as error:
            raise CorpusError(
                f"{reading.file.path}: line {rows.line_num}: {error}; check its quotes and sources.separator"
            ) from None


def _text_lines(reading: Reading, stream: BinaryIO) -> Iterator[str]:
    errors = "replace" if reading.clean.encoding == "repair" else "strict"
    for number, line in _lines(stream):
        if line is None:
            reading.drop("too_long", f":{number}")
            continue
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8", errors=errors)
        except UnicodeDecodeError:
            reading.drop("not_utf8", f":{number}", line)


def _read_parquet(source: ParquetConfig, reading: Reading) -> Iterator[Document]:
    with opened(reading.file) as stream:
        # Without the read-ahead, memory holds one page of each column.
        table = pq.ParquetFile(stream, pre_buffer=False, buffer_size=READ_BYTES)
        _check_columns(source, table.schema_arrow.names, reading)
        yield from _from_batches(source, table.iter_batches(256, columns=source.columns), reading)


def _read_arrow(source: ArrowConfig, reading: Reading) -> Iterator[Document]:
    with opened(reading.file) as stream:
        # datasets writes streams; plain Arrow files begin with a mark of their own.
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if is_file:
            file = pa.ipc.open_file(stream)
            schema, batches = file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            batches = pa.ipc.open_stream(stream)
            schema = batches.schema
        _check_columns(source, schema.names, reading)
        yield from _from_batches(source, (batch.select(source.columns) for batch in batches), reading)


def _from_batches(
    source: RecordSourceConfig, batches: Iterator[pa.RecordBatch], reading: Reading
) -> Iterator[Document]:
    number = 0
    for batch in batches:
        for i in range(len(batch)):
            record = {name: batch.column(name)[i].as_py() for name in source.columns}
            yield from _from_record(source, record, reading, f":{number + i}")
        number += len(batch)


def _check_columns(source: RecordSourceConfig, names: list[str], reading: Reading) -> None:
    for name in source.columns:
        if name not in names:
            raise CorpusError(
                f"{reading.file.path}: no column {name!r}; set sources.text_field (or template, id_field, "
                f"domain_field) to one of {', '.join(names)}"
            )


def _from_record(source: RecordSourceConfig, record: Any, reading: Reading, place: str) -> Iterator[Document]:
    found = _rendered(source, {field: _field(record, field) for field in source.text_fields})
    if isinstance(found, str):
        reading.drop(found, place, str(record)[:EXCERPT])
        return
    if len(found.text) > MAX_DOCUMENT_BYTES:
        reading.drop("too_long", place, found.text)
        return
    if source.id_field is not None and (name := _field(record, source.id_field)) is not None:
        place = f":{name}"
    document = reading.document(found.text, place)._replace(answers=found.answers)
    if source.domain_field is not None and (domain := _field(record, source.domain_field)) is not None:
        document = document._replace(domain=named(domain))
    yield document


def _rendered(source: RecordSourceConfig, values: dict[str, Any]) -> Rendered | str:
    """A record's fields as text, or the reason why it is dropped."""
    if source.conversation is not None:
        return render(source.conversation, list(values.values()))
    for field, value in values.items():
        if not (isinstance(value, str) if source.template is None else isinstance(value, str | int | float | list)):
            return f"no_field_{field}"
    return Rendered(
        values[source.text_field] if source.template is None else _filled(source.template, source.join, values)
    )


def _field(record: Any, field: str) -> Any:
    """The value at ``a.b``, or None."""
    for name in field.split("."):
        record = record.get(name) if isinstance(record, dict) else None
    return record


def _filled(template: str, join: str, values: dict[str, Any]) -> str:
    """The template with its fields' values, lists joined. Only names are looked up, never attributes."""
    text = io.StringIO()
    for literal, field, _, _ in string.Formatter().parse(template):
        text.write(literal)
        if field:
            value = values[field]
            text.write(join.join(map(str, value)) if isinstance(value, list) else str(value))
    return text.getvalue()


_READERS: dict[type, Callable[[Any, Reading], Iterator[Document]]] = {
    PythonStdlibConfig: _read_stdlib,
    PydocConfig: _read_pydoc,
    TextConfig: _read_text,
    JsonlConfig: _read_jsonl,
    JsonConfig: _read_json,
    CsvConfig: _read_csv,
    ParquetConfig: _read_parquet,
    ArrowConfig: _read_arrow,
}
