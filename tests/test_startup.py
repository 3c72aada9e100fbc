"""--help of every script and command answers without the libraries that take seconds to import."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = [[path.name] for path in sorted(ROOT.glob("*.py"))]
COMMANDS = [["evaluate.py", "fixations"], ["evaluate.py", "reconstruction"], ["benchmarks/run.py"]]
SLOW = {"torch", "torchvision", "scipy", "sklearn", "skimage", "matplotlib", "safetensors", "requests"}


@pytest.mark.parametrize("command", SCRIPTS + COMMANDS, ids=" ".join)
def test_help_imports_nothing_slow(command: list[str]) -> None:
    """By the list of what was imported, not by the clock."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "argparse" in imported and not imported & SLOW
    assert "usage:" in result.stdout
