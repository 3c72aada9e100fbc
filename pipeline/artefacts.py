"""Artefacts of a workspace: written atomically, marked complete by a sidecar, refused when they do not fit.

An artefact `x.npy` is written as `x.npy.partial`, flushed and renamed; then `x.npy.json`, its sidecar, says what
made it. No sidecar means not finished. Facts are plain JSON values.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import UserError

PARTIAL = ".partial"
PROGRESS = ".progress"
Facts = dict[str, Any]


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, on disk, once the block has ended well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + PARTIAL)
    try:
        yield temporary
        commit(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def commit(temporary: Path, path: Path) -> None:
    """Flush `temporary` to disk and rename it to `path`."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.chmod(0o666 & ~_umask())  # safetensors creates files that only the user may read
    temporary.replace(path)
    if os.name == "posix":  # the rename itself must survive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, keys in the order given."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a `.npy` file atomically."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)


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
        f"{key} is {found.get(key)!r}, not {value!r}"
        for key, value in expected.items()
        if found.get(key) != json.loads(json.dumps(value))
    ]


def is_finished(artefact: Path, facts: Facts, overwrite: bool) -> bool:
    """Whether an artefact with exactly these facts already stands.

    With `overwrite`, or where it is unfinished, the old sidecar is removed, so that what follows cannot be
    mistaken for it.

    Raises:
        UserError: a finished artefact with other facts stands there.
    """
    sidecar = sidecar_path(artefact)
    if overwrite or not artefact.is_file() or not sidecar.is_file():
        sidecar.unlink(missing_ok=True)
        return False
    found = read_json(sidecar)
    if changed := differences(found if isinstance(found, dict) else {}, facts):
        raise UserError(f"{artefact} was made otherwise ({'; '.join(changed)}): use --overwrite or another folder")
    return True


def open_array(path: Path, made_by: str) -> tuple[np.ndarray, Facts]:
    """A finished `.npy` artefact, memory-mapped read-only, and its facts.

    Raises:
        UserError: missing, unfinished, truncated, of pickled objects, or not of the shape its sidecar states.
    """
    facts = read_sidecar(path, made_by)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}): run {made_by} again with --overwrite") from None
    if list(array.shape) != facts.get("shape") or str(array.dtype) != facts.get("dtype"):
        raise UserError(
            f"{path} is {array.dtype} {array.shape}, its sidecar says {facts.get('dtype')} {facts.get('shape')}: "
            f"run {made_by} again with --overwrite"
        )
    return array, facts


def check_disk(folder: Path, needed: int) -> None:
    """Raise a UserError if the disk of `folder` has less than `needed` bytes free."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
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
    """A `.npy` file written row by row through a memory map, which survives being killed.

    Rows that were reported with `mark` before the kill are kept: a writer opened again with the same facts goes on
    from there.

    Args:
        path: the artefact.
        shape, dtype: of the whole array; rows are its first axis.
        facts: what makes it; a partial file with other facts is discarded.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: str, facts: Facts):
        self.path = path
        self.partial = path.with_name(path.name + PARTIAL)
        self.progress = path.with_name(path.name + PROGRESS)
        self.facts = {"shape": list(shape), "dtype": str(np.dtype(dtype)), **facts}
        self.done = 0
        self.state: Facts = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self._resume():
            self.progress.unlink(missing_ok=True)
            self.array = np.lib.format.open_memmap(self.partial, mode="w+", dtype=dtype, shape=shape)

    def _resume(self) -> bool:
        if not (self.partial.is_file() and self.progress.is_file()):
            return False
        try:
            noted = read_json(self.progress)
            if noted["facts"] != self.facts:
                return False
            self.array = np.load(self.partial, mmap_mode="r+", allow_pickle=False)
            if list(self.array.shape) != self.facts["shape"] or str(self.array.dtype) != self.facts["dtype"]:
                return False
            self.done, self.state = int(noted["done"]), dict(noted["state"])
        except (UserError, ValueError, OSError, KeyError, TypeError):
            return False
        return True

    def mark(self, done: int, **state: Any) -> None:
        """Record on disk that the first `done` rows are final, with any other JSON state."""
        self.array.flush()
        write_json(self.progress, {"done": done, "facts": self.facts, "state": state})

    def finish(self, rows: int | None = None, **more: Any) -> None:
        """Turn the partial file into the artefact, cut to its first `rows`, and write its sidecar.

        `more` are further facts, known only now.
        """
        self.array.flush()
        if rows is not None and rows < len(self.array):
            self._cut(rows)
        del self.array
        commit(self.partial, self.path)
        write_json(sidecar_path(self.path), {**self.facts, **more})
        self.progress.unlink(missing_ok=True)

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
