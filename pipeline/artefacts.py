"""Artefacts of a workspace: written atomically, marked complete by a sidecar, refused when they do not fit.

An artefact `x.npy` is written as `x.npy.partial`, flushed and renamed; then `x.npy.json`, its sidecar, says what
made it. No sidecar means not finished. Facts are plain JSON values.
"""

import errno
import glob
import hashlib
import io
import json
import mmap
import os
import platform
import reprlib
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.errors import UserError
from pipeline import distributed, ownership
from pipeline.paths import beside, real

if TYPE_CHECKING:
    import torch

PARTIAL = ".partial"
PROGRESS = ".progress"
ROWS_AT_ONCE = 16
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)  # None: numpy reports a short write without a number
Facts = dict[str, Any]
SHORT = reprlib.Repr()  # of facts, which may be anything where a sidecar was edited
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 80
SHORT.maxlist = SHORT.maxdict = 20


class NoRoomError(UserError):
    """The disk, or the user's part of it, is full."""


@contextmanager
def atomic_path(path: Path, size: int | None = None) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, on disk, once the block has ended well.

    Args:
        size: bytes that will be written, where that is known, to say so where they do not fit.

    Raises:
        NoRoomError: the disk is full, or the user's quota; what stood at `path` is intact.
    """
    temporary = path.with_name(path.name + PARTIAL)
    try:
        with _room_for(path, temporary, size):
            path.parent.mkdir(parents=True, exist_ok=True)
            ownership.remove(temporary)
            ownership.check(path)
            yield temporary
            commit(temporary, path)
    finally:
        with suppress(UserError):
            ownership.remove(temporary)


@contextmanager
def _room_for(path: Path, temporary: Path, size: int | None = None) -> Iterator[None]:
    """A block that writes `temporary`, which is to become `path` of `size` bytes.

    Raises:
        NoRoomError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise NoRoomError(_no_room(path, temporary, size, error)) from None


def _no_room(path: Path, temporary: Path, size: int | None, error: OSError) -> str:
    """What to say when `temporary`, which was to become `path`, could not be written."""
    written = getattr(temporary.stat(), "st_blocks", 0) * 512 if temporary.is_file() else 0
    free = shutil.disk_usage(next(p for p in path.absolute().parents if p.is_dir())).free + written
    needed = f"needs {format_bytes(size)}" if size is not None else f"needs more than {format_bytes(written)}"
    return (
        f"{path} {needed} and its disk has {format_bytes(free)} free ({error.strerror or 'short write'}): "
        "make room and run the same command again"
    )


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
    with _room_for(path, file):
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
        file.write_text(text, encoding="utf-8")


def _holder(file: Path) -> str:
    """Which process holds a lock, as far as it can be read."""
    try:
        return " ".join(file.read_text(encoding="utf-8").split()) or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"


def commit(temporary: Path, path: Path) -> None:
    """Flush `temporary` to disk and rename it to `path`."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    if os.name == "posix":  # the rename itself must survive a power cut
        _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Flush a folder's entries, where its file system can: shared ones may refuse."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, encoded(text))


def encoded(text: str) -> bytes:
    """Text as UTF-8; bytes of a file's name that are not text become escapes, which JSON reads as what they were."""
    return text.encode("utf-8", "backslashreplace")


def append_text(path: Path, text: str) -> None:
    """Add to a text file. Whoever reads it must expect that a kill or a full disk cut the last line off."""
    ownership.check(path)
    before = path.stat().st_size
    try:
        with path.open("ab") as file:
            file.write(encoded(text))
    except OSError as error:
        if error.errno not in FULL:
            raise
        os.truncate(path, before)
        raise NoRoomError(_no_room(path, path, before + len(encoded(text)), error)) from None


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_path(path, len(content)) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, keys in the order given."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a `.npy` file atomically."""
    with atomic_path(path, array.nbytes) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)


def write_tensors(path: Path, tensors: "Mapping[str, torch.Tensor]", configuration: Facts) -> None:
    """Write a safetensors file atomically, as `models.checkpoints.write_tensors`."""
    from models import checkpoints

    with atomic_path(path, sum(t.numel() * t.element_size() for t in tensors.values())) as temporary:
        checkpoints.write_tensors(temporary, tensors, configuration)


def discard(path: Path) -> None:
    """Remove a state file, its temporary one, and those that other ranks left, `path`-<rank>of<size>."""
    for file in path.parent.glob(f"{glob.escape(path.name)}*"):
        if ownership.is_companion(file.name, path.name):
            ownership.remove(file)


def rank_path(path: Path) -> Path:
    """Where this rank notes its part of a state: `path` itself in a single process."""
    count = distributed.size()
    return path if count == 1 else path.with_name(f"{path.name}-{distributed.rank()}of{count}")


def sidecar_path(artefact: Path) -> Path:
    """Where the facts of an artefact stand."""
    return artefact.with_name(artefact.name + ".json")


def read_json(path: Path) -> Any:
    """Parse a JSON file; a UserError where it is not one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): remove it and rerun its stage") from None


def read_sidecar(artefact: Path, made_by: str) -> Facts:
    """Facts of a finished artefact.

    Raises:
        UserError: the artefact or its sidecar is missing or unreadable; `made_by` names the script to run.
    """
    if not artefact.is_file():
        raise UserError(f"{artefact} does not exist: run {made_by} first")
    if not sidecar_path(artefact).is_file():
        raise UserError(f"{artefact} has no sidecar, so it is not finished: run {made_by} again")
    facts = read_json(sidecar_path(artefact))
    if not isinstance(facts, dict):
        raise UserError(f"{sidecar_path(artefact)} holds no facts: run {made_by} again with --overwrite")
    return facts


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """`key: found …, expected …` for every expected fact that a sidecar does not state."""
    return [
        f"{key} is {SHORT.repr(found.get(key))}, not {SHORT.repr(value)}"
        for key, value in expected.items()
        if found.get(key) != json.loads(json.dumps(value))
    ]


def is_finished(artefact: Path, facts: Facts) -> bool:
    """Whether an artefact with exactly these facts stands.

    Raises:
        UserError: a finished artefact with other facts stands there.
    """
    if not artefact.is_file() or not sidecar_path(artefact).is_file():
        return False
    found = read_json(sidecar_path(artefact))
    if changed := differences(found if isinstance(found, dict) else {}, facts):
        raise UserError(f"{artefact} was made otherwise ({'; '.join(changed)}): use --overwrite or another folder")
    return True


def reuse(artefact: Path, facts: Facts, overwrite: bool) -> bool:
    """Whether an artefact with exactly these facts can be used again; if not, the way is clear to make it.

    With `overwrite` nothing that stands there is used. Beside a finished artefact what an earlier run left
    half-written is removed; where one is to be made without `overwrite` it stays, to go on from.

    Raises:
        UserError: as `is_finished`.
    """
    if overwrite:
        withdraw(artefact)
        return False
    if is_finished(artefact, facts):
        discard_partial(artefact)
        return True
    ownership.remove(sidecar_path(artefact))
    return False


def withdraw(artefact: Path) -> None:
    """Declare an artefact unfinished, so that what follows cannot be mistaken for it; half-written parts go too."""
    discard_partial(artefact)
    ownership.remove(sidecar_path(artefact))


def discard_partial(artefact: Path) -> None:
    """Remove what a killed run left beside an artefact that is finished, or is to be made afresh."""
    for path in (artefact, sidecar_path(artefact)):
        ownership.remove(path.with_name(path.name + PARTIAL))
    discard(artefact.with_name(artefact.name + PROGRESS))


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


def check_disk(folder: Path, needed: int) -> None:
    """Raise a NoRoomError if the disk of `folder` has less than `needed` bytes free."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise NoRoomError(
            f"{folder} needs {format_bytes(needed)} and its disk has {format_bytes(free)} free: "
            "make room, use fewer images or layers, --dtype float16, or another --root"
        )


def check_memory(what: str, needed: int) -> None:
    """Raise a UserError if `what` needs more bytes than this computer has: it would be killed, not refused."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else needed
    if needed > there:
        raise UserError(
            f"{what} need {format_bytes(needed)} of memory and this computer has {format_bytes(there)}: give less"
        )


def format_bytes(count: float) -> str:
    """1536 -> '1.5 KB', in powers of 1000."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


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
            message = _no_room(self.path, self.partial, int(np.prod(shape)) * np.dtype(dtype).itemsize, error)
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
        return _room_for(self.path, self.partial, size)

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
    """sha256 of an array's rows, in order."""
    digest = hashlib.sha256()
    for row in array:
        digest.update(np.ascontiguousarray(row).data)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
