"""The sample ledger: which samples a run trained on at each step, kept so that anybody can check it.

Every data rank appends one line per step to ``RUN/ledger/data-0000.jsonl``: the places of its samples in the endless
sequence of epochs, taken from the batches themselves, and a hash of their tokens. With a mixture the line also has the
places in the sequence of each group: a rank's part of a step is a run of places in every group, so that two numbers per
group name all its rows, whatever mixtures came before. Lines go to disk with each checkpoint; a resumed run drops those
behind its checkpoint from all files, also of ranks that are gone. The proof that steps 1 to N used every place once is
then a matter of reading (:func:`check_ledger`), whatever layouts the run had.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import orjson
import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, StrictInt, TypeAdapter, ValidationError

from lightbulb.data.batches import BatchSizes, batch_sizes
from lightbulb.data.loader import Batch
from lightbulb.folder import explained, write_atomically
from lightbulb.train.tensor_file import TensorFileError, open_regular

FOLDER = "ledger"
_NAME = re.compile(r"data-\d{4,6}\.jsonl")
_Count = Annotated[StrictInt, Field(ge=0, lt=1 << 62)]


class LedgerError(ValueError):
    """A ledger that cannot be read; the message names file and line."""


class Line(BaseModel):
    """What one data rank trained on at one step."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: _Count
    places: list[tuple[_Count, _Count]]
    """Runs of places, ``[first, last + 1)``, in the order of the batches."""
    tokens: str
    """xxh3-64 of the samples' input tokens, int64: in the same order, or with groups by group and place."""
    groups: dict[str, tuple[_Count, _Count]] | None = None
    """With a mixture: places in the sequence of each group, ``[first, last + 1)``."""
    skipped: bool = False
    """The step's gradients were not finite: read, but the weights were left alone."""


class Ledger:
    """Appends this rank's lines; ranks that read the same samples as another have no file and do nothing.

    Args:
        run: folder of the run.
        data_rank: which share of the samples this rank reads.
        is_writer: whether this rank keeps the ledger of that share.
        groups: names of the groups that batches give by number.
    """

    def __init__(self, run: Path, data_rank: int, is_writer: bool, groups: Sequence[str] = ()):
        self.path = run / FOLDER / f"data-{data_rank:04d}.jsonl"
        self.is_writer = is_writer
        self.groups = groups
        self._lines: list[bytes] = []

    def add(self, step: int, batches: Iterable[Batch], skipped: bool = False) -> None:
        """Note the batches of a step; nothing is written yet."""
        if self.is_writer:
            batches = list(batches)
            record: dict[str, Any] = {"step": step}
            record["places"] = _runs(torch.cat([batch.sample_ids for batch in batches]).numpy())
            if batches[0].group_places is None:
                record["tokens"] = tokens_hash(batch.tokens for batch in batches)
            else:
                record |= self._by_group(batches)
            self._lines.append(orjson.dumps(record | ({"skipped": True} if skipped else {})))

    def _by_group(self, batches: list[Batch]) -> dict[str, Any]:
        """Hash and places of samples that were drawn from groups."""
        tokens = torch.cat([batch.tokens for batch in batches])
        groups = torch.cat([batch.groups for batch in batches]).numpy()
        places = torch.cat([batch.group_places for batch in batches if batch.group_places is not None]).numpy()
        ordered = np.lexsort((places, groups))
        found: dict[str, tuple[int, int]] = {}
        for number in np.unique(groups):
            of_group = places[groups == number]
            found[self.groups[number]] = int(of_group.min()), int(of_group.max()) + 1
        return {"tokens": tokens_hash([tokens[torch.from_numpy(ordered)]]), "groups": found}

    def take(self) -> bytes:
        """The lines since the last call, for :meth:`write`."""
        lines, self._lines = self._lines, []
        return b"".join(line + b"\n" for line in lines)

    def write(self, lines: bytes) -> None:
        """Append lines and wait until they are on disk; may run in another thread.

        Raises:
            FolderError: the ledger cannot be written.
        """
        if not lines:
            return
        with explained(self.path, len(lines)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())


def tokens_hash(tokens: Iterable[torch.Tensor]) -> str:
    """xxh3-64 of int64 ``[batch, length]`` tokens, one after the other."""
    digest = xxhash.xxh3_64()
    for part in tokens:
        digest.update(np.ascontiguousarray(part.numpy()).data)
    return digest.hexdigest()


def rewind_ledger(run: Path, step: int) -> None:
    """Drop the lines behind a step from the files of all ranks, and what a kill left half-written.

    Raises:
        FolderError: a file cannot be replaced; it is untouched then.
        LedgerError: a file cannot be read.
    """
    for path in ledger_files(run):
        content = _read(path)
        kept = [line for line in content.splitlines(keepends=True) if _step_of(line) <= step]
        if len(b"".join(kept)) != len(content):
            write_atomically(path, b"".join(kept))


def ledger_files(run: Path) -> list[Path]:
    """The ledger's files, those of all ranks that ever wrote."""
    return sorted(path for path in (run / FOLDER).glob("data-*") if _NAME.fullmatch(path.name))


def read_ledger(run: Path, last_step: int) -> Iterator[tuple[Path, Line]]:
    """All lines up to a step.

    Raises:
        LedgerError: a line is damaged; one that a kill cut short is passed over.
    """
    adapter = TypeAdapter(Line)
    for path in ledger_files(run):
        content = _read(path)
        for number, text in enumerate(content.splitlines(keepends=True), 1):
            if not text.endswith(b"\n"):
                continue
            try:
                line = adapter.validate_python(orjson.loads(text))
            except (orjson.JSONDecodeError, ValidationError):
                raise LedgerError(f"{path}: line {number} is damaged; the ledger proves nothing any more") from None
            if line.step <= last_step:
                yield path, line


@dataclass
class LedgerCheck:
    """What the ledger proves.

    Attributes:
        steps: last step it was asked about.
        samples: places it lists.
        problems: every step that lacks, repeats or invents samples, the first few named.
    """

    steps: int
    samples: int = 0
    skipped_steps: int = 0
    problems: list[str] = field(default_factory=list)


Runs = list[tuple[int, int]]


def check_ledger(
    run: Path,
    steps: int,
    global_batch_size: int | BatchSizes,
    drawn: Mapping[str, int] | None = None,
    plain_samples: int = 0,
) -> LedgerCheck:
    """Whether steps 1 to ``steps`` used the first places once each, in their order.

    Args:
        global_batch_size: places of every step: one size, or one for each.
        drawn: with a mixture, the samples of each group that the checkpoint counts: the places in every group must
            lead up to them without a gap.
        plain_samples: samples before the run had a mixture.
    """
    check, sizes = LedgerCheck(steps), batch_sizes(global_batch_size)
    runs: dict[int, Runs] = {step: [] for step in range(1, steps + 1)}
    groups: dict[int, dict[str, Runs]] = defaultdict(lambda: defaultdict(list))
    skipped: set[int] = set()
    try:
        for path, line in read_ledger(run, steps):
            if line.step not in runs:
                check.problems.append(f"{path}: names step {line.step}")
                continue
            runs[line.step] += line.places
            count = _length(line.places)
            check.samples += count
            if line.skipped:
                skipped.add(line.step)
            for name, places in (line.groups or {}).items():
                groups[line.step][name].append(places)
            if line.groups is not None and _length(line.groups.values()) != count:
                check.problems.append(f"{path}: step {line.step}: its groups do not have its {count} samples")
    except LedgerError as error:
        check.problems.append(str(error))
        return check
    check.skipped_steps = len(skipped)
    for step, found in runs.items():
        first = sizes.samples(step - 1)
        if problem := _gap(sorted(found), first, sizes.samples(step)):
            check.problems.append(f"{run / FOLDER}: step {step}: {problem}")
        if (first >= plain_samples and drawn is not None) != (step in groups):
            check.problems.append(f"{run / FOLDER}: step {step}: has groups although it had no mixture, or none")
    if drawn is not None:
        check.problems += [f"{run / FOLDER}: {problem}" for problem in _group_gaps(groups, drawn, plain_samples)]
    return check


def _group_gaps(
    groups: Mapping[int, Mapping[str, Runs]], drawn: Mapping[str, int], plain_samples: int
) -> Iterator[str]:
    """Where the places of a group do not follow each other from step to step, up to what was drawn of it."""
    stands: dict[str, int] = {}
    begins: dict[str, int] = {}
    for step in sorted(groups):
        for name, runs in groups[step].items():
            ordered = sorted(runs)
            begins.setdefault(name, ordered[0][0])
            first = stands.get(name, ordered[0][0])
            stands[name] = first + _length(runs)
            if problem := _gap(ordered, first, stands[name]):
                yield f"step {step}: group {name}: {problem}"
    for name, count in drawn.items():
        if stands.get(name, count) != count:
            yield f"group {name}: {stands[name]} samples, the checkpoint counts {count}"
    before = sum(begins.get(name, count) for name, count in drawn.items())
    if before != plain_samples:
        yield f"the groups began at {before} samples together, the mixture at sample {plain_samples}"


def _length(runs: Iterable[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in runs)


def _gap(runs: Runs, first: int, last: int) -> str | None:
    """What keeps sorted runs from covering ``[first, last)`` once."""
    place = first
    for start, stop in runs:
        if start > place:
            return f"samples {place} to {start - 1} were skipped"
        if start < place:
            return f"sample {start} was read twice or at another step"
        place = stop
    return None if place == last else f"samples up to {place - 1} instead of {last - 1} were read"


def _runs(places: np.ndarray) -> list[list[int]]:
    """Consecutive places as ``[first, last + 1]``."""
    cuts = np.flatnonzero(np.diff(places) != 1) + 1
    return [[int(run[0]), int(run[-1]) + 1] for run in np.split(places, cuts) if len(run)]


def _read(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except (OSError, TensorFileError) as error:
        raise LedgerError(str(error)) from None


def _step_of(line: bytes) -> float:
    """The step of a line; infinity for what a kill cut short."""
    try:
        record: Any = orjson.loads(line) if line.endswith(b"\n") else None
        return record["step"]
    except (orjson.JSONDecodeError, TypeError, KeyError):
        return float("inf")
