"""Commands of the README: the install line and the tests are what .ci/run runs, the others are scripts with options."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from pipeline import options

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()]
SCRIPTS = [command for command in COMMANDS if ".py" in command]


def test_install_line_and_tests_are_what_ci_runs() -> None:
    checked = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (install,) = (line for line in COMMANDS if line.startswith("pip install"))
    for part in install.split(" && "):
        assert part.replace("pip install", "pip install --quiet") in checked
    (tests,) = (line for line in COMMANDS if "pytest" in line)
    assert tests in checked.splitlines()
    assert len(SCRIPTS) == len(COMMANDS) - 2 > 12


@pytest.mark.parametrize("command", SCRIPTS)
def test_every_command_is_understood(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the script's own parser, beside files of the names that the command has."""
    words = shlex.split(command)
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    for name in ("photo.jpg", "job4/vlm.safetensors", "job5/vlm.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    script = words[place].removesuffix(".py")
    parser = importlib.import_module(script).get_parser()
    options.parse_args(parser, words[place + 1 :], script)
