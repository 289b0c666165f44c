"""Finds ranks that hang, and ends the run instead of letting it hold its machines for hours.

Every rank has a thread that writes a heartbeat into the run folder: where the rank is (section and step), whether it
waits for others, and a counter that shows the thread is alive. When a section takes longer than its limit, the rank
reads all heartbeats. Silent ones (a stopped process, a machine that is gone) come first, then those that compute while
the others wait for them. A hung rank is named by rank, step and section with the stack of its threads in
``RUN/hang-rank-N.txt``; then the processes end, a stopped one included.

Only counters and durations are compared across ranks, never clocks.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import psutil
import torch.distributed as dist

FOLDER = ".heartbeat"
EXIT_CODE = 75
"""Exit code of a rank that was ended because it, or a rank it waited for, hung."""
STACK_SIGNAL = signal.SIGUSR2
"""A rank that receives it writes the stacks of its threads into ``RUN/hang-rank-N.txt`` and goes on."""
LONG_SECTIONS = {"setup": 3.0, "save": 3.0}
"""Sections whose limit is a multiple of ``train.hang_seconds``: they read or write everything at once."""
GONE_SECONDS = 5.0
"""From a peer's death to this rank's end, if losing it raised no error here."""

_WAITING_IN = ("/torch/distributed/", "/megatron/core/")
_RECORD_BYTES = 256
_PLACE_CHARACTERS = 100


class Beat(NamedTuple):
    """What one rank says of itself; ``seconds`` in the section so far, ``beats`` written since the start."""

    rank: int
    step: int
    section: str
    seconds: float
    waits: bool
    where: str
    beats: int


class _Peer(NamedTuple):
    host: str
    pid: int
    born: str


class Watchdog:
    """Watches this rank and, with the others' heartbeats, all of them; use it as a context, on all ranks together.

    Args:
        folder: run folder, the same for all ranks; this run must hold it.
        limit_seconds: longest time in one section; 0 turns the watchdog off.
    """

    def __init__(self, folder: Path, limit_seconds: float):
        self.folder, self.limit_seconds = folder, limit_seconds
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._section, self._step, self._since = "setup", 0, time.monotonic()
        self._main = threading.main_thread().ident or 0
        self._count = 0
        self._closing = threading.Event()
        self._interval = min(max(limit_seconds / 20, 0.1), 5.0)
        # long enough for any thread that lives to be scheduled, also on an overloaded machine
        self._window = max(1.5 * self._interval, 1.0)

    def __enter__(self) -> "Watchdog":
        if self.limit_seconds:
            self._peers: list[Any] = [None] * self.world_size
            dist.all_gather_object(self._peers, _Peer(socket.gethostname(), os.getpid(), _born(os.getpid())))
            (self.folder / FOLDER).mkdir(exist_ok=True)
            self._beats = (self.folder / FOLDER / _name(self.rank)).open("wb", buffering=0)
            self._stacks = (self.folder / f"hang-rank-{self.rank}.txt").open("w")
            faulthandler.register(STACK_SIGNAL, file=self._stacks, all_threads=True)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching; this rank's empty stack file and its heartbeat go."""
        if not self.limit_seconds or self._closing.is_set():
            return
        self._closing.set()
        self._thread.join()
        faulthandler.unregister(STACK_SIGNAL)
        self._beats.close()
        self._stacks.close()
        (self.folder / FOLDER / _name(self.rank)).unlink(missing_ok=True)
        if not (self.folder / f"hang-rank-{self.rank}.txt").stat().st_size:
            (self.folder / f"hang-rank-{self.rank}.txt").unlink()

    @contextmanager
    def section(self, name: str, step: int) -> Iterator[None]:
        """The block belongs to this part of a step; afterwards the part around it begins anew."""
        before = self._section, self._step
        self._section, self._step, self._since = name, step, time.monotonic()
        try:
            yield
        finally:
            self._section, self._step = before
            self._since = time.monotonic()

    def _watch(self) -> None:
        gone_since: float | None = None
        while not self._closing.wait(self._interval):
            self._beat()
            if self._beat_now().seconds > self._limit():
                self._end_hung_run()
            gone = self._gone_peer()
            gone_since = None if gone is None else gone_since or time.monotonic()
            if gone is not None and gone_since and time.monotonic() - gone_since > GONE_SECONDS:
                self._end(f"rank {self.rank}: rank {gone} (pid {self._peers[gone].pid}) has died; ending")

    def _limit(self) -> float:
        return self.limit_seconds * LONG_SECTIONS.get(self._section, 1.0)

    def _beat_now(self) -> Beat:
        waits, where = _place(sys._current_frames().get(self._main))
        seconds = round(time.monotonic() - self._since, 1)
        return Beat(self.rank, self._step, self._section, seconds, waits, where, self._count)

    def _beat(self) -> None:
        self._count += 1
        record = json.dumps(self._beat_now()).encode()[:_RECORD_BYTES].ljust(_RECORD_BYTES)
        with suppress(OSError):  # a full disk or a lost mount ends the run at the next save, not here
            os.pwrite(self._beats.fileno(), record, 0)  # one write: a reader sees the old record or the new

    def _gone_peer(self) -> int | None:
        """A rank of this machine whose process ended while this one runs."""
        here = self._peers[self.rank].host
        return next((r for r, peer in enumerate(self._peers) if peer.host == here and not _lives(peer)), None)

    def _end_hung_run(self) -> NoReturn:
        mine = self._beat_now()
        if not mine.waits:
            self._report_own_hang(mine)
        silent, beats = self._look_around()
        late = behind(list(beats.values()))
        if mine.waits and not silent and self.rank in late:
            self._report_own_hang(mine)  # all wait for each other: every stack is part of the cause
        self._dump(mine)
        causes = [f"rank {r}, which is silent{self._rouse(r)}{_last(beats.get(r))}" for r in silent]
        causes += [describe(beats[r]) for r in late if r not in silent and r != self.rank and not silent]
        cause = "; ".join(causes) or "ranks that cannot be told"
        self._end(
            f"rank {self.rank} waited {mine.seconds:g} s in section {mine.section} at step {mine.step} for {cause}. "
            f"Stacks: {self.folder}/hang-rank-*.txt. A longer limit: train.hang_seconds"
        )

    def _report_own_hang(self, mine: Beat) -> NoReturn:
        self._dump(mine)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        self._keep_beating(self._window + 1.0)  # the others reach their limit too, and see this rank alive and busy
        self._end(f"{describe(mine)}. Stack: {self._stacks.name}. A longer limit: train.hang_seconds")

    def _dump(self, mine: Beat) -> None:
        self._stacks.write(f"{describe(mine)}\n")
        self._stacks.flush()
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)

    def _look_around(self) -> tuple[list[int], dict[int, Beat]]:
        """Ranks whose heartbeat stands still, and every rank's newest."""
        before = self._read_all()
        self._keep_beating(self._window)
        after = self._read_all()
        after[self.rank] = self._beat_now()
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        still = [r for r in others if r not in after or (r in before and after[r].beats == before[r].beats)]
        return still, after

    def _keep_beating(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(self._interval / 2)
            self._beat()

    def _read_all(self) -> dict[int, Beat]:
        beats = {}
        for rank in range(self.world_size):
            try:
                beats[rank] = Beat(*json.loads((self.folder / FOLDER / _name(rank)).read_bytes()))
            except (OSError, ValueError, TypeError):
                continue
        return beats

    def _rouse(self, rank: int) -> str:
        """Have a silent rank of this machine write its stack, then kill it; says how it was found."""
        peer = self._peers[rank]
        if peer.host != self._peers[self.rank].host:
            return f" (pid {peer.pid} on {peer.host}: look there)"
        if not _lives(peer):
            return f" (pid {peer.pid} has ended)"
        try:
            process = psutil.Process(peer.pid)
            how = "stopped by a signal" if process.status() == psutil.STATUS_STOPPED else "holds the interpreter"
            process.send_signal(STACK_SIGNAL)
            process.send_signal(signal.SIGCONT)  # its handler is in C and runs before anything else does
            self._await_stack(self.folder / f"hang-rank-{rank}.txt")
            process.kill()
        except psutil.Error:  # another rank was faster
            return f" (pid {peer.pid} was killed)"
        return f" (pid {peer.pid}, {how}; killed)"

    def _await_stack(self, stacks: Path) -> None:
        """Until a file has come and stopped growing; not longer, for once awake a stopped rank goes on training."""
        size, end = 0, time.monotonic() + 1.0
        while time.monotonic() < end:
            time.sleep(0.03)
            before, size = size, stacks.stat().st_size
            if size and size == before:
                return

    def _end(self, sentence: str) -> NoReturn:
        try:
            print(f"error: {sentence}", file=sys.stderr, flush=True)
        finally:
            os._exit(EXIT_CODE)


def behind(beats: list[Beat]) -> list[int]:
    """The ranks the others wait for: those that do not wait themselves, else those at the earliest step."""
    busy = [beat.rank for beat in beats if not beat.waits and beat.seconds > 0]
    first = min((beat.step for beat in beats), default=0)
    return busy or [beat.rank for beat in beats if beat.step == first]


def describe(beat: Beat) -> str:
    """``rank 1 hung in section step at step 5 for 3.2 s, at corpus.py:80 rows < loader.py:96 next_step < ...``."""
    place = f", at {beat.where}" if beat.where else ""
    return f"rank {beat.rank} hung in section {beat.section} at step {beat.step} for {beat.seconds:g} s{place}"


def sweep_heartbeats(folder: Path) -> None:
    """Remove the heartbeats and hang reports of an earlier start; the run folder must be claimed."""
    for path in [*(folder / FOLDER).glob("rank-*"), *folder.glob("hang-rank-*.txt")]:
        path.unlink(missing_ok=True)


def _place(frame: FrameType | None) -> tuple[bool, str]:
    """Whether a thread waits for other ranks, and its innermost places outside torch."""
    waits, depth = False, 0
    places: list[str] = []
    while frame is not None and len(places) < 3:
        file = frame.f_code.co_filename
        waits |= depth < 4 and any(part in file for part in _WAITING_IN)
        if "/torch/" not in file and "/megatron/" not in file:
            places.append(f"{Path(file).name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame, depth = frame.f_back, depth + 1
    return waits, " < ".join(places)[:_PLACE_CHARACTERS]


def _last(beat: Beat | None) -> str:
    return "" if beat is None else f"; last seen in section {beat.section} at step {beat.step}"


def _lives(peer: _Peer) -> bool:
    return _born(peer.pid) == peer.born


def _born(pid: int) -> str:
    """When a process of this machine started, in ticks since boot (no clock can be set back); "" when it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else fields[18]


def _name(rank: int) -> str:
    return f"rank-{rank:05d}"
