"""Branches that keep their trunks together, as real pretraining processes."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Command
from training_runs import STEPS, TRAIN, final_hashes, losses, reached, wait_for, write_run_file

from lightbulb.train.checkpoint import Checkpoint
from lightbulb.train.manifest import step_folder

SETTINGS = {"every": 3, "lr": 0.7, "momentum": 0.9, "wait_seconds": 100}
QUIET = TRAIN | {"eval_every": 0, "save_every": 4}  # the middle checkpoints are between two meetings

Write = Callable[..., list[Path]]


@pytest.fixture
def branches(run_file, tmp_path: Path) -> Write:
    """``branches("name", seeds=(1, 2), every=4)``: run files of branches that meet in ``tmp_path/name-exchange``."""

    def write(name: str, seeds: tuple[int, ...], **sync: Any) -> list[Path]:
        sync = SETTINGS | {"folder": str(tmp_path / f"{name}-exchange"), "branches": len(seeds)} | sync
        return [
            run_file(f"{name}-{branch}", seed=seed, train=QUIET, outer=sync | {"branch": branch})
            for branch, seed in enumerate(seeds)
        ]

    return write


def tensors(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(step_folder(run, step))
    return {
        name: checkpoint.read(name, tuple(slice(0, size) for size in record.shape), tuple(record.shape))
        for name, record in checkpoint.manifest.tensors.items()
    }


def train(start: Callable[..., Command], paths: list[Path], world_size: int = 1, **environment: str) -> None:
    commands = [start("pretrain", [str(path)], world_size, **environment) for path in paths]
    for command in commands:
        assert command.wait() == 0, command.text()


def meetings(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in lines if record["kind"] == "outer"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> list[Path]:
    """Run folders of two branches that nothing interrupted."""
    root = tmp_path_factory.mktemp("whole")
    outer = SETTINGS | {"folder": str(root / "exchange"), "branches": 2}
    commands = []
    for branch in (0, 1):
        path = write_run_file(
            root, corpus, f"branch-{branch}", seed=branch + 1, train=QUIET, outer=outer | {"branch": branch}
        )
        commands.append(Command("pretrain", [str(path)], 1, {}, root / f"output-{branch}.txt"))
    for command in commands:
        assert command.wait() == 0, command.text()
    return [root / f"branch-{branch}" for branch in (0, 1)]


def test_equality_one_branch_and_equal_branches_are_the_single_run(start, run_file, branches, tmp_path: Path) -> None:
    train(start, [run_file("single", seed=1, train=QUIET)])
    expected = final_hashes(tmp_path / "single")
    train(start, branches("one", (1,), lr=1.0, momentum=0.0))
    assert final_hashes(tmp_path / "one-0") == expected
    train(start, branches("two", (1, 1), lr=1.0, momentum=0.0, every=1))
    assert final_hashes(tmp_path / "two-0") == final_hashes(tmp_path / "two-1") == expected
    train(start, branches("never", (1,), every=STEPS + 1))
    assert final_hashes(tmp_path / "never-0") == expected
    assert [record["number"] for record in meetings(tmp_path / "never-0")] == [0]  # the common start


def test_equality_in_bfloat16_too(start, run_file, branches, tmp_path: Path) -> None:
    narrow = "train.precision=bf16"
    paths = [run_file("single", seed=1, train=QUIET), *branches("two", (1, 1), lr=1.0, momentum=0.0)]
    commands = [start("pretrain", [str(path), narrow]) for path in paths]
    for command in commands:
        assert command.wait() == 0, command.text()
    expected = final_hashes(tmp_path / "single")
    assert final_hashes(tmp_path / "two-0") == final_hashes(tmp_path / "two-1") == expected


def test_trunks_are_equal_after_a_meeting_experts_stay_and_a_kill_changes_nothing(
    start, branches, whole, tmp_path
) -> None:
    first, second = map(tensors, whole)
    shared = [name for name in first if ".channel." not in name and ":" not in name]
    local = [name for name in first if ".channel." in name and name.endswith("weight")]
    assert shared and local
    assert all(torch.equal(first[name], second[name]) for name in shared)
    assert not any(torch.equal(first[name], second[name]) for name in local)
    found = meetings(whole[1])
    assert [(record["number"], record["step"]) for record in found] == [(0, 0), (1, 3), (2, 6), (3, 9), (4, 12)]
    trunk_bytes = 4 * sum(first[name].numel() for name in shared)
    assert all(record["received"] == trunk_bytes <= record["sent"] < 1.3 * trunk_bytes for record in found[1:])

    paths = branches("killed", (1, 2))
    # branch 1 dies having sent the trunk of round 3, branch 0 while it makes the step of round 2
    commands = [
        start("pretrain", [str(path)], LIGHTBULB_FAULT=fault)
        for path, fault in zip(paths, ("kill:point=outer.step:step=2", "kill:point=outer.sent:step=3"), strict=True)
    ]
    assert commands[0].wait() == -signal.SIGKILL, commands[0].text()
    again = start("pretrain", [str(paths[0])])
    assert commands[1].wait() == -signal.SIGKILL, commands[1].text()
    last = start("pretrain", [str(paths[1])])
    assert again.wait() == last.wait() == 0, again.text() + last.text()
    for branch in (0, 1):
        assert final_hashes(tmp_path / f"killed-{branch}") == final_hashes(whole[branch])
        assert losses(tmp_path / f"killed-{branch}") == losses(whole[branch])


def test_who_waits_stops_for_a_signal_and_names_who_is_missing(start, branches, whole, tmp_path: Path) -> None:
    paths = branches("alone", (1, 2))
    alone = start("pretrain", [str(paths[0])])
    wait_for(lambda: reached(tmp_path / "alone-0", 3))
    time.sleep(0.5)
    alone.processes[0].terminate()
    assert alone.wait() == 0, alone.text()
    assert f"stopped at step 3 of {STEPS}" in alone.text()
    waits = start("pretrain", [str(paths[0]), "outer.wait_seconds=1"])
    assert waits.wait() == 1
    assert "waited 1 s at step 3 for branch 1 (never seen)" in waits.text() and "Traceback" not in waits.text()
    train(start, paths)
    for branch in (0, 1):
        assert final_hashes(tmp_path / f"alone-{branch}") == final_hashes(whole[branch])


@pytest.mark.parametrize("layout", ["tensor", pytest.param("data", marks=pytest.mark.slow)])
def test_branches_of_two_ranks_are_those_of_one(start, branches, whole, tmp_path: Path, layout: str) -> None:
    paths = branches(layout, (1, 2))
    commands = [start("pretrain", [str(path), f"parallel.{layout}=2"], world_size=2) for path in paths]
    for command in commands:
        assert command.wait() == 0, command.text()
    for branch in (0, 1):
        ours, expected = tensors(tmp_path / f"{layout}-{branch}"), tensors(whole[branch])
        for name in expected:
            torch.testing.assert_close(ours[name], expected[name], rtol=1e-3, atol=1e-5, msg=name)
