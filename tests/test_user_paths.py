"""Paths as people have them, through the command line: inputs beside outputs, odd names, other locales."""

import errno
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

import saliency
from pipeline import artefacts, images
from tests.conftest import make_photo
from tests.pipeline.test_options import tiny, tiny_workspace  # noqa: F401 (fixtures)

ROOT = Path(__file__).parent.parent
POSIX = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
BYTES = os.fsdecode(b"caf\xe9.png")  # not UTF-8
STEERS = "a\x1b[31m\nb.png"


def write_photo(path: Path, seed: int = 0) -> Path:
    images.write_png(path, make_photo(seed, 66, 70))
    path.with_name(".cnn-vlm").unlink()
    return path


def run(script: str, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, timeout=500)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with a plain name, one that is no text, one that would steer a terminal and one of another alphabet."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed, name in enumerate(("cat.png", BYTES, STEERS, "猫.png")):
        write_photo(folder / name, seed)
    return folder


def test_stage_1_beside_its_inputs(photos: Path) -> None:
    """The default workspace lies inside the source; the second run finds the first one's results, and no others."""
    for environment, told in (({}, b"4 images, 0 rejected"), (POSIX, b"is finished: nothing to do")):
        result = run("prepare_images.py", photos, "--source", ".", "--verbose", **environment)
        assert result.returncode == 0 and not result.stderr, result.stderr
        assert told in result.stdout and b"\x1b" not in result.stdout
    with tarfile.open(photos / "x.tar", "w") as archive:
        archive.add(photos / "cat.png", "cat.png")
    (photos / "list.txt").write_text("cat.png\n猫.png\n", encoding="utf-8")
    result = run("prepare_images.py", photos, "--source", "list.txt", "--root", "listed", **POSIX)
    assert result.returncode == 0 and b"2 images, 0 rejected" in result.stdout, result.stderr
    for source in ("x.tar", "list.txt"):
        before = (photos / source).read_bytes()
        result = run("prepare_images.py", photos, "--source", source, "--out", f"./../photos/{source}", "--overwrite")
        assert result.returncode == 2 and result.stderr.count(b"\n") == 1, result.stderr
        assert b"is read by this run and would be replaced" in result.stderr
        assert (photos / source).read_bytes() == before


def test_maps_of_names_that_are_no_text(photos: Path) -> None:
    """In the folder above, under a locale without letters."""
    vlm = ["--vlm", str(ROOT / "models" / "pretrained" / "alexnet.safetensors"), "--weights", "random"]
    named = [f"photos/{name}" for name in (BYTES, STEERS, "猫.png")]
    result = run("saliency.py", photos.parent, *named, *vlm, "--verbose", "--out", ".", **POSIX)
    assert result.returncode == 0, result.stderr
    assert b"\x1b" not in result.stdout + result.stderr
    assert len(list(photos.parent.glob("*-overlay.png"))) == 3 and (photos.parent / "猫-overlay.png").exists()


def test_maps_beside_their_photos(tmp_path: Path, tiny_workspace: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    """A photo is never replaced, and maps never become photos, however often and with what a shell makes of `*`."""
    vlm = ["--vlm", str(tiny_workspace / "vlm.safetensors"), "--weights", "random", "--device", "cpu"]

    def maps(*inputs: Path) -> list[str]:
        """What a run says of its maps; names of all photos and maps."""
        assert saliency.main([*map(str, inputs), *vlm, "--out", str(tmp_path)]) == 0
        assert {path: path.read_bytes() for path in photos} == photos
        return sorted(path.name.removesuffix("-overlay.png") for path in tmp_path.glob("*-overlay.png"))

    def new(name: str, seed: int) -> None:
        path = tmp_path / name
        Image.fromarray(make_photo(seed, 66, 70)).save(path)
        photos[path] = path.read_bytes()

    photos: dict[Path, bytes] = {}
    new("a.jpg", 0)
    assert maps(tmp_path) == ["a"]
    new("cat.png", 1)
    new("b.jpg", 2)
    for _ in range(2):
        assert maps(tmp_path) == ["a", "b", "cat.png"]
        assert "3 saliency maps" in capsys.readouterr().out
    assert maps(*sorted(path for path in tmp_path.glob("[!.]*"))) == ["a", "b", "cat.png"]
    (tmp_path / "a.png").unlink()  # a map, whose name a new photo takes
    new("a.png", 3)
    assert maps(tmp_path) == ["a", "a.jpg", "a.png", "b", "cat.png"]


def test_a_disk_that_refuses_a_name(
    tmp_path: Path,
    tiny_workspace: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """It costs the map of that image, in one line, and of no other."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed, name in enumerate(("a:b?.png", "fine.png")):
        write_photo(folder / name, seed)
    write = Path.write_bytes

    def refuse(path: Path, content: bytes) -> int:
        if ":" in path.name:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    vlm = ["--vlm", str(tiny_workspace / "vlm.safetensors"), "--weights", "random", "--device", "cpu"]
    capsys.readouterr()
    assert saliency.main([str(folder), *vlm, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "a:b?" in told and "Invalid argument" in told
    assert artefacts.read_sidecar(tmp_path / "out" / "fine.npy", "saliency.py")
    assert not (tmp_path / "out" / "a:b?.npy.json").exists()
