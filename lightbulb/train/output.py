"""A run outlives whoever reads its output: a closed pipe, terminal or ssh session silences it and stops nothing."""

import errno
import io
import os
import sys

_NOBODY_READS = (errno.EPIPE, errno.EIO, errno.ESTALE)


class LastingOutput(io.RawIOBase):
    """Writes to a descriptor until nobody reads it, from then on to nowhere.

    Args:
        descriptor: an open file descriptor; it stays open.
    """

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def write(self, data: object) -> int:
        content = bytes(data)  # type: ignore[call-overload]
        try:
            return os.write(self.descriptor, content)
        except OSError as error:
            if error.errno not in _NOBODY_READS:
                raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.descriptor)  # for what writes there without Python, too
        os.close(nowhere)
        return len(content)


def outlive_readers() -> None:
    """Let this process's stdout and stderr outlive their readers; call it before anything keeps a stream."""
    sys.stdout = _stream(1)
    sys.stderr = _stream(2)


def _stream(descriptor: int) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(LastingOutput(descriptor)), encoding="utf-8", errors="replace", line_buffering=True
    )
