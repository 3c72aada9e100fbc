"""What may be written: nothing that this run reads, and no file that was there before this program wrote it.

Everything that is written or removed passes `check`, and every input is told to `reading`. In each folder a hidden
ledger names the files that this program wrote there, a JSON string a line, each noted before the file appears; a
picture once more when it stands, with its hash. A file outside the ledger, or a picture that is another one now, is
somebody's own: it is never replaced, not even with --overwrite. Other files in the ledger are never taken for an input
where a folder is listed.
"""

import json
import mimetypes
import os
import re
import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from models.errors import UserError
from models.weights.downloads import file_hash
from pipeline.paths import IS_EMPTY, native_name, problem_of, real, utf8_name

LEDGER = ".cnn-vlm"
# Behind the name of an artefact: its sidecar, what is half-written, and the parts of several ranks.
COMPANION = re.compile(r"(\.json|\.partial|\.progress|-\d+of\d+)$")

LOCK = re.compile(rb"$|process \d|\d+\s")  # empty, or who holds it

STATE = re.compile(r"restart-\d+\.state\.safetensors")  # of what was interrupted
RAW_MAP = re.compile(r"(.+)-unnaturalness(-.+)?\.npy")  # beside an overlay: maps that were being written
EARLIER = (  # pictures of results of earlier versions, and what stands beside them
    (r"(reconstruction|image|comparison|curves|restart-\d+)\.png", r"curves\.csv|restart-\d+\.state\.safetensors"),
    (r"examples-.+\.png|pictures\.png", r"table\.md"),
    (r"figure\.png", r"report\.html"),
)

FACTS = {"stage", "weights_sha256"}  # of which every sidecar states one

_inputs: dict[tuple[int, int], Path] = {}  # device and file number: links, hard ones too, are the same file
_ledgers: dict[Path, dict[str, str]] = {}  # by folder and name, the hash of a picture
_one_at_a_time = threading.RLock()


def forget() -> None:
    """A new command begins: it has its own inputs, and others may have written meanwhile."""
    with _one_at_a_time:
        _inputs.clear()
        _ledgers.clear()


def reading(*paths: Path) -> None:
    """These files are inputs of this run."""
    for path in paths:
        with suppress(OSError, ValueError):
            status = Path(path).stat()
            _inputs[status.st_dev, status.st_ino] = path


def check(path: Path, note: bool = True) -> None:
    """Allow a file to be written (and `note` it as ours from now on), or to be removed.

    Raises:
        UserError: it is an input of this run, or was not written by this program.
    """
    with _one_at_a_time:
        _refuse_inputs(path)
        folder = real(path.parent)
        if os.path.lexists(folder / path.name):
            if _is_ours(folder, path.name):
                if note and _ledger(folder).get(utf8_name(path.name)):
                    _note(folder, [path.name])  # another picture will stand there
                return
            if claimed := [name for name in _owners(path.name) if _is_claimed(folder / name)]:
                _note(folder, claimed)  # somebody put a finished artefact here, with its sidecar
                return
            raise _would_be_replaced(path)
        if not is_written(path.name, _ledger(folder)):
            for beside in _companions(folder, path.name):  # with this name they would count as ours from now on
                if not _is_ours(folder, beside):
                    raise _would_be_replaced(folder / beside)
            if note:
                _note(folder, [path.name])


def _would_be_replaced(path: Path) -> UserError:
    return UserError(f"{path} was not written by this program, and would be replaced: move it away, or write elsewhere")


def wrote(path: Path) -> None:
    """Note which picture stands now where `check` allowed one."""
    if _is_picture(path.name):
        with _one_at_a_time:
            _note(real(path.parent), [path.name], file_hash(path))


def foresee(folder: Path, *names: str) -> None:
    """Refuse at once what `check` would refuse once these files of a folder are written, after all the work."""
    for name in names:
        check(folder / name, note=False)


def check_lock(path: Path) -> None:
    """Refuse a lock's file that leads elsewhere or holds something: opening it empties it."""
    _refuse_inputs(path)
    if os.path.lexists(path):
        if path.is_symlink() or problem_of(path) not in ("", IS_EMPTY) or not LOCK.match(path.read_bytes()[:20]):
            raise UserError(f"{path} is no lock of this program, and its name is needed for one: move it away")
    with _one_at_a_time:
        _ledger(path.parent)
        if not (path.parent / LEDGER).exists():  # so that the lock is not taken for one of an earlier version
            _note(path.parent, [])


def remove(path: Path) -> None:
    """Remove a file of ours, if it is there."""
    if os.path.lexists(path):
        check(path, note=False)
        path.unlink(missing_ok=True)


def written(folder: Path) -> frozenset[str]:
    """Names of the files right inside a folder that this program wrote, and nobody replaced."""
    with _one_at_a_time:
        folder = real(folder)
        names = _read(folder / LEDGER)
        return frozenset(name for name in names if _is_unchanged(folder / native_name(name), names[name]))


def is_written(name: str, names: Collection[str]) -> bool:
    """Whether a file of this name is among `written`, or a companion of one."""
    return any(utf8_name(owner) in names for owner in _owners(name))


def is_companion(name: str, of: str) -> bool:
    """Whether two files are the same, or companions of one artefact."""
    return not {*_owners(name)}.isdisjoint(_owners(of))


def _owners(name: str) -> list[str]:
    """A name and those whose companion it may be: x.json.partial, x.json, x."""
    owners = [name]
    while (shorter := COMPANION.sub("", owners[-1])) != owners[-1]:
        owners.append(shorter)
    return owners


def is_read(path: Path) -> bool:
    """Whether a path leads to an input of this run."""
    with suppress(OSError, ValueError):
        status = Path(path).stat()
        return (status.st_dev, status.st_ino) in _inputs
    return False


def _refuse_inputs(path: Path) -> None:
    if is_read(path):
        raise UserError(f"{path} is read by this run and would be replaced: write elsewhere, with another --out")


def _companions(folder: Path, owner: str) -> list[str]:
    """Names in a folder that are companions of this one."""
    if not folder.is_dir():
        return []
    return [p.name for p in folder.iterdir() if p.name.startswith(owner) and owner in _owners(p.name)]


def _is_ours(folder: Path, name: str) -> bool:
    """Whether a file that stands there is what this program wrote."""
    names = _ledger(folder)
    if _is_noted(folder, name, names):
        return True
    names.update(_read(folder / LEDGER))  # another rank may have written it meanwhile
    return _is_noted(folder, name, names)


def _is_noted(folder: Path, name: str, names: Mapping[str, str]) -> bool:
    return is_written(name, names) and _is_unchanged(folder / name, names.get(utf8_name(name), ""))


def _is_unchanged(path: Path, digest: str) -> bool:
    """Whether a file may still be the one that had this hash, any if it is empty."""
    with suppress(OSError):
        return not digest or not path.is_file() or file_hash(path) == digest
    return False


def _ledger(folder: Path) -> dict[str, str]:
    if folder not in _ledgers:
        ledger = folder / LEDGER
        _ledgers[folder] = _read(ledger)
        if not ledger.exists() and (earlier := _of_earlier_versions(folder)):
            _note(folder, earlier)
    return _ledgers[folder]


def _read(ledger: Path) -> dict[str, str]:
    """Names of a ledger, each with the hash it was noted with last."""
    if problem_of(ledger):
        return {}
    names = {}
    for line in ledger.read_bytes().decode("utf-8", "replace").splitlines():
        with suppress(ValueError):  # cut off by a kill or a full disk
            noted = json.loads(line)
            name, digest = noted if isinstance(noted, list) and len(noted) == 2 else (noted, "")
            names[str(name)] = str(digest)
    return names


def _note(folder: Path, names: list[str], digest: str = "") -> None:
    ledger, names = folder / LEDGER, [utf8_name(name) for name in names]
    _refuse_inputs(ledger)
    if os.path.lexists(ledger) and (ledger.is_symlink() or (problem_of(ledger) != IS_EMPTY and not _read(ledger))):
        raise UserError(f"{ledger} is no list of this program, and its name is needed for one: move it away")
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(ledger, flags, 0o666)
    try:
        if size := os.fstat(descriptor).st_size:
            os.lseek(descriptor, size - 1, os.SEEK_SET)
        cut_off = size and os.read(descriptor, 1) != b"\n"  # by a full disk, or a power cut
        lines = "".join(f"{json.dumps([name, digest] if digest else name)}\n" for name in names)
        os.write(descriptor, (f"\n{lines}" if cut_off else lines).encode())
    finally:
        os.close(descriptor)
    _ledgers.setdefault(folder, {}).update(dict.fromkeys(names, digest))


def _of_earlier_versions(folder: Path) -> list[str]:
    """Names that versions without ledgers left beside a sidecar, a state or a lock; of pictures those of results."""
    with suppress(OSError):
        within = folder.name in ("figures", "snapshots")
        names = sorted(p.name for p in folder.iterdir() if p.name != LEDGER and not p.is_dir())
        if _has_marks(folder.parent if within else folder):
            return [name for name in names if within or not _is_picture(name) or _is_result(name, names)]
    return []


def _has_marks(folder: Path) -> bool:
    for path in folder.iterdir():
        with suppress(OSError, ValueError, RecursionError):
            if problem_of(path) not in ("", IS_EMPTY):
                continue
            if STATE.fullmatch(path.name):
                return True
            if (raw := RAW_MAP.fullmatch(path.name)) and path.with_name(f"{raw[1]}-overlay.png").is_file():
                return True
            if path.name.startswith(".") and path.name.endswith(".lock") and LOCK.match(path.read_bytes()[:20]):
                return True
            if path.suffix == ".json" and _is_claimed(path.with_suffix("")):
                return True
    return False


def _is_claimed(path: Path) -> bool:
    """Whether an artefact stands beside a sidecar of ours."""
    with suppress(OSError, ValueError, RecursionError):
        if path.is_file():
            facts = json.loads(path.with_name(f"{path.name}.json").read_bytes())
            return isinstance(facts, dict) and bool(facts.keys() & FACTS)
    return False


def _is_picture(name: str) -> bool:
    return (mimetypes.guess_type(name)[0] or "").startswith("image/")


def _is_result(name: str, names: list[str]) -> bool:
    """Whether a picture among the `names` of a folder is one of a result's."""
    stem = name.removesuffix(".png").removesuffix("-overlay")
    if f"{stem}.npy" in names or any(other.startswith(f"{stem}-unnaturalness") for other in names):
        return True
    return any(
        re.fullmatch(pictures, name) and any(re.fullmatch(beside, other) for other in names)
        for pictures, beside in EARLIER
    )
