"""Input files: which ones a source has, what they hash to, and their bytes, unpacked within a bound.

A path may be a URL that fsspec knows; such files are told apart by what their file system says of them (size, time or
etag), local ones by a hash of their content. Archives are refused: what they unpack to, and where, is for people to
decide.
"""

import hashlib
import io
import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data import topics
from typing import Any, BinaryIO, NamedTuple

import fsspec
import pyarrow as pa
import xxhash
from fsspec.implementations.local import LocalFileSystem

from lightbulb.data_prep.config import FileSourceConfig, PydocConfig, PythonStdlibConfig, SourceConfig
from lightbulb.data_prep.counts import CorpusError

READ_BYTES = 1 << 20
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.zst", ".tar.bz2", ".tar.xz", ".7z", ".rar")
PACKED = {".gz": "gzip", ".zst": "zstd"}

# Text rarely packs a hundredfold; a bomb of zeros packs many thousandfold.
MAX_EXPANSION = 1000
MIN_EXPANSION_BYTES = 1 << 28

# pydoc_data is the `pydoc` source once more, and would put its held-out topics into the training split.
SKIPPED_STDLIB_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "pydoc_data"}
STDLIB_TESTS = {"test", "tests", "idle_test"}


class InputFile(NamedTuple):
    """One file of a source.

    Attributes:
        name: path relative to the source, with ``/``.
        path: where it is, a local path or a URL.
        bytes: its size.
        stamp: what changes when a local file is written to; its identity where it is remote.
    """

    name: str
    path: str
    bytes: int
    stamp: str

    @property
    def is_local(self) -> bool:
        """Whether the path is one of this machine's."""
        return "://" not in self.path


def describe_source(source: SourceConfig) -> str:
    """The source's type, and its path if it has one."""
    return f"{source.type} {source.path}" if isinstance(source, FileSourceConfig) else source.type


def list_files(source: SourceConfig) -> list[InputFile]:
    """The files of a source in the order of their names.

    Raises:
        CorpusError: there is nothing to read, or an archive.
    """
    if isinstance(source, PydocConfig):
        return [InputFile("topics", "", sum(map(len, topics.topics.values())), "")]
    if isinstance(source, PythonStdlibConfig):
        return _stdlib_files(source)
    assert isinstance(source, FileSourceConfig)
    files = _below(source)
    if not files:
        raise CorpusError(
            f"source {describe_source(source)}: no file ends in {', '.join(source.suffixes)}; "
            "name one file, or set sources.suffixes"
        )
    for file in files:
        if file.name.lower().endswith(ARCHIVES):
            raise CorpusError(f"{file.path}: an archive; unpack it into a folder and set sources.path to that")
    return files


def file_digest(file: InputFile) -> str:
    """Hash of a file's content, or of what a remote file system says of it."""
    if not file.path:
        return xxhash.xxh3_128_hexdigest(repr(sorted(topics.topics.items())).encode())
    if not file.is_local:
        return xxhash.xxh3_128_hexdigest(f"{file.path}\0{file.stamp}".encode())
    with open(file.path, "rb", buffering=0) as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type]


def check_unchanged(file: InputFile) -> None:
    """A file is still the one that was listed.

    Raises:
        CorpusError: it was written to meanwhile.
    """
    if file.path and file.is_local and _stamp(os.stat(file.path)) != file.stamp:
        raise CorpusError(f"{file.path}: changed while the corpus was made; run the command again")


@contextmanager
def opened(file: InputFile) -> Iterator[BinaryIO]:
    """The file's bytes; .gz and .zst are unpacked while reading, in bounded memory.

    Raises:
        CorpusError: damaged, cut short, or unpacking to far more than its size.
    """
    compression = PACKED.get(os.path.splitext(file.name)[1])
    try:
        with open(file.path, "rb", READ_BYTES) if file.is_local else fsspec.open(file.path, "rb") as raw:
            if compression is None:
                yield raw
            else:
                # Python's zstandard takes a frame that is cut short for its end; Arrow does not.
                limit = max(MIN_EXPANSION_BYTES, MAX_EXPANSION * file.bytes)
                yield io.BufferedReader(_Bounded(pa.input_stream(raw, compression), limit, file.path), READ_BYTES)
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(f"{file.path}: unreadable, damaged or cut short ({error}); fetch the file again") from None


class _Bounded(io.RawIOBase):
    """A stream that refuses to give more than ``limit`` bytes."""

    def __init__(self, stream: Any, limit: int, path: str):
        self._stream = stream
        self._left = limit
        self._limit = limit
        self._path = path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise CorpusError(
                f"{self._path}: unpacks to more than {self._limit >> 20} MB, {MAX_EXPANSION} times its size, which no "
                "text does; remove the file, or unpack it yourself"
            )
        buffer[: len(data)] = data
        return len(data)


def _below(source: FileSourceConfig) -> list[InputFile]:
    system, root = fsspec.core.url_to_fs(os.path.expanduser(source.path))
    if isinstance(system, LocalFileSystem):
        return _local(source, Path(root))
    if system.isfile(root):
        return [_remote(system, root, os.path.dirname(root))]
    if not system.exists(root):
        raise CorpusError(f"source {describe_source(source)}: no such file or folder; check sources.path")
    return [_remote(system, path, root) for path in sorted(system.find(root)) if _is_wanted(path, source)]


def _local(source: FileSourceConfig, path: Path) -> list[InputFile]:
    if path.is_file():
        return [_local_file(path, path.parent)]
    if not path.is_dir():
        raise CorpusError(f"source {describe_source(source)}: no such file or folder; check sources.path")
    found = [Path(folder, name) for folder, _, names in os.walk(path, onerror=_refuse) for name in names]
    return [_local_file(file, path) for file in sorted(found) if _is_wanted(str(file), source)]


def _refuse(error: OSError) -> None:
    """A folder that cannot be listed is an error; os.walk by itself passes over it."""
    raise error


def _is_wanted(path: str, source: FileSourceConfig) -> bool:
    return path.endswith(source.suffixes) and not os.path.basename(path).startswith(".")


def _local_file(path: Path, root: Path) -> InputFile:
    # Bytes of a name that are not UTF-8 are spelled out.
    name = path.relative_to(root).as_posix().encode("utf-8", "backslashreplace").decode("utf-8")
    status = path.stat()
    return InputFile(name, str(path), status.st_size, _stamp(status))


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns}"


def _remote(system: fsspec.AbstractFileSystem, path: str, root: str) -> InputFile:
    name = path.removeprefix(root).lstrip("/")
    return InputFile(name, system.unstrip_protocol(path), system.size(path) or 0, system.ukey(path))


def _stdlib_files(source: PythonStdlibConfig) -> list[InputFile]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = SKIPPED_STDLIB_FOLDERS | (set() if source.tests else STDLIB_TESTS)
    found = [path for path in root.rglob("*.py") if not skipped.intersection(path.relative_to(root).parts)]
    return [_local_file(path, root) for path in sorted(found)]
