"""Options that scripts share, and the types of their values.

Nothing here imports torch, so that `--help` answers at once.
"""

import argparse
import importlib
import inspect
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from models.errors import UserError
from pipeline import ownership, parsers
from pipeline.parsers import HelpFormatter, Parser
from pipeline.paths import IS_EMPTY, problem_of, user_path
from pipeline.presets import DEFAULTS, PRESETS, Stage

DEVICES = ("auto", "cpu", "cuda", "mps")
LARGEST_COUNT = 10**9  # of images, updates, …: beyond, sizes would overflow before memory does
LARGEST_NUMBER = 3.4e38  # float32's
LONGEST_PART = 255  # bytes of a file's or folder's name, on the usual file systems


def set_defaults(parser: Parser, settings: Stage) -> None:
    """Make settings the defaults of the options that are called so; --help shows them."""
    parser.set_defaults(**{name: setting.value for name, setting in settings.items()})
    for action in parser._actions:
        if action.dest in settings:
            action.setting = settings[action.dest]


def stage_parser(doc: str, *, workspace: bool = True) -> Parser:
    """A parser with the options every stage has; `doc` is the script's docstring.

    `workspace` adds --preset and --root.
    """
    parser = Parser(description=doc, formatter_class=HelpFormatter)
    add_common_options(parser, workspace=workspace)
    return parser


def command_parser(doc: str, commands: Mapping[str, tuple[Callable, Callable]]) -> Parser:
    """A parser for a script of several commands, each with the options every stage has.

    `commands` are by name what adds the command's options to a parser, and its main, whose docstring explains it.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_options, main) in commands.items():
        about = inspect.cleandoc(main.__doc__ or "")  # python -OO drops docstrings
        first_line = about.partition("\n")[0]
        command = choices.add_parser(name, help=first_line, description=about, formatter_class=HelpFormatter)
        add_common_options(command, workspace=False)
        add_options(command)
    return parser


def add_common_options(parser: Parser, *, workspace: bool) -> None:
    """Options of `stage_parser`."""
    if workspace:
        parser.model(
            "--preset",
            choices=sorted(PRESETS),
            default="alexnet",
            metavar="NAME",
            help=f"whose defaults to take: {', '.join(sorted(PRESETS))} (…_caffe: the paper's; default: alexnet)",
        )
        parser.output("--root", type=folder, help="workspace folder (default: out/<preset>)")
    parser.machine("--device", choices=DEVICES, default="auto", help="auto takes cuda, then mps, then cpu")
    parser.machine("--seed", type=natural, default=0, help="everything that is drawn follows from it (default: 0)")
    parser.output("--overwrite", action="store_true", help="start afresh where finished or partial results stand")
    parser.output("--verbose", action="store_true", help="print all effective arguments, which sidecars hold too")


def parse_args(parser: Parser, argv: list[str] | None, stage: str) -> argparse.Namespace:
    """Parse with the chosen preset's values as the defaults of this stage."""
    first = Parser(add_help=False, prog=parser.prog)
    first.add_argument("--preset", default="alexnet")
    name = first.parse_known_args(argv)[0].preset
    if name in PRESETS:
        parser.set_defaults(root=Path("out") / name)
        set_defaults(parser, PRESETS[name].get(stage, {}))
    return parser.parse_args(argv)


def entry_of(module: str, registry: str) -> Callable[[str], str]:
    """argparse type: a name in a registry of some module, which is imported only once a value is read."""

    def entry(text: str) -> str:
        names = getattr(importlib.import_module(module), registry)
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is unknown: choose from {', '.join(names)}")
        return text

    return entry


def _number(
    name: str, kind: Callable[[str], Any], fits: Callable[[Any], bool], what: str, metavar: str | None = None
) -> Callable[[str], Any]:
    """argparse type: a number that fits; `what` says in an error which do, `metavar` stands in --help."""

    def number(text: str) -> Any:
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text[:40]} is not {what}")
        return value

    number.__name__, number.metavar = name, metavar
    return number


natural = _number("natural", int, lambda v: 0 <= v < 2**63, "an integer from 0 to 2⁶³-1", "N")
positive = _number("positive", int, lambda v: 1 <= v <= LARGEST_COUNT, f"an integer from 1 to {LARGEST_COUNT}", "N")
MOST = f"{LARGEST_NUMBER} at most"
positive_number = _number("positive_number", float, lambda v: 0 < v <= LARGEST_NUMBER, f"a number above 0, {MOST}", "X")
finite_number = _number("finite_number", float, lambda v: abs(v) <= LARGEST_NUMBER, f"a number, {MOST}")
non_negative_number = _number(
    "non_negative_number", float, lambda v: 0 <= v <= LARGEST_NUMBER, f"a number from 0 up, {MOST}", "X"
)
fraction = _number("fraction", float, lambda v: 0 <= v < 1, "in [0, 1)", "X")


def _path(text: str) -> Path:
    """The path that a user means, if it can be one."""
    try:
        path = user_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if any(len(os.fsencode(part)) > LONGEST_PART for part in Path(text).parts):
        raise argparse.ArgumentTypeError(f"{text[:80]!r}… has a name of more than {LONGEST_PART} bytes")
    return path


def _kind(text: str) -> int:
    """stat's type of what stands at a path, 0 for nothing there."""
    path = _path(text)
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        return 0
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise argparse.ArgumentTypeError(f"{text[:80]!r} cannot be used: {reason}") from None


def _may(path: str | Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def readable_file(text: str) -> Path:
    """argparse type: a file that is there and may be read."""
    path = _path(text)
    if (problem := problem_of(path)) not in ("", IS_EMPTY):
        raise argparse.ArgumentTypeError(f"{text!r} {problem}: give a file")
    if not _may(path, os.R_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be read: permission denied")
    ownership.reading(path)
    return path


def readable_path(text: str) -> Path:
    """argparse type: a folder, or a file that may be read."""
    return user_path(text) if _kind(text) == stat.S_IFDIR else readable_file(text)


def folder(text: str) -> Path:
    """argparse type: a folder, there or not yet."""
    if _kind(text) not in (0, stat.S_IFDIR):
        raise argparse.ArgumentTypeError(f"{text!r} is a file: give a folder")
    return user_path(text)


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
    path = user_path(text)
    writable_folder(str(path.parent))
    return path


readable_file.metavar = writable_file.metavar = "FILE"
folder.metavar = writable_folder.metavar = "FOLDER"


def count_or_file(text: str) -> int | Path:
    """argparse type: an integer from 0 up, or a file that is there and may be read."""
    return natural(text) if text.strip().isdecimal() else readable_file(text)


def add_image_options(parser: Parser) -> None:
    """Options that say how images are read."""
    parser.inputs(
        "--range",
        type=finite_number,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="black and white of floats and of more than 8 bits (default, of 16 bits: 0 and 65535)",
    )


def image_facts() -> dict[str, list[float]]:
    """What decides the pixels of images besides their files: the command's --range, where it was given."""
    return {} if parsers.image_range is None else {"range": parsers.image_range}


def as_arguments(**values: Any) -> list[str]:
    """The command line that gives options these values; what is None or False is left out."""
    given: list[str] = []
    for name, value in values.items():
        if value is not None and value is not False:
            several = [] if value is True else value if isinstance(value, list) else [value]
            given += [f"--{name.replace('_', '-')}", *map(str, several)]
    return given


def add_weights_options(parser: Parser) -> None:
    """Options that say where the CNN's weights come from."""
    parser.model(
        "--weights",
        default="auto",
        metavar="auto|random|FILE",
        help="of the CNN: auto (default): the installed package, or a download; random: a control",
    )
    parser.model(
        "--mean-image",
        type=readable_file,
        help="imagenet_mean.binaryproto for the Caffe backbones (default: downloaded)",
    )
    parser.model("--cache", type=folder, help="folder of downloads (default: $CNN_VLM_CACHE or ~/.cache/cnn-vlm)")


class OneOrEach(argparse.Action):
    """Keeps a single value as it is, several as a list."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        """See `argparse.Action`."""
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def add_postprocess_options(parser: Parser) -> None:
    """Options that say how an unnaturalness map becomes a saliency map."""
    each = {"nargs": "+", "action": OneOrEach}
    parser.output("--power", type=positive_number, **each, help="that the map is raised to; one for each --vlm")
    parser.output("--blur", type=fraction, **each, help="σ of the blur, of the image's sides; one for each --vlm")
    parser.model(
        "--predictor",
        **each,
        default="vlm",
        help="what gives the map: the language model by its errors (vlm), or by how improbable these are (surprise); "
        "without one predict-nothing (the energy of features), rarity (its surprise), repeat-last, feature-contrast; "
        "one for each --vlm (default: vlm)",
    )
    parser.output(
        "--centre-prior",
        type=fraction,
        default=0.0,
        metavar="SIGMA",
        help="multiply the map by a Gaussian at the image's centre, σ of its sides (default: none)",
    )
    parser.output(
        "--postprocess",
        choices=("float", "original"),
        help="original rounds to 256 levels on the way, as the paper's code did",
    )
    set_defaults(parser, DEFAULTS["saliency"])
