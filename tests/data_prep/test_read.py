"""Every kind of source, and every reason to drop a document."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lightbulb.config import build_config
from lightbulb.data_prep import read
from lightbulb.data_prep.config import CorpusConfig, SourceConfig
from lightbulb.data_prep.read import CorpusError, Counts, read_source, source_digest


def source(**values: Any) -> SourceConfig:
    return build_config(CorpusConfig, {"output": "x", "sources": [values]}).sources[0]


def read_all(config: SourceConfig) -> tuple[dict[str, str], Counts]:
    counts = Counts()
    return {document.path: document.text for document in read_source(config, counts)}, counts


def test_standard_library_has_no_tests_and_no_pydoc_topics() -> None:
    documents, counts = read_all(source(type="python_stdlib"))
    assert "json/decoder.py" in documents and counts.documents > 500
    assert not any("test" in name.split("/")[:-1] for name in documents)
    assert not any(name.startswith("pydoc_data/") for name in documents)


def test_pydoc_gives_one_document_per_topic() -> None:
    documents, _ = read_all(source(type="pydoc"))
    assert "topics/lambda" in documents and len(documents) > 50


def test_text_folder_is_read_in_order_and_drops_are_named(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "good.txt").write_bytes(b"two\r\nlines")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwith mark")
    (tmp_path / "empty.txt").write_bytes(b" \n ")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "nul.txt").write_bytes(b"a\0b")
    (tmp_path / "utf16.txt").write_bytes("text".encode("utf-16"))
    (tmp_path / "skipped.bin").write_bytes(b"x")
    documents, counts = read_all(source(type="text", path=str(tmp_path)))
    assert list(documents.items()) == [("a.txt", "with mark"), ("b/good.txt", "two\r\nlines")]
    assert counts.dropped == {"empty": 1, "not_utf8": 1, "not_text": 2}
    assert counts.first_dropped == {"empty": "empty.txt", "not_utf8": "latin.txt", "not_text": "nul.txt"}
    assert counts.bytes == len("with mark") + len("two\r\nlines")


@pytest.mark.parametrize(
    ("delimiter", "expected"),
    [("", {"f.txt:1": "a\nb\n", "f.txt:4": "c\n---\nd"}), ("---", {"f.txt:1": "a\nb\n\nc\n", "f.txt:6": "d"})],
    ids=["blank_line", "dashes"],
)
def test_delimiter_divides_a_file(tmp_path: Path, delimiter: str, expected: dict[str, str]) -> None:
    (tmp_path / "f.txt").write_text("a\nb\n\nc\n---\nd")
    documents, _ = read_all(source(type="text", path=str(tmp_path / "f.txt"), delimiter=delimiter))
    assert documents == expected


def test_document_over_the_limit_is_divided_or_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "MAX_DOCUMENT_BYTES", 16)
    (tmp_path / "f.txt").write_text("short line\nshort line\n" + "x" * 100 + "\nend\n")
    documents, counts = read_all(source(type="text", path=str(tmp_path), delimiter=""))
    assert documents == {"f.txt:1": "short line\n", "f.txt:2": "short line\nend\n"}
    assert counts.first_dropped == {"too_long": "f.txt:3"}
    with pytest.raises(
        CorpusError, match=r"no usable document; dropped 1 too_long \(first: f\.txt\); set sources\.del"
    ):
        read_all(source(type="text", path=str(tmp_path)))


LINES = [{"text": "one"}, {"text": "two <|endoftext|>"}, {"body": "no text"}, {"text": 3}, {"text": ""}]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_jsonl_plain_and_packed(tmp_path: Path, suffix: str) -> None:
    content = b"".join(json.dumps(line).encode() + b"\n" for line in LINES) + b'{"cut": \n\n"\\ud800"\n'
    # Two frames one behind the other, as parallel compressors write them.
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.ZstdCompressor().compress}[suffix]
    half = content.index(b"\n") + 1
    (tmp_path / f"d{suffix}").write_bytes(pack(content[:half]) + pack(content[half:]))
    documents, counts = read_all(source(type="jsonl", path=str(tmp_path)))
    assert documents == {f"d{suffix}:1": "one", f"d{suffix}:2": "two <|endoftext|>"}
    assert counts.dropped == {"no_field_text": 2, "empty": 1, "not_json": 2}
    assert counts.first_dropped["not_json"] == f"d{suffix}:6"


def test_endless_line_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "MAX_DOCUMENT_BYTES", 1 << 10)
    monkeypatch.setattr(read, "READ_BYTES", 1 << 8)
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "' + b"x" * 5000 + b'"}\n{"text": "good"}\n')
    documents, counts = read_all(source(type="jsonl", path=str(tmp_path)))
    assert documents == {"d.jsonl:2": "good"}
    assert counts.first_dropped == {"too_long": "d.jsonl:1"}


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_archive_cut_short_is_named(tmp_path: Path, suffix: str) -> None:
    content = b'{"text": "0123456789 abcdefghij"}\n' * 50
    packed = gzip.compress(content) if suffix.endswith("gz") else zstandard.ZstdCompressor().compress(content)
    (tmp_path / f"d{suffix}").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(CorpusError, match=rf"d{suffix}: unreadable, damaged or cut short"):
        read_all(source(type="jsonl", path=str(tmp_path)))


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["one", None, "three"], "n": [1, 2, 3]}), tmp_path / "d.parquet")
    documents, counts = read_all(source(type="parquet", path=str(tmp_path), text_field="content"))
    assert documents == {"d.parquet:0": "one", "d.parquet:2": "three"}
    assert counts.dropped == {"not_text": 1}
    with pytest.raises(
        CorpusError, match=r"d\.parquet: no column 'text'; set sources\.text_field to one of content, n"
    ):
        read_all(source(type="parquet", path=str(tmp_path)))
    (tmp_path / "d.parquet").write_bytes(b"PAR1 not parquet")
    with pytest.raises(CorpusError, match=r"d\.parquet: not a readable parquet file"):
        read_all(source(type="parquet", path=str(tmp_path)))


def test_source_without_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"none: no such file or folder"):
        read_all(source(type="text", path=str(tmp_path / "none")))
    with pytest.raises(CorpusError, match=r"no file ends in \.txt, \.md"):
        read_all(source(type="text", path=str(tmp_path)))


def test_digest_follows_names_and_contents(tmp_path: Path) -> None:
    config = source(type="text", path=str(tmp_path))
    (tmp_path / "a.txt").write_text("one")
    first, size = source_digest(config)
    assert source_digest(config) == (first, size) and size == 3
    (tmp_path / "a.txt").write_text("two")
    second, _ = source_digest(config)
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    third, _ = source_digest(config)
    assert len({first, second, third}) == 3
