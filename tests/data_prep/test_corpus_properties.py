"""Random corpora: nothing is lost, nothing depends on how the work was cut, tokens are the text."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightbulb.config import build_config
from lightbulb.data.tokenizer import EOS, Tokenizer
from lightbulb.data_prep.config import CorpusConfig
from lightbulb.data_prep.mds import ShardFormat
from lightbulb.data_prep.pipeline import preprocess

any_text = st.one_of(
    st.text(alphabet="ab \n", max_size=80),
    st.text(max_size=40),
    st.sampled_from([EOS, f"x{EOS}y", "</s>", "\0", "  \n", "twice", "thrice", "a b " * 40]),
)
METHODS = ("concatenate", "best_fit", "ordered")


def build(folder: Path, texts: list[str], **changes: Any) -> tuple[CorpusConfig, dict[str, Any]]:
    """A corpus of JSON lines in several files; the first two documents make it trainable."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "in").mkdir(parents=True)
    lines = [orjson.dumps({"text": text}) for text in ("word " * 60, "other " * 40, *texts)]
    for i in range(3):
        (folder / "in" / f"{i}.jsonl").write_bytes(b"\n".join(lines[i::3]) + b"\n")
    values = {
        "output": str(folder / "out"),
        "context_length": 16,
        "held_out_fraction": 0.0,
        "shard_bytes": 1 << 12,
        "tokenizer": {"vocab_size": 280},
        "sources": [{"type": "jsonl", "path": str(folder / "in")}],
        "deduplicate": {},
        "executor": {"workers": 1},
    }
    config = build_config(CorpusConfig, values | changes)
    return config, preprocess(config).manifest


def read_rows(config: CorpusConfig, manifest: dict[str, Any]) -> list[Any]:
    """All training rows in their order."""
    shards = ShardFormat(config.context_length + 1, "uint16", config.shard_bytes)
    folder = config.output / "train" / "jsonl"
    entries = manifest["splits"]["train"]["jsonl"]["shards"]
    return [shards.read(folder / entry["basename"], i) for entry in entries for i in range(entry["samples"])]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(any_text, max_size=30), method=st.sampled_from(METHODS))
def test_nothing_is_lost(tmp_path: Path, texts: list[str], method: str) -> None:
    config, manifest = build(tmp_path, texts, pack={"method": method})
    [source] = manifest["sources"]
    entry = manifest["splits"]["train"]["jsonl"]
    dropped = source["dropped"]
    assert source["documents"] + sum(dropped.values()) == len(texts) + 2
    assert entry["documents"] == source["documents"] and entry["bytes"] == source["bytes"]
    usable = [text for text in texts if text.strip() and "\0" not in text]
    assert dropped.get("duplicate", 0) == len(usable) - len(set(usable) - {"word " * 60, "other " * 40})

    lineage = pq.read_table(config.output / "lineage" / "documents.parquet").to_pylist()
    assert [line["document"] for line in lineage] == list(range(len(lineage)))
    assert Counter(line["dropped"] for line in lineage) == {
        **({"duplicate": dropped["duplicate"]} if dropped.get("duplicate") else {}),
        None: source["documents"],
    }
    assert sum(line["tokens"] for line in lineage) == entry["tokens"]

    # Rows, put together by the lineage, are the texts.
    tokenizer = Tokenizer.load(config.output / "tokenizer.json")
    rows = read_rows(config, manifest)
    pieces = pq.read_table(config.output / "lineage" / "rows" / "train" / "jsonl.parquet").to_pylist()
    found: dict[int, dict[int, int]] = {}
    ends = [0] * len(rows)
    for piece in pieces:
        begin = ends[piece["row"]]
        ends[piece["row"]] = end = begin + piece["length"]
        for i, token in enumerate(rows[piece["row"]]["tokens"][begin:end].tolist()):
            found.setdefault(piece["document"], {})[piece["start"] + i] = token
    for row, end in zip(rows, ends, strict=True):
        assert (row["document_ids"][:end] > 0).all() and (row["document_ids"][end:] == 0).all()
    by_file = [["word " * 60, "other " * 40, *texts][i::3] for i in range(3)]
    in_order = [text for part in by_file for text in part if text.strip() and "\0" not in text]
    unused = 0
    for line, text in zip(lineage, in_order, strict=True):
        tokens = found.get(line["document"], {})
        unused += line["tokens"] - len(tokens)
        if line["tokens"] and len(tokens) == line["tokens"]:
            ids = [tokens[i] for i in range(len(tokens))]
            assert ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in ids[:-1]
            assert tokenizer.decode(ids[:-1]) == text
    assert unused == entry["unused_tokens"] < (1 if method == "best_fit" else 17)


@pytest.mark.parametrize(
    ("method", "workers"),
    [
        ("concatenate", 1),
        ("best_fit", 1),
        ("ordered", 1),
        ("concatenate", 2),
        pytest.param("concatenate", 4, marks=pytest.mark.slow),
    ],
)
def test_same_bytes_however_the_work_is_cut(tmp_path: Path, method: str, workers: int) -> None:
    texts = [f"document {i} " * (i % 23) + EOS for i in range(200)] + ["again and again"] * 7
    texts[1::30] = [" "] * len(texts[1::30])  # dropped, in tasks of their own
    config, _ = build(tmp_path / "a", texts, pack={"method": method}, held_out_fraction=0.1)
    assert orjson.loads((config.output / "manifest.json").read_bytes())["sources"][0]["examples"]["empty"]
    small = {"task_bytes": 2_000, "executor": {"workers": workers}, "output": str(tmp_path / "cut")}
    again = build_config(CorpusConfig, config.model_dump(mode="json") | small)
    preprocess(again)
    assert files_of(again.output) == files_of(config.output)
