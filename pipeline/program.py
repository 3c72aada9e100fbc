"""A script as a program: its first lines, its errors, its exit code."""

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from models.errors import UserError
from pipeline import distributed, parsers, streams
from pipeline.artefacts import NoRoomError
from pipeline.paths import utf8_name
from pipeline.progress import Terminated, endings

ROOT = Path(__file__).resolve().parent.parent


def announce(arguments: Mapping[str, Any], device: object = None) -> None:
    """First lines of every script, once for all stages of a process: versions, device; with --verbose the arguments.

    The effective arguments also go into the sidecars, see `versions`.
    """
    _effective.clear()
    _effective.update({key: printable(parsers.show(value)) for key, value in sorted(arguments.items())})
    _introduce(None if device is None else str(device))
    if arguments.get("verbose"):
        print("arguments: " + " ".join(f"{key}={value}" for key, value in _effective.items()), flush=True)


_effective: dict[str, str] = {}  # arguments of the stage that this process runs


@cache
def _introduce(device: str | None) -> None:
    packages = " ".join(f"{name} {_version(name)}" for name in ("torch", "torchvision", "numpy", "pillow"))
    where = "" if device is None else f", {device} ({os.cpu_count()} CPU cores)"
    ranks = f", one of {distributed.size()} processes" if distributed.size() > 1 else ""
    print(f"cnn-vlm {code_version()}, python {platform.python_version()}, {packages}{where}{ranks}", flush=True)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def code_version() -> str:
    """The git commit of this code, or 'unknown' outside a checkout of its own, inside another repository too."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(ROOT), "rev-parse", "--show-toplevel", "--short=12", "HEAD"]
    try:
        result = subprocess.run(command, env=own, capture_output=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    folder, _, commit = os.fsdecode(result.stdout).strip().partition("\n")
    ours = result.returncode == 0 and Path(folder).resolve() == ROOT
    return commit if ours else "unknown"


def versions() -> dict[str, Any]:
    """Versions for an artefact's sidecar, and the effective arguments of the stage that makes it."""
    names = ("torch", "torchvision", "numpy", "pillow")
    found = {"code": code_version(), "python": platform.python_version(), **{n: _version(n) for n in names}}
    return {**found, "arguments": dict(_effective)}


LACKS_MEMORY = "this does not fit into memory: use smaller values (batch, positions, layers) or smaller images"


def _on_signal(number: int, _frame: object) -> None:
    raise Terminated(number)


def explanation(error: Exception) -> str | None:
    """The one line for what a user can mend; None for a bug, which keeps its traceback."""
    if isinstance(error, UserError):
        return one_line(str(error))
    if isinstance(error, OSError) and error.errno is not None:  # the system's, which is no bug of this program
        where = repr(os.fsdecode(error.filename)[:200]) if isinstance(error.filename, str | bytes) else "a file"
        return one_line(f"{where}: {error.strerror}; mend that and run again to go on")
    # of torch, which is not imported here: its own error on a device, its words on a CPU
    of_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    lacks_memory = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and of_torch)
    return LACKS_MEMORY if lacks_memory else None


def why_left_out(error: Exception) -> str:
    """Why one of several inputs is left out, in a line; raises what stops all of them: a bug, a full disk."""
    if isinstance(error, NoRoomError) or (line := explanation(error)) is None:
        raise error
    return line


def one_line(text: str) -> str:
    """Text without line breaks, and without what would steer a terminal."""
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """Text that can be written as UTF-8 and shown on a terminal, whatever bytes a file's name has."""
    if text.isprintable():
        return text
    text = utf8_name(text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def run(main: Callable[[], int | None]) -> int:
    """Run a script's `main` and turn what ends it into an exit code.

    0 success; 2 a user's mistake, and what the system refuses, in one line on stderr; 130 Ctrl-C, 143 SIGTERM and 129
    SIGHUP, with a line on how to go on. Other exceptions keep their traceback. Of several ranks one speaks.
    """
    name = Path(sys.argv[0]).name
    for number in endings():
        signal.signal(number, _on_signal)
    streams.secure()
    try:
        code = main() or 0
        sys.stdout.flush()
        return code
    except distributed.ElsewhereError:
        return 2
    except Exception as error:
        if (line := explanation(error)) is None:
            raise
        print(f"{name}: {line}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Terminated) as stop:
        if distributed.rank() == 0:
            with_it = " without --overwrite" if "--overwrite" in sys.argv else ""
            line_end = "\n" if sys.stderr.isatty() else ""  # the terminal shows ^C
            print(
                f"{line_end}{name}: interrupted; the same command{with_it} goes on from the last saved state",
                file=sys.stderr,
            )
        return 130 if isinstance(stop, KeyboardInterrupt) else 128 + stop.number
    finally:
        with suppress(OSError):  # what is left, of --help too
            sys.stdout.flush()
