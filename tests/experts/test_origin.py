"""origin.json: written, read back, checked, and found again after a move."""

import hashlib
import json
from pathlib import Path

import pytest
from dense_runs import make_run

from lightbulb.experts.upcycle import upcycle
from lightbulb.experts.upcycle_config import UpcycleConfig
from lightbulb.train.manifest import CheckpointError, step_folder
from lightbulb.train.origin import Origin, Parent, locate, note_start, parent_of, read_origin, write_origin

MLP = {
    "vocab_size": 64, "dim": 16, "num_layers": 1, "context_length": 12,
    "block_pattern": [{
        "token": {"type": "attention", "num_heads": 4},
        "channel": {"type": "mlp", "hidden_dim": 24},
    }],
}  # fmt: skip


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    return make_run(tmp_path / "seed", MLP)


def test_what_is_written_is_read(tmp_path: Path, seed: Path) -> None:
    checkpoint = step_folder(seed, 0)
    parent = parent_of(checkpoint)
    digest = hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()
    assert parent == Parent(run=str(seed), step=0, digest=digest)
    run = tmp_path / "decay"
    run.mkdir()
    assert read_origin(run) is None
    origin = Origin(kind="decay", parents=[parent], detail={"mixture": {"weights": {"code": 2}}})
    write_origin(run, origin)
    assert read_origin(run) == origin
    note_start(run, checkpoint)
    assert read_origin(run) == origin, "what the folder says already counts"


def test_an_upcycled_run_names_its_sources(tmp_path: Path, seed: Path) -> None:
    other = make_run(tmp_path / "other", MLP, drift=0.1, seed=1)
    upcycle(UpcycleConfig.model_validate(
        {"run": str(tmp_path / "moe"), "method": "btx", "compare": False,
         "sources": [{"path": str(seed)}, {"path": str(other)}]}
    ))  # fmt: skip
    origin = read_origin(tmp_path / "moe")
    assert origin is not None and origin.kind == "upcycle" and origin.detail["method"] == "btx"
    assert origin.parents == [parent_of(step_folder(run, 0)) for run in (seed, other)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "magic"}, "kind"),
        ({"parents": []}, "parents"),
        ({"parents": [{"run": "/a", "step": -1}]}, "parents.0.step"),
        ({"parents": [{"run": "/a", "digest": "abc"}]}, "parents.0.digest"),
        ({"more": 1}, "more"),
    ],
)
def test_a_damaged_origin_is_named(tmp_path: Path, change: dict, words: str) -> None:
    (tmp_path / "origin.json").write_text(json.dumps({"kind": "start", "parents": [{"run": "/a"}]} | change))
    with pytest.raises(CheckpointError, match=rf"origin.json: damaged or of another version: {words}.*restore"):
        read_origin(tmp_path)


def test_a_cut_file_and_a_missing_manifest_are_named(tmp_path: Path, seed: Path) -> None:
    (tmp_path / "origin.json").write_text('{"kind": "sta')
    with pytest.raises(CheckpointError, match="unreadable"):
        read_origin(tmp_path)
    with pytest.raises(CheckpointError, match="manifest.json: unreadable"):
        parent_of(step_folder(seed, 7))


def test_a_parent_that_moved_along_is_found(tmp_path: Path, seed: Path) -> None:
    parent = parent_of(step_folder(seed, 0))
    run = make_run(tmp_path / "run", MLP)
    assert locate(run, parent) == seed
    moved = tmp_path / "moved"
    moved.mkdir()
    seed.rename(moved / "seed")
    assert locate(run, parent) is None
    run.rename(moved / "run")
    assert locate(moved / "run", parent) == moved / "seed"
