"""Artefacts of a workspace: written atomically, marked complete by a sidecar, refused when they do not fit.

An artefact `x.npy` is written as `x.npy.partial`, flushed and renamed; then `x.npy.json`, its sidecar, says what
made it. No sidecar means not finished. Facts are plain JSON values.
"""

import errno
import glob
import json
import os
import reprlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import UserError
from pipeline import distributed, ownership

if TYPE_CHECKING:
    import torch

PARTIAL = ".partial"
PROGRESS = ".progress"
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
        with room_for(path, temporary, size):
            path.parent.mkdir(parents=True, exist_ok=True)
            ownership.remove(temporary)
            ownership.check(path)
            yield temporary
            commit(temporary, path)
            ownership.wrote(path)
    finally:
        with suppress(UserError):
            ownership.remove(temporary)


@contextmanager
def room_for(path: Path, temporary: Path, size: int | None = None) -> Iterator[None]:
    """A block that writes `temporary`, which is to become `path` of `size` bytes.

    Raises:
        NoRoomError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise NoRoomError(no_room(path, temporary, size, error)) from None


def no_room(path: Path, temporary: Path, size: int | None, error: OSError) -> str:
    """What to say when `temporary`, which was to become `path`, could not be written."""
    written = getattr(temporary.stat(), "st_blocks", 0) * 512 if temporary.is_file() else 0
    free = shutil.disk_usage(next(p for p in path.absolute().parents if p.is_dir())).free + written
    needed = f"needs {format_bytes(size)}" if size is not None else f"needs more than {format_bytes(written)}"
    return (
        f"{path} {needed} and its disk has {format_bytes(free)} free ({error.strerror or 'short write'}): "
        "make room and run the same command again"
    )


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
    """Write a text file atomically, as `encoded`; a NoRoomError where the disk is full."""
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
        raise NoRoomError(no_room(path, path, before + len(encoded(text)), error)) from None


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically; a NoRoomError where the disk is full."""
    with atomic_path(path, len(content)) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, keys in the order given."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


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
    """Where the facts of an artefact stand: x.npy -> x.npy.json."""
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
