"""Writing checkpoints: whole or not at all, while training goes on.

A save has three parts, all in a thread. The *snapshot* copies what this rank owns to memory of its own: the next
forward and backward need not wait for it, only the next update must (:meth:`Saver.settle`). Then the thread *writes*
the files into a hidden folder, each hashed on its way to the disk, and last a small record of them. On rank 0 it waits
for every rank's record and *publishes*: manifest, final name, ``latest``, removal of old checkpoints. The threads
communicate through the folder alone, so a checkpoint in flight survives an error anywhere in training. Ranks ask each
other for the outcome at step boundaries, and only while a save is in flight.
"""

import logging
import math
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import torch
import torch.distributed as dist
from torch import Tensor

from lightbulb.folder import FolderError, check_writable, explained, sync_folder, write_atomically
from lightbulb.parallel.collective import agree, on_rank_zero
from lightbulb.parallel.engine import Engine
from lightbulb.train.boxes import Box, owned_boxes
from lightbulb.train.faults import fault_point
from lightbulb.train.manifest import (
    TrainState,
    entry,
    finish_checkpoint,
    hidden_name,
    remove_old,
    step_folder,
)
from lightbulb.train.tensor_file import sync_file, write_tensors

log = logging.getLogger(__name__)

POLL_SECONDS = 0.02
VISIBLE_SECONDS = 120.0  # a network file system may show another machine's file late
GRACE_SECONDS = 15.0  # after an error, for ranks that are still writing; launchers kill after 30


class Saver:
    """Saves one run's checkpoints from all ranks. Methods are collectives unless said otherwise.

    Attributes:
        total_bytes: of one checkpoint's tensors, over all ranks.
        blocked_seconds: that training waited for the save in flight or the last one.
        written_seconds: that the last complete save took on this rank from its snapshot on.

    Args:
        run: folder of the run, on a file system that all ranks share.
        engine: what is saved.
        keep: newest checkpoints to keep.
        background: write while training goes on; else :meth:`save` returns when the checkpoint is complete.

    Raises:
        FolderError: there is no space for a checkpoint, or the folder cannot be written.
    """

    def __init__(self, run: Path, engine: Engine, keep: int, background: bool = True):
        self.run, self.engine, self.keep, self.background = run, engine, keep, background
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._writing: _Writing | None = None
        self._buffer: Tensor | None = None
        self.blocked_seconds = self.written_seconds = 0.0
        size = torch.tensor(float(sum(box.values.nbytes for box in owned_boxes(engine))), dtype=torch.float64)
        size = size.to(engine.device)
        dist.all_reduce(size)
        self.total_bytes = int(size.item())
        on_rank_zero(lambda: check_writable(step_folder(run, 0).parent, self.total_bytes))

    def save(self, state: TrainState, before: Callable[[], None] | None = None) -> None:
        """Save the state of this step; waits for a save that is in flight.

        Args:
            state: what is saved besides tensors, the same on every rank.
            before: called by this rank's writing thread ahead of its record (the ledger goes to disk there).

        Raises:
            FolderError: on every rank, when any rank could not write the previous or, without ``background``, this
                checkpoint; earlier ones are untouched.
        """
        self.wait()
        started, self.blocked_seconds = time.perf_counter(), 0.0
        partial = hidden_name(step_folder(self.run, state.step), "partial")

        def prepare() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            check_writable(partial.parent, self.total_bytes)
            with explained(partial):
                partial.mkdir()

        on_rank_zero(prepare)
        self._writing = _Writing(self, state, partial, before)
        self.blocked_seconds += time.perf_counter() - started
        if not self.background:
            self.wait()

    def settle(self) -> None:
        """Wait until the state that is being saved has been copied: call it before every update. No collective."""
        if self._writing is not None and not self._writing.has_copied.is_set():
            started = time.perf_counter()
            self._writing.has_copied.wait()
            self.blocked_seconds += time.perf_counter() - started

    def poll(self) -> None:
        """At a step boundary: notice that a save in flight has ended. Costs nothing when none is.

        Raises:
            FolderError: on every rank, when some rank could not write.
        """
        if self._writing is None:
            return
        started, thread = time.perf_counter(), self._writing
        flags = (thread.is_alive(), not thread.has_written, thread.error is not None)
        votes = torch.tensor(flags, dtype=torch.float32, device=self.engine.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        alive, some_write, some_failed = votes.tolist()
        if some_failed:
            thread.give_up()
        elif not some_write:
            thread.expect()
        if some_failed or not alive:
            self._finish(thread)
        self.blocked_seconds += time.perf_counter() - started

    def wait(self) -> None:
        """Wait until no save is in flight.

        Raises:
            FolderError: as :meth:`poll`.
        """
        while self._writing is not None:
            started = time.perf_counter()
            self._writing.join(POLL_SECONDS)
            self.blocked_seconds += time.perf_counter() - started
            self.poll()

    def close(self) -> None:
        """Let a save in flight end without asking other ranks, as after an error; no collective."""
        if self._writing is not None:
            self._writing.join(GRACE_SECONDS)
            self._writing.give_up()
            self._writing.join()
            self._writing = None

    def _finish(self, thread: "_Writing") -> None:
        """The thread has ended, or will at once: raise its error everywhere, or say what the save took."""
        thread.join()
        self._writing = None
        try:
            agree(thread.error)
        except Exception:
            if self._rank == 0:  # only now is nobody writing into it
                shutil.rmtree(thread.partial, ignore_errors=True)
            raise
        self.written_seconds = thread.seconds
        log.info(
            "saved step %d: %.1f MB in %.2f s, training waited %.3f s",
            thread.state.step, self.total_bytes / 1e6, thread.seconds, self.blocked_seconds,
        )  # fmt: skip

    def snapshot(self, boxes: list[Box]) -> list[Box]:
        """The boxes with values of their own, in one buffer that is kept for the next save."""
        total = sum(box.values.numel() for box in boxes)
        on_cuda = self.engine.device.type == "cuda"
        if self._buffer is None or self._buffer.numel() < total:
            self._buffer = torch.empty(total, pin_memory=on_cuda)
        copies, start = [], 0
        for box in boxes:
            target = self._buffer[start : start + box.values.numel()].view(box.values.shape)
            target.copy_(box.values, non_blocking=True)
            copies.append(Box(box.kind, box.name, box.shape, box.start, target))
            start += box.values.numel()
        if on_cuda:
            torch.cuda.synchronize(self.engine.device)
        return copies


class _OtherRankFailed(Exception):
    """Ends the thread of a rank that has nothing to report."""


class _Writing(threading.Thread):
    """One save on its way to the disk.

    Attributes:
        error: what stopped it.
        has_copied: the training state may change.
        has_written: this rank's files and record are on disk.
        seconds: from the start to the end.
    """

    def __init__(self, saver: Saver, state: TrainState, partial: Path, before: Callable[[], None] | None):
        super().__init__(name=f"save-{state.step}", daemon=True)
        self.state, self.partial = state, partial
        self.error: Exception | None = None
        self.has_copied, self.has_written = threading.Event(), False
        self.seconds = 0.0
        self._run, self._keep, self._rank, self._world_size = saver.run, saver.keep, saver._rank, saver._world_size
        self._boxes, self._before = list(owned_boxes(saver.engine)), before
        self._snapshot = saver.snapshot if saver.background else None
        self._deadline, self._is_lost = math.inf, False
        self.start()

    def expect(self) -> None:
        """All ranks have written: their records must show soon."""
        self._deadline = min(self._deadline, time.monotonic() + VISIBLE_SECONDS)

    def give_up(self) -> None:
        """Some rank will not write any more: do not wait for its record."""
        self._is_lost = True
        self._deadline = time.monotonic()

    def run(self) -> None:
        started = time.perf_counter()
        try:
            if self._snapshot is not None:
                self._boxes = self._snapshot(self._boxes)
                self.has_copied.set()
            self._write()
            if self._rank == 0:
                self._publish()
        except _OtherRankFailed:
            pass  # that rank has the error
        except Exception as error:  # raised in the main threads of all ranks at the next step boundary
            self.error = error
        self.has_copied.set()
        self._boxes = []
        self.seconds = time.perf_counter() - started

    def _write(self) -> None:
        """This rank's files, then its record of them."""
        files: dict[str, Any] = {}
        stored: list[dict[str, Any]] = []
        for kind in ("model", "optimizer"):
            boxes = [box for box in self._boxes if box.kind == kind]
            if not boxes:
                continue
            fault_point("save", self.state.step)
            file = f"{kind}-rank{self._rank:04d}.safetensors"
            keyed: dict[str, Tensor] = {}
            for box in boxes:
                key = box.name if box.name not in keyed else f"{box.name}@{','.join(map(str, box.start))}"
                keyed[key] = box.values
                where = {"file": file, "key": key, "start": list(box.start), "shape": list(box.values.shape)}
                stored.append({"name": box.name, "shape": list(box.shape), "part": where})
            files[file] = entry(write_tensors(self.partial / file, keyed))
        for file in files:  # only now: the disk wrote the first file while the next one was copied
            sync_file(self.partial / file)
        if self._before is not None:
            self._before()
        record = self.partial / _record_name(self._rank)  # read by rank 0 only: it need not be on disk
        with explained(record):
            record.with_suffix(".tmp").write_bytes(orjson.dumps({"files": files, "stored": stored}))
            record.with_suffix(".tmp").rename(record)
        self.has_written = True
        fault_point("save.written", self.state.step)

    def _publish(self) -> None:
        """Rank 0, when every rank has written: manifest, final name, pointer, removal of the oldest."""
        step, partial = self.state.step, self.partial
        final = step_folder(self._run, step)
        files: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        for rank in range(self._world_size):
            record = self._record_of(rank)
            files |= record["files"]
            for item in record["stored"]:
                tensor = tensors.setdefault(item["name"], {"shape": item["shape"], "parts": []})
                if all(item["part"]["start"] != part["start"] for part in tensor["parts"]):  # else a replica's
                    tensor["parts"].append(item["part"])
        for rank in range(self._world_size):
            (partial / _record_name(rank)).unlink()
        finish_checkpoint(partial, self.state, files, tensors)
        fault_point("save.rename", step)
        with explained(final):
            if final.exists():  # not by this run: it goes on from its newest checkpoint, and sets others aside
                final.rename(hidden_name(final, "deleting"))
            sync_folder(partial)
            partial.rename(final)
            sync_folder(final.parent)
        fault_point("save.latest", step)
        write_atomically(final.parent / "latest", final.name)
        remove_old(self._run, self._keep)

    def _record_of(self, rank: int) -> dict[str, Any]:
        """A rank's record, when it has come.

        Raises:
            FolderError: another rank failed, or its file does not appear.
        """
        path = self.partial / _record_name(rank)
        while not path.exists():
            if time.monotonic() > self._deadline:
                if self._is_lost:
                    raise _OtherRankFailed
                raise FolderError(
                    f"{path}: rank {rank} wrote it {VISIBLE_SECONDS:.0f} s ago and it is not to be seen here; put the "
                    "run folder on a file system that all machines share"
                )
            time.sleep(POLL_SECONDS)
        return orjson.loads(path.read_bytes())


def _record_name(rank: int) -> str:
    return f"rank{rank:04d}.json"
