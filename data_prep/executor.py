"""Tasks to workers: datatrove's executors, one door.

One task, or one worker, runs in this process, because starting others takes seconds. Everything else is a datatrove
pipeline of a single step, run by its executors for local processes, Slurm and Ray. Which tasks are finished is read
from the work folder alone, so a task is not done twice whichever executor began it, and how many workers there are
changes no byte. A task that fails leaves its message in the work folder, where this side finds it; of one that is
killed, a local executor says which it was and by what.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import multiprocess
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger
from multiprocess.connection import wait

from lightbulb.data.tokenizer import TokenizerError
from lightbulb.data_prep.config import ExecutorConfig
from lightbulb.data_prep.counts import CorpusError
from lightbulb.data_prep.step import Step, perform
from lightbulb.folder import write_atomically

POLL_SECONDS = 0.1
SLURM_POLL_SECONDS = 10.0
EXPLAINED = (CorpusError, TokenizerError, OSError)
"""Failures whose message is all there is to say; of others it is told where they came from."""

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

    def names(self) -> set[str]:
        """Of what lies beside the folders; one listing is all that thousands of unfinished tasks cost."""
        return {name for parent in {folder.parent for folder in self.folders} for name in os.listdir(parent)}

    def failures(self, names: set[str]) -> list[Path]:
        """Files with the message of each task that failed, of what lies there."""
        return [path for path in map(failure_file, self.folders) if path.name in names]


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
            message = f"{type(error).__name__}: {error}"
            if not isinstance(error, EXPLAINED):
                message += "\n" + traceback.format_exc()
            write_atomically(failure_file(final), message)
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
        """Do all tasks, at most ``workers`` at once, until one fails.

        Raises:
            ExecutorError: a process did not end with 0.
        """
        context = multiprocess.get_context("forkserver")
        waiting = deque(range(self.tasks))
        running: dict[Any, tuple[int, Any]] = {}  # tasks and their processes, by what the processes' end makes ready
        try:
            while (waiting or running) and not self.is_ended:
                while waiting and len(running) < self.workers:
                    place = waiting.popleft()
                    process = context.Process(target=self._run_task, args=(place,), daemon=True)
                    process.start()
                    running[process.sentinel] = place, process
                for sentinel in wait(list(running), timeout=POLL_SECONDS):
                    place, process = running.pop(sentinel)
                    process.join()
                    if process.exitcode:
                        raise ExecutorError(self._told(place, process.exitcode))
        finally:
            for _, process in running.values():
                process.kill()
                process.join()

    @property
    def _batch(self) -> Batch:
        return self.pipeline[0].batch

    def _told(self, place: int, code: int) -> str:
        """How a task's process ended, in words."""
        task = f"task {self._batch.ranks[place] + 1} of {len(self._batch.step.parts())}"
        again = "run the command again, it goes on from here"
        if code == -signal.SIGKILL:
            cause = "was killed (SIGKILL), most likely for lack of memory"
            return f"{task} {cause}; lower executor.workers (now {self.workers}) and {again}"
        if code < 0:
            return f"{task} was ended by signal {signal.Signals(-code).name}; {again}"
        return f"{task} ended with exit code {code}, its message is above; {again}"

    def _run_task(self, place: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent ends its workers
        try:
            self._run_for_rank(place, place)
        except Exception:
            if not failure_file(self._batch.folders[place]).exists():  # it could not be written: told here
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
    for path in batch.failures(batch.names()):
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
    """Run the executor in a thread, and look after its tasks meanwhile: what is done, and what failed."""
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
            was_alive, names = thread.is_alive(), batch.names()
            for place in sorted(open_places):
                if batch.folders[place].name in names:
                    open_places.discard(place)
                    advance(place, -1)
            if failures := batch.failures(names):
                raise ExecutorError(f"{batch.step.name}: {failures[0].read_text(encoding='utf-8')}")
            if open_places and not was_alive and not _is_queued(executor):
                if raised and isinstance(raised[0], ExecutorError):
                    raise ExecutorError(f"{batch.step.name}: {raised[0]}")
                cause = f": {raised[0]}" if raised else ""
                raise ExecutorError(f"{batch.step.name}: {len(open_places)} tasks did not run{cause}; see {logs}")
            time.sleep(SLURM_POLL_SECONDS if isinstance(executor, SlurmPipelineExecutor) else POLL_SECONDS)
        thread.join()
    except BaseException:
        if isinstance(executor, LocalExecutor):
            executor.is_ended = True
            thread.join()
        raise


def _is_queued(executor: PipelineExecutor) -> bool:
    """Whether Slurm still has the job; the other executors return when they are done."""
    if not isinstance(executor, SlurmPipelineExecutor) or executor.job_id in (None, -1):
        return False
    answer = subprocess.run(["squeue", "-h", "-j", str(executor.job_id)], capture_output=True, text=True, check=False)
    return answer.returncode == 0 and bool(answer.stdout.strip())
