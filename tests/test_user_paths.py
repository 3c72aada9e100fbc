"""Paths as people have them, through the command line: inputs beside outputs, odd names, other locales."""

import errno
import os
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

import evaluate
import reconstruct
import saliency
from models.backbones import find_architecture
from models.errors import UserError
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


def tiny_vlm(workspace: Path) -> list[str]:
    """Options that take the language models of a tiny workspace."""
    return ["--vlm", str(workspace / "vlm.safetensors"), "--weights", "random", "--device", "cpu"]


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
    vlm = tiny_vlm(tiny_workspace)

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
    vlm = tiny_vlm(tiny_workspace)
    capsys.readouterr()
    assert saliency.main([str(folder), *vlm, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "a:b?" in told and "Invalid argument" in told
    assert artefacts.read_sidecar(tmp_path / "out" / "fine.npy", "saliency.py")
    assert not (tmp_path / "out" / "a:b?.npy.json").exists()


def test_odd_pictures_in_an_evaluation(
    tmp_path: Path,
    tiny_workspace: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """A damaged one is left out and listed; one that a network cannot see is named."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(3):
        write_photo(folder / f"{seed}.png", seed)
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:500])
    vlm = tiny_vlm(tiny_workspace)
    capsys.readouterr()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    natural = ["naturalness", str(folder), *vlm, "--spoilings", "mirrored", "--out", "."]
    assert evaluate.main(natural) == 0 and (tmp_path / "here" / "table.md").is_file()
    told = capsys.readouterr()
    assert "cut.png is damaged" in told.err and told.err.count("left out: ") == 1 and "3 images" in told.out
    once = ["--iterations", "1", "--target", "fc8", "--learning-rate", "1"]
    assert not reconstruct.main([str(folder / "0.png"), *vlm, *once, "--out", "."])
    assert (tmp_path / "here" / "reconstruction.png").is_file()
    Image.fromarray(make_photo(0, 3, 3)).save(folder / "small.png")
    (tmp_path / "fixations.csv").write_text("image,x,y\n0.png,1,1\nsmall.png,1,1\n")
    looks = ["fixations", "--stimuli", str(folder), "--fixations", str(tmp_path / "fixations.csv")]
    with pytest.raises(UserError, match="^small.png: an image of 3×3 pixels is too small for conv2 of tiny"):
        evaluate.main([*looks, *vlm, "--out", str(tmp_path / "looks")])


def test_weights_and_targets_in_a_process_of_their_own(tmp_path: Path) -> None:
    """Convolutions of AlexNet as a training script leaves them are read; what else is given is named in a line."""
    write_photo(tmp_path / "a.png")
    shapes = find_architecture("alexnet").parameter_shapes()
    kept = {name: torch.randn(shape) for name, shape in shapes.items() if name.startswith("conv")}
    torchvisions = dict(zip(("conv1", "conv2", "conv3", "conv4", "conv5"), (0, 3, 6, 8, 10), strict=True))
    renamed = {f"module.features.{torchvisions[n[:5]]}.{n[6:]}": value for n, value in kept.items()}
    torch.save({"model": {"state_dict": renamed}, "epoch": 3}, tmp_path / "w.pth")
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html>404")
    vlm, once = ["--vlm", str(ROOT / "models" / "pretrained" / "alexnet.safetensors")], ["--iterations", "1"]
    tries = {
        ("saliency.py", "a.png", *vlm, "--weights", "w.pth", "--no-naturalness", "--out", "maps"): "",
        ("saliency.py", "a.png", "--vlm", "pointer.safetensors"): "pointer.safetensors is a Git LFS pointer",
        ("saliency.py", "a.png", *vlm, "--weights", "page.pth"): "page.pth is a web page",
        ("saliency.py", *vlm, "a.png"): "--vlm takes all that follows it: put IMAGE|FOLDER before it",
        ("reconstruct.py", "a.png", *vlm, "--weights", "w.pth", *once, "--target", "mixed4a"): "no tap 'mixed4a'",
        ("reconstruct.py", "a.png", *vlm, "--weights", "w.pth", *once, "--target", "fc7"): "fc7",
    }
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda i, c: run(*c[:1], tmp_path, *c[1:], "--root", f"root{i}"), range(6), tries))
    for (command, told), result in zip(tries.items(), results, strict=True):
        said = result.stderr.decode()
        assert (result.returncode, said.count("\n")) == ((2, 1) if told else (0, 0)), (command, said)
        assert told in said
    assert (tmp_path / "maps" / "a-overlay.png").is_file()
