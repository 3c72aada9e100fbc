"""Standard streams that end no run: closed ones lead nowhere, a reader that went away is not missed."""

import errno
import io
import os
import sys
from typing import TextIO

GONE = (errno.EPIPE, errno.EIO, errno.ECONNRESET, errno.EBADF)  # EIO: the terminal was closed
OUT, ERR = 1, 2


class _Outlet(io.RawIOBase):
    """Bytes to a file descriptor until that fails: then they go nowhere."""

    def __init__(self, descriptor: int, replaced: TextIO | None):
        self.descriptor, self.works = descriptor, True
        self.replaced = replaced  # kept: a stream that nobody holds closes its descriptor

    def writable(self) -> bool:
        """Always."""
        return True

    def fileno(self) -> int:
        """The descriptor."""
        return self.descriptor

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self.descriptor)

    def write(self, data: bytes) -> int:
        """Write what the system takes.

        Raises:
            OSError: once, of standard output, where it fails for another reason than that nobody reads any more.
        """
        if self.works:
            try:
                return os.write(self.descriptor, data)
            except OSError as error:
                self.works = False
                if self.descriptor == OUT and error.errno not in GONE:
                    raise OSError(error.errno, error.strerror, "standard output") from None
        return len(data)


def secure() -> None:
    """Make standard output and standard error safe to print any text to, for the rest of the process.

    Where they are closed, files opened later would otherwise take their numbers and get what is printed. File names
    need not be text: what the streams' encoding has not is written as an escape.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
    sys.stdout, sys.stderr = _secured(sys.stdout, OUT), _secured(sys.stderr, ERR)


def _secured(stream: TextIO | None, descriptor: int) -> TextIO:
    try:
        if stream is not None and stream.fileno() != descriptor:
            return stream
    except (OSError, ValueError):  # not a file: a test's, a notebook's
        return stream
    if stream is not None:
        stream.flush()
    raw = _Outlet(descriptor, stream)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    by_line = raw.isatty() or descriptor == ERR
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=by_line)
