"""Every kind of source, and every reason to drop a document."""

import gzip
import json
import resource
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lightbulb.config import build_config
from lightbulb.data_prep import files, read
from lightbulb.data_prep.clean import cleaned
from lightbulb.data_prep.config import CleanConfig, CorpusConfig, SourceConfig
from lightbulb.data_prep.counts import CorpusError, Counts
from lightbulb.data_prep.documents import Document
from lightbulb.data_prep.files import file_digest, list_files
from lightbulb.data_prep.ingest import inputs_digest, inputs_of
from lightbulb.data_prep.read import read_file


def source(**values: Any) -> SourceConfig:
    return build_config(CorpusConfig, {"output": "x", "sources": [values]}).sources[0]


def documents_of(config: SourceConfig, **clean: Any) -> tuple[list[Document], Counts]:
    settings, counts = CleanConfig(**clean), Counts()
    found = (document for file in list_files(config) for document in read_file(config, file, settings, counts))
    return [kept for document in found if (kept := cleaned(document, settings, counts)) is not None], counts


def read_all(config: SourceConfig, **clean: Any) -> tuple[dict[str, str], Counts]:
    documents, counts = documents_of(config, **clean)
    return {document.path: document.text for document in documents}, counts


def test_standard_library_has_no_tests_and_no_pydoc_topics() -> None:
    documents, _ = read_all(source(type="python_stdlib"))
    assert "json/decoder.py" in documents and len(documents) > 500
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
    assert counts.examples["not_utf8"] == [{"path": "latin.txt", "text": "caf\ufffd"}]
    assert [example["path"] for example in counts.examples["not_text"]] == ["nul.txt", "utf16.txt"]
    assert counts.examples["not_text"][0]["text"] == "a\ufffdb"


def test_a_few_examples_of_each_reason_are_kept_over_all_tasks() -> None:
    tasks = [Counts(), Counts()]
    for number in range(12):
        tasks[number // 4 % 2].drop("too_short", f"{number}.txt", f"text\nof {number} " + "x" * 200)
    together = Counts()
    for task in tasks:
        together.add(task.to_json())
    shown = together.examples["too_short"]
    assert [example["path"] for example in shown] == ["0.txt", "1.txt", "2.txt", "3.txt", "8.txt"]
    assert shown[0]["text"] == "text of 0 " + "x" * 70 and together.dropped == {"too_short": 12}


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
    assert counts.dropped == {"no_field_content": 1}
    with pytest.raises(
        CorpusError, match=r"d\.parquet: no column 'text'; set sources\.text_field .* to one of content, n"
    ):
        read_all(source(type="parquet", path=str(tmp_path)))
    (tmp_path / "d.parquet").write_bytes(b"PAR1 not parquet")
    with pytest.raises(CorpusError, match=r"d\.parquet: unreadable, damaged or cut short"):
        read_all(source(type="parquet", path=str(tmp_path)))


def test_source_without_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"none: no such file or folder"):
        read_all(source(type="text", path=str(tmp_path / "none")))
    with pytest.raises(CorpusError, match=r"no file ends in \.txt, \.md"):
        read_all(source(type="text", path=str(tmp_path)))


def test_digest_follows_names_and_contents(tmp_path: Path) -> None:
    sources = [source(type="text", path=str(tmp_path))]
    (tmp_path / "a.txt").write_text("one")
    first = inputs_digest(inputs_of(sources))
    assert inputs_digest(inputs_of(sources)) == first
    (tmp_path / "a.txt").write_text("two")
    second = inputs_digest(inputs_of(sources))
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert len({first, second, inputs_digest(inputs_of(sources))}) == 3


@pytest.mark.parametrize("url", ["file://{path}", "memory://{path}"])
def test_urls_are_read_as_paths_are(tmp_path: Path, url: str) -> None:
    root = url.format(path=tmp_path / "texts")
    for name, text in (("b/two.txt", "second"), ("one.txt", "first"), (".hidden.txt", "x"), ("c.bin", "x")):
        with fsspec.open(f"{root}/{name}", "w", auto_mkdir=True) as file:
            file.write(text)
    config = source(type="text", path=root)
    documents, _ = read_all(config)
    assert documents == {"b/two.txt": "second", "one.txt": "first"}
    digests = [file_digest(file) for file in list_files(config)]
    with fsspec.open(f"{root}/one.txt", "w") as file:
        file.write("first, longer")
    assert [file_digest(file) for file in list_files(config)][0] == digests[0]
    assert [file_digest(file) for file in list_files(config)][1] != digests[1]


def test_packed_text_over_a_url(tmp_path: Path) -> None:
    with fsspec.open("memory://packed/a.jsonl.zst", "wb") as file:
        file.write(zstandard.ZstdCompressor().compress(b'{"text": "packed"}\n'))
    assert read_all(source(type="jsonl", path="memory://packed"))[0] == {"a.jsonl.zst:1": "packed"}


def test_csv_by_column_with_quotes_and_bad_rows(tmp_path: Path) -> None:
    rows = 'id,text,kind\n7,"one,\ntwo ""three""",Big Data\n8,short\n9,last,x\n'
    (tmp_path / "t.csv").write_text(rows)
    (tmp_path / "u.tsv").write_text("text\tid\nwith tab\t1\n")
    config = source(type="csv", path=str(tmp_path), id_field="id", domain_field=None)
    documents, counts = read_all(config)
    assert documents == {"t.csv:7": 'one,\ntwo "three"', "t.csv:9": "last", "u.tsv:1": "with tab"}
    assert counts.dropped == {"not_a_row": 1} and counts.first_dropped == {"not_a_row": "t.csv:4"}
    found, _ = documents_of(source(type="csv", path=str(tmp_path / "t.csv"), domain_field="kind"))
    assert [document.domain for document in found] == ["big-data", "x"]
    with pytest.raises(CorpusError, match=r"t\.csv: no column 'body'.* to one of id, text, kind"):
        read_all(source(type="csv", path=str(tmp_path), text_field="body"))


def test_records_of_several_fields_become_one_text(tmp_path: Path) -> None:
    records = [
        {"q": "What?", "meta": {"a": ["this", "that"]}, "n": 3},
        {"q": "Which?", "meta": {}},
        {"q": "{n} {q.__class__}", "meta": {"a": "no"}},
    ]
    (tmp_path / "r.json").write_text(json.dumps(records))
    documents, counts = read_all(source(type="json", path=str(tmp_path), template="{q}\n{{{meta.a}}}"))
    assert documents == {"r.json:0": "What?\n{this, that}", "r.json:2": "{n} {q.__class__}\n{no}"}
    assert counts.dropped == {"no_field_meta.a": 1}


@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "file"])
def test_saved_dataset_folder(tmp_path: Path, is_stream: bool) -> None:
    table = pa.table({"text": ["one", None, "three"], "id": ["x", "y", "z"]})
    make = pa.ipc.new_stream if is_stream else pa.ipc.new_file
    with make(str(tmp_path / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "state.json").write_text("{}")
    documents, counts = read_all(source(type="arrow", path=str(tmp_path), id_field="id"))
    assert list(documents.values()) == ["one", "three"] and counts.dropped == {"no_field_text": 1}
    assert list(documents) == ["data-00000-of-00001.arrow:x", "data-00000-of-00001.arrow:z"]


def test_domain_by_folder(tmp_path: Path) -> None:
    for name in ("cs.AI/train/a.txt", "top.txt", "Art History/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found, _ = documents_of(source(type="text", domain="rest", path=str(tmp_path), domain_folder=1))
    assert {document.path: document.domain for document in found} == {
        "cs.AI/train/a.txt": "cs-ai",
        "top.txt": "rest",
        "Art History/b.txt": "art-history",
    }


# Faults 43, 45, 46 and 54: hostile input.


def test_bomb_stops_at_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MIN_EXPANSION_BYTES", 1 << 24)
    with (tmp_path / "bomb.jsonl.zst").open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as writer:
        for _ in range(1 << 10):
            writer.write(bytes(1 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorpusError, match=r"bomb\.jsonl\.zst: unpacks to more than \d+ MB, 1000 times its size"):
        read_all(source(type="jsonl", path=str(tmp_path)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_junk_behind_a_frame_is_an_error(tmp_path: Path) -> None:
    frame = zstandard.ZstdCompressor().compress(b'{"text": "good"}\n')
    (tmp_path / "d.jsonl.zst").write_bytes(frame + b"junk that is no frame")
    with pytest.raises(CorpusError, match=r"d\.jsonl\.zst: unreadable, damaged or cut short"):
        read_all(source(type="jsonl", path=str(tmp_path)))


def test_awkward_text_is_kept_repaired_or_counted(tmp_path: Path) -> None:
    texts = {
        "bom.txt": b"\xef\xbb\xbfmark",
        "control.txt": b"bell \x07 and \x1b[1m",
        "crlf.txt": b"a\r\nb",
        "invalid.txt": b"caf\xe9 cr\xe8me",
        "long.txt": b"x" * 10_000_000,
        "nul.txt": b"a\0b",
        "rtl.txt": "\u202eright\u200b to left \ufeff".encode(),
        "special.txt": b"<|endoftext|> </s> [EOS]",
        "utf16.txt": "sixteen".encode("utf-16"),
    }
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
    config = source(type="text", path=str(tmp_path))
    documents, counts = read_all(config)
    assert counts.dropped == {"not_utf8": 1, "not_text": 2} and not counts.repaired
    assert documents == {
        name: texts[name].decode("utf-8-sig") for name in sorted(texts) if name[:3] not in ("inv", "nul", "utf")
    }
    repaired, counts = read_all(config, encoding="repair", controls="strip")
    assert counts.repaired == {"encoding": 2, "controls": 2} and not counts.dropped
    assert repaired["utf16.txt"] == "sixteen" and repaired["nul.txt"] == "ab"
    assert repaired["invalid.txt"] == "caf\ufffd cr\ufffdme" and repaired["control.txt"] == "bell  and [1m"


def test_lone_surrogates_are_dropped_or_replaced(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "a \\ud800 b"}\n{"text": "caf\xe9"}\n{"text": "good"}\n')
    config = source(type="jsonl", path=str(tmp_path))
    documents, counts = read_all(config)
    assert documents == {"d.jsonl:3": "good"} and counts.dropped == {"not_json": 2}
    documents, counts = read_all(config, encoding="repair")
    assert list(documents.values()) == ["a \ufffd b", "caf\ufffd", "good"] and counts.repaired["encoding"] == 2


@pytest.mark.parametrize(
    "kind", [pytest.param("jsonl", marks=pytest.mark.slow), "text", pytest.param("csv", marks=pytest.mark.slow), "json"]
)
def test_two_gigabytes_in_one_line_are_passed_over_and_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"huge.{kind if kind != 'text' else 'txt'}"
    path.write_bytes({"csv": b"text\n", "jsonl": b'{"text": "first"}\n'}.get(kind, b""))
    with path.open("r+b") as file:
        file.truncate(2 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    documents, counts = read_all(source(type=kind, path=str(tmp_path)))
    assert counts.first_dropped["too_long"] == (path.name if kind in ("text", "json") else f"{path.name}:2")
    assert list(documents.values()) == (["first"] if kind == "jsonl" else [])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


@pytest.mark.parametrize("name", ["texts.zip", "texts.tar", "texts.tar.gz", "texts.tgz", "texts.TAR.ZST"])
def test_archives_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(CorpusError, match=rf"{name}: an archive; unpack it into a folder"):
        list_files(source(type="text", path=str(tmp_path / name)))
    with pytest.raises(CorpusError, match="an archive"):
        list_files(source(type="text", path=str(tmp_path), suffixes=[Path(name).suffix]))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_links_that_go_round_end(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f.txt").write_text("text")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert read_all(source(type="text", path=str(tmp_path)))[0] == {"a/f.txt": "text"}
