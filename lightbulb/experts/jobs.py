"""Several pretraining runs, each in processes of its own: one after the other, several at once, or one per node group.

A run fails by itself: the others go on, and starting the same runs again skips the complete ones and resumes the rest.
"""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import orjson
import torch
from pydantic import Field, model_validator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lightbulb.config import Config, load_config
from lightbulb.folder import FolderInUse, claim
from lightbulb.train.checkpoint import Checkpoint, CheckpointError
from lightbulb.train.config import RunConfig
from lightbulb.train.faults import Interrupted
from lightbulb.train.manifest import step_folder
from lightbulb.train.metrics import FILE_NAME
from lightbulb.train.resume import check_resumable

LOG = "output.log"
POLL_SECONDS = 0.25
LEAVING_SECONDS = 60.0
LINE_SECONDS = 30.0
"""Between two lines about a run where the console is no terminal."""
_LAST_LINES = 6
_TAIL_BYTES = 1 << 16
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


class JobError(RuntimeError):
    """Runs that did not become complete; the message names each with the last lines it printed."""


class JobsStopped(JobError):
    """A signal stopped the runs after they had saved."""


class JobsConfig(Config):
    """How runs are started."""

    ranks: int | None = Field(None, ge=1)
    """Processes of one run; None for one process without a launcher."""
    at_once: int = Field(1, ge=1)
    """Runs at the same time on this machine; they share its cores, and its GPUs if there are enough of them."""
    hostfiles: list[Path] = []
    """One per node group, as for deepspeed: each group trains one run at a time, with all of its slots."""
    restarts: int = Field(0, ge=0)
    """Restarts in a row without a new checkpoint after which a run has failed (`lightbulb pretrain --restart`)."""

    @model_validator(mode="after")
    def _one_kind(self) -> "JobsConfig":
        if self.hostfiles and (self.ranks is not None or self.at_once > 1):
            raise ValueError("hostfiles: they say how many ranks and runs there are; leave out ranks and at_once")
        return self

    @property
    def slots(self) -> int:
        """Runs at the same time."""
        return len(self.hostfiles) or self.at_once


def run_jobs(configs: Sequence[Path], jobs: JobsConfig) -> None:
    """Train the runs of these run files; from the main thread. What each prints goes to ``RUN/output.log``.

    SIGTERM, SIGINT and SIGUSR1 are passed on, so that every run saves and stops; a second, later SIGINT ends them.

    Raises:
        ConfigError: a run file is not one.
        JobError: some runs failed; the others are complete.
        JobsStopped: a signal came.
    """
    waiting = [_Run(path) for path in configs]
    with _Board(waiting) as board, _Forward() as signals:
        complete = [run for run in waiting if is_complete(run.path)]
        for run in complete:
            waiting.remove(run)
            board.say(run, "complete already")
        wait_until_free([run.folder for run in waiting], lambda: signals.received is not None)
        failed = _work(waiting, jobs, board, signals)
    if signals.received is not None:
        name = signal.Signals(signals.received).name
        raise JobsStopped(f"stopped by {name}; what was running has saved: the same command goes on from there")
    if failed:
        raise JobError("\n".join(run.epitaph() for run in failed))


def wait_until_free(folders: Sequence[Path], is_stopped: Callable[[], bool], seconds: float = LEAVING_SECONDS) -> None:
    """Wait for runs of an earlier start that was killed: they save before they end. No longer than so many seconds,
    for what still holds its folder then is alive and well, and the run that wants it will say so."""
    end = time.monotonic() + seconds
    for folder in folders:
        while folder.exists() and time.monotonic() < end and not is_stopped():
            try:
                with claim(folder):
                    break
            except FolderInUse:
                time.sleep(POLL_SECONDS)


def is_complete(config: Path) -> bool:
    """Whether the run of a run file has trained all steps and written its summary, with no setting that would make it
    another run."""
    wanted = load_config(RunConfig, config)
    run = Path(wanted.run).expanduser()
    try:
        steps = orjson.loads((run / "summary.json").read_bytes())["steps"]
        check_resumable(Checkpoint(step_folder(run, wanted.train.steps), verify=False), wanted)
    except (OSError, ValueError, KeyError, CheckpointError):
        return False
    return steps == wanted.train.steps


def command(config: Path, jobs: JobsConfig, slot: int = 0) -> list[str]:
    """The command line that trains a run in a slot (of node groups: which one)."""
    words = [sys.executable, "-m", "lightbulb.launcher.pretrain", str(config)]
    if jobs.hostfiles:
        return [*words, f"--restart={jobs.restarts}", f"--hostfile={jobs.hostfiles[slot]}"]
    if jobs.ranks is None and not jobs.restarts:
        return words
    return [*words, f"--restart={jobs.restarts}", f"--num_gpus={jobs.ranks or 1}"]


def environment(jobs: JobsConfig, slot: int) -> dict[str, str]:
    """A slot's share of this machine, as environment variables; nothing that was set by hand is changed but the list
    of GPUs, of which each slot gets its own where there are enough."""
    if jobs.hostfiles or jobs.at_once == 1:
        return {}
    ranks = jobs.ranks or 1
    share = {}
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        share["OMP_NUM_THREADS"] = str(max(cores // (ranks * jobs.at_once), 1))
    count = torch.cuda.device_count()
    if count:
        named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        devices = named.split(",") if named else [str(number) for number in range(count)]
        mine = dict.fromkeys(devices[(slot * ranks + rank) % count] for rank in range(ranks))
        share["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    return share


def printed(config: Path, jobs: JobsConfig, slot: int = 0) -> str:
    """The command line for a person to type, with its environment."""
    variables = [f"{name}={value}" for name, value in environment(jobs, slot).items()]
    return " ".join([*variables, shlex.join(["lightbulb", "pretrain", *command(config, jobs, slot)[3:]])])


class _Run:
    """One run on its way."""

    def __init__(self, path: Path):
        self.path = path
        config = load_config(RunConfig, path)
        self.folder, self.steps = Path(config.run).expanduser(), config.train.steps
        self.process: subprocess.Popen[bytes] | None = None
        self.slot = 0

    def start(self, jobs: JobsConfig, slot: int) -> None:
        self.slot = slot
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOG).open("ab") as log:
            # A session of its own: the terminal's Ctrl-C reaches this process alone, which hands it on once. Should
            # this process be killed, the system sends the run SIGTERM: it saves, and no run is left behind.
            self.process = subprocess.Popen(
                command(self.path, jobs, slot), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=os.environ | environment(jobs, slot), start_new_session=True,
                preexec_fn=partial(_LIBC.prctl, _PR_SET_PDEATHSIG, signal.SIGTERM),
            )  # fmt: skip

    def epitaph(self) -> str:
        """Why the run is not complete, as far as it said so."""
        assert self.process is not None
        code = self.process.returncode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if code == 0:
            how = "was stopped before its last step"
        lines = [line for line in _tail(self.folder / LOG).splitlines() if line.strip()][-_LAST_LINES:]
        return "\n  ".join([f"{self.path}: {how}; {self.folder / LOG} ends with", *lines])

    def progress(self) -> dict[str, Any]:
        """The newest training record of the metrics; empty before there is one."""
        for line in reversed(_tail(self.folder / FILE_NAME).splitlines()):
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError:  # the first of the tail may have lost its beginning
                continue
            if record.get("kind") == "train":
                return record
        return {}


def _work(waiting: list[_Run], jobs: JobsConfig, board: "_Board", signals: "_Forward") -> list[_Run]:
    """Start runs as slots become free, until all have ended; gives those that did not become complete."""
    free, failed = list(range(jobs.slots)), []
    while signals.runs or (waiting and signals.received is None):
        while waiting and free and signals.received is None:
            run = waiting.pop(0)
            run.start(jobs, free.pop(0))
            signals.runs.append(run)
            board.say(run, "started")
        time.sleep(POLL_SECONDS)
        for run in list(signals.runs):
            if run.process is None or run.process.poll() is None:
                board.update(run)
                continue
            signals.runs.remove(run)
            free = sorted([*free, run.slot])
            done = run.process.returncode == 0 and is_complete(run.path)
            board.say(run, "complete" if done else "stopped" if signals.received is not None else "failed")
            failed += [] if done else [run]
    return failed


class _Forward(Interrupted):
    """Hands signals on to the runs that are there."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.runs: list[_Run] = []

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        for run in self.runs:
            if run.process is not None and run.process.poll() is None:
                run.process.send_signal(number)


class _Board:
    """A bar per run on a terminal, a line per run now and then elsewhere; on stderr."""

    def __init__(self, runs: Sequence[_Run]):
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._progress = Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)
        self._tasks: dict[Path, TaskID] = {
            run.path: self._progress.add_task(str(run.folder), total=run.steps, note="waits", start=False)
            for run in runs
        }
        self._said = {run.path: time.monotonic() for run in runs}

    def __enter__(self) -> "_Board":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def say(self, run: _Run, word: str) -> None:
        """Something happened to a run."""
        if word == "started":
            self._progress.start_task(self._tasks[run.path])
        self._show(run, word)

    def update(self, run: _Run) -> None:
        """A run is going on."""
        if not self._progress.disable:
            self._show(run, "")
        elif time.monotonic() - self._said[run.path] > LINE_SECONDS:
            self._show(run, "trains")

    def _show(self, run: _Run, word: str) -> None:
        record = run.progress()
        step, loss = record.get("step", 0), record.get("loss")
        note = " ".join(filter(None, [word, "" if loss is None else f"loss {loss:.4f}"]))
        if self._progress.disable:
            self._said[run.path] = time.monotonic()
            print(f"{run.folder}: step {step} of {run.steps} {note}", file=sys.stderr, flush=True)
        else:
            self._progress.update(self._tasks[run.path], completed=step, note=note)


def _tail(path: Path) -> str:
    """The end of a file; empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
