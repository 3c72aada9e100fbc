"""The command line itself: one-line errors, help in sections, defaults with their source.

Nothing here imports torch, so that `--help` answers at once.
"""

import argparse
import itertools
import shutil
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from pipeline import ownership

image_range: list[float] | None = None  # of the command that runs: --range, black and white of its deep images


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    _given: Sequence[str] = ()

    def parse_args(self, *arguments: Any, **more: Any) -> argparse.Namespace:
        """As usual; a new command begins, whose inputs the types of options note."""
        global image_range
        ownership.forget()
        args = super().parse_args(*arguments, **more)
        image_range = given = getattr(args, "range", None)
        if given is not None and not given[0] < given[1]:
            self.error(f"--range {given[0]:g} {given[1]:g}: black must be the smaller number")
        return args

    def parse_known_args(self, given: Sequence[str] | None = None, namespace: Any = None) -> tuple:
        """As usual; `error` knows what was given."""
        self._given = list(sys.argv[1:] if given is None else given)
        return super().parse_known_args(given, namespace)

    def _swallowed(self, message: str) -> str:
        """A hint where an option of several values may have taken the argument that stood behind it."""
        taking = {name for a in self._actions if a.nargs in ("+", "*") for name in a.option_strings}
        what = next((a.metavar for a in self._actions if not a.option_strings and isinstance(a.metavar, str)), None)
        for place, name in enumerate(self._given):
            values = list(itertools.takewhile(lambda text: not text.startswith("-"), self._given[place + 1 :]))
            told = "arguments are required" in message or message.startswith(f"argument {name}:")
            if what and name in taking and len(values) > 1 and told:
                return f"; {name} takes all that follows it: put {what} before it, or after --"
        return ""

    def error(self, message: str) -> NoReturn:
        """Print one line on stderr and exit with code 2."""
        message += self._swallowed(message)
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see --help)\n")

    def format_help(self) -> str:
        """Usage in one line, what the script does, and its options by `SECTIONS`."""
        if any(isinstance(action, argparse._SubParsersAction) for action in self._actions):
            return super().format_help()
        formatter = self._get_formatter()
        positionals = [action for action in self._actions if not action.option_strings]
        called = {a: a.metavar or a.dest.upper() for a in positionals}
        names = [f"[{name}]" if a.nargs in ("?", "*") else f"{name}" for a, name in called.items()]
        formatter.add_text(" ".join([f"usage: {self.prog}", "[options]", *names]))
        formatter.add_text(self.description)
        for title in dict.fromkeys(SECTIONS.values()):
            formatter.start_section(title)
            formatter.add_arguments([a for a in self._actions if a.dest != "help" and SECTIONS.get(a.dest) == title])
            formatter.end_section()
        return formatter.format_help()


SECTIONS = {  # of --help, by the option's name
    **dict.fromkeys(
        "inputs source image folders folder stimuli fixations dataset skip limit spoilings reconstructions maps "
        "baseline images rows held_out exclude num_images workers strict features from_iteration merge export "
        "figures max_side range views random_crop flip".split(),
        "inputs",
    ),
    **dict.fromkeys(
        "preset backbone weights mean_image cache vlm init cell layers layer target statistics dtype pca_positions "
        "add predictor list_layers regularizer layer_weights feature_weight vlm_weight energy_weight l2_weight "
        "tv_weight".split(),
        "model",
    ),
    **dict.fromkeys(
        "descent iterations reconstruction_iterations batch_size joint_learning_rate learning_rate momentum decay_at "
        "decay_factor precision restarts start_noise frequency_exponent decorrelate in_turn".split(),
        "descent",
    ),
    **dict.fromkeys(
        "out root overwrite verbose snapshot_every log_every checkpoint_every grid power blur centre_prior postprocess "
        "naturalness first last dry_run".split(),
        "output",
    ),
    **dict.fromkeys("device processes gflops seed".split(), "machine"),
}
METAVARS = {"positive": "N", "natural": "N", "positive_number": "X", "non_negative_number": "X", "fraction": "X"}
METAVARS |= {"readable_file": "FILE", "writable_file": "FILE", "folder": "FOLDER", "writable_folder": "FOLDER"}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Says of every option with a `Setting` what its default is, and where that is from."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=min(120, shutil.get_terminal_size().columns - 2))

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        name = getattr(action.type, "__name__", "")
        return METAVARS.get(name) or super()._get_default_metavar_for_optional(action)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        setting = getattr(action, "setting", None)
        if setting is None:
            return action.help
        value = setting.rule if setting.value is None else show(setting.value)
        return f"{action.help} (default: {value}; {setting.source})".replace("%", "%%")


def show(value: Any) -> str:
    """The value of an option as help, first lines and plans print it."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
