"""Stopped and resumed runs against uninterrupted ones: fault catalogue 17, 18 and 19."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from training_runs import TRAIN, final_hashes, losses, write_run_file

from lightbulb.train.manifest import complete_checkpoints

BATCH, STEPS = 256, 13  # more than two epochs


def rows_of(corpus: Path) -> int:
    manifest = json.loads((corpus / "manifest.json").read_text())
    return sum(domain["rows"] for domain in manifest["splits"]["train"].values())


@pytest.fixture
def whole(start: Callable, tmp_path: Path, corpus: Path) -> Path:
    """A run over more than two epochs that keeps the checkpoint of every step."""
    assert BATCH * (STEPS - 1) > 2 * rows_of(corpus) > BATCH * 6, rows_of(corpus)
    train = TRAIN | {"steps": STEPS, "save_every": 1, "keep_checkpoints": STEPS, "eval_every": 0}
    train |= {"global_batch_size": BATCH, "micro_batch_size": 64}
    command = start("pretrain", [str(write_run_file(tmp_path, corpus, "whole", train=train))])
    assert command.wait() == 0, command.text()
    return tmp_path / "whole"


@pytest.mark.parametrize("cuts", ["at an epoch's end", pytest.param("elsewhere", marks=pytest.mark.slow)])
def test_a_run_is_the_sum_of_its_parts_wherever_it_is_cut(start, tmp_path, corpus, whole, cuts):
    """18: cut after the first step, in the middle, at the end of an epoch, behind it, and in the third epoch."""
    epoch = -(-rows_of(corpus) // BATCH)  # this step's batch ends the first epoch and begins the second
    ledger = (whole / "ledger" / "data-0000.jsonl").read_text()
    for k in [epoch] if cuts == "at an epoch's end" else [1, 4, epoch - 1, epoch + 1, 2 * epoch]:
        run = tmp_path / f"cut-{k}"
        shutil.copytree(whole, run)
        for folder in complete_checkpoints(run):
            if int(folder.name[5:]) > k:
                shutil.rmtree(folder)
        command = start("pretrain", [str(run / "config.yaml"), f"run={run}"])
        assert command.wait() == 0, command.text()
        assert f"step-{k:08d} (written as" in command.text()
        assert losses(run) == losses(whole)
        assert final_hashes(run, STEPS) == final_hashes(whole, STEPS)
        assert (run / "ledger" / "data-0000.jsonl").read_text() == ledger  # places and tokens of every step


def test_noise_after_a_resume_is_that_of_an_uninterrupted_run(start, run_file, tmp_path):
    """17, with two expert ranks: the five steps behind a resume have the losses they would have had, bit for bit."""
    path = run_file("whole", train=TRAIN | {"save_every": 7}, parallel={"expert": 2})
    noisy = ["model.dropout=0.1", "model.block_pattern.0.channel.router.jitter=0.1"]
    command = start("pretrain", [str(path), *noisy], world_size=2)
    assert command.wait() == 0, command.text()
    run = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole", run)
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    command = start("pretrain", [str(path), *noisy, f"run={run}"], world_size=2)
    assert command.wait() == 0, command.text()
    assert "step-00000007 (written as" in command.text()
    assert losses(run) == losses(tmp_path / "whole")
    assert final_hashes(run) == final_hashes(tmp_path / "whole")


def test_changed_settings_are_said_and_honoured(start, run_file, tmp_path):
    """19: learning rate and betas are those of the resumed run's config, not of the checkpoint."""
    constant = ["schedule.warmup=0", "schedule.decay=0"]
    path, run = run_file("run"), tmp_path / "run"
    assert start("pretrain", [str(path), *constant, "train.steps=3"]).wait() == 0
    shutil.copytree(run, tmp_path / "same")
    changes = ["optimizer.lr=0.001", "optimizer.beta1=0.5", "train.save_every=2", "train.micro_batch_size=4"]
    command = start("pretrain", [str(path), *constant, *changes, "train.steps=6"])
    assert command.wait() == 0, command.text()
    for sentence in ("optimizer.lr was 0.005, is now 0.001", "optimizer.beta1 was 0.9, is now 0.5"):
        assert command.text().count(f"resuming with a changed setting: {sentence}") == 1
    assert "train.steps was 3, is now 6" in command.text()
    assert "save_every" not in command.text() and "micro_batch_size" not in command.text()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = {record["step"]: record["lr"] for record in records if record["kind"] == "train"}
    assert rates[3] == 0.005 and rates[4] == rates[6] == 0.001
    other = start("pretrain", [str(path), *constant, "optimizer.lr=0.001", "train.steps=6", f"run={tmp_path / 'same'}"])
    assert other.wait() == 0, other.text()
    assert losses(run)[5] != losses(tmp_path / "same")[5]  # the beta was not taken from the checkpoint


def test_another_seed_or_order_is_refused(start, run_file):
    path = run_file("run")
    assert start("pretrain", [str(path), "train.steps=3"]).wait() == 0
    command = start("pretrain", [str(path), "seed=7", "data.shuffle=false", "train.global_batch_size=16"])
    assert command.wait() == 1
    for sentence in ("data.shuffle = True", "seed = 1234, this config has 7", "train.global_batch_size = 8"):
        assert sentence in command.text()
