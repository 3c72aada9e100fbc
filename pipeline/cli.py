"""The command line that all scripts share: options, presets, first lines, progress, errors.

Nothing here imports torch before it is needed, so that `--help` answers at once.
"""

import argparse
import ctypes
import errno
import hashlib
import io
import os
import platform
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from models.errors import UserError
from pipeline import distributed
from pipeline.presets import PRESETS

LINE_INTERVAL = 20.0  # seconds between progress lines where there is no terminal
DEVICES = ("auto", "cpu", "cuda", "mps")
LARGEST_COUNT = 10**9  # of images, updates, …: beyond, sizes would overflow before memory does
LARGEST_NUMBER = 3.4e38  # float32's
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
KEPT_BYTES = 2**30
LONGEST_PART = 255  # bytes of a file's or folder's name, on the usual file systems
# What goes wrong with a path that the user chose or can mend; other numbers are bugs.
USERS_ERRORS = {
    getattr(errno, name)
    for name in "ENOSPC EDQUOT EFBIG EACCES EPERM EROFS EISDIR ENOTDIR EEXIST ENAMETOOLONG ELOOP EIO".split()
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line on stderr and exit with code 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see --help)\n")


def stage_parser(doc: str, *, workspace: bool = True) -> Parser:
    """A parser with the options every stage has; `doc` is the script's docstring.

    `workspace` adds --preset and --root.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, workspace=workspace)
    return parser


def command_parser(doc: str, commands: Mapping[str, Any]) -> Parser:
    """A parser for a script of several commands, each with the options every stage has.

    `commands` are modules by the command's name: their docstring explains the command, `add_options(parser)` adds its
    options.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in commands.items():
        first_line = module.__doc__.partition("\n")[0]
        command = choices.add_parser(
            name, help=first_line, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        add_common_options(command, workspace=False)
        module.add_options(command)
    return parser


def add_common_options(parser: argparse.ArgumentParser, *, workspace: bool) -> None:
    """Options of `stage_parser`."""
    if workspace:
        parser.add_argument(
            "--preset",
            choices=sorted(PRESETS),
            default="alexnet",
            help="whose defaults to take for all other options; alexnet_caffe and vgg19_caffe are the paper's "
            "(default: alexnet)",
        )
        parser.add_argument("--root", type=folder, help="workspace folder (default: out/<preset>)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto takes cuda, then mps, then cpu")
    parser.add_argument("--seed", type=natural, default=0, help="everything that is drawn follows from it (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="start afresh where finished or partial results stand")


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None, stage: str) -> argparse.Namespace:
    """Parse with the chosen preset's values as the defaults of this stage."""
    first = Parser(add_help=False, prog=parser.prog)
    first.add_argument("--preset", default="alexnet")
    name = first.parse_known_args(argv)[0].preset
    if name in PRESETS:
        settings = PRESETS[name].get(stage, {})
        parser.set_defaults(root=Path("out") / name, **{key: s.value for key, s in settings.items()})
    return parser.parse_args(argv)


def natural(text: str) -> int:
    """argparse type: an integer from 0 to 2⁶³-1."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not an integer from 0 to 2⁶³-1")
    return value


def positive(text: str) -> int:
    """argparse type: an integer from 1 to 10⁹."""
    value = int(text)
    if not 1 <= value <= LARGEST_COUNT:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not an integer from 1 to {LARGEST_COUNT}")
    return value


def positive_number(text: str) -> float:
    """argparse type: a number above 0 that fits into float32."""
    value = float(text)
    if not 0 < value <= LARGEST_NUMBER:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not a number above 0, {LARGEST_NUMBER} at most")
    return value


def non_negative_number(text: str) -> float:
    """argparse type: a number from 0 up that fits into float32."""
    value = float(text)
    if not 0 <= value <= LARGEST_NUMBER:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not a number from 0 up, {LARGEST_NUMBER} at most")
    return value


def fraction(text: str) -> float:
    """argparse type: a number from 0 up, below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not in [0, 1)")
    return value


def _kind(text: str) -> int:
    """stat's type of what stands at a path, 0 for nothing there."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty path leads nowhere")
    if any(len(os.fsencode(part)) > LONGEST_PART for part in Path(text).parts):
        raise argparse.ArgumentTypeError(f"{text[:80]!r}… has a name of more than {LONGEST_PART} bytes")
    try:
        return stat.S_IFMT(Path(text).stat().st_mode)
    except FileNotFoundError:
        return 0
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} cannot be used: {_reason(error)}") from None


def _may(path: str | Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def readable_file(text: str) -> Path:
    """argparse type: a file that is there and may be read."""
    kind = _kind(text)
    if kind != stat.S_IFREG:
        what = "does not exist" if not kind else "is a folder" if kind == stat.S_IFDIR else "is no regular file"
        raise argparse.ArgumentTypeError(f"{text!r} {what}: give a file")
    if not _may(text, os.R_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be read: permission denied")
    return Path(text)


def folder(text: str) -> Path:
    """argparse type: a folder, there or not yet."""
    if _kind(text) not in (0, stat.S_IFDIR):
        raise argparse.ArgumentTypeError(f"{text!r} is a file: give a folder")
    return Path(text)


def writable_folder(text: str) -> Path:
    """argparse type: a folder that may be written, or made."""
    path = folder(text)
    there = next(p for p in (path, *path.absolute().parents) if _kind(str(p)))
    if not _may(there, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{there} cannot be written: permission denied")
    return path


def writable_file(text: str) -> Path:
    """argparse type: a file to be written, replacing one that stands there."""
    if _kind(text) not in (0, stat.S_IFREG):
        raise argparse.ArgumentTypeError(f"{text!r} is no file: give the name of one")
    writable_folder(str(Path(text).parent))
    return Path(text)


def add_weights_options(parser: argparse.ArgumentParser) -> None:
    """Options that say where the CNN's weights come from."""
    parser.add_argument(
        "--weights",
        default="auto",
        metavar="auto|random|FILE",
        help="CNN weights: auto looks for the installed package, then downloads; a FILE (.pth, .safetensors, "
        ".caffemodel, .ckpt) serves offline; random is a control (default: auto)",
    )
    parser.add_argument(
        "--mean-image",
        type=readable_file,
        help="imagenet_mean.binaryproto for the Caffe backbones (default: downloaded)",
    )
    parser.add_argument(
        "--cache", type=folder, help="folder of downloads (default: $CNN_VLM_CACHE or ~/.cache/cnn-vlm)"
    )


def add_postprocess_options(parser: argparse.ArgumentParser) -> None:
    """Options that say how an unnaturalness map becomes a saliency map."""
    parser.add_argument("--power", type=positive_number, default=0.5, help="of the map (original code: 0.5)")
    parser.add_argument("--blur", type=fraction, default=0.03, help="of the image's sides (original code: 0.03)")
    parser.add_argument(
        "--postprocess",
        choices=("float", "original"),
        default="float",
        help="original rounds to 256 levels on the way, as the paper's code did",
    )


def load_backbone(args: argparse.Namespace, name: str, layers: list[str], device: Any) -> tuple[Any, Any]:
    """The backbone and its `Weights` for the options of `add_weights_options`, on a device; says what was taken.

    `layers` are the taps that will be read: they decide whether convolutions alone are enough.
    """
    from models.weights import load_backbone

    with Progress(None, "weights", "B") as progress:
        backbone, weights = load_backbone(
            name,
            args.weights,
            layers=layers,
            mean_image=args.mean_image or "auto",
            cache=args.cache,
            progress=progress.download,
            seed=args.seed,
        )
    print(f"weights: {weights.source}, sha256 {weights.sha256[:16]}", flush=True)
    return backbone.to(device), weights


def weights_facts(backbone: Any, weights: Any) -> dict[str, str]:
    """What a sidecar states of the CNN's weights, and of the mean image where there is one."""
    facts = {"weights_sha256": weights.sha256}
    if backbone.mean_image is not None:
        facts["mean_image_sha256"] = hashlib.sha256(backbone.mean_image.cpu().numpy().tobytes()).hexdigest()
    return facts


def replace(args: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    """A copy of parsed arguments with some values changed."""
    return argparse.Namespace(**{**vars(args), **changes})


def checkpoint_backbone(path: Path) -> str:
    """Name of the backbone that a checkpoint reads."""
    from models.checkpoints import read_tensors

    name = read_tensors(path)[1].get("backbone")
    if not isinstance(name, str):
        raise UserError(f"{path} does not say which backbone it reads: give another file")
    return name


def pick_device(name: str):
    """The torch device for an option value of `DEVICES`.

    Raises:
        UserError: the device asked for is not there.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device {name} is not available here: use --device auto or cpu")
    if name == "cpu":
        keep_freed_memory()
    if name == "cuda" and distributed.launched():
        if distributed.local_rank() >= torch.cuda.device_count():
            raise UserError(f"{torch.cuda.device_count()} CUDA devices are too few: lower --nproc-per-node to that")
        return torch.device(name, distributed.local_rank())
    return torch.device(name)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for what is allocated next; where it is not glibc, nothing changes.

    It gives large blocks back to the system, which then has to hand out and clear the pages of the same tensors in
    every update: a quarter of an update's time.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            library.mallopt(parameter, KEPT_BYTES)


def announce(args: argparse.Namespace, device: object = None) -> None:
    """First lines of every script: versions, device, effective arguments."""
    packages = " ".join(f"{name} {_version(name)}" for name in ("torch", "torchvision", "numpy", "pillow"))
    print(f"cnn-vlm {code_version()}, python {platform.python_version()}, {packages}", flush=True)
    if device is not None:
        ranks = f", one of {distributed.size()} processes" if distributed.size() > 1 else ""
        print(f"device: {device}, {os.cpu_count()} CPU cores{ranks}", flush=True)
    arguments = " ".join(f"{key}={_show(value)}" for key, value in sorted(vars(args).items()))
    print(f"arguments: {arguments}", flush=True)


def _show(value: Any) -> str:
    return ",".join(str(v) for v in value) if isinstance(value, list | tuple) else str(value)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def code_version() -> str:
    """The git commit of this code, or 'unknown' outside a checkout."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    """Versions for an artefact's sidecar."""
    names = ("torch", "torchvision", "numpy", "pillow")
    return {"code": code_version(), "python": platform.python_version(), **{n: _version(n) for n in names}}


class Progress:
    """A tqdm bar on a terminal, a line every `LINE_INTERVAL` seconds elsewhere.

    Args:
        total: units of work in all.
        what: what is being done.
        unit: name of one unit.
        done: units that an earlier run did.
    """

    def __init__(self, total: int | None, what: str, unit: str = "it", done: int = 0):
        self.total, self.what, self.unit = total, what, unit
        self.done = self.first = done
        self.started = self.printed = time.monotonic()
        self.bar = None
        if self._has_terminal() and total is not None:
            self._open_bar()

    @staticmethod
    def _has_terminal() -> bool:
        return sys.stderr.isatty() and distributed.rank() == 0

    def _open_bar(self) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=self.total,
            desc=self.what,
            unit=self.unit,
            unit_scale=self.unit == "B",
            initial=self.first,
            dynamic_ncols=True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, count: int = 1, note: str = "") -> None:
        """Report `count` further units, with a short note such as a loss."""
        self.done += count
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif time.monotonic() - self.printed >= LINE_INTERVAL:
            self.printed = time.monotonic()
            rate = (self.done - self.first) / (self.printed - self.started)
            left = f", {(self.total - self.done) / rate:.0f} s left" if self.total and rate else ""
            of = f"/{self.total}" if self.total else ""
            note = f"  {note}" if note else ""
            print(f"{self.what}: {self.done}{of} {self.unit}, {rate:.2f} {self.unit}/s{left}{note}", flush=True)

    def download(self, done: int, total: int | None) -> None:
        """The callback of `models.downloads.fetch`: `done` of `total` bytes are there."""
        self.total = total
        if self.bar is None and self._has_terminal():
            self._open_bar()
        self.update(done - self.done)


LACKS_MEMORY = "this does not fit into memory: use smaller values (batch, positions, layers) or smaller images"


class Terminated(BaseException):
    """SIGTERM arrived."""


def _on_sigterm(*_: object) -> None:
    raise Terminated


def lacks_memory(error: Exception) -> bool:
    """Whether an exception says that memory is exhausted, the device's or the computer's."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, which is not imported here
        or "can't allocate memory" in str(error)
    )


class SafePoints:
    """Holds Ctrl-C and SIGTERM back, so that they stop a loop only where its state is whole and can be saved.

        with SafePoints() as signals:
            for …:
                …one step…
                signals.check(save)

    A second signal acts at once; what was saved before stands.
    """

    def __init__(self):
        self.caught: int | None = None
        self.earlier: dict[int, Any] = {}

    def __enter__(self) -> "SafePoints":
        if threading.current_thread() is threading.main_thread():
            self.earlier = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if kind is None:
            self.check()

    def _note(self, number: int, _frame: object) -> None:
        if self.caught is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        self.caught = number

    def check(self, save: Callable[[], object] | None = None, everywhere: bool = False) -> None:
        """If a signal came, here or (`everywhere`) to another rank: call `save`, then raise what it stands for."""
        if self.caught is None and not everywhere:
            return
        number = self.caught
        if save is not None:
            save()
        self.caught = None
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def explanation(error: Exception) -> str | None:
    """The one line for what a user can mend; None for a bug, which keeps its traceback."""
    if isinstance(error, UserError):
        return one_line(str(error))
    if isinstance(error, OSError) and error.errno in USERS_ERRORS:
        where = str(error.filename or "the workspace")
        return one_line(f"{where[:200]!r}: {error.strerror}; mend that and run again to go on")
    if isinstance(error, MemoryError | RuntimeError) and lacks_memory(error):
        return LACKS_MEMORY
    return None


def one_line(text: str) -> str:
    """Text without line breaks, and without what would steer a terminal."""
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """Text that can be written as UTF-8 and shown on a terminal, whatever bytes a file's name has."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def run(main: Callable[[], int | None]) -> int:
    """Run a script's `main` and turn what ends it into an exit code.

    0 success; 2 a user's mistake, in one line on stderr; 130 Ctrl-C and 143 SIGTERM, with a line on how to go on.
    Other exceptions keep their traceback. Of several ranks one speaks.
    """
    name = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, _on_sigterm)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        return main() or 0
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
        return 130 if isinstance(stop, KeyboardInterrupt) else 143
