"""Tasks to workers: datatrove's executors, one door.

One task, or one worker, runs in this process, because starting others takes seconds. Everything else is a datatrove
pipeline of a single step, run by its executors for local processes, Slurm and Ray. Which tasks are finished is read
from the work folder alone, so a task is not done twice whichever executor began it, and how many workers there are
changes no byte. A task that fails leaves its message in the work folder, where this side finds it.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import multiprocess
import psutil
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger
from multiprocess.connection import wait

from lightbulb.data_prep.config import ExecutorConfig
from lightbulb.data_prep.step import Step, owner_of, perform

POLL_SECONDS = 0.1
SLURM_POLL_SECONDS = 10.0

# Imported once by the server that workers are forked from, instead of by every worker of every step.
multiprocess.set_forkserver_preload(["lightbulb.data_prep.pipeline"])

# datatrove reports on standard error what the display shows; workers import this file before they begin.
logger.disable("datatrove")


class ExecutorError(RuntimeError):
    """A task failed, or its worker died; the message names the step and says why."""


@dataclass(frozen=True)
class Batch:
    """The unfinished tasks of one step.

    Attributes:
        step: what they belong to.
        ranks: their numbers in the step.
        folders: where each leaves its files.
    """

    step: Step
    ranks: Sequence[int]
    folders: Sequence[Path]

    def failures(self) -> list[Path]:
        """Files with the message of each task that failed."""
        return [path for path in map(failure_file, self.folders) if path.exists()]


class RunTasks(PipelineStep):
    """A datatrove step that does one unfinished task per rank."""

    name = "LightBulb"
    type = "step"

    def __init__(self, batch: Batch):
        super().__init__()
        self.batch = batch

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Do the task; its failure is written beside its folder."""
        os.environ["RAYON_NUM_THREADS"] = "1"  # read by the tokenizers library when it starts its threads
        final = self.batch.folders[rank]
        try:
            perform(self.batch.step, self.batch.ranks[rank], final, 1, lambda _: None)
        except Exception as error:
            failure_file(final).write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
            raise

    def to_json(self) -> dict[str, Any]:
        """What datatrove notes about the step in its log folder."""
        return {"name": self.batch.step.name, "tasks": list(self.batch.ranks)}


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's executor for local processes, with a process per task instead of a pool.

    The workers of a pool share a queue with a lock. One that is killed while it holds that lock keeps it for ever, and
    this process would wait for it when it ends. Processes that share nothing can be killed at any time.

    Attributes:
        is_ended: set by others to have every process killed and :meth:`run` return.
    """

    is_ended = False

    def run(self) -> None:
        """Do all tasks, at most ``workers`` at once.

        Raises:
            ExecutorError: a process did not end with 0.
        """
        context = multiprocess.get_context("forkserver")
        waiting, codes = deque(range(self.tasks)), set()
        running: dict[Any, Any] = {}  # processes by what their end makes ready
        try:
            while (waiting or running) and not self.is_ended:
                while waiting and len(running) < self.workers:
                    process = context.Process(target=self._run_task, args=(waiting.popleft(),), daemon=True)
                    process.start()
                    running[process.sentinel] = process
                for sentinel in wait(list(running), timeout=POLL_SECONDS):
                    process = running.pop(sentinel)
                    process.join()
                    codes.add(process.exitcode)
        finally:
            for process in running.values():
                process.kill()
                process.join()
        if failed := sorted(codes - {0}):
            raise ExecutorError(f"processes ended with exit codes {failed}")

    def _run_task(self, rank: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent ends its workers
        try:
            self._run_for_rank(rank, rank)
        except Exception:
            if not self.pipeline[0].batch.failures():  # what is written there needs no traceback here
                raise
            sys.exit(1)


def failure_file(final: Path) -> Path:
    """Where a task leaves the message it failed with."""
    return final.with_name(f"{final.name}.failed")


def execute(batch: Batch, config: ExecutorConfig, logs: Path, advance: Callable[[int, int], None]) -> None:
    """Do all tasks of the batch.

    Args:
        batch: the tasks.
        config: where they run, and how many at once.
        logs: folder for datatrove's own logs.
        advance: takes the place of a task in the batch and how much of it was done since the last call.

    Raises:
        ExecutorError: a task failed in another process.
        Exception: whatever a task in this process raised.
    """
    for path in batch.failures():
        path.unlink()
    if config.type == "local" and (config.num_workers == 1 or len(batch.ranks) == 1):
        os.environ.setdefault("RAYON_NUM_THREADS", str(config.num_workers))
        for place, (rank, final) in enumerate(zip(batch.ranks, batch.folders, strict=True)):
            perform(batch.step, rank, final, config.num_workers, lambda n, place=place: advance(place, n))
        return
    logs.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(logs, ignore_errors=True)
    _watch(batch, _executor(batch, config, logs), logs, advance)


def _executor(batch: Batch, config: ExecutorConfig, logs: Path) -> PipelineExecutor:
    count = len(batch.ranks)
    common: dict[str, Any] = {
        "pipeline": [RunTasks(batch)],
        "tasks": count,
        "logging_dir": str(logs.absolute()),
        "skip_completed": False,  # the work folder knows
        "workers": min(config.workers or count, count),
    }
    match config.type:
        case "local":
            return LocalExecutor(**common | {"workers": min(config.num_workers, count)})
        case "slurm":
            return SlurmPipelineExecutor(**common, job_name=f"lightbulb-{batch.step.name}", **config.options)
        case "ray":
            return RayPipelineExecutor(**common, **config.options)


def _watch(batch: Batch, executor: PipelineExecutor, logs: Path, advance: Callable[[int, int], None]) -> None:
    """Run the executor in a thread, and look after its tasks meanwhile: what is done, what failed, who died."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            executor.run()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    open_places = set(range(len(batch.ranks)))
    try:
        while open_places:
            was_alive = thread.is_alive()
            for place in sorted(open_places):
                if batch.folders[place].exists():
                    open_places.discard(place)
                    advance(place, -1)
            if failures := batch.failures():
                raise ExecutorError(f"{batch.step.name}: {failures[0].read_text(encoding='utf-8')}")
            if open_places and (dead := _dead_worker(batch)):
                raise ExecutorError(
                    f"{batch.step.name}: worker {dead} was killed, by lack of memory perhaps; "
                    "lower executor.workers and run the command again, it goes on from here"
                )
            if open_places and not was_alive and not _is_queued(executor):
                cause = f": {raised[0]}" if raised else ""
                raise ExecutorError(f"{batch.step.name}: {len(open_places)} tasks did not run{cause}; see {logs}")
            time.sleep(SLURM_POLL_SECONDS if isinstance(executor, SlurmPipelineExecutor) else POLL_SECONDS)
        thread.join()
    except BaseException:
        if isinstance(executor, LocalExecutor):
            executor.is_ended = True
            thread.join()
        raise


def _dead_worker(batch: Batch) -> int | None:
    """A process of this machine that has begun a task and is gone."""
    for parent in {final.parent for final in batch.folders}:
        for path in parent.glob(".*.tmp"):
            owner = owner_of(path)
            if owner and owner[0] == socket.gethostname() and not psutil.pid_exists(owner[1]) and path.exists():
                return owner[1]
    return None


def _is_queued(executor: PipelineExecutor) -> bool:
    """Whether Slurm still has the job; the other executors return when they are done."""
    if not isinstance(executor, SlurmPipelineExecutor) or executor.job_id in (None, -1):
        return False
    answer = subprocess.run(["squeue", "-h", "-j", str(executor.job_id)], capture_output=True, text=True, check=False)
    return answer.returncode == 0 and bool(answer.stdout.strip())
