"""The ready configs read the layouts they are for, each made here in small."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lightbulb.config import load_config
from lightbulb.data_prep.clean import cleaned
from lightbulb.data_prep.config import CorpusConfig, RecordSourceConfig
from lightbulb.data_prep.counts import Counts
from lightbulb.data_prep.documents import Document
from lightbulb.data_prep.files import list_files
from lightbulb.data_prep.read import read_file

CORPORA = Path(__file__).parents[2] / "configs" / "corpora"
WORDS = "a sentence that is long enough to be kept, said once more and then again, until a hundred signs are there. "


def put(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def lines(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def put_table(path: Path, **columns: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def read(name: str, *overrides: str) -> list[Document]:
    config = load_config(CorpusConfig, CORPORA / f"{name}.yaml", overrides)
    counts = Counts()
    found = [
        kept
        for source in config.sources
        for file in list_files(source)
        for document in read_file(source, file, config.clean, counts)
        if (kept := cleaned(document, config.clean, counts)) is not None
    ]
    assert not counts.dropped
    return found


def domains(documents: list[Document]) -> Counter[str]:
    return Counter(document.domain for document in documents)


def test_m2d2(tmp_path: Path) -> None:
    put(tmp_path / "cs.AI" / "train.txt", f"{WORDS}\n\n{WORDS}2\n")
    put(tmp_path / "Culture_and_the_arts" / "train.txt", WORDS)
    put(tmp_path / "cs.AI" / "test.txt", WORDS)
    assert domains(read("m2d2", f"sources.0.path={tmp_path}")) == {"cs-ai": 2, "culture_and_the_arts": 1}


def test_amps(tmp_path: Path) -> None:
    put(tmp_path / "khan" / "12" / "1.json", json.dumps({"problem": "1 + 1?", "hints": ["Count.", "It is 2."]}))
    put(tmp_path / "mathematica" / "algebra" / "gcd" / "0.txt", "Problem:\ngcd(4, 6)\nAnswer:\n$2$")
    found = read("amps", f"sources.0.path={tmp_path}/khan", f"sources.1.path={tmp_path}/mathematica")
    assert [document.text for document in found] == [
        "Problem:\n1 + 1?\nSolution:\nCount.\nIt is 2.",
        "Problem:\ngcd(4, 6)\nAnswer:\n$2$",
    ]
    assert domains(found) == {"khan": 1, "mathematica": 1}


def test_math(tmp_path: Path) -> None:
    record = {"problem": "What?", "level": "Level 5", "type": "Counting & Probability", "solution": "$\\boxed{1}$"}
    put(tmp_path / "counting_and_probability" / "7.json", json.dumps(record))
    [document] = read("math", f"sources.0.path={tmp_path}")
    assert document.text == "Problem:\nWhat?\n\nSolution:\n$\\boxed{1}$\n"
    assert document.domain == "counting---probability"


def test_phi_code(tmp_path: Path) -> None:
    put(tmp_path / "code" / "0.jsonl", lines({"content": WORDS, "language": "Python"}))
    put_table(tmp_path / "exercises" / "0.parquet", prompt=[WORDS], response=["def f(): ..."])
    found = read("phi-code", f"sources.0.path={tmp_path}/code", f"sources.1.path={tmp_path}/exercises")
    assert domains(found) == {"python": 1, "exercises": 1} and found[1].text == f"{WORDS}\ndef f(): ...\n"


def test_open_qa(tmp_path: Path) -> None:
    put(
        tmp_path / "nq.jsonl", lines({"question": "Who?", "answer": ["she", "Ada"]}, {"question": "{x}", "answer": "y"})
    )
    found = read("open-qa", f"sources.0.path={tmp_path}")
    assert [d.text for d in found] == ["Question: Who?\nAnswer: she, Ada\n", "Question: {x}\nAnswer: y\n"]


def test_fineweb_edu(tmp_path: Path) -> None:
    path = tmp_path / "CC-MAIN-2024-10" / "train-00000-of-00001.parquet"
    put_table(
        path, text=["one", "two"], id=["<urn:uuid:1>", "<urn:uuid:2>"], dump=["CC-MAIN-2024-10"] * 2, score=[3.0, 4]
    )
    found = read("fineweb-edu", f"sources.0.path={tmp_path}")
    assert domains(found) == {"cc-main-2024-10": 2}
    assert found[0].path == "CC-MAIN-2024-10/train-00000-of-00001.parquet:<urn:uuid:1>"


def test_pairs(tmp_path: Path) -> None:
    put(tmp_path / "train.jsonl", lines({"question": "1 + 1?", "answer": "It is 2."}))
    [document] = read("pairs", f"sources.0.path={tmp_path}")
    assert document.text == "user:\n1 + 1?\n\nassistant:\nIt is 2."
    (begin, end) = document.answers
    assert document.text[begin:end] == "It is 2."


def test_redpajama(tmp_path: Path) -> None:
    put(tmp_path / "arxiv" / "a.jsonl", lines({"text": WORDS, "meta": {"url": "x"}}))
    put(tmp_path / "c4" / "b.jsonl.zst", zstandard.ZstdCompressor().compress(lines({"text": WORDS}).encode()))
    assert domains(read("redpajama", f"sources.0.path={tmp_path}")) == {"arxiv": 1, "c4": 1}


@pytest.mark.parametrize("path", sorted(CORPORA.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_ready_config_is_tried(path: Path) -> None:
    assert f"test_{path.stem.replace('-', '_')}" in globals()
    for source in load_config(CorpusConfig, path).sources:
        assert not isinstance(source, RecordSourceConfig) or source.text_fields
