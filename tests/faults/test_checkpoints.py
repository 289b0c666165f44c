"""Crashes, full disks and damage to checkpoints, on real processes. Numbers are those of the fault catalogue.

1, 20: killed at random points, also inside a save: ``test_a_run_killed_*``; 2, 3: ``test_killed_between_*``;
4: ``tests/train/test_checkpoint.py: test_latest_is_never_trusted``, ``test_a_latest_that_*``;
5: ``test_a_file_size_limit_*``, ``test_a_full_disk_*``; 6, 24: ``test_removal_*``, ``test_many_saves_*``;
7: ``test_a_read_only_*``; 8: ``test_a_signal_*``; 11-13: ``test_every_flipped_bit_*`` and
``tests/train/test_checkpoint.py: test_damage_*, test_two_ranks_files_*``; 14: ``test_pickles_*``;
15: ``test_another_model_*``, ``test_another_tokenizer_*``; 16: ``tests/distributed/test_resharding.py``;
17: ``tests/faults/test_resume.py: test_noise_*``; 18, 19: ``tests/faults/test_resume.py``;
21: ``tests/train/test_checkpoint.py: test_the_newest_is_chosen_by_its_step_*``; 22: ``test_two_runs_*``.
"""

import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import Command
from training_runs import STEPS, TRAIN, final_hashes, losses, reached, step_reached, wait_for, write_run_file

from lightbulb.train.checkpoint import Checkpoint, CheckpointError, newest_checkpoint
from lightbulb.train.manifest import complete_checkpoints
from lightbulb.train.tensor_file import hash_file

MIB = 1 << 20


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run on two ranks that nothing disturbed; all its checkpoints are kept."""
    folder = tmp_path_factory.mktemp("reference")
    path = write_run_file(folder, corpus, "run", train=TRAIN | {"keep_checkpoints": 9})
    command = Command("pretrain", [str(path)], 2, {}, folder / "output.txt")
    assert command.wait() == 0, command.text()
    assert sorted(losses(folder / "run")) == list(range(1, STEPS + 1))
    return folder / "run"


def assert_resumes_bit_for_bit(start: Callable, path: Path, reference: Path, said: str = "resumed from") -> None:
    """Started again, the run ends with the losses, weights and moments of one that was never disturbed."""
    run = path.with_suffix("")
    resumed = start("pretrain", [str(path)], world_size=2)
    assert resumed.wait() == 0, resumed.text()
    assert said in resumed.text()
    assert losses(run) == losses(reference)
    assert final_hashes(run) == final_hashes(reference)
    assert not [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]
    check = start("verify", [str(run), "--json"])
    assert check.wait() == 0, check.text()
    assert json.loads(check.text())["ledger"]["samples"] == STEPS * TRAIN["global_batch_size"]


@pytest.mark.parametrize("seed", [pytest.param(s, marks=[pytest.mark.slow] if s > 1 else []) for s in range(30)])
def test_a_run_killed_anywhere_resumes_bit_for_bit(start, run_file, tmp_path, reference, seed):
    path = run_file("killed")
    chance = random.Random(seed)
    pause = f"sleep:point=save:seconds={chance.choice([0, 0.05, 0.3])}"
    command = start("pretrain", [str(path)], world_size=2, LIGHTBULB_FAULT=pause)
    wait_for(lambda: reached(tmp_path / "killed", 4))  # the first save, of step 3, has begun
    wait_for(lambda: complete_checkpoints(tmp_path / "killed"))
    time.sleep(chance.uniform(0, 0.8))
    command.kill()
    assert_resumes_bit_for_bit(start, path, reference)


def kill_at(start: Callable, path: Path, fault: str) -> None:
    """Run until rank 0 kills itself at the planted place, then kill the other."""
    command = start("pretrain", [str(path)], world_size=2, LIGHTBULB_FAULT=f"kill:rank=0:{fault}")
    command.processes[0].join(60)
    assert command.processes[0].exitcode == -signal.SIGKILL, command.text()
    command.kill()


@pytest.mark.parametrize(
    ("point", "newest"),
    [
        ("save", 3),
        ("save.written", 3),
        pytest.param("save.manifest", 3, marks=pytest.mark.slow),
        ("save.rename", 3),
        ("save.latest", 6),
        pytest.param("save.delete:step=3", 9, marks=pytest.mark.slow),
        ("save.deleting:step=3", 9),
    ],
)
def test_killed_between_two_operations_of_a_save(start, run_file, tmp_path, reference, point, newest):
    path = run_file("killed")
    kill_at(start, path, f"point={point}" if "step" in point else f"point={point}:step=6")
    assert complete_checkpoints(tmp_path / "killed")[0].name == f"step-{newest:08d}"
    assert_resumes_bit_for_bit(start, path, reference, f"checkpoints/step-{newest:08d} (written as")


def test_training_goes_on_while_a_checkpoint_of_its_step_is_written(start, run_file, tmp_path, reference):
    path = run_file("slow", train=TRAIN | {"save_every": 6})
    command = start("pretrain", [str(path)], LIGHTBULB_FAULT="sleep:point=save:step=6:seconds=1.5", world_size=2)
    run = tmp_path / "slow"
    wait_for(lambda: reached(run, 9))
    assert not complete_checkpoints(run)
    assert command.wait() == 0, command.text()  # the save of step 12 waited for that of step 6
    assert [p.name for p in complete_checkpoints(run)] == ["step-00000012", "step-00000006"]
    assert final_hashes(run, 6) == final_hashes(reference, 6)
    assert final_hashes(run) == final_hashes(reference)


def test_saving_in_the_foreground_writes_the_same(start, run_file, tmp_path, reference):
    command = start("pretrain", [str(run_file("sync", train=TRAIN | {"async_save": False}))], world_size=2)
    assert command.wait() == 0, command.text()
    assert final_hashes(tmp_path / "sync") == final_hashes(reference)


def test_a_latest_that_leads_out_of_the_run_is_neither_read_nor_written_through(start, run_file, tmp_path):
    path, run = run_file("run", train=TRAIN | {"steps": 3}), tmp_path / "run"
    assert start("pretrain", [str(path)]).wait() == 0
    (tmp_path / "outside").write_text("step-00000099")
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints" / "latest").symlink_to(tmp_path / "outside")
    command = start("pretrain", [str(path), "train.steps=6"])
    assert command.wait() == 0, command.text()
    assert "step-00000003 (written as" in command.text()
    assert (tmp_path / "outside").read_text() == "step-00000099"
    assert (run / "checkpoints" / "latest").read_text() == "step-00000006"


def test_a_file_size_limit_keeps_the_last_checkpoint_and_is_named_on_one_line(start, run_file, tmp_path):
    run = tmp_path / "full"
    command = start("pretrain", [str(run_file("full", train=TRAIN | {"steps": 400}))], world_size=2)
    wait_for(lambda: complete_checkpoints(run))
    limit = (100_000, 100_000)  # like a disk quota, on one of two machines: larger files cannot be written any more
    resource.prlimit(command.processes[1].pid, resource.RLIMIT_FSIZE, limit)
    assert command.wait(60) == 1, command.text()
    assert "error: rank 1: " in command.text()
    assert "limit or disk quota is reached (0.1 MB needed)" in command.text()
    assert "Traceback" not in command.text()
    assert newest_checkpoint(run)[0] is not None
    assert not list((run / "checkpoints").glob(".*.partial"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a file system of its own: ``small_disk("size=2m")``; skipped where that is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("mounting a file system is not allowed here")
        return folder

    yield mount
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True)


def test_a_full_disk_names_needed_and_free_space_and_keeps_the_last_checkpoint(start, run_file, small_disk):
    disk = small_disk("size=4m")
    path = run_file("full", run=str(disk / "run"), train=TRAIN | {"steps": 400})
    command = start("pretrain", [str(path)], world_size=2)
    wait_for(lambda: complete_checkpoints(disk / "run"))
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        while file.write(b"\0" * 4096) == 4096 and shutil.disk_usage(disk).free > 100_000:
            pass
    assert command.wait(60) == 1, command.text()
    assert "the disk is full (" in command.text() and "MB needed, 0." in command.text()
    assert "Traceback" not in command.text()
    assert not list((disk / "run" / "checkpoints").glob(".*.partial"))
    filler.unlink()
    again = start("pretrain", [str(path), "train.steps=12"], world_size=2)
    assert again.wait() == 0, again.text()
    assert "resumed from" in again.text()


def test_no_room_for_one_checkpoint_is_said_before_training(start, run_file, small_disk):
    disk = small_disk("size=256k")
    command = start("pretrain", [str(run_file("run", run=str(disk / "run")))])
    assert command.wait() == 1
    assert "the disk is full (" in command.text()
    assert not (disk / "run" / "metrics.jsonl").exists()


def test_a_read_only_folder_is_refused_before_training(start, run_file, small_disk):
    disk = small_disk("size=1m,ro")
    command = start("pretrain", [str(run_file("run", run=str(disk / "run")))], world_size=2)
    assert command.wait() == 1
    assert "the file system is read-only; choose a writable folder" in command.text()
    assert "Traceback" not in command.text()


def test_removal_that_fails_leaves_more_checkpoints_not_fewer(start, run_file, tmp_path):
    path = run_file("run", train=TRAIN | {"keep_checkpoints": 1})
    command = start("pretrain", [str(path)], LIGHTBULB_FAULT="raise:point=save.delete")
    assert command.wait() == 1
    assert [p.name for p in complete_checkpoints(tmp_path / "run")] == ["step-00000006", "step-00000003"]
    assert newest_checkpoint(tmp_path / "run")[0].state.step == 6


@pytest.mark.slow
def test_many_saves_killed_in_their_removals_never_leave_none(start, run_file, tmp_path):
    train = TRAIN | {"steps": 100, "save_every": 1, "keep_checkpoints": 3, "eval_every": 0}
    path, run = run_file("many", train=train), tmp_path / "many"
    for step in (7, 31, 32, 60, 88):
        point = "save.deleting" if step % 2 else "save.delete"
        command = start("pretrain", [str(path)], LIGHTBULB_FAULT=f"kill:point={point}:step={step}")
        assert command.wait() == -signal.SIGKILL, command.text()
        checkpoint, problems = newest_checkpoint(run)
        assert checkpoint is not None and not problems
    command = start("pretrain", [str(path)])
    assert command.wait() == 0, command.text()
    assert len(complete_checkpoints(run)) == 3
    assert sorted(p.name for p in (run / "checkpoints").iterdir())[0] == "latest"


PHASES = {
    "warm-up": ("sleep:point=start:seconds=1", lambda run: (run / "config.yaml").exists()),
    "step": ("sleep:point=step:step=4:seconds=0.5", lambda run: step_reached(run) == 3),
    "evaluation": ("sleep:point=eval:seconds=0.5", lambda run: step_reached(run) == 5),
    "save": ("sleep:point=save:seconds=0.5", lambda run: list((run / "checkpoints").glob(".*.partial"))),
}


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_to_one_rank_in_any_phase_saves_and_stops_all(start, run_file, tmp_path, phase, times):
    fault, is_there = PHASES[phase]
    run = tmp_path / "stopped"
    path = run_file("stopped", train=TRAIN | {"steps": 400, "eval_contexts": 64})
    command = start("pretrain", [str(path)], world_size=2, LIGHTBULB_FAULT=fault)
    wait_for(lambda: is_there(run))
    for _ in range(times):
        os.kill(command.processes[1].pid, signal.SIGTERM)
        time.sleep(0.05)
    assert command.wait(25) == 0, command.text()
    last = max(losses(run))
    assert f"stopped at step {last} of 400" in command.text()
    assert last <= {"warm-up": 1, "step": 4, "evaluation": 5, "save": 6}[phase]
    assert newest_checkpoint(run)[0].state.step == last


def test_every_flipped_bit_of_a_checkpoint_is_found_and_the_one_before_offered(reference, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(reference / "checkpoints", run / "checkpoints")
    newest = complete_checkpoints(run)[0]
    files = sorted(newest.iterdir())
    assert len(files) == 6
    for path in files:
        content = path.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            path.write_bytes(damaged)
            checkpoint, (problem,) = newest_checkpoint(run)
            assert str(path) in problem and checkpoint is not None and checkpoint.state.step == 9
        for rest in (content[:-1], content[: len(content) // 2], b"", content + b"\0"):
            path.write_bytes(rest)
            assert str(path) in newest_checkpoint(run)[1][0]
        path.unlink()
        assert newest_checkpoint(run)[0].state.step == 9
        path.write_bytes(content)
    assert newest_checkpoint(run)[0].state.step == STEPS


def test_a_damaged_checkpoint_is_named_passed_over_and_set_aside(start, run_file, tmp_path, reference):
    path, run = run_file("damaged"), tmp_path / "damaged"
    shutil.copytree(reference, run)
    newest = run / "checkpoints" / f"step-{STEPS:08d}" / "model-rank0000.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    check = start("verify", [str(run)])
    assert check.wait() == 1
    assert f"error: {newest}: damaged: its hash is not the one that was written" in check.text()
    command = start("pretrain", [str(path)], world_size=2)
    assert command.wait() == 0, command.text()
    assert command.text().count(f"{newest}: damaged") == 1
    assert "resumed from" in command.text() and "step-00000009" in command.text()
    assert (run / "checkpoints" / f".step-{STEPS:08d}.damaged").is_dir()
    assert losses(run) == losses(reference) and final_hashes(run) == final_hashes(reference)
    for manifest in (run / "checkpoints").glob("step-*/manifest.json"):
        manifest.write_text("{}")
    command = start("pretrain", [str(path)])
    assert command.wait() == 1
    assert "no checkpoint is intact" in command.text()


class Canary:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickles_in_a_checkpoint_are_never_run(start, run_file, tmp_path, reference):
    path, run = run_file("poisoned"), tmp_path / "poisoned"
    shutil.copytree(reference, run)
    poison = pickle.dumps(Canary(tmp_path / "canary"))
    newest, before = complete_checkpoints(run)[:2]
    for name in (".metadata", "rng.pt", "common.pt", "__0_0.distcp"):
        (before / name).write_bytes(poison)
    for name in ("optimizer-rank0000.safetensors", "state.json"):
        (newest / name).write_bytes(poison)
    (run / "checkpoints" / "latest").write_bytes(poison)
    command = start("pretrain", [str(path)], world_size=2)
    assert command.wait() == 0, command.text()
    assert "optimizer-rank0000.safetensors: damaged" in command.text()
    assert losses(run) == losses(reference)
    assert not (tmp_path / "canary").exists()


def test_another_model_is_refused_with_every_difference_and_changes_nothing(start, run_file, tmp_path, reference):
    path, run = run_file("other"), tmp_path / "other"
    shutil.copytree(reference, run)
    before = {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file() and p.name != ".lock"}
    changes = {"model.dim": 64, "model.vocab_size": 1024, "model.block_pattern.0.channel.num_experts": 8}
    command = start("pretrain", [str(path), *(f"{key}={value}" for key, value in changes.items())])
    assert command.wait() == 1
    for key, old in zip(changes, (32, 512, 4), strict=True):
        assert f"{key} = {old}, this config has {changes[key]}" in command.text()
    assert before == {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file() and p.name != ".lock"}


def test_another_tokenizer_is_refused_with_both_digests(start, run_file, tmp_path, corpus, reference):
    data, run = tmp_path / "data", tmp_path / "other"
    shutil.copytree(corpus, data)
    shutil.copytree(reference, run)
    manifest = json.loads((data / "manifest.json").read_text())
    old = manifest["tokenizer"]["digest"]
    (data / "tokenizer.json").write_text((data / "tokenizer.json").read_text() + " ")
    digest = subprocess.run(["sha256sum", data / "tokenizer.json"], capture_output=True, text=True).stdout.split()[0]
    (data / "manifest.json").write_text(json.dumps(manifest).replace(old, digest))
    config = (run / "config.yaml").read_bytes()
    command = start("pretrain", [str(run_file("other", data={"path": str(data)}))])
    assert command.wait() == 1
    assert f"data.tokenizer_digest: the checkpoint was trained with '{old}', this run has '{digest}'" in command.text()
    assert (run / "config.yaml").read_bytes() == config


def test_two_runs_in_one_folder_the_second_is_refused_until_the_first_is_gone(start, run_file, tmp_path):
    path = run_file("busy", train=TRAIN | {"steps": 400})
    first = start("pretrain", [str(path)])
    wait_for(lambda: reached(tmp_path / "busy", 1))
    started = time.monotonic()
    second = start("pretrain", [str(path)])
    assert second.wait(30) == 1
    assert time.monotonic() - started < 5
    assert f"in use by {first.processes[0].pid}@" in second.text()
    first.kill()  # its lock file stays, its claim does not
    third = start("pretrain", [str(path), "train.steps=3"])
    assert third.wait() == 0, third.text()


def test_swapped_files_of_two_ranks_are_refused(reference, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(reference / "checkpoints", run / "checkpoints")
    folder = complete_checkpoints(run)[0]
    one, two = folder / "model-rank0000.safetensors", folder / "model-rank0001.safetensors"
    one.rename(folder / "other"), two.rename(one), (folder / "other").rename(two)
    with pytest.raises(CheckpointError, match="model-rank0000.safetensors: damaged"):
        Checkpoint(folder)
    assert hash_file(one, one.stat().st_size)
