"""Files of float32 tensors in the safetensors format, written in one pass and read without copies.

The format is an 8-byte length, a JSON header and the raw values: so small that writing it here, tensor by tensor from
their own memory, costs no second copy, and the hash is taken from the same bytes on their way to the file. Any
safetensors library reads the result. Reading maps the file; nothing in it can make this process run code, read
outside the file or allocate more than the caller asked for.
"""

import ctypes
import hashlib
import json
import math
import mmap
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import orjson
import torch
import xxhash
from torch import Tensor

from lightbulb.folder import explained

CHUNK = 1 << 22  # stays in the cache between hash and write, and is large enough to leave Python's lock alone
_MADV_POPULATE_READ = 22  # Linux 5.14; Python's mmap does not name it
WRITEBACK = 1 << 24  # bytes after which the disk is told to begin
MAX_HEADER = 100_000_000  # as in the safetensors library
ITEM = 4  # bytes of a float32


class TensorFileError(ValueError):
    """A file that is not what was written; the message names it."""


class FileRecord(NamedTuple):
    """What a file must be: bytes, and the xxh3-128 of all of them."""

    size: int
    xxh3_128: str


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write float32 tensors of any device to a new file; :func:`sync_file` then waits until it is on disk.

    Tensors are taken one at a time: beyond them, memory for one that is not on the CPU is needed at most.

    Raises:
        FolderError: the disk is full or the folder cannot be written (the message names the file and its size).
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return stream_tensors(path, shapes, tensors.values())


def stream_tensors(path: Path, shapes: Mapping[str, Sequence[int]], tensors: Iterable[Tensor]) -> FileRecord:
    """As :func:`write_tensors`, of tensors that need not exist together: they come in the order of their shapes.

    Raises:
        FolderError: as :func:`write_tensors`.
        TypeError: a tensor is not float32 or has another shape.
    """
    header = _header(shapes)
    size = len(header) + ITEM * sum(map(math.prod, shapes.values()))
    with explained(path, size), path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as hasher:
        writer = _Writer(file, hasher)
        writer.write(memoryview(header))
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            if tensor.dtype != torch.float32 or tuple(tensor.shape) != tuple(shape):
                found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                raise TypeError(f"{name!r} is {found}; the checkpoint holds float32 of shape {tuple(shape)}")
            values = tensor.detach().to("cpu").contiguous()
            writer.write(memoryview(values.view(-1).numpy().view(np.uint8)))  # type: ignore[arg-type]
    return FileRecord(size, writer.digest.hexdigest())


def sync_file(path: Path) -> None:
    """Wait until a written file is on disk (its folder's entry aside).

    Raises:
        FolderError: it could not be written.
    """
    with explained(path), path.open("rb") as file:
        os.fsync(file.fileno())


def write_synced(path: Path, content: bytes) -> None:
    """Write a small file and wait until it is on disk (its folder's entry aside)."""
    with path.open("wb", buffering=0) as file:
        file.write(content)
        os.fsync(file.fileno())


def hash_file(path: Path, size: int) -> str:
    """The xxh3-128 of a regular file of this size.

    Raises:
        TensorFileError: missing, a link or no file, another size, or unreadable.
    """
    with open_regular(path) as file:
        found = os.fstat(file.fileno()).st_size
        if found != size:
            raise TensorFileError(f"{path}: damaged: {found} bytes, {size} were written")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        try:
            return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type]
        except OSError as error:
            raise TensorFileError(f"{path}: cannot be read ({error.strerror})") from None


def open_regular(path: Path) -> BinaryIO:
    """Open a plain file for reading: no links, pipes or devices, which could lead elsewhere or never end.

    Raises:
        TensorFileError: it is missing or something else.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise TensorFileError(f"{path}: missing") from None
    except OSError as error:
        reason = "a symbolic link" if path.is_symlink() else error.strerror
        raise TensorFileError(f"{path}: cannot be opened ({reason})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise TensorFileError(f"{path}: not a plain file")
    return os.fdopen(descriptor, "rb", buffering=0)


class TensorFile:
    """A file of float32 tensors mapped into memory; check its hash before reading.

    Raises:
        TensorFileError: missing, empty, or no plain file.
    """

    def __init__(self, path: Path):
        self.path = path
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise TensorFileError(f"{path}: damaged: it is empty")
            # Private pages: nobody's write through a tensor reaches the file.
            self._map = mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)

    def hash(self, size: int) -> str:
        """As :func:`hash_file`, but the pages stay mapped for reading, which then costs no second look at them."""
        if size != len(self._map):
            raise TensorFileError(f"{self.path}: damaged: {len(self._map)} bytes, {size} were written")
        digest, view = xxhash.xxh3_128(), memoryview(self._map)
        try:
            for start in range(0, size, CHUNK):
                piece = view[start : start + CHUNK]
                # A page that the disk cannot read is an error here; touched without asking, it would be a signal.
                self._map.madvise(_MADV_POPULATE_READ, start, len(piece))
                digest.update(piece)
        except OSError:  # Linux before 5.14, or a page that cannot be read: plain reads tell
            return hash_file(self.path, size)
        return digest.hexdigest()

    def read(self, name: str, shape: Sequence[int]) -> Tensor:
        """A tensor of a known shape, as a view of the file.

        Raises:
            TensorFileError: it is not there, not float32, of another shape, or does not lie within the file.
        """
        size = ITEM * math.prod(shape)
        entry = self._entries.get(name)
        if isinstance(entry, dict) and (entry.get("dtype"), entry.get("shape")) == ("F32", list(shape)):
            match entry.get("data_offsets"):
                case [int(start), int(stop)] if 0 <= start <= stop <= len(self._values) and stop - start == size:
                    values = self._values[start:stop].view(np.float32)
                    return torch.from_numpy(values).view(tuple(shape)) if size else torch.empty(tuple(shape))
        raise TensorFileError(f"{self.path}: damaged: no float32 tensor {name!r} of shape {list(shape)} in it")

    @cached_property
    def _header_length(self) -> int:
        length = int.from_bytes(self._map[:8], "little")
        if not 2 <= length <= min(MAX_HEADER, len(self._map) - 8):
            raise TensorFileError(f"{self.path}: damaged: no safetensors header")
        return length

    @cached_property
    def _entries(self) -> dict[str, Any]:
        try:
            entries = orjson.loads(self._map[8 : 8 + self._header_length])
        except ValueError as error:
            raise TensorFileError(f"{self.path}: damaged: its header is no JSON ({error})") from None
        if not isinstance(entries, dict):
            raise TensorFileError(f"{self.path}: damaged: its header is no table of tensors")
        return entries

    @cached_property
    def _values(self) -> np.ndarray:
        return np.frombuffer(self._map, dtype=np.uint8)[8 + self._header_length :]


def _header(shapes: Mapping[str, Sequence[int]]) -> bytes:
    """Length and JSON table, padded so that the values begin at a multiple of 8 bytes."""
    entries, start = {}, 0
    for name, shape in shapes.items():
        stop = start + ITEM * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    table = json.dumps(entries, separators=(",", ":")).encode()
    table += b" " * (-len(table) % 8)
    return len(table).to_bytes(8, "little") + table


class _Writer:
    """Writes bytes piece by piece while another thread hashes them; Python's lock is free meanwhile."""

    def __init__(self, file: Any, hasher: ThreadPoolExecutor):
        self.file, self.digest = file, xxhash.xxh3_128()
        self._hasher, self._pending = hasher, 0

    def write(self, values: memoryview) -> None:
        for start in range(0, len(values), CHUNK):
            piece = values[start : start + CHUNK]
            hashed = self._hasher.submit(self.digest.update, piece)
            self._pending += len(piece)
            while len(piece):  # an unbuffered file may take less than it was given, as at a size limit
                piece = piece[self.file.write(piece) :]
            if self._pending >= WRITEBACK:
                self._pending = 0
                _start_writeback(self.file.fileno())
            hashed.result()


def _start_writeback(descriptor: int) -> None:
    """Let the disk begin with what has been written, so that the final fsync has little left to wait for."""
    if _SYNC_FILE_RANGE is not None:
        _SYNC_FILE_RANGE(descriptor, 0, 0, _SYNC_FILE_RANGE_WRITE)


def _find_sync_file_range() -> Any:
    """Linux's call of that name; None elsewhere, where fsync does all the work."""
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


_SYNC_FILE_RANGE = _find_sync_file_range()
_SYNC_FILE_RANGE_WRITE = 2
