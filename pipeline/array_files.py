"""`.npy` files: memory-mapped to read, written row by row so that a kill loses little, checked by their sidecar."""

import errno
import hashlib
import io
import mmap
import os
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import UserError
from pipeline import distributed, ownership
from pipeline.artefacts import (
    FULL,
    PARTIAL,
    PROGRESS,
    SHORT,
    Facts,
    NoRoomError,
    atomic_path,
    commit,
    discard,
    no_room,
    rank_path,
    read_json,
    read_sidecar,
    room_for,
    sidecar_path,
    write_json,
)

ROWS_AT_ONCE = 16


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array as a `.npy` file, atomically; a NoRoomError where the disk is full."""
    with atomic_path(path, array.nbytes) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)


def open_array(path: Path, made_by: str) -> tuple[np.ndarray, Facts]:
    """A finished `.npy` artefact, memory-mapped read-only, and its facts.

    Raises:
        UserError: missing, unfinished, truncated, of pickled objects, or not of the shape its sidecar states.
    """
    facts = read_sidecar(path, made_by)
    ownership.reading(path)
    try:
        array = map_array(path)
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}): run {made_by} again with --overwrite") from None
    if list(array.shape) != facts.get("shape") or str(array.dtype) != facts.get("dtype"):
        raise UserError(
            f"{path} is {array.dtype} {array.shape}, its sidecar says {SHORT.repr(facts.get('dtype'))} "
            f"{SHORT.repr(facts.get('shape'))}: "
            f"run {made_by} again with --overwrite"
        )
    return array, facts


def release(array: np.ndarray) -> None:
    """Give back what was read of a memory map: it stays in the system's cache, and leaves this process's memory.

    Without this a long run comes to hold the whole file. Nothing happens to other arrays.
    """
    if isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        array.base.madvise(mmap.MADV_DONTNEED)


def map_array(path: Path) -> np.ndarray:
    """The array of a `.npy` file, memory-mapped; objects are never unpickled, archives never opened.

    Raises:
        ValueError: the file is not one, or shorter than its header says.
    """
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():  # of nonsense in the header
            warnings.simplefilter("ignore")
            return np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        if error.errno in (None, errno.ENOENT):
            raise ValueError(str(error)) from None
        raise OSError(error.errno, f"{error.strerror} (on mapping it into memory)", str(path)) from None
    except Exception as error:  # a hostile header makes numpy raise nearly anything
        raise ValueError(" ".join(f"{type(error).__name__}: {error}".split())[:200]) from None


def read_rows(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A copy of some rows (n, …); of a memory map, few pages are held at a time (each row brings neighbours along)."""
    copy = np.empty((len(rows), *array.shape[1:]), array.dtype)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        copy[start : start + ROWS_AT_ONCE] = array[rows[start : start + ROWS_AT_ONCE]]
        release(array)
    return copy


class ArrayWriter:
    """A `.npy` file written row by row, which survives being killed.

    `array` is a memory map of it, for reading. Rows are written as bytes of the file: stored through the map, whole
    pages would travel to a shared disk, with the rows of another machine in them, and would count as memory.

    Rows that were reported with `mark` before the kill are kept: a writer opened again with the same facts goes on
    from there. Several ranks open it together, each for its own rows; they go on if each of them can.

    Args:
        path: the artefact.
        shape, dtype: of the whole array; rows are its first axis.
        facts: what makes it; a partial file with other facts is discarded.
        rows: first and last+1 row that this process writes (default: all).

    Raises:
        NoRoomError: the file does not fit on the disk.
    """

    def __init__(
        self, path: Path, shape: tuple[int, ...], dtype: str, facts: Facts, rows: tuple[int, int] | None = None
    ):
        self.path = path
        self.partial = path.with_name(path.name + PARTIAL)
        self.progress = path.with_name(path.name + PROGRESS)
        self.facts = {"shape": list(shape), "dtype": str(np.dtype(dtype)), **facts}
        self.done, self.stop = rows or (0, shape[0])
        self.state: Facts = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        distributed.first(self._check)
        noted = self._resumable()
        if distributed.all_of(noted is not None):
            self.done, self.state = int(noted["done"]), dict(noted["state"])
        else:
            distributed.first(lambda: self._create(shape, dtype))
        self.array = map_array(self.partial)
        with self._room():
            self.file = self.partial.open("rb+")

    def _check(self) -> None:
        ownership.check(self.partial, note=False)
        with self._room():
            ownership.check(self.path)
        if self.partial.is_symlink():
            self.partial.unlink()

    def _resumable(self) -> Facts | None:
        """What an earlier run noted of its progress, where its partial file can be continued."""
        try:
            noted = read_json(rank_path(self.progress))
            array = map_array(self.partial)
            fits = list(array.shape) == self.facts["shape"] and str(array.dtype) == self.facts["dtype"]
            fits &= noted["facts"] == self.facts and isinstance(noted["state"], dict)
            fits &= type(noted["done"]) is int and self.done <= noted["done"] <= self.stop
        except (UserError, OSError, ValueError, KeyError, TypeError):
            return None
        return noted if fits else None

    def _create(self, shape: tuple[int, ...], dtype: str) -> None:
        discard(self.progress)
        try:
            array = np.lib.format.open_memmap(self.partial, mode="w+", dtype=dtype, shape=shape)
            reserve(self.partial, array.offset + array.nbytes)
        except OSError as error:
            if error.errno not in FULL:
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            message = no_room(self.path, self.partial, int(np.prod(shape)) * np.dtype(dtype).itemsize, error)
            ownership.remove(self.partial)
            raise NoRoomError(message) from None

    def put(self, first: int, rows: np.ndarray) -> None:
        """Write rows (n, …) from row `first` on, in the file's dtype."""
        if rows.shape[1:] != self.array.shape[1:] or not 0 <= first <= first + len(rows) <= len(self.array):
            raise ValueError(f"rows {first} to {first + len(rows)} of {rows.shape[1:]} in {self.array.shape}")
        with self._room():
            self.file.seek(self.array.offset + first * self.array[:1].nbytes)
            self.file.write(np.ascontiguousarray(rows, self.array.dtype).data)

    def _room(self) -> AbstractContextManager[None]:
        """Says so where the disk is full after all: not every one can be reserved."""
        size = int(np.prod(self.facts["shape"])) * np.dtype(self.facts["dtype"]).itemsize
        return room_for(self.path, self.partial, size)

    def _flush(self) -> None:
        with self._room():
            self.file.flush()
            os.fsync(self.file.fileno())

    def mark(self, done: int, **state: Any) -> None:
        """Record on disk that this process's rows before `done` are final, with any other JSON state."""
        self._flush()
        write_json(rank_path(self.progress), {"done": done, "facts": self.facts, "state": state})

    def finish(self, rows: int | None = None, **more: Any) -> None:
        """Turn the partial file into the artefact, cut to its first `rows`, and write its sidecar.

        `more` are further facts, known only now. Waits for all ranks.
        """
        self._flush()
        distributed.wait_for_all()
        self.file.close()
        if rows is not None and rows < len(self.array):
            self._cut(rows)
        del self.array
        distributed.first(lambda: self._complete(more))

    def _complete(self, more: Facts) -> None:
        with self._room():
            commit(self.partial, self.path)
        write_json(sidecar_path(self.path), {**self.facts, **more})
        discard(self.progress)

    def _cut(self, rows: int) -> None:
        """Shorten the partial file; numpy pads its header so that another row count fits in its place."""
        shape = (rows, *self.array.shape[1:])
        header = io.BytesIO()
        described = {
            "descr": np.lib.format.dtype_to_descr(self.array.dtype),
            "fortran_order": False,
            "shape": shape,
        }
        np.lib.format.write_array_header_1_0(header, described)
        if len(header.getvalue()) != self.array.offset:
            raise AssertionError("the header of a .npy file changed its length")
        size = self.array.offset + self.array[:rows].nbytes
        with self.partial.open("rb+") as file:
            file.write(header.getvalue())
            file.truncate(size)
        self.facts["shape"] = list(shape)


def reserve(path: Path, size: int) -> None:
    """Take `size` bytes of the disk for a file now: on a full one a memory map would kill the process later."""
    if not hasattr(os, "posix_fallocate"):
        return
    with path.open("rb+") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise


def hash_rows(array: np.ndarray) -> str:
    """sha256 of an array's rows, in order, as hex digits."""
    digest = hashlib.sha256()
    for row in array:
        digest.update(np.ascontiguousarray(row).data)
    return digest.hexdigest()
