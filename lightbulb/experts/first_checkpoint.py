"""A run folder that begins with a converted model: a checkpoint of step 0, without moments.

Values are written piece by piece as they are made, so that memory for one is needed. Any layout loads the result, by
``start_from`` or by training in the folder itself; the moments, which are zero, and the place in the data, which is its
beginning, are left out.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from lightbulb.config import save_config
from lightbulb.experts.pieces import Piece
from lightbulb.experts.receipt import Digests, digest
from lightbulb.folder import explained, sync_folder
from lightbulb.train.config import RunConfig
from lightbulb.train.manifest import (
    FORMAT,
    STATE,
    Manifest,
    TrainState,
    check_complete,
    entry,
    step_folder,
    write_manifest,
)
from lightbulb.train.tensor_file import FileRecord, stream_tensors, sync_file, write_synced

MODEL = "model-rank0000.safetensors"


def write_first_checkpoint(run: Path, config: RunConfig, pieces: Iterable[Piece], tokenizer: Path) -> Digests:
    """Write config, tokenizer (if there is one) and the checkpoint of step 0 into an empty folder.

    Returns:
        a record of every piece that was written.

    Raises:
        FolderError: the disk is full or the folder cannot be written.
    """
    folder = step_folder(run, 0)
    with explained(folder):
        folder.mkdir(parents=True)
        save_config(config, run / "config.yaml")
        if tokenizer.is_file():
            shutil.copyfile(tokenizer, run / "tokenizer.json")
    keyed = {_key(piece): piece for piece in pieces}
    digests: Digests = {}

    def values() -> Iterator[Tensor]:
        for key, piece in keyed.items():
            tensor = piece.values().contiguous()
            digests[key] = digest(tensor, record=True)
            yield tensor

    record = stream_tensors(folder / MODEL, {key: piece.size for key, piece in keyed.items()}, values())
    sync_file(folder / MODEL)
    state = json.dumps(asdict(_state(config)), indent=1).encode()
    with explained(folder):
        write_synced(folder / STATE, state)
    files = {MODEL: entry(record), STATE: entry(FileRecord(len(state), xxhash.xxh3_128(state).hexdigest()))}
    stored = {"format": FORMAT, "step": 0, "files": files, "tensors": _tensors(keyed)}
    manifest = Manifest.model_validate(stored)
    check_complete(folder, manifest.tensors)
    write_manifest(folder, manifest.model_dump())
    with explained(folder):
        sync_folder(folder)
        (folder.parent / "latest").write_text(folder.name)
        sync_folder(folder.parent)
    return digests


def _state(config: RunConfig) -> TrainState:
    return TrainState(
        step=0,
        tokens=0,
        optimizer_step=0,
        skipped_steps=0,
        loader={},
        config=config.model_dump(mode="json"),
        layout="a conversion",
    )


def _tensors(keyed: dict[str, Piece]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for key, piece in keyed.items():
        part = {"file": MODEL, "key": key, "start": list(piece.start), "shape": list(piece.size)}
        tensors.setdefault(piece.name, {"shape": list(piece.shape), "parts": []})["parts"].append(part)
    return tensors


def _key(piece: Piece) -> str:
    return piece.name if piece.size == piece.shape else f"{piece.name}@{','.join(map(str, piece.start))}"
