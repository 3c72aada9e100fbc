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


SECTIONS = ("inputs", "model", "descent", "output", "machine")  # of --help, in this order


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line; `parser.inputs("--images", …)` adds an option to that section."""

    _given: Sequence[str] = ()

    def __init__(self, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        self.sections = [self.add_argument_group(title) for title in SECTIONS]
        self.inputs, self.model, self.descent, self.output, self.machine = (s.add_argument for s in self.sections)

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
        """Usage in one line, what the script does, and its options by section."""
        if any(isinstance(action, argparse._SubParsersAction) for action in self._actions):
            return super().format_help()
        formatter = self._get_formatter()
        positionals = [action for action in self._actions if not action.option_strings]
        called = {a: a.metavar or a.dest.upper() for a in positionals}
        names = [f"[{name}]" if a.nargs in ("?", "*") else f"{name}" for a, name in called.items()]
        formatter.add_text(" ".join([f"usage: {self.prog}", "[options]", *names]))
        formatter.add_text(self.description)
        for section in self.sections:
            formatter.start_section(section.title)
            formatter.add_arguments(section._group_actions)
            formatter.end_section()
        return formatter.format_help()


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Says of every option with a `Setting` what its default is, and where that is from."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=min(120, shutil.get_terminal_size().columns - 2))

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return getattr(action.type, "metavar", None) or super()._get_default_metavar_for_optional(action)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        setting = getattr(action, "setting", None)
        if setting is None:
            return action.help
        value = setting.rule if setting.value is None else show(setting.value)
        return f"{action.help} (default: {value}; {setting.source})".replace("%", "%%")


def show(value: Any) -> str:
    """The value of an option as help, first lines and plans print it."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
