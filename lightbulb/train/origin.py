"""Where a run came from: ``origin.json`` in its folder.

A run that goes on from another one (a decay, a branch), is made of others (an upcycling) or takes its first weights
from one (``start_from``) says which checkpoints those were, with the hash of their manifest, which holds the hashes of
all their files. A tree of runs can be drawn from these files alone.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import orjson
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from lightbulb.config import describe
from lightbulb.folder import write_atomically
from lightbulb.train.manifest import MANIFEST, CheckpointError, read_json, step_of
from lightbulb.train.tensor_file import open_regular

FILE_NAME = "origin.json"
FIX = "restore the file, or remove it to forget where the run came from"

Kind = Literal["start", "branch", "decay", "upcycle", "import", "finetune"]
KINDS: tuple[str, ...] = get_args(Kind)


class Parent(BaseModel):
    """A model that a run was made of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    """Its folder, absolute."""
    step: Annotated[StrictInt, Field(ge=0)] | None = None
    """Of the checkpoint; None for a folder that is no run of ours."""
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """SHA-256 of the checkpoint's manifest.json; None for a folder that is no run of ours."""


class Origin(BaseModel):
    """How a run began."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    parents: Annotated[list[Parent], Field(min_length=1)]
    detail: dict[str, Any] = {}
    """What else is worth knowing: a branch's cluster, a decay's mixture."""


def parent_of(checkpoint: Path) -> Parent:
    """The record of one checkpoint, given its folder ``RUN/checkpoints/step-00001000``.

    Raises:
        CheckpointError: it has no readable manifest.
    """
    try:
        with open_regular(checkpoint / MANIFEST) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / MANIFEST}: unreadable ({error}); use an earlier checkpoint") from None
    return Parent(run=str(checkpoint.parent.parent.resolve()), step=step_of(checkpoint), digest=digest)


def write_origin(run: Path, origin: Origin) -> None:
    """Say where a run came from.

    Raises:
        FolderError: the folder cannot be written.
    """
    write_atomically(run / FILE_NAME, orjson.dumps(origin.model_dump(), option=orjson.OPT_INDENT_2))


def note_start(run: Path, checkpoint: Path) -> None:
    """Say that a run took its first weights from a checkpoint, unless whoever prepared its folder has said more.

    Raises:
        CheckpointError: what stands there already is damaged.
        FolderError: the folder cannot be written.
    """
    if read_origin(run) is None:
        write_origin(run, Origin(kind="start", parents=[parent_of(checkpoint)]))


def read_origin(run: Path) -> Origin | None:
    """Where a run came from; None for one that began with weights of its own.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = run / FILE_NAME
    if not path.is_file():
        return None
    try:
        return Origin.model_validate(read_json(path, FIX))
    except ValidationError as error:
        raise CheckpointError(f"{path}: damaged or of another version: {describe(error)[0]:.300}; {FIX}") from None


def locate(run: Path, parent: Parent) -> Path | None:
    """Folder of a parent: where it was, or beside the run, if both were moved together; None if it is gone."""
    recorded = Path(parent.run)
    candidates = (recorded, run.resolve().parent / recorded.name, run.resolve().parent.parent / recorded.name)
    return next((folder for folder in candidates if folder.is_dir() and folder != run.resolve()), None)
