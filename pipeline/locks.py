"""Who makes an artefact: a lock of the operating system keeps other processes from it meanwhile."""

import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from models.errors import UserError
from pipeline import distributed, ownership
from pipeline.artefacts import room_for
from pipeline.paths import beside, real


@contextmanager
def claim(*paths: Path) -> Iterator[None]:
    """Keep other processes from making the same artefacts (files, or folders of them) during a block.

    The lock is the operating system's, on an empty hidden file beside each path: it ends with the process that
    holds it, however that ends, so a stale one cannot exist. The file itself stays (removing it would let two
    processes lock two files of one name). Of several ranks the first claims for all.

    Raises:
        UserError: another process works on one of `paths`; the line names it.
    """
    with ExitStack() as stack:
        places = sorted({real(path) for path in paths})
        distributed.first(lambda: [stack.enter_context(_locked(path)) for path in places] and None)
        yield


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    from filelock import FileLock, SoftFileLock, Timeout

    file = beside(path, ".", ".lock")
    with room_for(path, file):
        path.parent.mkdir(parents=True, exist_ok=True)
        ownership.check_lock(file)
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"{path} is being written by {_holder(file)}: wait for it, or use another --root") from None
    noted = not isinstance(lock, SoftFileLock)  # that one, for disks without locks, keeps its own notes in the file
    since, command = time.strftime("%Y-%m-%d %H:%M:%S"), shlex.join(sys.argv)
    try:
        if noted:
            _note(file, f"process {os.getpid()} on {platform.node()} since {since} ({command})")
        yield
    finally:
        if noted:
            _note(file, "")
        lock.release()


def _note(file: Path, text: str) -> None:
    with suppress(OSError):  # a full disk must not keep the lock from being released
        file.write_bytes(text.encode("utf-8", "backslashreplace"))  # a file's name need not be text


def _holder(file: Path) -> str:
    """Which process holds a lock, as far as it can be read."""
    try:
        return " ".join(file.read_text(encoding="utf-8").split()) or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"
