"""The real launchers: torchrun, deepspeed without ssh, and `pretrain --restart` over failures, signals and kills.

deepspeed on one machine: tests/integration/test_commands.py. srun's variables: tests/parallel/test_rendezvous.py. Two
machines with ssh: tests/integration/test_two_nodes.py. Each start imports the whole stack once per rank, hence slow.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from training_runs import STEPS, TRAIN, losses, reached, wait_for

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
SCRIPT = str(ROOT / "launcher" / "pretrain.py")

Launch = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start a command in a session of its own; all it left behind is killed at the end."""
    running: list[subprocess.Popen[str]] = []

    def run(*words: object, **environment: str) -> subprocess.Popen[str]:
        variables = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"} | environment
        with (tmp_path / f"output-{len(running)}.txt").open("w") as output:
            command = [str(word) for word in words]
            process = subprocess.Popen(
                command, cwd=ROOT, env=variables, stdout=output, stderr=output, text=True, start_new_session=True
            )
        running.append(process)
        return process

    yield run
    for process in running:
        for child in ranks_of(tmp_path):
            child.kill()
        process.kill()
        process.wait()


def ranks_of(tmp_path: Path) -> list[psutil.Process]:
    """Every process of this test's runs, by the run file in its command: launchers, supervisor and ranks."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(tmp_path) in word for word in process.info["cmdline"] or []) and process.pid != os.getpid():
            found.append(process)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def output(tmp_path: Path, number: int = 0) -> str:
    return (tmp_path / f"output-{number}.txt").read_text()


def test_torchrun_trains_and_a_signal_to_it_saves(launch: Launch, run_file, tmp_path: Path) -> None:
    path = run_file(train=TRAIN | {"steps": 100_000, "eval_every": 0, "save_every": 0})
    torchrun = launch("torchrun", "--nproc-per-node", 2, "--master-port", free_port(), SCRIPT, path)
    wait_for(lambda: reached(tmp_path / "run", 3) or torchrun.poll() is not None, 150.0)
    torchrun.send_signal(signal.SIGTERM)
    torchrun.wait(25.0)
    last = max(losses(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / f"step-{last:08d}" / "manifest.json").exists(), output(tmp_path)
    assert not ranks_of(tmp_path)


def test_deepspeed_without_ssh_joins_nodes_started_by_hand(launch: Launch, run_file, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("first slots=1\nsecond slots=1\n")
    path, port = run_file(), free_port()
    options = ["--hostfile", tmp_path / "hosts", "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", port]
    nodes = [launch("deepspeed", *options, "--node_rank", node, SCRIPT, path) for node in (0, 1)]
    assert [node.wait(200.0) for node in nodes] == [0, 0], output(tmp_path) + output(tmp_path, 1)
    assert sorted(losses(tmp_path / "run")) == list(range(1, STEPS + 1))
    assert "TP1xPP1xEP1xDP2" in (tmp_path / "run" / "summary.json").read_text()


def test_restart_goes_on_from_the_newest_checkpoint_also_with_fewer_ranks(
    launch: Launch, run_file, start, tmp_path: Path
) -> None:
    whole = start("pretrain", [str(run_file("whole"))])
    assert whole.wait() == 0, whole.text()
    options = ["--restart", 2, "--num_gpus", 2, "--min_ranks", 1]
    # rank 1 dies at step 5 of every start that has a rank 1
    process = launch("lightbulb", "pretrain", run_file(), *options, LIGHTBULB_FAULT="kill:rank=1:step=5")
    assert process.wait(300.0) == 0, output(tmp_path)
    said = re.findall(r"supervisor: (.*)", output(tmp_path))
    assert len(said) == 2, output(tmp_path)
    assert "going on from step 3" in said[0] and "instead of" not in said[0]
    assert "going on from step 3 with 1 ranks instead of 2" in said[1]
    found, expected = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert sorted(found) == sorted(expected)
    assert max(abs(found[step] - expected[step]) for step in expected) < 1e-5
    assert not ranks_of(tmp_path)


def test_a_killed_launcher_is_restarted_and_a_signal_to_the_supervisor_saves_and_ends(
    launch: Launch, run_file, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    path = run_file(train=TRAIN | {"steps": 100_000, "eval_every": 0, "save_every": 0})
    process = launch("lightbulb", "pretrain", path, "--restart", 3, "--num_gpus", 2)
    wait_for(lambda: reached(run, 3) or process.poll() is not None, 150.0)
    (launcher,) = (p for p in ranks_of(tmp_path) if "deepspeed.launcher.launch" in p.cmdline())
    ranks = launcher.children()
    assert len(ranks) == 2
    launcher.kill()
    began = time.monotonic()
    _, alive = psutil.wait_procs(ranks, timeout=30.0)
    assert not alive, output(tmp_path)
    assert time.monotonic() - began < 30.0
    wait_for(lambda: "supervisor: restart 1 of 3" in output(tmp_path), 60.0)
    saved = int(re.findall(r"going on from step (\d+)", output(tmp_path))[0])
    assert "its launcher deepspeed.launcher.launch" in output(tmp_path) and saved >= 3
    wait_for(lambda: reached(run, saved + 2) or process.poll() is not None, 150.0)
    process.send_signal(signal.SIGTERM)
    process.wait(120.0)  # the time two launchers and their ranks need to end on busy cores
    assert "stopped at step" in output(tmp_path)
    assert not ranks_of(tmp_path)
    last = max(losses(run))
    assert (run / "checkpoints" / f"step-{last:08d}" / "manifest.json").exists()
