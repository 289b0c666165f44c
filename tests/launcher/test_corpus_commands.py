"""`verify` and `inspect` of a corpus: every damaged file is named, and what is shown is what is there."""

import json
from pathlib import Path

import pytest

from lightbulb.config import build_config
from lightbulb.data_prep.config import CorpusConfig
from lightbulb.data_prep.pipeline import preprocess
from lightbulb.launcher.inspect import main as inspect
from lightbulb.launcher.verify import main as verify


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    for domain in ("one", "two"):
        (tmp_path / domain).mkdir()
        for i in range(20):
            (tmp_path / domain / f"{i}.txt").write_text(f"{domain} {i}\n" * (i + 2))
    (tmp_path / "one" / "empty.txt").write_text("")
    values = {
        "output": str(tmp_path / "corpus"),
        "context_length": 16,
        "shard_bytes": 1 << 12,
        "held_out_fraction": 0.2,
        "tokenizer": {"vocab_size": 280},
        "sources": [{"type": "text", "domain": name, "path": str(tmp_path / name)} for name in ("one", "two")],
        "executor": {"workers": 1},
    }
    preprocess(build_config(CorpusConfig, values))
    return tmp_path / "corpus"


def test_whole_corpus_is_good(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify([str(prepared)]) == 0
    assert "corpus: good" in capsys.readouterr().out
    assert verify([str(prepared), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["files"] == sum(path.is_file() for path in prepared.rglob("*"))


def test_every_damaged_file_is_named(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault 41: each file in turn with a flipped bit, cut, empty and gone."""
    files = sorted(path for path in prepared.rglob("*") if path.is_file())
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for damaged in (flipped, content[:middle], b"", None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            assert verify([str(prepared)]) == 1
            errors = capsys.readouterr().err.splitlines()
            assert len(errors) == 1 and str(path) in errors[0]
            path.write_bytes(content)
    assert verify([str(prepared)]) == 0


def test_all_damaged_files_are_named_at_once(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = sorted(prepared.rglob("*.mds"))
    for path in shards:
        path.write_bytes(path.read_bytes()[:-1])
    assert verify([str(prepared)]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == len(shards) and all(str(path) in "".join(errors) for path in shards)


def test_a_manifest_that_points_outside_is_not_followed(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault 42."""
    manifest = json.loads((prepared / "manifest.json").read_text())
    (tmp_path / "secret").write_text("secret")
    manifest["files"] = {"../secret": "0", "/etc/passwd": "0"}
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    assert verify([str(prepared)]) == 1
    assert capsys.readouterr().err.count("listed, but not inside the corpus") == 2


def test_inspect_shows_sources_groups_documents_and_a_picture(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect([str(prepared), "--samples", "4", "--split", "held_out"]) == 0
    shown = capsys.readouterr().out
    assert "1 empty" in shown and "held_out/" in shown and shown.count(" tokens") >= 4
    picture = prepared.with_name("corpus.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    assert verify([str(prepared)]) == 0


def test_inspect_shows_clusters_order_and_what_was_dropped_for_what(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    texts, corpus = tmp_path / "texts", tmp_path / "corpus"
    texts.mkdir()
    for i in range(20):
        subject = ("harbour sail wave tide anchor", "oven flour butter sugar dough")[i % 2].split()
        (texts / f"{i}.txt").write_text(" ".join(subject[i * j % 5] for j in range(1, 40)) + f" {i}")
    (texts / "twice.txt").write_text((texts / "7.txt").read_text())
    (texts / "short.txt").write_text("[red]x")
    values = {
        "output": str(corpus),
        "context_length": 16,
        "tokenizer": {"vocab_size": 280},
        "sources": [{"type": "text", "domain": "one", "path": str(texts)}],
        "clean": {"min_chars": 10},
        "deduplicate": {},
        "embed": {"dimensions": 4},
        "cluster": {"num_clusters": 2},
        "order": {"method": "in_context"},
        "pack": {"method": "ordered"},
        "executor": {"workers": 1},
    }
    preprocess(build_config(CorpusConfig, values))
    assert inspect([str(corpus), "--samples", "0"]) == 0
    shown = capsys.readouterr().out
    for reason, path, because in (("duplicate", "twice.txt", "like 7.txt"), ("too_short", "short.txt", "[red]x")):
        assert any(reason in line and path in line and because in line for line in shown.splitlines())
    assert "nearest" in shown and "adjacent" in shown and "random" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["{}/none"], "manifest.json: missing"), (["{}", "--split", "test"], "split 'test' has no rows")],
)
def test_inspect_says_what_is_missing(
    prepared: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert inspect([argument.format(prepared) for argument in arguments]) == 1
    assert message in capsys.readouterr().err
