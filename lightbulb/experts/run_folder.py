"""A run folder whose one checkpoint nobody trained: what an import or an upcycling writes.

Values are written piece by piece as they are made, with memory for one. There is no place in any data, and mostly there
are no moments: ``start_from`` reads the model on any layout, and so does whatever reads a run; training in the folder
itself begins with the data's first sample, and with moments of zero where there are none.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightbulb.config import build_config, save_config
from lightbulb.experts.receipt import Digests, digest
from lightbulb.folder import explained, sync_folder
from lightbulb.models.language import LanguageConfig
from lightbulb.nn.parameter import logical_of
from lightbulb.routing.router import Router
from lightbulb.train.config import RunConfig
from lightbulb.train.manifest import TrainState, entry, finish_checkpoint, step_folder
from lightbulb.train.origin import Origin, write_origin
from lightbulb.train.tensor_file import stream_tensors, sync_file

MODEL, OPTIMIZER = "model-rank0000.safetensors", "optimizer-rank0000.safetensors"

Shape = tuple[int, ...]


class Piece(NamedTuple):
    """A box of a logical tensor: its first index and extent, and what makes its values."""

    name: str
    shape: Shape
    start: Shape
    size: Shape
    values: Callable[[], Tensor]

    @property
    def key(self) -> str:
        """Its name in the file."""
        return self.name if self.size == self.shape else f"{self.name}@{','.join(map(str, self.start))}"


def whole(name: str, shape: Shape, values: Callable[[], Tensor]) -> Piece:
    """A logical tensor in one piece."""
    return Piece(name, shape, (0,) * len(shape), shape, values)


def part_at(name: str, shape: Shape, index: Shape, values: Callable[[], Tensor]) -> Piece:
    """What a logical tensor has at an index of its leading dimensions; the values come without them."""
    start, size = index + (0,) * (len(shape) - len(index)), (1,) * len(index) + shape[len(index) :]
    return Piece(name, shape, start, size, lambda: values().reshape(size))


def whole_pieces(model: LanguageConfig, read: Callable[[str], Tensor], known: Iterable[str]) -> Iterator[Piece]:
    """All of a model: parameters as they are read, and the state of its routers (:func:`router_state`)."""
    for name, shape in shapes_of(model).items():
        yield whole(name, shape, partial(read, name))
    yield from router_state(model, read, set(known))


def router_state(model: LanguageConfig, read: Callable[[str], Tensor], known: set[str]) -> Iterator[Piece]:
    """The buffers of a model's routers: loads as before the first step, biases as they are read, else of zero."""
    with torch.device("meta"):
        routers = [(name, part) for name, part in model.build().named_modules() if isinstance(part, Router)]
    for name, router in routers:
        for key, buffer in router.named_buffers(prefix=name):
            shape = tuple(buffer.shape)
            fill = 1.0 / router.num_experts if key.endswith(".load") else 0.0
            is_read = key in known and not key.endswith(".load")
            yield whole(key, shape, partial(read, key) if is_read else partial(torch.full, shape, fill))


def shapes_of(model: LanguageConfig) -> dict[str, Shape]:
    """The logical tensors that are parameters of a model."""
    with torch.device("meta"):
        return {name: logical_of(parameter).shape for name, parameter in model.build().named_parameters()}


def untrained_config(run: Path, model: LanguageConfig, data: Path, name: str = "config") -> RunConfig:
    """The config of such a folder: the model, and the least of everything else."""
    train = {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
    return build_config(RunConfig, {"run": str(run), "model": model, "data": {"path": str(data)}, "train": train}, name)


def write_run(
    folder: Path,
    config: RunConfig,
    pieces: Iterable[Piece],
    tokenizer: str | None,
    origin: Origin | None = None,
    moments: Iterable[Piece] = (),
    updates: int = 0,
) -> Digests:
    """Write config, tokenizer and checkpoint into a folder.

    Args:
        folder: to write into; it need not be ``config.run`` yet.
        config: of the run.
        pieces: of all logical tensors, routers' loads and biases among them, in float32.
        tokenizer: content of its ``tokenizer.json``; None where there is none.
        origin: what it was made of; None for values from nowhere.
        moments: pieces of both moments of all parameters, or nothing.
        updates: that the moments have seen.

    Returns:
        A record of every piece.

    Raises:
        FolderError: the disk is full or the folder cannot be written.
        CheckpointError: the pieces are not all of their tensors.
    """
    checkpoint = step_folder(folder, 0)
    with explained(checkpoint):
        checkpoint.mkdir(parents=True)
    digests: Digests = {}
    tensors: dict[str, Any] = {}
    files = {}
    for file, listed in ((MODEL, list(pieces)), (OPTIMIZER, list(moments))):
        if listed:
            files[file] = _write_pieces(checkpoint / file, listed, digests)
        for piece in listed:
            part = {"file": file, "key": piece.key, "start": list(piece.start), "shape": list(piece.size)}
            tensors.setdefault(piece.name, {"shape": list(piece.shape), "parts": []})["parts"].append(part)
    state = TrainState(
        step=0, tokens=0, optimizer_step=updates, skipped_steps=0, loader={}, config=config.model_dump(mode="json"),
        layout="none",
    )  # fmt: skip
    finish_checkpoint(checkpoint, state, files, tensors)
    with explained(folder):
        (checkpoint.parent / "latest").write_text(checkpoint.name)
        if tokenizer is not None:
            (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        save_config(config, folder / "config.yaml")
        if origin is not None:
            write_origin(folder, origin)
        sync_folder(checkpoint.parent)
        sync_folder(folder)
    return digests


def _write_pieces(path: Path, pieces: list[Piece], digests: Digests) -> dict[str, Any]:
    """Stream pieces into a file, and note the digest of each; the file's line in the manifest."""

    def values() -> Iterator[Tensor]:
        for piece in pieces:
            tensor = piece.values()
            digests[piece.key] = digest(tensor, record=True)
            yield tensor

    record = stream_tensors(path, {piece.key: piece.size for piece in pieces}, values())
    sync_file(path)
    return entry(record)
