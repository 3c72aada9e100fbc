"""Streams, signals and the environment: none of them changes a result or ends a run with a traceback."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.errors import UserError
from pipeline import array_files, artefacts, plotting, program
from tests.conftest import FLUSH

ROOT = Path(__file__).parent.parent
TALK = """import sys; from pipeline import program
def main():
    for i in range(3000):
        print("line", i, flush=i % 2 == 0)
    print("x" * 70000, file=sys.stderr if len(sys.argv) > 1 else sys.stdout)
sys.exit(program.run(main))
"""


def shell(command: str, **more: str) -> subprocess.CompletedProcess:
    """A command line of bash, with the exit code of its first part."""
    line = f"set -o pipefail; {command}"
    return subprocess.run(["bash", "-c", line], cwd=ROOT, env={**os.environ, **more}, capture_output=True, timeout=120)


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        ("| head -1", 0, b""),
        ("| (exec 0<&-; sleep 1)", 0, b""),
        ("2>&-", 0, b""),
        (">&-", 0, b""),
        ("<&- >&- 2>&-", 0, b""),
        ("> /dev/full", 2, b"-c: 'standard output': No space left on device"),
        ("2> /dev/full", 0, b""),
    ],
)
def test_streams(redirection: str, code: int, said: bytes) -> None:
    if "/dev/full" in redirection and not Path("/dev/full").exists():
        pytest.skip("needs Linux")
    result = shell(f"{sys.executable} -c '{TALK}' {redirection}")
    assert result.returncode == code
    assert result.stderr.startswith(said) and result.stderr.count(b"\n") == bool(said)


HANG_UP = """import os, signal, sys; from pipeline import program; from pipeline.progress import SafePoints
def main():
    with SafePoints() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        signals.check(lambda: print("saved"))
    os.kill(os.getpid(), signal.SIGHUP)
    print("done")
if len(sys.argv) > 1:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
sys.exit(program.run(main))
"""


def test_a_hangup_is_a_wish_to_end_unless_it_is_ignored() -> None:
    """Started under nohup, a command outlives its terminal."""
    result = shell(f"{sys.executable} -c '{HANG_UP}' default")
    assert (result.returncode, result.stdout) == (129, b"saved\n") and result.stderr.count(b"\n") == 1
    result = shell(f"nohup {sys.executable} -c '{HANG_UP}'")
    assert (result.returncode, result.stdout) == (0, b"done\n")


def test_the_first_line_of_a_plan() -> None:
    result = shell(f"{sys.executable} run_all.py --dry-run --preset demo | head -1")
    assert result.returncode == 0 and not result.stderr


def test_a_mistake_is_told_where_standard_error_is_all_there_is() -> None:
    for redirection in (">&-", "2> /dev/null > /dev/full", "2>&-"):
        result = shell(f"{sys.executable} prepare_images.py --source /nowhere {redirection}")
        assert result.returncode == 2
        assert (b"does not exist" in result.stderr) == (redirection == ">&-")


def test_matplotlib_and_docstrings_and_locale(tmp_path: Path) -> None:
    """A figure by `python -OO` under settings that would break it or change it is the same figure."""
    (tmp_path / "matplotlibrc").write_text("axes.titlesize: 30\nfont.family: cursive\nbackend: nonsense\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from pipeline import figures; "
        "figures.picture_row({'a title': figures.np.eye(20)}, Path(sys.argv[2]))"
    )
    pictures = []
    for flags, more in (
        ([], {}),
        (["-OO"], {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "LC_ALL": "POSIX"}),
        ([], {"MPLBACKEND": "nonsense", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX"}),
    ):
        out = tmp_path / "é.png"
        environment = {**os.environ, **more}
        command = [sys.executable, *flags, "-c", code, str(ROOT), str(out)]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
        assert result.returncode == 0, result.stderr.decode()
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1] == pictures[2]


def test_matplotlib_is_imported_at_one_place() -> None:
    others = [
        str(path)
        for path in (
            *ROOT.glob("*.py"),
            *(p for n in ("pipeline", "evaluation", "models") for p in (ROOT / n).rglob("*.py")),
        )
        if "import matplotlib" in (text := path.read_text(encoding="utf-8")) or "from matplotlib" in text
    ]
    assert others == [plotting.__file__]


@pytest.mark.parametrize("script", ["evaluate.py", "train_vlm.py"])
def test_help_without_docstrings(script: str) -> None:
    result = shell(f"{sys.executable} -OO {script} --help")
    assert result.returncode == 0 and b"usage" in result.stdout and not result.stderr


def test_commit_is_this_repositorys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = shutil.which("git")
    if git is None:
        pytest.skip("needs git")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([git, "init", "-q", str(tmp_path)], check=True)
    subprocess.run([git, "-C", str(tmp_path), *identity, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    before = program.code_version()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert program.code_version() == before
    monkeypatch.delenv("GIT_DIR")
    inside = tmp_path / "vendored"
    inside.mkdir()
    monkeypatch.setattr(program, "ROOT", inside)
    assert program.code_version() == "unknown"
    monkeypatch.setattr(program, "ROOT", tmp_path.resolve())
    assert len(program.code_version()) == 12


@pytest.mark.parametrize(
    "number", [errno.EINVAL, errno.ENODEV, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOENT, errno.EIO]
)
def test_any_error_of_the_system_is_a_line(number: int) -> None:
    line = program.explanation(OSError(number, os.strerror(number), "a\x1b[31m.jpg"))
    assert os.strerror(number) in line and "\x1b" not in line and "a\\x1b[31m.jpg" in line
    assert program.explanation(OSError(number, os.strerror(number))) is not None
    assert program.explanation(ValueError("a bug")) is None


def test_folders_that_cannot_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        FLUSH(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    artefacts.write_text(tmp_path / "a.txt", "here")
    assert (tmp_path / "a.txt").read_text() == "here"


def test_files_that_cannot_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    np.save(tmp_path / "a.npy", np.zeros(3))
    artefacts.write_json(tmp_path / "a.npy.json", {})
    monkeypatch.setattr(np.lib.format, "open_memmap", refuse)
    for work in (
        lambda: array_files.ArrayWriter(tmp_path / "b.npy", (2, 3), "uint8", {}),
        lambda: array_files.open_array(tmp_path / "a.npy", "x.py"),
    ):
        with pytest.raises((OSError, UserError)) as caught:
            work()
        line = program.explanation(caught.value)
        assert "No such device" in line and str(tmp_path) in line


def test_names_that_are_not_text(tmp_path: Path) -> None:
    artefacts.write_json(tmp_path / "a.json", {"name": "caf\udce9.jpg"})
    assert artefacts.read_json(tmp_path / "a.json") == {"name": "caf\udce9.jpg"}
