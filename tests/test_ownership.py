"""No input is ever overwritten, and no file that this program did not write."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare_images
from models.errors import UserError
from pipeline import artefacts, images, ownership, paths
from tests.conftest import make_photo

places = st.sampled_from(["a", "b", "a/c"])
names = st.sampled_from(
    ["x.npy", "x.npy.json", "x.npy.partial", "rejected.csv", "photo.png", ".x.npy.lock", ".cnn-vlm"]
)
kinds = st.sampled_from(["photo", "symbolic", "hard", "own", "folder link"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(places, names, kinds), max_size=5),
    st.sampled_from(["a", "b", "list"]),
    places,
    st.booleans(),
)
def test_every_input_keeps_its_bytes(tmp_path: Path, files: list, source: str, out: str, overwrite: bool) -> None:
    """Any placing of photos, of somebody's own files and of links among a few folders; stage 1 reads and writes."""
    shutil.rmtree(tmp_path)
    for place in ("a/c", "b"):
        (tmp_path / place).mkdir(parents=True)
    images.write_png(tmp_path / "picture.png", make_photo(0, 20, 30))
    content = (tmp_path / "picture.png").read_bytes()
    kept = [tmp_path / "a" / "first.png"]
    kept[0].write_bytes(content)
    for place, name, kind in files:
        path = tmp_path / place / name
        if os.path.lexists(path):
            continue
        if kind == "photo":
            path.write_bytes(content)
        elif kind == "own":
            path.write_text("my own notes")
        elif kind == "symbolic":
            path.symlink_to(kept[0])
        elif kind == "hard":
            os.link(kept[0], path)
        elif not (tmp_path / place / "link").exists():
            (tmp_path / place / "link").symlink_to(tmp_path / "a", target_is_directory=True)
        if path.is_file() and not path.is_symlink():
            kept.append(path)
    (tmp_path / "list").write_text("a/first.png\n")
    before = {path: path.read_bytes() for path in kept}
    options = ["--source", str(tmp_path / source), "--out", str(tmp_path / out / "x.npy"), "--root", str(tmp_path)]
    for _ in range(2):
        try:
            prepare_images.main([*options, *(["--overwrite"] if overwrite else [])])
        except (UserError, SystemExit):
            break
    assert {path: path.read_bytes() for path in kept} == before


def test_what_is_ours_may_be_written_again(tmp_path: Path) -> None:
    ownership.forget()
    for text in ("one", "two"):
        artefacts.write_text(tmp_path / "a.txt", text)
        ownership.forget()
    assert (tmp_path / "a.txt").read_text() == "two"
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"mine.txt was not written by this program.*move it away, or write elsewhere"):
        artefacts.write_text(tmp_path / "mine.txt", "x")
    ownership.reading(tmp_path / "a.txt")
    (tmp_path / "link").mkdir()
    os.link(tmp_path / "a.txt", tmp_path / "link" / "b.txt")
    for path in (tmp_path / "a.txt", tmp_path / "link" / "b.txt"):
        with pytest.raises(UserError, match="is read by this run and would be replaced"):
            artefacts.write_text(path, "x")
    ownership.forget()


def test_files_of_earlier_versions_may_be_written_again(tmp_path: Path) -> None:
    for name in ("vlm.safetensors", "log.csv", "photo.png"):
        (tmp_path / name).write_text("old")
    (tmp_path / "vlm.safetensors.json").write_text('{"stage": "train_vlm"}')
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "loss.png").write_text("old")
    ownership.forget()
    for name in ("log.csv", "figures/loss.png"):
        artefacts.write_text(tmp_path / name, "new")
    with pytest.raises(UserError, match=r"photo.png was not written"):
        artefacts.write_text(tmp_path / "photo.png", "new")


def test_own_results_are_no_inputs(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"somebody's")
    images.write_png(tmp_path / "photo-overlay.png", np.zeros((2, 2), np.uint8))
    assert [path.name for path in images.list_images([str(tmp_path)])[0].values()] == ["photo.png"]


def test_one_place_is_one_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.user_path("~/x") == tmp_path / "x"
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to("d")
    with artefacts.claim(tmp_path / "d"):
        for other in (tmp_path / "link", tmp_path / "link" / ".." / "d"):
            with pytest.raises(UserError, match="is being written by"), artefacts.claim(other):
                pass
    monkeypatch.chdir(tmp_path / "d")
    for here in (".", "./"):
        with artefacts.claim(Path(here)):
            artefacts.write_text(Path(here) / "a.txt", here)
    assert paths.beside(Path("/"), ".", ".lock") == Path("/..lock")
