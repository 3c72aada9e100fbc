"""Fetching one file from one of several mirrors: resumed, retried, verified, atomic, bounded in time."""

import hashlib
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from models.errors import UserError

if TYPE_CHECKING:
    import requests

CHUNK = 1 << 20
SMALL_CHUNK = 1 << 14  # where a read waits until all it asked for is there
CEILING = 2 << 30  # bytes accepted of a file whose size nobody states
MAX_REDIRECTS = 5
MAX_ATTEMPTS = 50  # requests to one mirror, however much each brings
MINIMUM_RATE = 10_000  # bytes per second below which a server counts as stalling
PATIENCE = 60.0  # seconds over which that rate is measured
HEAD_PATIENCE = 60.0  # seconds for a host's address, connections, redirects and headers, all together
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class RemoteFile:
    """A file that can be downloaded: what it is called, how to know it, where it may be.

    `sha256` may be the first hex digits only (at least 8), where no source states more.
    """

    name: str
    urls: tuple[str, ...]
    licence: str
    size: int | None = None
    sha256: str | None = None
    sha1: str | None = None
    md5: str | None = None

    def mismatch(self, path: Path) -> str | None:
        """What is wrong with a file at `path`, or None if its size and hashes are right."""
        size = path.stat().st_size
        if self.size is not None and size != self.size:
            return f"has {size} bytes instead of {self.size}"
        for algorithm, expected in (("sha256", self.sha256), ("sha1", self.sha1), ("md5", self.md5)):
            if expected and not file_hash(path, algorithm).startswith(expected):
                return f"has another {algorithm} than {expected}"
        return None


class _Refused(Exception):
    """This mirror is of no use; the next one may be."""


class _Broken(Exception):
    """The connection failed; the same mirror may go on."""


class _Dead(_Broken):
    """There was no connection at all: one more attempt is enough."""


class _Slow(_Broken):
    """The body trickles: what it brought does not speak for the mirror."""


def file_hash(path: Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file's bytes, read as a stream."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def cache_folder() -> Path:
    """Where downloads are kept: $CNN_VLM_CACHE, else $XDG_CACHE_HOME/cnn-vlm, else ~/.cache/cnn-vlm."""
    try:
        if folder := os.environ.get("CNN_VLM_CACHE"):
            return Path(folder).expanduser()
        base = os.environ.get("XDG_CACHE_HOME")
        return (Path(base) if base else Path.home() / ".cache") / "cnn-vlm"
    except RuntimeError:  # a user without a home, as in some containers
        raise UserError("there is no home folder to keep downloads in: choose one with --cache FOLDER") from None


def flaw(file: RemoteFile, cache: Path) -> str | None:
    """What is wrong with the file in the cache (`is missing`, `has 3 bytes instead of 4`), None if nothing is."""
    path = cache / file.name
    try:
        return file.mismatch(path) if path.is_file() else "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def cached(file: RemoteFile, cache: Path) -> bool:
    """Whether the file lies in the cache, whole and unchanged."""
    return flaw(file, cache) is None


def fetch(
    file: RemoteFile,
    cache: Path,
    *,
    progress: Progress | None = None,
    retries: int = 3,
    timeout: float = 20.0,
    pause: float = 1.0,
    option: str = "--weights",
) -> Path:
    """The path of `file` in `cache`, downloaded if need be.

    A partial download is kept as `<name>.part` and resumed. A mirror is left for the next one when it answers with
    an error, when its file is not the right one, or after `retries` broken connections in a row without progress.
    A second process that wants the same file waits for the first.

    Args:
        progress: called with the bytes there and the bytes in all (None where unknown).
        timeout: seconds to wait for a connection, and for each piece of the body.
        pause: seconds before the first retry; doubled each time.
        option: the command line's way to give the file, for the message of the UserError.

    Raises:
        UserError: no mirror gave the file, or the cache cannot be written; says how to go on without a network.
    """
    from filelock import FileLock

    if cached(file, cache):  # before anything is written: the cache may be read-only
        return cache / file.name
    path = cache / file.name
    reasons = [f"{path} {flaw(file, cache)}"] if path.is_file() else []
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{file.name}.lock"):
            if cached(file, cache):
                return path
            for url in file.urls:
                try:
                    _fetch_from(url, file, path, progress or (lambda done, total: None), retries, timeout, pause)
                    return path
                except _Refused as error:
                    reasons.append(f"{urlsplit(url).netloc}: {error}")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(
            f"cannot write {error.filename or cache} ({reason}): make room or choose another folder with --cache FOLDER"
        ) from None
    raise UserError(
        f"{file.name} could not be downloaded ({'; '.join(reasons)}): get it elsewhere and give it with "
        f"{option} FILE, or put it at {path}"
    )


def _fetch_from(
    url: str, file: RemoteFile, path: Path, progress: Progress, retries: int, timeout: float, pause: float
) -> None:
    """Download from one mirror; raises _Refused where it is of no use."""
    part = path.with_name(path.name + ".part")
    inherited = _size(part) > 0  # bytes of an earlier run or of another mirror
    failures = 0
    for _ in range(MAX_ATTEMPTS):
        before = _size(part)
        try:
            _continue_part(url, file, part, progress, timeout)
        except _Broken as error:
            gained = _size(part) > before and not isinstance(error, _Slow)
            failures = 1 if gained else failures + 1
            if failures > (min(1, retries) if isinstance(error, _Dead) else retries):
                raise _Refused(str(error)) from None
            time.sleep(min(pause * 2 ** (failures - 1), 30))
            continue
        problem = file.mismatch(part)
        if problem is None:
            with part.open("rb+") as written:
                os.fsync(written.fileno())
            part.replace(path)
            return
        part.unlink()
        if not inherited:
            raise _Refused(f"the file there {problem}")
        inherited = False  # the fault may lie in the bytes from elsewhere: once more from the start
    raise _Refused(f"it broke off {MAX_ATTEMPTS} times")


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _continue_part(url: str, file: RemoteFile, part: Path, progress: Progress, timeout: float) -> None:
    """Append to `part` what it lacks, in one request."""
    import requests
    import urllib3

    have = _size(part)
    if file.size is not None and have > file.size:
        part.unlink()
        have = 0
    if have and have == file.size:
        return
    answer = _Answer(url, have, timeout)
    try:
        with answer:
            response = answer.take(HEAD_PATIENCE)
            if response.status_code == 416 and have:  # nothing left to send: the part is whole, or of another file
                if file.mismatch(part) is not None:
                    part.unlink()
                    raise _Broken("it refused to resume")
                return
            have, total = _announced(response, have, file, part)
            _append(answer, part, have, total, file, progress)
            if total is not None and _size(part) < total:
                raise _Broken("it sent less than it announced")
    except requests.ConnectionError as error:  # its ConnectTimeout included
        if error.args and isinstance(error.args[0], urllib3.exceptions.ProtocolError):
            raise _Broken("it broke off") from None
        raise _Dead("no connection") from None
    except (requests.Timeout, urllib3.exceptions.TimeoutError):
        raise _Broken("it timed out") from None
    except urllib3.exceptions.HTTPError:
        raise _Broken("it broke off") from None
    except requests.RequestException as error:
        raise _Refused(f"no usable answer ({type(error).__name__})") from None


def _announced(response, have: int, file: RemoteFile, part: Path) -> tuple[int, int | None]:
    """Where the body of this answer starts, and the size of the whole file (None where unknown).

    Raises:
        _Refused, _Broken: an answer without the file, of another size, or of another range than asked for.
    """
    status = response.status_code
    if status >= 500 or status == 429:
        raise _Broken(f"it answered {status}")
    if status not in (200, 206):
        raise _Refused(f"it answered {status}")
    sent = re.match(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})?", response.headers.get("Content-Range", ""))
    if status == 206 and not (sent and int(sent[1]) == have):
        part.unlink(missing_ok=True)
        raise _Broken("it sent another range than asked for")
    start = have if status == 206 else 0
    length = response.headers.get("Content-Length", "")
    total = start + int(length) if re.fullmatch(r"\d{1,18}", length) else file.size
    if start and sent and sent[2]:  # the range may end before the file does
        total = int(sent[2])
    if total is not None and file.size is not None and total != file.size and not start:
        raise _Refused(f"its file has {total} bytes instead of {file.size}")
    if total is not None and total > CEILING:
        raise _Refused(f"its file has {total} bytes")
    return start, total


def _append(answer: "_Answer", part: Path, have: int, total: int | None, file: RemoteFile, progress: Progress) -> None:
    """Write the body behind the first `have` bytes, at most to the size the file may have."""
    ceiling = file.size if file.size is not None else CEILING
    started, first = time.monotonic(), have
    with part.open("ab" if have else "wb") as out:
        while chunk := answer.take(PATIENCE):
            if have + len(chunk) > ceiling:
                out.close()
                part.unlink()
                raise _Refused(f"it sends more than {ceiling} bytes")
            out.write(chunk)
            have += len(chunk)
            progress(have, total)
            seconds = time.monotonic() - started
            if seconds > PATIENCE and (have - first) / seconds < MINIMUM_RATE:
                raise _Slow("it stalls")


class _Answer:
    """A response, then the pieces of its body, then b"", read by a thread of its own.

    A server can drag out what has no time limit: finding its address, endless interim answers, headers or trailers
    that come byte by byte. The thread is then left behind; it writes nothing and ends with the process at the latest.
    """

    def __init__(self, url: str, have: int, timeout: float):
        self.pieces: queue.Queue = queue.Queue(maxsize=4)
        self.left = threading.Event()
        threading.Thread(target=self._read, args=(url, have, timeout), daemon=True).start()

    def __enter__(self) -> "_Answer":
        return self

    def __exit__(self, *_: object) -> None:
        self.left.set()

    def take(self, patience: float) -> "requests.Response | bytes":
        """The next piece, or what the thread raised; _Dead where `patience` seconds bring none."""
        try:
            piece = self.pieces.get(timeout=patience)
        except queue.Empty:
            raise _Dead("it timed out") from None
        if isinstance(piece, Exception):
            raise piece
        return piece

    def _read(self, url: str, have: int, timeout: float) -> None:
        try:
            with _open(url, have, timeout) as response:
                # read1 (urllib3 2.2) gives what has come: neither a stall nor a trickle holds back bytes or the clock
                immediate = hasattr(response.raw, "read1")
                read, amount = (response.raw.read1, CHUNK) if immediate else (response.raw.read, SMALL_CHUNK)
                piece: requests.Response | bytes = response
                while self._give(piece) and piece != b"":
                    piece = read(amount, decode_content=False)
        except Exception as error:
            self._give(error)

    def _give(self, piece: "requests.Response | bytes | Exception") -> bool:
        """Hand a piece over; False where nobody waits for it any more."""
        while not self.left.is_set():
            try:
                self.pieces.put(piece, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


def _open(url: str, have: int, timeout: float):
    """A streaming response; redirects are followed by hand, only to http(s) and never down from https."""
    import requests

    headers = {"Accept-Encoding": "identity", "User-Agent": "cnn-vlm"}
    if have:
        headers["Range"] = f"bytes={have}-"
    for _ in range(MAX_REDIRECTS + 1):
        try:
            response = requests.get(url, headers=headers, stream=True, timeout=timeout, allow_redirects=False)
            if not response.is_redirect:
                return response
            response.close()
            target = urljoin(url, response.headers["Location"])
        except requests.exceptions.InvalidHeader:
            raise _Refused("no usable answer (InvalidHeader)") from None
        except ValueError:  # of a redirect too: requests looks where it leads
            raise _Refused("no valid address") from None
        scheme = urlsplit(target).scheme
        if scheme not in ("http", "https") or (urlsplit(url).scheme == "https" and scheme == "http"):
            raise _Refused(f"it redirects to {scheme}:")
        url = target
    raise _Refused("it redirects without end")
