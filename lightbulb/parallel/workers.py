"""A pool of CPU rank processes that run one job after another, each job on a process group of its own.

Importing the engine takes about ten seconds, which a proof of fifteen layouts cannot pay per rank and layout. The pool
imports it once in Python's fork server and forks the ranks from there; a job then opens a fresh gloo group over as many
of them as it asks for. A failed job ends the pool's processes, since ranks that wait for a lost peer cannot be called
back, and the next job forks new ones (milliseconds).
"""

import faulthandler
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import connection, get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lightbulb.parallel.topology import destroy_groups

PRELOAD = ["lightbulb.parallel.engine"]
START_SECONDS = 600.0  # the first start imports the engine, on a machine that may be busy
GRACE_SECONDS = 1.0  # to tell a rank that failed from those that only lost their peer
STACK_SECONDS = 0.5
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",  # numpy would start its threads at import, and threads do not survive a fork
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",  # these are CPU ranks, also on a machine with GPUs
    "PYTHONWARNINGS": "ignore:Transformer Engine and Apex",  # Megatron-core's, once per module
}


class JobError(RuntimeError):
    """A job failed; the message names the rank and holds its traceback.

    Attributes:
        rank: the rank that failed first.
    """

    def __init__(self, rank: int, message: str):
        super().__init__(message)
        self.rank = rank


class RankDied(JobError):
    """A rank's process ended in the middle of a job."""


class JobTimeout(JobError):
    """A rank did not answer in time; the message says where each such rank stood."""


class _Job(NamedTuple):
    function: Callable[..., Any]
    args: tuple[Any, ...]
    world_size: int
    store: str
    timeout_seconds: float


class _Failure(NamedTuple):
    summary: str
    trace: str


class RankPool:
    """Up to ``num_ranks`` gloo ranks on this machine, alive until the ``with`` block ends::

        with RankPool(4) as pool:
            results = pool.run(2, function, argument)  # function(rank, argument) on two ranks

    Args:
        num_ranks: processes.
        timeout_seconds: default limit of one job.
        preload: modules the fork server imports, if this is what starts it (a process has one server); None for
            those the process has chosen already.
    """

    def __init__(self, num_ranks: int, timeout_seconds: float = 300.0, preload: list[str] | None = PRELOAD):
        self.num_ranks = num_ranks
        self.timeout_seconds = timeout_seconds
        self._context = get_context("forkserver")
        if preload is not None:
            self._context.set_forkserver_preload(preload)
        self._folder = tempfile.TemporaryDirectory(prefix="lightbulb-ranks-")
        self._processes: list[ForkServerProcess] = []
        self._connections: list[connection.Connection] = []
        self._jobs = 0

    def __enter__(self) -> "RankPool":
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        self._folder.cleanup()

    @property
    def pids(self) -> list[int]:
        """Process id of each rank."""
        return [process.pid or 0 for process in self._processes]

    def run(
        self, world_size: int, function: Callable[..., Any], *args: Any, timeout_seconds: float | None = None
    ) -> list[Any]:
        """Call ``function(rank, *args)`` on ``world_size`` ranks of a fresh process group.

        Args:
            world_size: ranks of the group; the others idle.
            function: a picklable function (top level of a module), called with ``torch.distributed`` initialised.
            args: picklable arguments.
            timeout_seconds: limit of this job, if not the pool's.

        Returns:
            The results, by rank.

        Raises:
            JobError: a rank raised, died (:class:`RankDied`) or did not answer (:class:`JobTimeout`).
        """
        if not 1 <= world_size <= self.num_ranks:
            raise ValueError(f"world_size {world_size} is outside 1..{self.num_ranks}, the pool's ranks")
        self._jobs += 1
        limit = timeout_seconds or self.timeout_seconds
        job = _Job(function, args, world_size, str(Path(self._folder.name, f"store-{self._jobs}")), limit)
        message = pickle.dumps(job)  # before anything starts: an unpicklable function is the caller's error
        if not self._processes:
            self._start()
        try:
            self._await_start()
            for rank in range(world_size):
                self._send(rank, message)
            return self._gather(list(range(world_size)), limit, getattr(function, "__qualname__", repr(function)))
        except BaseException:  # also Ctrl-C: the ranks may wait for each other forever
            self._stop()
            raise

    def _start(self) -> None:
        with _environment(_ENVIRONMENT):
            for rank in range(self.num_ranks):
                ours, theirs = self._context.Pipe()
                process = self._context.Process(
                    target=_serve, args=(rank, theirs, self._stack_file(rank)), name=f"rank {rank}", daemon=True
                )
                process.start()
                theirs.close()
                self._processes.append(process)
                self._connections.append(ours)
        self._waits_for_start = True

    def _await_start(self) -> None:
        if self._waits_for_start:
            self._gather(list(range(self.num_ranks)), START_SECONDS, "start")
            self._waits_for_start = False

    def _stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            process.close()
        for ours in self._connections:
            ours.close()
        self._processes, self._connections = [], []

    def _send(self, rank: int, message: bytes) -> None:
        try:
            self._connections[rank].send_bytes(message)
        except (BrokenPipeError, ConnectionResetError):
            raise self._death(rank, "before the job") from None

    def _gather(self, ranks: list[int], limit: float, what: str) -> list[Any]:
        """One answer from each rank, or the error of the rank that failed first."""
        answers: dict[int, Any] = {}
        dead: list[int] = []
        failed: list[int] = []
        deadline = time.monotonic() + limit
        while len(answers) + len(dead) < len(ranks) and time.monotonic() < deadline:
            silent = [rank for rank in ranks if rank not in answers and rank not in dead]
            for rank in self._ready(silent, deadline - time.monotonic()):
                answer = self._receive(rank)
                if answer is None:
                    dead.append(rank)
                else:
                    answers[rank] = answer[0]
                    if isinstance(answer[0], _Failure):
                        failed.append(rank)
            if dead or failed:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if dead:
            raise self._death(dead[0], f"during {what}")
        if failed:
            failure = answers[failed[0]]
            raise JobError(failed[0], f"rank {failed[0]} of {len(ranks)}: {what}: {failure.summary}\n{failure.trace}")
        if len(answers) < len(ranks):
            raise self._timeout([rank for rank in ranks if rank not in answers], limit, what)
        return [answers[rank] for rank in ranks]

    def _ready(self, ranks: list[int], seconds: float) -> list[int]:
        """Ranks that have answered or died."""
        waiting: dict[Any, int] = {self._connections[rank]: rank for rank in ranks}
        waiting |= {self._processes[rank].sentinel: rank for rank in ranks}
        return sorted({waiting[item] for item in connection.wait(list(waiting), timeout=max(seconds, 0.0))})

    def _receive(self, rank: int) -> tuple[Any] | None:
        """The answer, or None from a dead rank."""
        try:
            return (pickle.loads(self._connections[rank].recv_bytes()),) if self._connections[rank].poll() else None
        except (EOFError, ConnectionResetError):
            return None

    def _death(self, rank: int, when: str) -> RankDied:
        process = self._processes[rank]
        process.join(GRACE_SECONDS)
        code = process.exitcode
        how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return RankDied(rank, f"rank {rank} (pid {process.pid}) died {when}: {how}")

    def _timeout(self, silent: list[int], limit: float, what: str) -> JobTimeout:
        for rank in silent:
            os.kill(self.pids[rank], signal.SIGUSR1)  # see _serve: writes the rank's stack
        time.sleep(STACK_SECONDS)
        stacks = [f"rank {rank}: {_job_frames(self._stack_file(rank).read_text(errors='replace'))}" for rank in silent]
        names = ", ".join(map(str, silent))
        return JobTimeout(silent[0], f"{what}: no answer from rank {names} within {limit:g} s\n" + "\n".join(stacks))

    def _stack_file(self, rank: int) -> Path:
        return Path(self._folder.name, f"rank-{rank}.stack")


def _serve(rank: int, requests: connection.Connection, stack_file: Path) -> None:
    """A rank's process: answer jobs until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent ends its ranks
    os.environ.update(_ENVIRONMENT)  # if somebody else's fork server was running already
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no look-up of the machine's name
    warnings.filterwarnings("ignore", module="megatron")  # about parts we do not use; once per rank is too often
    torch.set_num_threads(1)
    with stack_file.open("w") as file:
        faulthandler.register(signal.SIGUSR1, file=file)
        requests.send_bytes(pickle.dumps("ready"))
        while True:
            try:
                requests.send_bytes(_answer(rank, requests.recv_bytes()))
            except (EOFError, BrokenPipeError, ConnectionResetError):
                return


def _answer(rank: int, message: bytes) -> bytes:
    """Run one job; its pickled result or failure."""
    try:
        job: _Job = pickle.loads(message)
        timeout = timedelta(seconds=job.timeout_seconds)
        store = dist.FileStore(job.store, job.world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=job.world_size, timeout=timeout)
        result = job.function(rank, *job.args)
        answer = pickle.dumps(result)
        destroy_groups()
        dist.destroy_process_group()
        return answer
    except Exception as error:  # any error of a job belongs to the parent
        # The groups stay open, so that no peer fails for losing this rank and hides the cause.
        return pickle.dumps(_Failure(f"{type(error).__name__}: {error}", traceback.format_exc()))


def _job_frames(stack: str) -> str:
    """The job's part of a stack written by faulthandler (most recent call first)."""
    return stack.partition(f'  File "{__file__}"')[0].rstrip()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables for processes started inside; this process keeps its own."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
