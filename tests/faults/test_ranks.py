"""Ranks that fail, die, hang or were started differently: the run ends soon, says which and why, and loses nothing.

Numbers of the fault catalogue: 26 raising, 27 killed and out of memory, 28 hung, 30 leaving early, 31 started
differently, 35 launcher killed (here in small; with the real launchers in tests/integration/test_launchers.py).
8 to 10, signals: tests/integration/test_pretrain.py, tests/faults/test_checkpoints.py, and through the launchers in
tests/integration/test_launchers.py. 32, meeting: tests/parallel/test_rendezvous.py. That every rank reads the same
number of batches, so that none leaves early, is the loader's test (tests/data/test_loader.py).
"""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import _CONTEXT, Command
from training_runs import TRAIN, reached, wait_for

from lightbulb.train.agreement import facts_of, refusal
from lightbulb.train.ancestry import is_launcher
from lightbulb.train.config import TrainConfig

ENDLESS = TRAIN | {"steps": 100_000, "eval_every": 0}
HANG_SECONDS = 2.0

Start = Callable[..., Command]
RunFile = Callable[..., Path]


def ended(command: Command, seconds: float) -> list[int]:
    """Exit codes by rank; every rank must end by itself, and nothing of it may be left."""
    end = time.monotonic() + seconds
    for process in command.processes:
        process.join(max(end - time.monotonic(), 0.0))
    codes = [process.exitcode for process in command.processes]
    assert None not in codes, f"ranks {[r for r, c in enumerate(codes) if c is None]} live on:\n{command.text()}"
    assert not any(psutil.pid_exists(process.pid) for process in command.processes)
    return [code or 0 for code in codes]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_rank_raises_is_the_last_error_with_a_trace(start: Start, run_file: RunFile, rank: int) -> None:
    command = start("pretrain", [str(run_file())], world_size=2, LIGHTBULB_FAULT=f"raise:rank={rank}:step=5")
    assert ended(command, 15.0) == [1, 1]
    _, _, after = command.text().rpartition("Traceback")
    assert f"error: rank {rank}: PlantedFault: planted at step, step 5" in after
    assert after.strip().splitlines()[-1] in (
        f"error: rank {rank}: PlantedFault: planted at step, step 5",
        f"error: rank {1 - rank} lost its peers; the rank that ended first has the cause",
    )


@pytest.mark.parametrize(("action", "code"), [("kill", -signal.SIGKILL), ("exit", 0)])
def test_when_a_rank_is_killed_or_leaves_the_others_end(
    start: Start, run_file: RunFile, tmp_path: Path, action: str, code: int
) -> None:
    command = start("pretrain", [str(run_file())], world_size=2, LIGHTBULB_FAULT=f"{action}:rank=1:step=5")
    assert ended(command, 15.0) == [1, code]
    assert "error: rank 0 lost its peers" in command.text()
    assert "Traceback" not in command.text()
    assert (tmp_path / "run" / "checkpoints" / "step-00000003" / "manifest.json").exists()
    resumed = start("pretrain", [str(run_file())], world_size=2)
    assert resumed.wait() == 0, resumed.text()


def test_a_rank_without_memory_says_so(start: Start, run_file: RunFile, tmp_path: Path) -> None:
    command = start("pretrain", [str(run_file(train=ENDLESS | {"save_every": 20}))], world_size=2)
    wait_for(lambda: reached(tmp_path / "run", 2))
    pid = command.processes[1].pid
    resource.prlimit(pid, resource.RLIMIT_AS, (1 << 20, resource.RLIM_INFINITY))  # nothing more
    codes = ended(command, 20.0)
    assert codes[0] in (1, 75) and codes[1] != 0, command.text()
    assert re.search("memory|allocate|can't start new thread", command.text(), re.IGNORECASE), command.text()


@pytest.mark.parametrize(("action", "rank"), [("hang", 1), ("stop", 1), ("stop", 0)])
def test_a_hung_rank_is_named_with_its_stack_and_no_process_stays(
    start: Start, run_file: RunFile, tmp_path: Path, action: str, rank: int
) -> None:
    path = run_file(train=TRAIN | {"hang_seconds": HANG_SECONDS})
    began = time.monotonic()
    command = start("pretrain", [str(path)], world_size=2, LIGHTBULB_FAULT=f"{action}:rank={rank}:step=5")
    wait_for(lambda: reached(tmp_path / "run", 4))
    codes = ended(command, HANG_SECONDS + 10.0)
    text = command.text()
    assert 75 in codes and 0 not in codes
    if action == "hang":
        assert re.search(rf"error: rank {rank} hung in section step at step 5 for \d.*fault_point", text), text
        assert f"rank {1 - rank} waited" in text
    else:
        assert re.search(rf"for rank {rank}, which is silent \(pid \d+, stopped by a signal; killed\)", text), text
        assert f"rank {1 - rank} waited" in text and "in section step at step 5" in text
    stack = (tmp_path / "run" / f"hang-rank-{rank}.txt").read_text()
    assert "fault_point" in stack and "_train_one_step" in stack
    assert time.monotonic() - began < 60.0


def test_ranks_that_are_only_slow_are_left_alone(start: Start, run_file: RunFile, tmp_path: Path) -> None:
    path = run_file(train=TRAIN | {"hang_seconds": 3.0})
    fault = ";".join(f"sleep:rank=1:step={step}:seconds=0.6" for step in range(2, 10))  # more than the limit in all
    command = start("pretrain", [str(path)], world_size=2, LIGHTBULB_FAULT=fault)
    assert command.wait() == 0, command.text()
    assert not list((tmp_path / "run").glob("hang-rank-*"))
    assert not list((tmp_path / "run" / ".heartbeat").iterdir())


def test_a_hang_limit_of_zero_turns_the_watchdog_off(start: Start, run_file: RunFile, tmp_path: Path) -> None:
    command = start("pretrain", [str(run_file(train=TRAIN | {"hang_seconds": 0}))], world_size=2)
    assert command.wait() == 0, command.text()
    assert not (tmp_path / "run" / ".heartbeat").exists()


def test_ranks_with_another_config_are_refused_with_key_and_values(
    start: Start, run_file: RunFile, tmp_path: Path
) -> None:
    own = [["optimizer.lr=0.001"], ["optimizer.lr=0.002"]]
    command = start("pretrain", [str(run_file())], world_size=2, own_arguments=own)
    assert ended(command, 15.0) == [1, 1]
    assert "config optimizer.lr: 0.001 on rank 0; 0.002 on rank 1" in command.text()
    assert "Traceback" not in command.text()
    assert not (tmp_path / "run").exists()


def test_other_code_and_packages_are_named_too(tmp_path: Path) -> None:
    config = TrainConfig(steps=1, global_batch_size=1, micro_batch_size=1)
    package = tmp_path / "lightbulb"
    package.mkdir()
    facts = []
    for text in ("a = 1\n", "a = 1\n", "a = 2\n"):
        (package / "loop.py").write_text(text)
        facts.append(facts_of(config, package))
    assert facts[0] == facts[1]
    facts[1] = facts[1] | {"version of torch": "2.0"}
    said = refusal(facts)
    assert "code lightbulb/loop.py" in said and "on rank 0, 1;" in said
    assert re.search(r"version of torch: \S+ on rank 0, 2; 2\.0 on rank 1", said)
    assert said.count("\n") == 2
    real = facts_of(config)
    assert "code lightbulb/train/loop.py" in real and "version of python" in real


def test_a_run_outlives_the_reader_of_its_output(run_file: RunFile, tmp_path: Path) -> None:
    path = run_file(train=TRAIN | {"log_every": 1})
    reading, writing = os.pipe()
    process = _CONTEXT.Process(target=_pretrain_into, args=(DupFd(writing), str(path)))
    process.start()
    os.close(writing)
    wait_for(lambda: reached(tmp_path / "run", 1))
    os.close(reading)
    process.join(60.0)
    assert process.exitcode == 0
    assert reached(tmp_path / "run", TRAIN["steps"])


def _pretrain_into(pipe: Any, path: str) -> None:
    descriptor = pipe.detach()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.exit(import_module("lightbulb.launcher.pretrain").main([path]))


RANK = """
import signal, sys, time
from lightbulb.train.ancestry import LauncherWatch
def stop(number, frame):
    open(sys.argv[1], "w").write("stopped")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
LauncherWatch()
print("ready", flush=True)
time.sleep(60)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]])"


@pytest.mark.parametrize(("name", "stops"), [("torchrun", True), ("some_script.py", False)])
def test_a_rank_ends_with_its_launcher_but_not_with_a_shell(tmp_path: Path, name: str, stops: bool) -> None:
    program, sign = tmp_path / name, tmp_path / "sign"
    program.write_text(LAUNCHER)
    above = subprocess.Popen([sys.executable, program, RANK, sign], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert above.stdout is not None
    above.stdout.readline()
    (rank,) = psutil.Process(above.pid).children()
    try:
        above.kill()
        above.wait()
        if stops:
            rank.wait(10.0)
            assert sign.read_text() == "stopped"
        else:
            with pytest.raises(psutil.TimeoutExpired):
                rank.wait(2.5)
    finally:
        if rank.is_running():
            os.kill(rank.pid, signal.SIGKILL)
        above.stdout.close()
        assert above.stderr is not None
        above.stderr.close()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/env/bin/python /env/bin/deepspeed --num_gpus 2 launcher/pretrain.py run.yaml", True),
        ("python -u -m deepspeed.launcher.launch --world_info=x launcher/pretrain.py run.yaml", True),
        ("python /env/bin/torchrun --nproc-per-node 2 launcher/pretrain.py", True),
        ("python -m torch.distributed.run launcher/pretrain.py", True),
        ("python /env/bin/lightbulb pretrain run.yaml --restart 3", True),
        ("python /env/bin/lightbulb pretrain run.yaml", False),
        ("bash -c deepspeed launcher/pretrain.py", False),
        ("python -m pytest tests/faults", False),
        ("/bin/bash ./job.sh", False),
    ],
)
def test_launchers_are_told_by_their_command(command: str, expected: bool) -> None:
    assert is_launcher(command.split()) is expected
