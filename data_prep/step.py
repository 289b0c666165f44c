"""The frame of a corpus: steps cut into tasks, each done once whatever ends the run.

A step is a small picklable object with its settings and the :class:`Output` of the steps before it. Its work is cut
into tasks whose number depends on data and configuration only, never on how many workers there are. A task writes
files into a folder of its own; :func:`perform` gives it a temporary folder, waits until all of it is on disk and
renames it to the task's key. A folder under its key is therefore finished, and anything else is not there.

The key hashes the step's name, version and settings and the task's part: everything the task's files depend on. A run
that was killed finds the keys it had finished and goes on; changed inputs, settings or code give other keys, and what
does not depend on them keeps its own.

To add a step:

1. Subclass :class:`Step` as a frozen dataclass; its fields are what it works on (configs, ``Output``, ``Documents``).
2. ``settings`` gives what can change the files, ``parts`` one JSON-able value per task naming what that task reads
   (the keys of the folders, hashes of arrays), ``run_task`` does the work and returns counts, which become
   ``report.json`` and end up in the manifest.
3. Call ``work.run(MyStep(...))`` at its place in :mod:`lightbulb.data_prep.pipeline`. Raise ``version`` whenever the
   code changes what is written.

A step that drops documents writes their numbers to ``dropped.npy`` (:mod:`lightbulb.data_prep.documents`).
"""

import os
import shutil
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import orjson
import xxhash

from lightbulb.folder import explained, sync_folder

REPORT_NAME = "report.json"


@dataclass(frozen=True)
class Task:
    """What a running task gets.

    Attributes:
        out: empty folder for its files.
        threads: how many it may use.
        advance: takes the number of documents (or whatever ``sizes`` counts) done since the last call.
    """

    out: Path
    threads: int
    advance: Callable[[int], None]


@dataclass(frozen=True)
class Output:
    """A finished step: the folder of each task, in the order of the tasks."""

    folders: tuple[Path, ...]

    @property
    def keys(self) -> list[str]:
        """What the folders are called: a hash of everything in them."""
        return [folder.name for folder in self.folders]

    @cached_property
    def reports(self) -> list[dict[str, Any]]:
        """What each task returned."""
        return [orjson.loads((folder / REPORT_NAME).read_bytes()) for folder in self.folders]


class Step(ABC):
    """One step of the chain; see the module's docstring."""

    name: ClassVar[str]
    """Its folder in the work folder."""

    title: ClassVar[str]
    """Its line of the display."""

    version: ClassVar[int] = 1
    """Raised when the code changes what a task writes."""

    @abstractmethod
    def settings(self) -> Any:
        """JSON-able: what of the configuration can change the files."""

    @abstractmethod
    def parts(self) -> Sequence[Any]:
        """One JSON-able value per task: what it reads."""

    @abstractmethod
    def run_task(self, rank: int, task: Task) -> dict[str, Any]:
        """Do the task with this number; the JSON-able result is its report."""

    def sizes(self) -> Sequence[int] | None:
        """How much each task has to do, for the display; None counts tasks."""
        return None

    def task_keys(self) -> list[str]:
        """The name of each task's folder."""
        head = [self.name, self.version, self.settings()]
        return [digest([*head, part]) for part in self.parts()]


def digest(value: Any) -> str:
    """Hash of a JSON-able value."""
    return xxhash.xxh3_128_hexdigest(orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS))


def perform(step: Step, rank: int, final: Path, threads: int, advance: Callable[[int], None]) -> None:
    """Do one task and leave its folder at ``final``: complete, on disk, or not at all.

    Raises:
        FolderError: the folder cannot be written.
    """
    temporary = final.with_name(f".{final.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    with explained(final):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    try:
        report = step.run_task(rank, Task(temporary, threads, advance))
        with explained(final):
            (temporary / REPORT_NAME).write_bytes(orjson.dumps(report, option=orjson.OPT_SERIALIZE_NUMPY))
            _sync(temporary)
            _rename(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        else:
            sync_folder(path)
    sync_folder(folder)


def _rename(temporary: Path, final: Path) -> None:
    try:
        temporary.rename(final)
    except OSError:
        # Another worker, left over by a run that was killed, has finished the same task with the same bytes.
        if not final.exists():
            raise
    sync_folder(final.parent)
