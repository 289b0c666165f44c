"""Folders of safetensors with a config.json: read tensor by tensor, written shard by shard.

Nothing is ever unpickled, no name in a file leads out of the folder, and no more than one shard is in memory. Files may
be links, as in the cache of downloads.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightbulb.experts.hf.family import InteropError
from lightbulb.experts.receipt import Digests, digest
from lightbulb.folder import explained, write_atomically
from lightbulb.train.manifest import MAX_JSON_BYTES
from lightbulb.train.tensor_file import sync_file

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
AGAIN = "download or export the folder again"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.safetensors")


class TensorFolder:
    """The tensors of a folder.

    Attributes:
        files: name of each tensor to that of its file.

    Args:
        path: of the folder.
        wanted: what the tensors must be (the receipt of the conversion that wrote them), if that is known.

    Raises:
        InteropError: no folder, or one without safetensors.
    """

    def __init__(self, path: Path, wanted: Digests | None = None):
        self.path, self._wanted = path, wanted or {}
        self._open: dict[str, Any] = {}
        self.files = self._find()

    def read(self, name: str) -> Tensor:
        """A tensor in float32; errors as :meth:`stored`."""
        return self.stored(name).float()

    def stored(self, name: str) -> Tensor:
        """A tensor as it lies there.

        Raises:
            InteropError: missing, unreadable, no floating-point numbers, or not what its receipt says.
        """
        if name not in self.files:
            raise InteropError(f"{self.path}: has no tensor {name!r}, which its {CONFIG} implies; {AGAIN}")
        try:
            values = self._file(self.files[name]).get_tensor(name)
        except SafetensorError as error:
            raise InteropError(f"{self.path / self.files[name]}: damaged ({error}); {AGAIN}") from None
        if values.dtype not in FLOATS:
            raise InteropError(f"{self.path}: {name!r} is {values.dtype}; quantised weights cannot be read")
        if name in self._wanted and self._wanted[name].xxh3_128 != digest(values):
            raise InteropError(
                f"{self.path}: {name!r} is not what was written there, as receipt.json says; {AGAIN}, or remove "
                "receipt.json if the change was meant"
            )
        return values

    def _find(self) -> dict[str, str]:
        if not self.path.is_dir():
            raise InteropError(f"{self.path}: no such folder; download the model first (hf download ... --local-dir)")
        if (self.path / INDEX).is_file():
            table = read_values(self.path / INDEX).get("weight_map")
            if not isinstance(table, dict) or not all(_FILE.fullmatch(str(file)) for file in table.values()):
                raise InteropError(f"{self.path / INDEX}: no table of tensors and their files; {AGAIN}")
            return table
        if (self.path / ONE_FILE).is_file():
            return dict.fromkeys(self._file(ONE_FILE).keys(), ONE_FILE)
        pickles = sorted(path.name for path in self.path.glob("*.bin"))
        if pickles:
            raise InteropError(
                f"{self.path}: its weights are a pickle ({pickles[0]}), which can run code when it is read; convert it "
                "to safetensors first"
            )
        raise InteropError(f"{self.path}: has no {ONE_FILE} and no {INDEX}; {AGAIN}")

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.path / name
            try:
                self._open[name] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InteropError(f"{path}: cannot be read ({error}); {AGAIN}") from None
        return self._open[name]


def read_values(path: Path) -> dict[str, Any]:
    """A JSON file with a mapping.

    Raises:
        InteropError: missing, unreadable, or something else.
    """
    try:
        with path.open("rb") as file:
            # Python's parser, because transformers writes Infinity into some configs.
            values = json.loads(file.read(MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise InteropError(f"{path}: unreadable ({error}); {AGAIN}") from None
    if not isinstance(values, dict):
        raise InteropError(f"{path}: not a mapping; {AGAIN}")
    return values


def write_values(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file for people too."""
    write_atomically(path, orjson.dumps(values, option=orjson.OPT_INDENT_2))


def write_shards(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], dtype: torch.dtype, size: int
) -> Digests:
    """Write tensors as ``model.safetensors``, or as several files and their index.

    Args:
        folder: to write into.
        shapes: of all tensors, in their order.
        read: gives one.
        dtype: that they are written in.
        size: bytes of a file at most, if no tensor alone is larger; so much memory is used.
    """
    shards = list(in_shards(shapes, dtype.itemsize, size))
    files = [ONE_FILE] if len(shards) == 1 else [shard_name(i, len(shards)) for i in range(len(shards))]
    digests: Digests = {}
    for file, names in zip(files, shards, strict=True):
        values = {name: read(name).to(dtype).contiguous() for name in names}
        digests |= {name: digest(tensor, record=True) for name, tensor in values.items()}
        with explained(folder / file, sum(tensor.nbytes for tensor in values.values())):
            save_file(values, folder / file, metadata={"format": "pt"})
        sync_file(folder / file)
    if len(shards) > 1:
        total = dtype.itemsize * sum(map(prod, shapes.values()))
        table = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_values(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": table})
    return digests


def in_shards(shapes: Mapping[str, tuple[int, ...]], item: int, size: int) -> Iterator[list[str]]:
    """Names in groups of at most ``size`` bytes (or of one tensor), in their order."""
    names: list[str] = []
    used = 0
    for name, shape in shapes.items():
        need = item * prod(shape)
        if names and used + need > size:
            yield names
            names, used = [], 0
        names.append(name)
        used += need
    yield names


def shard_name(index: int, count: int) -> str:
    """Of one of several files of tensors."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"
