"""Checkpoint folders of a run: their names, their manifest, which are complete, which go.

A folder is a checkpoint when it has its final name and a manifest, which is written last. Every other name of ours
starts with a dot: ``.step-00001000.partial`` while it is written, ``.deleting`` while it goes, ``.damaged`` when it was
set aside. What a manifest says is checked before any of it is used.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
import xxhash
from pydantic import BaseModel, ConfigDict, Field, StrictInt, TypeAdapter, ValidationError, model_validator

from lightbulb.config import describe
from lightbulb.folder import explained, sync_folder
from lightbulb.train.faults import fault_point
from lightbulb.train.tensor_file import (
    ITEM,
    MAX_HEADER,
    FileRecord,
    TensorFileError,
    hash_file,
    open_regular,
    write_synced,
)

FORMAT = 2
FOLDER = "checkpoints"
MANIFEST, STATE = "manifest.json", "state.json"
MAX_JSON_BYTES = 1 << 28
MAX_MESSAGE = 500
HASHING_THREADS = 2  # one reads while the other hashes

_STEP = re.compile(r"step-(\d{8,12})")
_LEFTOVER = re.compile(r"\.step-\d{8,12}\.(partial|deleting)")

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Count = Annotated[StrictInt, Field(ge=0, lt=1 << 62)]
Size = Annotated[StrictInt, Field(ge=1, lt=1 << 48)]


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file or field and the fix."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Part(_Strict):
    """One stored piece of a logical tensor: a box of it, in a file of the checkpoint."""

    file: FileName
    key: str
    """Name of the piece in its file."""
    start: list[Count]
    """First index of the box along each dimension of the logical tensor."""
    shape: list[Size]
    """Extent of the box."""


class LogicalRecord(_Strict):
    """A logical tensor and where its pieces lie."""

    shape: list[Size]
    parts: list[Part]

    @model_validator(mode="after")
    def _parts_fit(self) -> "LogicalRecord":
        for part in self.parts:
            if not len(part.start) == len(part.shape) == len(self.shape):
                raise ValueError(f"part {part.key!r} has not the {len(self.shape)} dimensions of its tensor")
            for start, size, whole in zip(part.start, part.shape, self.shape, strict=True):
                if start + size > whole:
                    raise ValueError(f"part {part.key!r} reaches to {start + size} in a dimension of {whole}")
        return self


class FileEntry(_Strict):
    """What a file must be."""

    size: Count
    xxh3_128: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class Manifest(_Strict):
    """The content of manifest.json, without the digest of itself."""

    format: Literal[2]
    step: Count
    files: dict[FileName, FileEntry]
    tensors: dict[str, LogicalRecord]

    @model_validator(mode="after")
    def _files_hold_their_parts(self) -> "Manifest":
        if STATE not in self.files:
            raise ValueError(f"{STATE} is not listed")
        needed = dict.fromkeys(self.files, 0)
        for name, record in self.tensors.items():
            for part in record.parts:
                if part.file not in needed:
                    raise ValueError(f"{part.file!r} of {name!r} is not listed in files")
                needed[part.file] += ITEM * math.prod(part.shape)
        for file, values in needed.items():
            size = self.files[file].size
            if values and not 0 <= size - values <= MAX_HEADER + 8:
                raise ValueError(f"{file} has {size} bytes and the parts listed in it {values}")
        return self


@dataclass(frozen=True)
class TrainState:
    """Everything a run needs besides tensors to go on exactly where it stopped.

    There is no generator state in it: every random choice is a function of the seed, the step and what is chosen for.
    """

    step: Count
    tokens: Count
    optimizer_step: Count
    skipped_steps: Count
    loader: dict[str, Any]
    config: dict[str, Any]
    layout: str
    domain_tokens: dict[str, Count] = field(default_factory=dict)
    """Tokens trained on, by domain; empty in checkpoints from before they were counted."""
    meetings: Count = 0
    """Rounds of the outer optimizer that are in the weights, round 0 counted."""

    @property
    def is_untrained(self) -> bool:
        """Of a model that a conversion wrote: no step was taken and no data read."""
        return self.step == 0 and not self.loader


_STATE = TypeAdapter(TrainState)


def step_folder(run: Path, step: int) -> Path:
    """Folder of one checkpoint."""
    return run / FOLDER / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = _STEP.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder}: not the name of a checkpoint; it should be like step-00001000")
    return int(match[1])


def hidden_name(final: Path, state: str) -> Path:
    """Where a checkpoint stands while it is none: ``state`` is partial, deleting or damaged."""
    return final.with_name(f".{final.name}.{state}")


def complete_checkpoints(run: Path) -> list[Path]:
    """Checkpoints with a manifest, newest step first. Links are passed over: they may lead out of the run."""
    found = [
        path
        for path in (run / FOLDER).glob("step-*")
        if _STEP.fullmatch(path.name) and path.is_dir() and not path.is_symlink() and (path / MANIFEST).is_file()
    ]
    return sorted(found, key=step_of, reverse=True)


def sweep(run: Path) -> None:
    """Remove what interrupted saves and removals left behind, and nothing else."""
    for path in (run / FOLDER).glob(".step-*"):
        if _LEFTOVER.fullmatch(path.name) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    for path in (run / FOLDER).glob(".latest.*.tmp"):
        path.unlink(missing_ok=True)


def set_aside_newer(run: Path, step: int) -> list[Path]:
    """Rename the checkpoints behind the step a run goes on from, which are damaged: they must neither count as
    checkpoints nor be in the way of the next. Their new names."""
    targets = []
    for folder in complete_checkpoints(run):
        if step_of(folder) > step:
            targets.append(hidden_name(folder, "damaged"))
            with explained(targets[-1]):
                shutil.rmtree(targets[-1], ignore_errors=True)
                folder.rename(targets[-1])
                sync_folder(folder.parent)
    return targets


def remove_old(run: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints. What is being removed no longer looks like one."""
    for old in complete_checkpoints(run)[keep:]:
        hidden = hidden_name(old, "deleting")
        fault_point("save.delete", step_of(old))
        with explained(old):
            shutil.rmtree(hidden, ignore_errors=True)
            old.rename(hidden)
        fault_point("save.deleting", step_of(old))
        shutil.rmtree(hidden, ignore_errors=True)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, checked.

    Raises:
        CheckpointError: unreadable, of another format or step, or saying what cannot be.
    """
    path = folder / MANIFEST
    values = read_json(path)
    if isinstance(values, dict):
        if values.get("format") != FORMAT:
            raise CheckpointError(f"{path}: format {values.get('format')!r:.40}, this version reads {FORMAT}")
        if values.pop("digest", None) != digest_of(values):
            raise CheckpointError(f"{path}: damaged: its digest is not that of its content; use an earlier checkpoint")
    manifest = _validated(path, TypeAdapter(Manifest), values)
    if manifest.step != step_of(folder):
        raise CheckpointError(f"{path}: of step {manifest.step}, in a folder named otherwise; rename the folder back")
    return manifest


def write_manifest(folder: Path, values: dict[str, Any]) -> None:
    """Write a manifest and its digest, which finds a changed bit as the hashes in it do for the other files."""
    with explained(folder / MANIFEST):
        write_synced(folder / MANIFEST, orjson.dumps(values | {"digest": digest_of(values)}))


def finish_checkpoint(
    folder: Path, state: TrainState, files: dict[str, dict[str, Any]], tensors: dict[str, dict[str, Any]]
) -> None:
    """Write state and manifest of a checkpoint whose tensors are on disk.

    Raises:
        CheckpointError: parts are missing: found now, not when they are needed.
    """
    content = json.dumps(asdict(state), indent=1).encode()
    with explained(folder):
        write_synced(folder / STATE, content)
    files = files | {STATE: entry(FileRecord(len(content), xxhash.xxh3_128(content).hexdigest()))}
    fault_point("save.manifest", state.step)
    manifest = Manifest.model_validate({"format": FORMAT, "step": state.step, "files": files, "tensors": tensors})
    check_complete(folder, manifest.tensors)
    write_manifest(folder, manifest.model_dump())


def read_state(folder: Path) -> TrainState:
    """The training state of a checkpoint.

    Raises:
        CheckpointError: unreadable, or of another step or version.
    """
    path = folder / STATE
    state = _validated(path, _STATE, read_json(path))
    if state.step != step_of(folder):
        raise CheckpointError(f"{path}: of step {state.step}, in a folder named otherwise; use an earlier checkpoint")
    return state


def check_files(
    folder: Path,
    manifest: Manifest,
    rank: int = 0,
    world_size: int = 1,
    hash_of: Callable[[Path, int], str] = hash_file,
) -> Iterator[str]:
    """Compare files with their sizes and hashes; what is wrong with each that is damaged.

    With several ranks each checks its share of the files.
    """

    def check(name: str) -> str | None:
        entry = manifest.files[name]
        try:
            found = hash_of(folder / name, entry.size)
            if found != entry.xxh3_128:
                raise TensorFileError(f"{folder / name}: damaged: its hash is not the one that was written")
        except TensorFileError as error:
            return f"{error}; use an earlier checkpoint"
        return None

    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        yield from filter(None, pool.map(check, sorted(manifest.files)[rank::world_size]))


def check_complete(folder: Path, tensors: dict[str, LogicalRecord]) -> None:
    """Every logical tensor's parts have as many values as it has.

    Raises:
        CheckpointError: naming the first that has not.
    """
    for name, record in tensors.items():
        stored, wanted = sum(math.prod(part.shape) for part in record.parts), math.prod(record.shape)
        if stored != wanted:
            raise CheckpointError(f"{folder}: parts of {name!r} cover {stored} of {wanted} values")


def entry(record: FileRecord) -> dict[str, Any]:
    """A file's line in the manifest."""
    return {"size": record.size, "xxh3_128": record.xxh3_128}


def digest_of(values: dict[str, Any]) -> str:
    """The hash of a manifest's values, whatever their order."""
    return xxhash.xxh3_128(orjson.dumps(values, option=orjson.OPT_SORT_KEYS)).hexdigest()


def read_json(path: Path, fix: str = "use an earlier checkpoint") -> Any:
    """Plain values from a file; orjson bounds their depth.

    Raises:
        CheckpointError: unreadable or too large; the message ends with the fix.
    """
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > MAX_JSON_BYTES:
                raise CheckpointError(f"{path}: larger than {MAX_JSON_BYTES >> 20} MB; {fix}")
            return orjson.loads(file.read())
    except (OSError, ValueError) as error:
        text = str(error).removeprefix(f"{path}: ")[:MAX_MESSAGE]
        raise CheckpointError(f"{path}: unreadable ({text}); {fix}") from None


def _validated(path: Path, adapter: TypeAdapter, values: Any) -> Any:
    try:
        return adapter.validate_python(values)
    except ValidationError as error:
        problem = describe(error)[0][:MAX_MESSAGE]
        raise CheckpointError(f"{path}: damaged or of another version: {problem}; use an earlier checkpoint") from None
