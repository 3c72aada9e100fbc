"""--help of every script and command answers without the libraries that take seconds to import."""

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCREEN_AND_A_HALF = 60  # lines of a terminal of 40
ROOT = Path(__file__).parent.parent
SCRIPTS = [[path.name] for path in sorted(ROOT.glob("*.py"))]
COMMANDS = [["evaluate.py", "fixations"], ["evaluate.py", "reconstruction"], ["benchmarks/run.py"]]
SLOW = {"torch", "torchvision", "scipy", "sklearn", "skimage", "matplotlib", "safetensors", "requests"}


@pytest.mark.parametrize("command", SCRIPTS + COMMANDS, ids=" ".join)
def test_help_imports_nothing_slow(command: list[str]) -> None:
    """By the list of what was imported, not by the clock."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "122"},
    )
    assert result.returncode == 0, result.stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "argparse" in imported and not imported & SLOW
    assert "usage:" in result.stdout
    assert len(result.stdout.splitlines()) <= SCREEN_AND_A_HALF or command[0].startswith("benchmarks")


def test_the_geometry_of_a_chain_needs_no_compiler() -> None:
    """Which PyTorch imports for two seconds where its own layers are run without data."""
    code = (
        "import sys; from models.backbones import find_architecture as find; found = find('vgg16'); found.survey(); "
        "assert found.grid('conv5_3', 600, 800) == (37, 50) and found.channels('fc8') == 1000; "
        "assert not {'torch._dynamo', 'torchvision'} & sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_the_colours_of_an_overlay_need_no_figures() -> None:
    """Of matplotlib, whose figures take half a second."""
    code = "import sys; from pipeline.plotting import colormap; colormap('inferno'); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "matplotlib" in result.stdout.split() and "matplotlib.figure" not in result.stdout.split(), result.stderr


def test_every_option_stands_in_a_section_of_help() -> None:
    for name in [path.stem for path in sorted(ROOT.glob("*.py"))]:
        parser = importlib.import_module(name).get_parser()
        commands = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for command in commands[0].choices.values() if commands else [parser]:
            shown = {action.dest for action in command._actions} - {"help"}
            assert shown == {action.dest for section in command.sections for action in section._group_actions}
            told = command.format_help()
            assert "None" not in told.partition("\n")[0], "a usage without the name of what is to be given"
            assert all(
                action.option_strings[0] in told
                for action in command._actions
                if action.dest != "help" and action.option_strings
            )
