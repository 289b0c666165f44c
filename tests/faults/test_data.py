"""Damaged and hostile corpora under a real run: fault catalogue 41, 42 and 44.

What can be wrong with an index or a shard is listed case by case in ``tests/data/test_shards.py`` (41, 42: names,
sizes, counts, depth; 44: ids beyond the vocabulary), with a tokenizer or manifest in ``tests/data/test_corpus.py``
(44: other tokenizer), with id types in ``tests/data_prep/test_tokenise.py`` (44: overflow). Here: a run stops, never
with fewer samples in silence, and `lightbulb verify --data` finds all.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from training_runs import TRAIN

from lightbulb.data.config import DataError
from lightbulb.data.index import read_index


@pytest.fixture
def data(tmp_path: Path, corpus: Path) -> Path:
    """A copy of the corpus to damage."""
    return Path(shutil.copytree(corpus, tmp_path / "data"))


def shard_of(data: Path) -> Path:
    return next((data / "train" / "sums").glob("*.mds"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (Path.unlink, "missing; copy the shard again"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "bytes, index.json says"),
    "empty": (lambda path: path.write_bytes(b""), "0 bytes, index.json says"),
    "flipped": (flip, "damaged, its xxh64 is"),
    "of another corpus": (lambda path: path.write_bytes(path.read_bytes()[::-1]), "damaged, its xxh64 is"),
    "symbolic link": (lambda path: (path.unlink(), path.symlink_to("/etc/passwd")), "bytes, index.json says"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_stops_the_run_and_is_named(start, run_file, tmp_path, data, damage):
    shard = shard_of(data)
    change, words = DAMAGE[damage]
    change(shard)
    command = start("pretrain", [str(run_file("run", data={"path": str(data)}))])
    assert command.wait() == 1, command.text()
    assert f"error: {shard}: " in command.text() and words in command.text()
    assert "Traceback" not in command.text()


def test_verify_finds_a_shard_damaged_after_it_was_read(start, run_file, tmp_path, data):
    path = run_file("run", data={"path": str(data)}, train=TRAIN | {"steps": 4, "eval_every": 0})
    command = start("pretrain", [str(path)], world_size=2)
    assert command.wait() == 0, command.text()
    good = start("verify", [str(tmp_path / "run"), "--data", "--json"])
    assert good.wait() == 0, good.text()
    report = json.loads(good.text())
    assert report["ok"] and report["data"]["shards"] >= 2 and report["data"]["lines"] == 8
    flip(shard_of(data))
    bad = start("verify", [str(tmp_path / "run"), "--data"])
    assert bad.wait() == 1
    assert f"error: {shard_of(data)}: damaged" in bad.text()


def test_an_index_that_leads_elsewhere_is_refused_before_anything_is_opened(start, run_file, data):
    """42: with the manifest's digest forged as well."""
    index = data / "train" / "sums" / "index.json"
    old = index.read_bytes()
    index.write_bytes(old.replace(shard_of(data).name.encode(), b"../../../secret.mds"))
    manifest = data / "manifest.json"
    new = [hashlib.sha256(content).hexdigest() for content in (old, index.read_bytes())]
    manifest.write_text(manifest.read_text().replace(*new))
    command = start("pretrain", [str(run_file("run", data={"path": str(data)}))])
    assert command.wait() == 1
    assert "index.json" in command.text() and "basename" in command.text()
    assert "Traceback" not in command.text()


def test_an_index_of_very_many_shards_is_refused_quickly(data):
    index = data / "train" / "sums" / "index.json"
    values = json.loads(index.read_text())
    entry = json.dumps(values["shards"][0])
    index.write_text('{"version": 2, "shards": [' + ", ".join([entry] * 20_000) + "]}")
    started = time.monotonic()
    with pytest.raises(DataError, match="is listed 20000 times"):
        read_index(index.parent)
    assert time.monotonic() - started < 10
