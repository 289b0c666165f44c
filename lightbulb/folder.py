"""Output folders: one owner at a time, checked before use, files replaced whole or not at all.

Nothing here is removed by age or by process id. The claim on a folder is a kernel file lock, which ends with the
process that holds it, however that process ends; a file is written beside its final name and renamed, so a reader
sees the old content or the new, never half of one.
"""

import errno
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_NAME = ".lock"
MIB = 1 << 20


class FolderError(OSError):
    """A folder or file that cannot be written; the message names it, the cause and the fix."""

    def __str__(self) -> str:
        return self.strerror or super().__str__()


class FolderInUse(FolderError):
    """Another living process holds the folder."""


@contextmanager
def claim(folder: Path) -> Iterator[Path]:
    """Create the folder and hold it until the block ends.

    The lock file stays behind (an unlocked file claims nothing), and the block may delete it with the folder.
    A forked child shares the lock; start children with spawn, so that the lock ends with this process.

    Raises:
        FolderInUse: another process holds it.
        FolderError: it cannot be created or written.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(folder)
    try:
        with explained(folder):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}@{socket.gethostname()}".encode(), 0)
        yield folder
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> int:
    """An open, locked descriptor of the folder's lock file."""
    path = folder / LOCK_NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us may have deleted the file between our open and our lock: then the name is
            # free again and this lock guards nothing.
            if path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError:
            owner = os.pread(descriptor, 256, 0).decode(errors="replace").strip() or "an unnamed process"
            os.close(descriptor)
            raise FolderInUse(
                f"{folder}: in use by {owner} (pid@host); wait for it, stop it, or choose another folder"
            ) from None
        os.close(descriptor)
        folder.mkdir(parents=True, exist_ok=True)


def check_writable(folder: Path, need_bytes: int = 0) -> None:
    """Create the folder and a probe file in it, and compare the free space with what will be written.

    Raises:
        FolderError: read-only, not permitted, a file in the way, or too little space (needed and free are named).
    """
    with explained(folder, need_bytes):
        folder.mkdir(parents=True, exist_ok=True)
        # The mode bits do not tell: root ignores them, and a read-only mount ignores root.
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
            probe.flush()
        if shutil.disk_usage(folder).free < need_bytes:
            raise OSError(errno.ENOSPC, "too little space")


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace a file's content: the old content stays until the new one is complete and on disk.

    Raises:
        FolderError: the disk is full, read-only or not permitted; the old content is untouched.
    """
    content = data.encode("utf-8") if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explained(path, len(content)):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the folder's entries (creations, renames) are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def built_beside(out: Path) -> Iterator[Path]:
    """A new folder beside ``out`` to fill; it gets that name when the block ends, and goes when the block fails.

    Raises:
        FolderError: there is something at ``out`` already, or it cannot be written.
    """
    with explained(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FolderError(errno.EEXIST, f"{out}: there is something already; choose another folder")
        partial = out.absolute().with_name(f".{out.name}.{os.getpid()}.partial")
        partial.mkdir(parents=True)
    try:
        yield partial
        with explained(out):
            partial.rename(out)
            sync_folder(out.absolute().parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def explained(path: Path, need_bytes: int = 0) -> Iterator[None]:
    """Turn the system's refusal to write ``path`` into a sentence that names the path, the cause and the fix.

    Raises:
        FolderError: in place of any OSError that is not one already.
    """
    try:
        yield
    except FolderError:
        raise
    except OSError as error:
        raise FolderError(error.errno, f"{path}: {_cause(error, path, need_bytes)}") from None


def _cause(error: OSError, path: Path, need_bytes: int) -> str:
    match error.errno:
        case errno.ENOSPC:
            free = shutil.disk_usage(_nearest_existing(path)).free
            needed = f"{need_bytes / MIB:.1f} MB needed, " if need_bytes else ""
            return f"the disk is full ({needed}{free / MIB:.1f} MB free); free some space or choose another folder"
        case errno.EDQUOT | errno.EFBIG:
            return f"the file-size limit or disk quota is reached ({need_bytes / MIB:.1f} MB needed); raise it"
        case errno.EROFS:
            return "the file system is read-only; choose a writable folder"
        case errno.EACCES | errno.EPERM:
            return "no permission to write here; choose another folder or change its owner"
        case errno.ENOTDIR | errno.EEXIST:
            return "a file stands where a folder is needed; move it away or choose another folder"
        case _:
            return f"cannot be written: {error.strerror or error}"


def _nearest_existing(path: Path) -> Path:
    return next(parent for parent in [path, *path.absolute().parents] if parent.is_dir())
