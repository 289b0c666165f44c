"""Tasks in processes of their own, some at once, each result in a file: what is done is not done again."""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from growth.plan import Settings, Task

Run = Callable[[Task, int, Path, dict[str, Path]], Settings]
POLL_SECONDS = 0.5


class SweepError(RuntimeError):
    """A task failed; what is done is kept, and the message names the log."""


class Job(NamedTuple):
    """A task of one seed under the key of its result."""

    task: Task
    seed: int
    key: str


@dataclass
class Sweep:
    """Does jobs in the order they are given, as soon as what they need is done.

    Args:
        work: folder of results, runs and logs.
        run: what a job does, in a process forked for it.
        workers: jobs at once.
    """

    work: Path
    run: Run
    workers: int
    _alive: dict[BaseProcess, Job] = field(default_factory=dict)

    def result(self, key: str) -> Settings | None:
        """What a job found, or None."""
        path = self.work / "results" / f"{key}.json"
        return json.loads(path.read_bytes()) if path.is_file() else None

    def apart(self, name: str, function: Callable[..., Settings], *arguments: Any) -> Settings:
        """What a function gives in a process of its own, whose threads then are not there to be forked.

        Raises:
            SweepError: it failed.
        """
        mine, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)

        def send() -> None:
            theirs.send(function(*arguments))

        child = multiprocessing.get_context("fork").Process(target=send)
        child.start()
        theirs.close()
        try:
            found = mine.recv()
        except EOFError:
            raise SweepError(f"{name} failed, see above") from None
        finally:
            child.join()
        return found

    def complete(self, tasks: Mapping[str, Task], keys: Mapping[int, Mapping[str, str]], names: Iterable[str]) -> None:
        """Do the named tasks of all seeds, and what they need.

        Args:
            tasks: by name, each behind what it needs.
            keys: of each seed, the key of every task.
            names: of the wanted ones.

        Raises:
            SweepError: a task failed.
            KeyboardInterrupt: SIGINT or SIGTERM; trainings that were going on saved what they had.
        """
        wanted = _with_needs(tasks, names)
        waiting = [
            Job(task, seed, of_seed[name])
            for name, task in tasks.items()
            if name in wanted
            for seed, of_seed in keys.items()
            if self.result(of_seed[name]) is None
        ]
        total = len(waiting)
        with _terminating(self._alive) as asked:
            while waiting or self._alive:
                if asked:
                    raise KeyboardInterrupt
                while len(self._alive) < self.workers and (job := self._ready(waiting, keys)):
                    waiting.remove(job)
                    self._start(job, keys[job.seed])
                self._collect(total - len(waiting) - len(self._alive), total)

    def folders(self, seed: int, keys: Mapping[str, str]) -> dict[str, Path]:
        """Where each task of a seed has its run, or its runs 0, 1, ..."""
        return {name: self.work / "runs" / f"seed-{seed}" / f"{name}-{key}" for name, key in keys.items()}

    def _ready(self, waiting: Sequence[Job], keys: Mapping[int, Mapping[str, str]]) -> Job | None:
        """The first job that can be done now."""
        for job in waiting:
            if all(self.result(keys[job.seed][need]) is not None for need in job.task.needs):
                return job
        return None

    def _start(self, job: Job, keys: Mapping[str, str]) -> None:
        folders = self.folders(job.seed, keys)
        for path in ("results", "logs"):
            (self.work / path).mkdir(parents=True, exist_ok=True)
        process = multiprocessing.get_context("fork").Process(target=self._do, args=(job, folders))
        process.start()
        self._alive[process] = job

    def _do(self, job: Job, folders: dict[str, Path]) -> None:
        """In a process of its own: do a job, write its result."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        log = (self.work / "logs" / f"{job.key}.log").open("a", buffering=1)  # until the process ends
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        sys.stdout = sys.stderr = log
        found = self.run(job.task, job.seed, self.work, folders)
        path = self.work / "results" / f"{job.key}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"task": job.task.name, "seed": job.seed} | found), encoding="utf-8")
        os.replace(partial, path)

    def _collect(self, done: int, total: int) -> None:
        """Wait for a job to end."""
        wait([process.sentinel for process in self._alive], timeout=POLL_SECONDS)
        for process, job in list(self._alive.items()):
            if process.exitcode is None:
                continue
            process.join()
            del self._alive[process]
            found = self.result(job.key)
            if found is None:
                log = self.work / "logs" / f"{job.key}.log"
                last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.is_file() else []
                raise SweepError(f"{job.task.name}, seed {job.seed}: {' '.join(last) or 'killed'}; see {log}")
            done += 1
            bpb = found.get("bpb") or found.get("likelihood")
            text = f"{bpb:.4f} bits/byte" if bpb else "done"
            print(
                f"[{done}/{total}] {time.strftime('%H:%M:%S')} seed {job.seed} {job.task.name}: {text}, "
                f"{found['seconds']:.0f} s ({found['cpu_seconds']:.0f} s of CPU)",
                file=sys.stderr,
                flush=True,
            )


def _with_needs(tasks: Mapping[str, Task], names: Iterable[str]) -> set[str]:
    """The names, and all that they need."""
    wanted, left = set(), list(names)
    while left:
        name = left.pop()
        if name not in wanted:
            wanted.add(name)
            left += tasks[name].needs
    return wanted


@contextlib.contextmanager
def _terminating(alive: Mapping[BaseProcess, Any]) -> Iterator[list[int]]:
    """Gives the signals that asked to stop; whatever ends the block ends the processes, each in its own good time.

    The handler raises nothing: Python drops exceptions in what runs around a fork.
    """
    asked: list[int] = []
    before = {number: signal.signal(number, lambda n, _: asked.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in alive:
            if process.is_alive():
                process.terminate()
        for process in alive:
            process.join()
