"""Runs in processes of their own: at once, failing by themselves, skipped when complete, stopped together."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from training_runs import STEPS, TRAIN, losses, reached, wait_for

from lightbulb.config import ConfigError, build_config
from lightbulb.experts.jobs import (
    JobError,
    JobsConfig,
    JobsStopped,
    command,
    environment,
    is_complete,
    run_jobs,
    wait_until_free,
)
from lightbulb.folder import claim


@pytest.mark.slow
def test_runs_fail_by_themselves_and_complete_ones_are_skipped(run_file, tmp_path: Path, capfd) -> None:
    paths = [
        run_file("a"),
        run_file("b", optimizer={"lr": 9.0}, train=TRAIN | {"global_batch_size": 4096}),
        run_file("c"),
    ]
    with pytest.raises(JobError) as caught:
        run_jobs(paths, JobsConfig(at_once=3))
    words = str(caught.value)
    assert words.count("ended with exit code 1") == 1 and words.startswith(str(paths[1]))
    assert "too few tokens" in words.splitlines()[-1]
    assert [is_complete(path) for path in paths] == [True, False, True]
    assert losses(tmp_path / "a") == losses(tmp_path / "c") and len(losses(tmp_path / "a")) == STEPS
    assert "INFO" in (tmp_path / "a" / "output.log").read_text()
    said = capfd.readouterr().err
    assert f"{tmp_path / 'a'}: step {STEPS} of {STEPS} complete loss" in said

    before = (tmp_path / "a" / "output.log").stat().st_mtime_ns
    run_jobs([paths[0], paths[2]], JobsConfig())  # nothing is started
    assert (tmp_path / "a" / "output.log").stat().st_mtime_ns == before
    assert "complete already" in capfd.readouterr().err


def test_complete_means_these_steps_of_this_run(run_file, tmp_path: Path) -> None:
    path = run_file("a")
    assert not is_complete(path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "summary.json").write_text(json.dumps({"steps": STEPS}))
    assert not is_complete(path)  # a summary without its checkpoint


def test_commands_follow_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("run.yaml")
    assert command(path, JobsConfig())[1:] == ["-m", "lightbulb.launcher.pretrain", "run.yaml"]
    assert command(path, JobsConfig(ranks=4, restarts=2))[4:] == ["--restart=2", "--num_gpus=4"]
    groups = JobsConfig(hostfiles=[Path("east"), Path("west")])
    assert command(path, groups, 1)[4:] == ["--restart=0", "--hostfile=west"]
    assert groups.slots == 2 and environment(groups, 1) == {}
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert environment(JobsConfig(at_once=4, ranks=2), 3)["OMP_NUM_THREADS"] == "2"
    with pytest.raises(ConfigError, match="leave out ranks and at_once"):
        build_config(JobsConfig, {"hostfiles": ["a"], "at_once": 2})


def test_a_run_that_is_still_saving_is_waited_for(tmp_path: Path) -> None:
    held, ended = threading.Event(), threading.Event()

    def save() -> None:
        with claim(tmp_path / "run"):
            held.set()
            time.sleep(0.6)
            ended.set()

    threading.Thread(target=save).start()
    held.wait()
    began = time.monotonic()
    wait_until_free([tmp_path / "run", tmp_path / "none"], lambda: False)
    assert ended.is_set() and time.monotonic() - began < 30 and not (tmp_path / "none").exists()
    with claim(tmp_path / "run"):
        wait_until_free([tmp_path / "run"], lambda: False, seconds=0.1)  # not for ever


@pytest.mark.slow
def test_a_signal_reaches_every_run_which_saves_and_goes_on_later(run_file, tmp_path: Path) -> None:
    long = TRAIN | {"steps": 100_000, "eval_every": 0, "save_every": 0}
    paths = [run_file(name, train=long) for name in ("a", "b", "c")]

    def stop_when_training() -> None:
        wait_for(lambda: all(reached(tmp_path / name, 3) for name in ("a", "b")), 120.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_training).start()
    with pytest.raises(JobsStopped, match="SIGTERM"):
        run_jobs(paths, JobsConfig(at_once=2))
    for name in ("a", "b"):
        last = max(losses(tmp_path / name))
        assert (tmp_path / name / "checkpoints" / f"step-{last:08d}" / "manifest.json").exists()
    assert not (tmp_path / "c").exists()  # no run is started after the signal


@pytest.mark.slow
def test_runs_of_several_ranks_are_started_by_the_launcher(run_file, tmp_path: Path) -> None:
    paths = [run_file("a"), run_file("b")]
    run_jobs(paths, JobsConfig(ranks=2, restarts=1))
    for name in ("a", "b"):
        assert "DP2" in (tmp_path / name / "summary.json").read_text()
