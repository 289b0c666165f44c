"""A chain of stages, each done once: skipped when done, gone on with when interrupted, redone when something changed.

A stage is done when its output is complete and was made with the same settings of the same inputs. Both are recorded
as hashes in ``FOLDER/stages/NAME.json``, written before the work begins (then without an output) and after it. What an
earlier setting made is never overwritten: it is moved into ``FOLDER/replaced/`` first, and what changed is said.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console

from lightbulb.config import describe, flatten
from lightbulb.folder import FolderError, claim, explained, write_atomically

STAGES = "stages"
REPLACED = "replaced"
MAX_NAMED = 4
"""Changed settings that a line names."""


class StageError(RuntimeError):
    """A stage whose work ended without its output."""


@dataclass(frozen=True)
class Stage:
    """One step of a recipe.

    Attributes:
        name: also of its record.
        title: what it does, in a few words.
        settings: all that decides its output besides its inputs, in JSON's types.
        needs: the stages whose outputs it reads.
        paths: files and folders that it alone writes; they are moved away together when it is redone.
        work: does it, or goes on with what is there.
        digest: hash of its output; None as long as that is not complete.
        defaults: paths of the settings that have their default: one that a record has not came with a later version,
            and is no change.
    """

    name: str
    title: str
    settings: Mapping[str, Any]
    needs: Sequence[str]
    paths: Sequence[Path]
    work: Callable[[], None]
    digest: Callable[[], str | None]
    defaults: Set[str] = frozenset()


class Record(BaseModel):
    """What is known of a stage that has begun."""

    model_config = ConfigDict(extra="forbid")

    settings: dict[str, Any]
    """Flat: path of a setting to its value."""
    inputs: dict[str, str]
    """Hash of each output that it read."""
    output: str | None = None
    """Hash of what it made; None until it is done."""
    seconds: float = 0.0
    """Time spent on it."""
    finished: str | None = None
    """When it was done."""


def run_stages(folder: Path, stages: Sequence[Stage], begin: Callable[[], None] | None = None) -> dict[str, Record]:
    """Do what is not done; gives the records of all stages.

    Args:
        folder: of the recipe.
        stages: in an order in which they can be done.
        begin: called once the folder is ours, before the first stage.

    Raises:
        FolderInUse: another process works in the folder.
        FolderError: something stands where a stage writes, and no record says that the stage made it.
        StageError: a stage ended without its output, or a record is damaged.
    """
    _refuse_foreign(folder)
    with claim(folder):
        (folder / STAGES).mkdir(exist_ok=True)
        if begin is not None:
            begin()
        chain = _Chain(folder, stages)
        for number, stage in enumerate(stages, 1):
            chain.do(stage, f"[{number}/{len(stages)}]")
    return chain.records


class _Chain:
    """The stages on their way."""

    def __init__(self, folder: Path, stages: Sequence[Stage]):
        self.folder = folder
        self.records: dict[str, Record] = {}
        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        self._width = max(len(stage.name) for stage in stages)

    def do(self, stage: Stage, place: str) -> None:
        """Bring one stage to its end."""
        wanted = Record(settings=_plain_flat(stage.settings), inputs={n: self._output(n) for n in stage.needs})
        before, found = self._read(stage), stage.digest()
        why = "" if before is None else changes(before, wanted, stage.defaults)
        head = f"{place} {stage.name:<{self._width}}"
        if before is not None and not why and before.output is not None and before.output == found:
            self._console.print(f"{head}  done already ({duration(before.seconds)}, {before.finished})")
            self.records[stage.name] = before
            return
        if before is None:
            _refuse_unrecorded(stage)
        elif why or before.output is not None:
            self._replace(stage, f"{head}  anew: {why or 'its output is not what was made'}")
            before = None
        self._work(stage, before or wanted, head, found if before else None)

    def _work(self, stage: Stage, record: Record, head: str, found: str | None) -> None:
        """Do the work, unless it was done and only its record is missing."""
        if found is None:
            self._write(stage, record)
            self._console.print(f"{head}  {stage.title}")
            with self._timed(stage, record, head):
                stage.work()
            found = stage.digest()
        if found is None:
            raise StageError(f"stage {stage.name}: ended, but its output is not complete ({stage.title})")
        record.output, record.finished = found, datetime.now().isoformat(" ", "seconds")
        self._write(stage, record)
        self.records[stage.name] = record
        self._console.print(f"{head}  done in {duration(record.seconds)}")

    @contextmanager
    def _timed(self, stage: Stage, record: Record, head: str) -> Iterator[None]:
        """Add the time of the block to the record; where the block fails, say which stage it was."""
        begun = time.monotonic()
        try:
            yield
        except BaseException:
            record.seconds += time.monotonic() - begun
            self._console.print(f"{head}  stopped after {duration(record.seconds)}")
            with suppress(FolderError):  # of a full disk what stopped the stage tells more
                self._write(stage, record)
            raise
        record.seconds += time.monotonic() - begun

    def _replace(self, stage: Stage, sentence: str) -> None:
        """Move what an earlier setting made out of the way."""
        there = [path for path in stage.paths if path.exists()]
        if not there:
            self._console.print(sentence)
            return
        names = (self.folder / REPLACED / f"{stage.name}-{number}" for number in count(1))
        aside = next(name for name in names if not name.exists())
        with explained(aside):
            aside.mkdir(parents=True)
            for path in there:
                path.rename(aside / path.name)
        self._console.print(f"{sentence}; what was there is in {aside} now")

    def _output(self, name: str) -> str:
        output = self.records[name].output
        assert output is not None
        return output

    def _file(self, stage: Stage) -> Path:
        return self.folder / STAGES / f"{stage.name}.json"

    def _read(self, stage: Stage) -> Record | None:
        return read_record(self._file(stage))

    def _write(self, stage: Stage, record: Record) -> None:
        write_atomically(self._file(stage), orjson.dumps(record.model_dump(), option=orjson.OPT_INDENT_2))


def read_record(path: Path) -> Record | None:
    """The record of a stage; None if it has not begun.

    Raises:
        StageError: the file is damaged.
    """
    try:
        return Record.model_validate(orjson.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, orjson.JSONDecodeError) as error:
        raise StageError(f"{path}: cannot be read ({error}); remove it and its stage's output to redo it") from None
    except ValidationError as error:
        raise StageError(f"{path}: {describe(error)[0]:.200}; remove it and its stage's output to redo it") from None


def changes(before: Record, now: Record, defaults: Set[str] = frozenset()) -> str:
    """What is different, in a line; a setting that is new and has its default, or is not set, is no difference."""
    old, new = before.settings, now.settings
    found = [
        f"{key} was {_shown(old.get(key))}, is {_shown(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not (key in defaults and _is_unknown_to(old, key))
    ]
    found += [
        f"{name} was redone" for name in sorted(now.inputs) if before.inputs.get(name) != now.inputs[name]
    ]  # fmt: skip
    found += [f"{name} is no input any more" for name in sorted(before.inputs.keys() - now.inputs.keys())]
    more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    return "; ".join(found[:MAX_NAMED]) + more


def _is_unknown_to(settings: Mapping[str, Any], key: str) -> bool:
    """Whether a setting was unknown when these were recorded: it is not among them, no section that it is in was off,
    and all items of lists that it is in were there."""
    names = key.split(".")
    above = [".".join(names[:length]) for length in range(1, len(names) + 1)]
    items = [path for path in above if path.rpartition(".")[2].isdigit()]
    return not any(path in settings for path in above) and all(
        any(known.startswith(f"{item}.") for known in settings) for item in items
    )


def file_digest(*paths: Path) -> str | None:
    """Hash of files together; None if one is missing."""
    total = hashlib.sha256()
    for path in paths:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def duration(seconds: float) -> str:
    """``3:20``, ``1:02:20``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _plain_flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their paths, as they come back from a file."""
    return orjson.loads(orjson.dumps(flatten(dict(settings)), default=str))


def _shown(value: Any) -> str:
    return "not set" if value is None else f"{value!r:.60}"


def _refuse_foreign(folder: Path) -> None:
    """A folder that holds something else is not taken."""
    with explained(folder):
        if folder.is_dir() and any(p.name != ".lock" for p in folder.iterdir()) and not (folder / STAGES).is_dir():
            raise FolderError(f"{folder}: holds something that is no recipe's; choose another run: or move it away")


def _refuse_unrecorded(stage: Stage) -> None:
    for path in stage.paths:
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise FolderError(
                f"{path}: is there, but not made by stage {stage.name} of this recipe; move it away or choose another "
                "run:"
            )
