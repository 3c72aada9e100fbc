"""Fetching one file from one of several mirrors: resumed, retried, verified, atomic, bounded in time."""

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from models.errors import UserError

CHUNK = 1 << 20
CEILING = 2 << 30  # bytes accepted of a file whose size nobody states
MAX_REDIRECTS = 5
MINIMUM_RATE = 10_000  # bytes per second below which a server counts as stalling
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

    def mismatch(self, path: Path) -> str | None:
        """What is wrong with a file at `path`, or None if its size and hashes are right."""
        size = path.stat().st_size
        if self.size is not None and size != self.size:
            return f"has {size} bytes instead of {self.size}"
        for algorithm, expected in (("sha256", self.sha256), ("sha1", self.sha1)):
            if expected and not file_hash(path, algorithm).startswith(expected):
                return f"has another {algorithm} than {expected}"
        return None


class _Refused(Exception):
    """This mirror is of no use; the next one may be."""


class _Broken(Exception):
    """The connection failed; the same mirror may go on."""


def file_hash(path: Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file's bytes, read as a stream."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def cache_folder() -> Path:
    """Where downloads are kept: $CNN_VLM_CACHE, else $XDG_CACHE_HOME/cnn-vlm, else ~/.cache/cnn-vlm."""
    if folder := os.environ.get("CNN_VLM_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cnn-vlm"


def cached(file: RemoteFile, cache: Path) -> bool:
    """Whether the file lies in the cache, whole and unchanged."""
    path = cache / file.name
    return path.is_file() and file.mismatch(path) is None


def fetch(
    file: RemoteFile,
    cache: Path,
    *,
    progress: Progress | None = None,
    retries: int = 3,
    timeout: float = 20.0,
    pause: float = 1.0,
) -> Path:
    """The path of `file` in `cache`, downloaded if need be.

    A partial download is kept as `<name>.part` and resumed. A mirror is left for the next one when it answers with
    an error, when its file is not the right one, or after `retries` broken connections in a row without progress.

    Args:
        progress: called with the bytes there and the bytes in all (None where unknown).
        timeout: seconds to wait for a connection, and for each piece of the body.
        pause: seconds before the first retry; doubled each time.

    Raises:
        UserError: no mirror gave the file, or the cache cannot be written; says how to go on without a network.
    """
    from filelock import FileLock

    path = cache / file.name
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{file.name}.lock"):
            if cached(file, cache):
                return path
            reasons = []
            for url in file.urls:
                try:
                    _fetch_from(url, file, path, progress or (lambda done, total: None), retries, timeout, pause)
                    return path
                except _Refused as error:
                    reasons.append(f"{urlsplit(url).netloc}: {error}")
    except OSError as error:
        raise UserError(f"cannot write {error.filename or cache} ({error.strerror}): set --cache FOLDER") from None
    raise UserError(
        f"{file.name} could not be downloaded ({'; '.join(reasons)}): get it elsewhere and give it with "
        f"--weights FILE, or put it at {path}"
    )


def _fetch_from(
    url: str, file: RemoteFile, path: Path, progress: Progress, retries: int, timeout: float, pause: float
) -> None:
    """Download from one mirror; raises _Refused where it is of no use."""
    part = path.with_name(path.name + ".part")
    failures = 0
    while True:
        before = part.stat().st_size if part.is_file() else 0
        try:
            _continue_part(url, file, part, progress, timeout)
            break
        except _Broken as error:
            gained = (part.stat().st_size if part.is_file() else 0) > before
            failures = 1 if gained and failures < 2 * retries else failures + 1
            if failures > retries:
                raise _Refused(str(error)) from None
            time.sleep(min(pause * 2 ** (failures - 1), 30))
    if problem := file.mismatch(part):
        part.unlink()
        raise _Refused(f"the file there {problem}")
    with part.open("rb+") as written:
        os.fsync(written.fileno())
    part.replace(path)


def _continue_part(url: str, file: RemoteFile, part: Path, progress: Progress, timeout: float) -> None:
    """Append to `part` what it lacks, in one request."""
    import requests

    have = part.stat().st_size if part.is_file() else 0
    if file.size is not None and have >= file.size:
        if have == file.size:
            return
        part.unlink()
        have = 0
    try:
        with _open(url, have, timeout) as response:
            if response.status_code == 416 and have:  # nothing left to send: the part is whole, or of another file
                if file.mismatch(part) is not None:
                    part.unlink()
                    raise _Broken("it refused to resume")
                return
            if response.status_code >= 500 or response.status_code == 429:
                raise _Broken(f"it answered {response.status_code}")
            if response.status_code not in (200, 206):
                raise _Refused(f"it answered {response.status_code}")
            resumed = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(
                f"bytes {have}-"
            )
            if response.status_code == 206 and not resumed:
                part.unlink(missing_ok=True)
                raise _Broken("it sent another range than asked for")
            have = have if resumed else 0
            length = response.headers.get("Content-Length", "")
            total = have + int(length) if length.isdigit() else file.size
            _append(response, part, have, file, total, progress)
            if total is not None and part.stat().st_size < total:
                raise _Broken("it sent less than it announced")
    except requests.RequestException as error:
        reason = "no connection" if isinstance(error, requests.ConnectionError) else type(error).__name__
        raise _Broken(reason) from None


def _append(response, part: Path, have: int, file: RemoteFile, total: int | None, progress: Progress) -> None:
    """Write the body behind the first `have` bytes, at most to the size the file may have."""
    ceiling = file.size if file.size is not None else CEILING
    started, first = time.monotonic(), have
    with part.open("ab" if have else "wb") as out:
        for chunk in response.iter_content(CHUNK if total is None or total > CHUNK else 1 << 14):
            if have + len(chunk) > ceiling:
                out.close()
                part.unlink()
                raise _Refused(f"it sends more than {ceiling} bytes")
            out.write(chunk)
            have += len(chunk)
            progress(have, total)
            seconds = time.monotonic() - started
            if seconds > 60 and (have - first) / seconds < MINIMUM_RATE:
                raise _Broken("it stalls")


def _open(url: str, have: int, timeout: float):
    """A streaming response, redirects followed by hand: never to another scheme than http(s), never down from https."""
    import requests

    headers = {"Accept-Encoding": "identity", "User-Agent": "cnn-vlm"}
    if have:
        headers["Range"] = f"bytes={have}-"
    session = requests.Session()
    for _ in range(MAX_REDIRECTS + 1):
        response = session.get(url, headers=headers, stream=True, timeout=timeout, allow_redirects=False)
        if not response.is_redirect:
            return response
        target = requests.compat.urljoin(url, response.headers["Location"])
        response.close()
        scheme = urlsplit(target).scheme
        if scheme not in ("http", "https") or (urlsplit(url).scheme == "https" and scheme == "http"):
            raise _Refused(f"it redirects to {scheme}:")
        url = target
    raise _Refused("it redirects without end")
