"""Whole corpora: the same bytes every time, nothing half written, nothing of others overwritten."""

import os
import random
import resource
from pathlib import Path
from typing import Any

import orjson
import pytest

from lightbulb.config import build_config
from lightbulb.data.tokenizer import Tokenizer, TokenizerError
from lightbulb.data_prep import pipeline
from lightbulb.data_prep.config import CorpusConfig
from lightbulb.data_prep.counts import CorpusError
from lightbulb.data_prep.pipeline import preprocess
from lightbulb.folder import FolderError, FolderInUse, claim


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    for domain in ("plain", "poems"):
        (folder / domain).mkdir(parents=True)
        for i in range(20):
            (folder / domain / f"{i:02}.txt").write_text(f"{domain} number {i}:\n" + "a line of words\n" * (i + 1))
    (folder / "plain" / "bad.txt").write_bytes(b"\xff\xfe")
    return folder


def corpus_config(texts: Path, **changes: Any) -> CorpusConfig:
    values = {
        "output": str(texts.parent / "corpus"),
        "context_length": 16,
        "held_out_fraction": 0.2,
        "shard_bytes": 1 << 12,
        "tokenizer": {"vocab_size": 300},
        "sources": [{"type": "text", "domain": name, "path": str(texts / name)} for name in ("plain", "poems")],
    }
    return build_config(CorpusConfig, values | changes)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_two_runs_give_the_same_bytes(texts: Path) -> None:
    first = corpus_config(texts)
    second = corpus_config(texts, output=str(texts.parent / "again"), executor={"workers": 1})
    assert not preprocess(first).is_up_to_date
    assert not preprocess(second).is_up_to_date
    assert files_below(first.output) == files_below(second.output)
    assert not list(texts.parent.glob("*.work"))


def test_another_seed_only_changes_the_training_order(texts: Path) -> None:
    results = [preprocess(corpus_config(texts, output=str(texts.parent / f"seed{seed}"), seed=seed)) for seed in (0, 1)]
    first, second = (result.manifest["splits"] for result in results)
    assert first["held_out"] == second["held_out"]
    assert first["train"]["plain"]["tokens"] == second["train"]["plain"]["tokens"]
    assert first["train"]["plain"]["shards"] != second["train"]["plain"]["shards"]


def test_manifest_counts_everything(texts: Path) -> None:
    manifest = preprocess(corpus_config(texts)).manifest
    plain, _ = manifest["sources"]
    assert (plain["documents"], plain["dropped"], plain["first_dropped"]) == (
        20,
        {"not_utf8": 1},
        {"not_utf8": "bad.txt"},
    )
    for domain in ("plain", "poems"):
        train, held_out = (manifest["splits"][split][domain] for split in ("train", "held_out"))
        assert train["documents"] + held_out["documents"] == 20
        assert train["rows"] * 16 + train["unused_tokens"] + 1 == train["tokens"]
        assert held_out["unused_tokens"] == 0 and held_out["rows"] == -(-(held_out["tokens"] - 1) // 16)
        assert sum(shard["samples"] for shard in train["shards"]) == train["rows"]
        assert len(train["shards"]) > 1
    assert plain["bytes"] == sum(manifest["splits"][split]["plain"]["bytes"] for split in ("train", "held_out"))


def test_unchanged_corpus_is_left_alone_and_a_changed_one_replaced(texts: Path) -> None:
    config = corpus_config(texts)
    preprocess(config)
    before = {path: path.stat().st_mtime_ns for path in config.output.rglob("*")}
    assert preprocess(config).is_up_to_date
    assert {path: path.stat().st_mtime_ns for path in config.output.rglob("*")} == before
    assert not preprocess(corpus_config(texts, context_length=8)).is_up_to_date
    assert not preprocess(config).is_up_to_date
    (texts / "plain" / "00.txt").write_text("changed")
    assert not preprocess(config).is_up_to_date


def test_loaded_tokenizer_is_used_and_part_of_the_inputs(texts: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    Tokenizer.train(["abc"], 260).save(path)
    config = corpus_config(texts, tokenizer={"path": str(path)})
    manifest = preprocess(config).manifest
    assert (config.output / "tokenizer.json").read_bytes() == path.read_bytes()
    assert manifest["tokenizer"]["digest"] == Tokenizer.load(path).digest
    Tokenizer.train(["abcd"], 261).save(path)
    assert not preprocess(config).is_up_to_date
    with pytest.raises(TokenizerError, match=r"none\.json"):
        preprocess(corpus_config(texts, tokenizer={"path": "none.json"}))


def test_interrupted_run_leaves_no_corpus_and_the_next_goes_on(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = corpus_config(texts)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "write_manifest", interrupt)
        preprocess(config)
    work = texts.parent / "corpus.work"
    assert not config.output.exists()
    finished = {path: path.stat().st_mtime_ns for path in work.glob("*/*/report.json")}
    assert {path.parent.parent.name for path in finished} >= {"read", "split", "tokenizer", "tokens", "pack", "shards"}
    # What a killed run would have left.
    (work / "corpus" / "train" / "plain").mkdir(parents=True, exist_ok=True)
    (work / "read" / ".0123.some-host.4711.tmp").mkdir()
    kept = corpus_config(texts, keep_work=True)
    preprocess(kept)
    assert (kept.output / "manifest.json").exists()
    assert {path: path.stat().st_mtime_ns for path in work.glob("*/*/report.json")} == finished
    assert not list(work.glob("*/.*"))


def interrupt(*arguments: Any) -> None:
    raise KeyboardInterrupt


def test_two_at_once_are_refused(texts: Path) -> None:
    with claim(texts.parent / "corpus.work"), pytest.raises(FolderInUse, match=str(os.getpid())):
        preprocess(corpus_config(texts))


@pytest.mark.parametrize("is_folder", [True, False], ids=["folder", "file"])
def test_output_of_someone_else_is_not_replaced(texts: Path, is_folder: bool) -> None:
    config = corpus_config(texts)
    mine = config.output / "thesis.doc" if is_folder else config.output
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("years of work")
    with pytest.raises(FolderError, match="choose another output"):
        preprocess(config)
    assert mine.read_text() == "years of work"


def test_too_little_text_is_said_with_counts(texts: Path) -> None:
    with pytest.raises(CorpusError, match=r"sources: \d+ training tokens do not fill one row of 100001"):
        preprocess(corpus_config(texts, context_length=100_000))
    assert not (texts.parent / "corpus").exists()


def test_write_that_the_system_refuses_is_explained_and_leaves_nothing_half_done(texts: Path) -> None:
    noise = random.Random(0).randbytes(1 << 20).hex()
    (texts / "plain" / "long.txt").write_text("\n".join(noise[i : i + 60] for i in range(0, len(noise), 60)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))
    try:
        with pytest.raises(FolderError, match=r"corpus\.work/read/.*: the file-size limit"):
            preprocess(corpus_config(texts))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(texts.parent.glob("corpus.work/*/*")) and not (texts.parent / "corpus").exists()


def test_control_token_in_a_document_is_no_document_end(texts: Path) -> None:
    for path in texts.rglob("*.txt"):
        path.write_text("before <|endoftext|> behind\n" * 5)
    manifest = preprocess(corpus_config(texts, held_out_fraction=0.0)).manifest
    assert manifest["splits"]["held_out"] == {}
    entry = manifest["splits"]["train"]["plain"]
    assert entry["tokens"] > entry["documents"] * 20


@pytest.mark.parametrize("name", ["tokenizer.json", "train/plain/index.json", "train/poems/shard.00000.mds"])
@pytest.mark.parametrize("is_deleted", [True, False], ids=["deleted", "damaged"])
def test_damaged_corpus_is_not_up_to_date(texts: Path, name: str, is_deleted: bool) -> None:
    config = corpus_config(texts)
    preprocess(config)
    before = files_below(config.output)
    path = config.output / name
    if is_deleted:
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert not preprocess(config).is_up_to_date
    assert files_below(config.output) == before


def test_manifest_that_is_not_json_does_not_count_as_a_corpus(texts: Path) -> None:
    config = corpus_config(texts)
    preprocess(config)
    (config.output / "manifest.json").write_text("{")
    assert not preprocess(config).is_up_to_date
    assert orjson.loads((config.output / "manifest.json").read_bytes())["format"] == 2


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"a.txt": ""}, r"source text .*: no usable document; dropped 1 empty \(first: a\.txt\)"),
        ({"a.txt": " \n\t", "b.txt": "\0"}, r"dropped 1 empty \(first: a\.txt\), 1 not_text \(first: b\.txt\)"),
        ({"a.txt": "x" * ((1 << 24) + 1)}, r"dropped 1 too_long \(first: a\.txt\); set sources\.delimiter"),
        ({"a.txt": "x"}, "held_out_fraction: domain 'text' has one document"),
        ({"a.txt": "x", "b.txt": "y"}, r"sources: 2 training tokens do not fill one row of 17"),
    ],
    ids=["empty", "blank", "long", "one", "few"],
)
def test_corpora_of_nothing_are_refused_with_counts(tmp_path: Path, contents: dict[str, str], message: str) -> None:
    """Fault 47."""
    (tmp_path / "texts").mkdir()
    for name, content in contents.items():
        (tmp_path / "texts" / name).write_text(content)
    source = {"type": "text", "path": str(tmp_path / "texts")}
    with pytest.raises(CorpusError, match=message):
        preprocess(corpus_config(tmp_path / "texts", sources=[source], executor={"workers": 1}))
    assert not (tmp_path / "corpus").exists()


def test_input_that_changes_meanwhile_is_refused(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 49."""
    config = corpus_config(texts)

    def write_more(*arguments: Any) -> Any:
        (texts / "plain" / "05.txt").write_text("quite another text")
        return inputs

    inputs = pipeline.inputs_of(config.sources)
    with (
        monkeypatch.context() as patch,
        pytest.raises(CorpusError, match=r"05\.txt: changed while the corpus was made"),
    ):
        patch.setattr(pipeline, "inputs_of", write_more)
        preprocess(config)
    preprocess(config)
    assert preprocess(config).is_up_to_date


def test_only_what_changed_is_done_again(texts: Path) -> None:
    """A new file redoes the tasks that read it; another context length keeps texts, tokenizer and tokens."""
    config = corpus_config(texts, keep_work=True, task_bytes=1000, executor={"workers": 1})

    def finished() -> dict[str, set[str]]:
        work = texts.parent / "corpus.work"
        steps = {path.parent.parent.name for path in work.glob("*/*/report.json")}
        return {step: {path.name for path in (work / step).iterdir()} for step in steps}

    preprocess(config)
    first = finished()
    preprocess(config.model_copy(update={"context_length": 8}))
    second = finished()
    for step in ("read", "split", "tokenizer", "tokens"):
        assert second[step] == first[step]
    assert not second["pack"] & first["pack"] and not second["shards"] & first["shards"]
    (texts / "poems" / "99.txt").write_text("one poem more\n" * 3)
    preprocess(config.model_copy(update={"context_length": 8}))
    third = finished()
    assert len(third["read"] - second["read"]) == 1 and not second["tokens"] & third["tokens"]
