"""Starts a job again after a rank has died: `lightbulb pretrain CONFIG --restart N`.

The supervising process starts the launcher, waits, and looks at how the job ended. Unless it is complete, was stopped
by a signal or was refused for a reason that would come back, it goes on from the newest complete checkpoint: with
the same ranks at first, with fewer when a machine has lost a device or the same ranks got no further. The model does
not depend on the layout, so fewer ranks train the same model, only slower.
"""

import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import psutil
import torch

from lightbulb.config import ConfigError
from lightbulb.train.ancestry import is_launcher
from lightbulb.train.config import RunConfig
from lightbulb.train.ending import read_outcome
from lightbulb.train.faults import IMPATIENCE_SECONDS, Interrupted
from lightbulb.train.manifest import FOLDER

POLL_SECONDS = 0.5
LEFTOVER_SECONDS = 30.0
"""How long ranks of a failed job may take to end before they are killed."""


class Job(NamedTuple):
    """What to start.

    Attributes:
        script: the file every rank runs.
        arguments: its arguments: config and overrides.
        ranks: ranks of the first start (per machine with a hostfile).
        min_ranks: fewest ranks worth training with.
        max_restarts: restarts in a row without a new checkpoint.
        hostfile: several machines, as deepspeed wants them; their number of ranks stays.
    """

    script: Path
    arguments: list[str]
    ranks: int
    min_ranks: int
    max_restarts: int
    hostfile: Path | None = None


def supervise(job: Job, config: RunConfig) -> int:
    """Run the job to its end, restarting it as often as allowed; gives the exit code."""
    run = Path(config.run).expanduser()
    ranks, failures, reached = job.ranks, 0, newest_step(run)
    with _Forward() as signals, tempfile.TemporaryDirectory(prefix="lightbulb-") as scratch:
        while True:
            outcome_file = (run.parent if job.hostfile else Path(scratch)) / f".{run.name}-{os.getpid()}.outcome"
            code = _run(job, config, ranks, outcome_file, signals)
            outcome = read_outcome(outcome_file)
            outcome_file.unlink(missing_ok=True)
            if outcome is not None or signals.received:
                return code if outcome != "refused" else code or 1
            step, cause = newest_step(run), describe_exit(code)
            failures = 1 if step > reached else failures + 1
            if failures > job.max_restarts:
                _say(f"error: {cause}; {job.max_restarts} restarts brought no new checkpoint after step {step}")
                return code or 1
            available = ranks if job.hostfile else fewer_ranks(config, ranks, job.min_ranks, step > reached)
            reached = max(step, reached)
            change = "" if available == ranks else f" with {available} ranks instead of {ranks}"
            ranks = available
            _say(f"restart {failures} of {job.max_restarts}: {cause}; going on from step {step}{change}")


def fewer_ranks(config: RunConfig, ranks: int, min_ranks: int, progressed: bool) -> int:
    """Ranks of the next start: as before while that gets on and the devices are there, else the next that fit."""
    most = ranks if progressed else max(ranks - 1, min_ranks)
    if torch.cuda.is_available():
        most = min(most, torch.cuda.device_count())
    return next((n for n in range(most, min_ranks - 1, -1) if degrees_for(config, n) is not None), ranks)


def degrees_for(config: RunConfig, ranks: int) -> list[str] | None:
    """Overrides with which the config runs on so many ranks: tensor and pipeline stay; None when nothing fits."""
    expert = config.parallel.expert
    for degree in (d for d in range(expert, 0, -1) if expert % d == 0):
        parallel = config.parallel.model_copy(update={"data": None, "expert": degree})
        try:
            config.model_copy(update={"parallel": parallel}).resolve(ranks)
        except ConfigError:
            continue
        return ["parallel.data=null", f"parallel.expert={degree}"]
    return None


def newest_step(run: Path) -> int:
    """Step of the newest complete checkpoint; 0 without one."""
    steps = [int(path.parent.name.removeprefix("step-")) for path in (run / FOLDER).glob("step-*/manifest.json")]
    return max(steps, default=0)


def describe_exit(code: int) -> str:
    """The launcher's exit code in words; deepspeed reports a rank killed by signal 9 as 256 - 9."""
    number = -code if code < 0 else 256 - code if code > 192 else 0
    if number:
        try:
            return f"a rank was ended by {signal.Signals(number).name}"
        except ValueError:
            pass
    return "the launcher ended before its ranks" if code == 0 else f"the job ended with exit code {code}"


def command(job: Job, config: RunConfig, ranks: int, outcome: Path) -> list[str]:
    """The launcher's command line: deepspeed's, or torchrun's where deepspeed is not installed."""
    same = ranks == job.ranks
    extra = [] if same else degrees_for(config, ranks) or []
    script = [str(job.script), *job.arguments, *extra, f"--outcome={outcome}"]
    if job.hostfile is not None:
        return [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={job.hostfile}", *script]
    port = _free_port()
    if find_spec("deepspeed") is not None:
        options = [f"--num_gpus={ranks}", f"--master_port={port}"]
        return [sys.executable, "-m", "deepspeed.launcher.runner", *options, *script]
    options = [f"--nproc-per-node={ranks}", f"--master-port={port}"]
    return [sys.executable, "-m", "torch.distributed.run", *options, *script]


def _run(job: Job, config: RunConfig, ranks: int, outcome: Path, signals: "_Forward") -> int:
    """One start, from the launcher's beginning to the end of the last process it started."""
    # a session of its own: the terminal's Ctrl-C reaches the supervisor alone, which hands it on once
    child = psutil.Popen(command(job, config, ranks, outcome), start_new_session=True)
    seen: set[psutil.Process] = set()
    with signals.to(child):
        while child.poll() is None:
            seen |= set(_descendants(child))
            time.sleep(POLL_SECONDS)
        _, alive = psutil.wait_procs(list(seen), timeout=LEFTOVER_SECONDS)
    for process in alive:
        _say(f"killing pid {process.pid}, which the job left behind")
        process.kill()
    return int(child.returncode)


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


class _Forward(Interrupted):
    """Hands signals on to the ranks, which save and stop; a second SIGINT, a second later, kills them."""

    def __init__(self) -> None:
        self.received: float | None = None
        self._child: psutil.Popen | None = None

    @contextmanager
    def to(self, child: psutil.Popen) -> Iterator[None]:
        self._child = child
        try:
            yield
        finally:
            self._child = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        waited = 0.0 if self.received is None else now - self.received
        impatient = number == signal.SIGINT and waited > IMPATIENCE_SECONDS
        self.received = self.received or now
        if self._child is None:
            return
        below = _descendants(self._child)
        ranks = [process for process in below if not _is_launcher(process) and _is_launcher(process.parent())]
        # ranks under ssh are no descendants; then the launcher passes SIGTERM to all machines
        for process in [*below, self._child] if impatient else ranks or [self._child]:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGKILL if impatient else signal.SIGTERM)


def _is_launcher(process: psutil.Process | None) -> bool:
    try:
        return process is not None and is_launcher(process.cmdline())
    except psutil.Error:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _say(sentence: str) -> None:
    print(f"supervisor: {sentence}", file=sys.stderr, flush=True)


def default_ranks(asked: int | None) -> int:
    """``--num_gpus``, else the machine's GPUs, else one."""
    return asked or torch.cuda.device_count() or 1
