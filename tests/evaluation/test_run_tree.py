"""The tree of runs: drawn from origin.json alone, whatever of it is there."""

import json
from pathlib import Path

import pytest

from lightbulb.evaluation.run_tree import Node, run_tree
from lightbulb.launcher import tree
from lightbulb.train.origin import Origin, Parent, write_origin


def make(folder: Path, kind: str | None = None, parents: tuple[Path, ...] = (), step: int = 8, **summary) -> Path:
    """A run's folder with no more in it than a tree needs."""
    folder.mkdir(parents=True)
    if kind is not None:
        origins = [Parent(run=str(parent), step=step, digest="0" * 64) for parent in parents]
        write_origin(folder, Origin.model_validate({"kind": kind, "parents": origins}))
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Path]:
    seed = make(tmp_path / "seed", steps=8, tokens=2048, held_out_bpb=2.5)
    one, two = (make(tmp_path / f"branch-{i}", "branch", (seed,), steps=12, tokens=3072) for i in range(2))
    moe = make(tmp_path / "moe", "upcycle", (one, two, seed), step=12)
    decay = make(tmp_path / "moe-decay-20" / "flat", "decay", (moe,), 20, steps=24, tokens=6144, held_out_bpb=2.0)
    return {"seed": seed, "one": one, "two": two, "moe": moe, "decay": decay}


def below(node: Node) -> dict:
    return {child.name: below(child) for child in node.children}


def test_ancestors_are_found_and_stand_above(family: dict[str, Path]) -> None:
    (root,) = run_tree([family["decay"]])
    assert root.run == family["seed"]
    assert below(root) == {"branch-0": {"moe": {"moe-decay-20/flat": {}}}, "branch-1": {}}
    moe = root.children[0].children[0]
    assert [parent.name for parent in moe.parents] == ["branch-0", "branch-1", "seed"]
    assert moe.facts == ["upcycle from step 12", "with branch-1, seed"]
    assert moe.children[0].facts == ["decay from step 20", "24 steps", "6,144 tokens", "2.0000 bits/byte"]


def test_metrics_count_where_there_is_no_summary(family: dict[str, Path]) -> None:
    lines = [{"kind": "train", "step": 3, "tokens": 30}, {"kind": "eval", "step": 3, "held_out_bpb": 4.0}]
    (family["moe"] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root,) = run_tree([family["moe"]])
    moe = root.children[0].children[0]
    assert (moe.steps, moe.tokens, moe.bpb) == (3, 30, 4.0)


def test_the_command_prints_and_draws(family: dict[str, Path], tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert tree.main([str(family["decay"]), str(family["two"]), "--png", str(tmp_path / "tree.png")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("branch-1") == 2  # as a run, and as what the mixture was made of
    assert "2.0000 bits/byte" in shown and "decay from step 20" in shown
    assert (tmp_path / "tree.png").read_bytes().startswith(b"\x89PNG")


def test_a_parent_that_is_gone_is_shown_as_gone(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "start", (tmp_path / "lost",))
    (root,) = run_tree([run])
    assert (root.kind, root.name) == ("gone", "lost") and below(root) == {"run": {}}


def test_what_is_no_run_or_damaged_is_named(tmp_path: Path, capsys) -> None:
    assert tree.main([str(tmp_path / "nothing")]) == 1
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "evaluation.json").write_text("{")
    assert tree.main([str(tmp_path / "bad")]) == 1
    assert "bad/evaluation.json: cannot be read" in capsys.readouterr().err
    (tmp_path / "bad" / "evaluation.json").write_text('{"format": 1, "bpb": 1.5}')
    assert run_tree([tmp_path / "bad"])[0].bpb == 1.5
    (tmp_path / "bad" / "summary.json").write_text("[]")
    assert tree.main([str(tmp_path / "bad")]) == 1
    assert "summary.json: damaged" in capsys.readouterr().err
