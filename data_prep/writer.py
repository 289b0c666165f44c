"""The handle on the process that writes shards (:mod:`lightbulb.data_prep.write`).

Starting it early hides the ten seconds streaming takes to import behind reading and tokenising. It ends when this
side closes the pipe, or dies.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import BinaryIO

import orjson

from lightbulb.folder import FolderError

SHARD_HASH = "xxh64"
"""What each shard is hashed with; streaming and xxhash know it by this name."""

WRITER_MODULE = "lightbulb.data_prep.write"


class WriterError(RuntimeError):
    """The writing process ended before its work was done."""


@dataclass(frozen=True)
class Job:
    """One domain of one split: where its tokens are and how they become rows."""

    folder: str
    """Where the shards go."""

    tokens: str
    """File of token ids, all documents end to end."""

    lengths: str
    """File of int64 document lengths."""

    dtype: str
    context_length: int
    shard_bytes: int

    shuffle_seed: tuple[int, int] | None
    """Seed of the documents' order; None keeps the order of the file."""

    pad_with: int | None
    """Id that completes the last row; None drops a partial last row."""


class ShardWriter:
    """Starts the writing process once and hands it jobs, one at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: BinaryIO | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None or self._process.stdin is None or self._answers is None:
            return
        if kind is not None:
            self._process.kill()
        self._process.stdin.close()
        self._process.wait()
        self._answers.close()
        self._process = self._answers = None

    def start(self) -> None:
        """Start the process, unless it runs already."""
        if self._process is not None:
            return
        # Answers have a pipe of their own: whatever a library prints while it is imported is no answer.
        read_end, write_end = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", WRITER_MODULE, str(write_end)],
            stdin=subprocess.PIPE,
            pass_fds=[write_end],
            # A session of its own, so that Ctrl-C reaches this side alone, which then stops the other.
            start_new_session=True,
        )
        os.close(write_end)
        self._answers = os.fdopen(read_end, "rb")

    def write(self, job: Job, progress: Callable[[int], None]) -> int:
        """Write one job's shards; gives the number of rows.

        Raises:
            FolderError: the disk is full or not writable.
            WriterError: the process died; its own message stands above.
        """
        self.start()
        process, answers = self._process, self._answers
        assert process is not None and process.stdin is not None and answers is not None
        try:
            process.stdin.write(orjson.dumps(asdict(job)) + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise self._ended(process, job) from None
        for line in answers:
            message = orjson.loads(line)
            if "done" in message:
                return message["done"]
            if "error" in message:
                raise FolderError(message["error"])
            progress(message["rows"])
        raise self._ended(process, job)

    def _ended(self, process: subprocess.Popen[bytes], job: Job) -> WriterError:
        return WriterError(
            f"{job.folder}: the process that writes shards ended with exit code {process.wait()}; "
            "its own message stands above, run the command again"
        )
