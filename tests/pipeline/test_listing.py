"""Which files count as images: in folders, lists and archives, the same for every stage."""

import zipfile
from pathlib import Path

import pytest

from models.errors import UserError
from pipeline import images, listing, sources
from tests.conftest import make_photo


def write_photo(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images.write_png(path, make_photo(seed, 20, 24))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images at the top and in folders, some without a proper extension, among files of other kinds."""
    root = tmp_path / "folder"
    for name in ("b.png", "a.png", "sub/below/c.PNG", "photo.HEIC", "noextension", "empty.png"):
        write_photo(root / name).with_name(".cnn-vlm").unlink()
    (root / "empty.png").write_bytes(b"")
    for name in ("._a.png", "README.pdf", "features.h5", "notes.txt", "sub/a.xml", ".DS_Store", "sub/Thumbs.db"):
        (root / name).write_bytes(b"%PDF-1.4 or whatever")
    return root


GOOD = ["a.png", "b.png", "noextension", "photo.HEIC", "sub/below/c.PNG"]


def test_stages_and_training_find_the_same_images(folder: Path) -> None:
    entries = sources.list_images(str(folder), None, 0)
    assert [entry.name for entry in entries if not entry.problem] == GOOD
    files = listing.images_below(folder)
    assert [str(file.relative_to(folder)) for file in files] == sorted([*GOOD, "empty.png"])
    named, problems = images.list_images([str(folder)])
    assert sorted(named.values()) == files and not problems
    for name in GOOD:
        assert images.read_rgb(folder / name).shape == (20, 24, 3)


def test_a_subset_is_one_of_images(tmp_path: Path) -> None:
    for i in range(12):
        write_photo(tmp_path / "d" / f"{i}.png", i)
        (tmp_path / "d" / f"{i}.xml").write_text("<annotation/>")
    entries = sources.list_images(str(tmp_path / "d"), 6, 0)
    assert sum(not entry.problem for entry in entries) == 6
    assert sources.list_images(str(tmp_path / "d"), 6, 0) == entries != sources.list_images(str(tmp_path / "d"), 6, 1)


def test_lists_as_others_write_them(tmp_path: Path) -> None:
    for name in ("a.png", "b 1.png", "d/c.png", "e#1.png", "f 0.png", "g.png", "h.png"):
        write_photo(tmp_path / name)
    lines = [
        "a.png 0",  # Caffe's
        "b 1.png\t12",
        "d\\c.png",
        "e#1.png   # a comment",
        "f 0.png",  # called so
        '"g.png"',
        "",
        "# a comment",
        "  'h.png', 3",
        "gone.png",
    ]
    for mark, end, encoding in (("", "\n", "utf-8"), ("\ufeff", "\r\n", "utf-8"), ("", "\r\n", "utf-16")):
        (tmp_path / "list.txt").write_bytes((mark + end.join(lines)).encode(encoding))
        entries = sources.list_images(str(tmp_path / "list.txt"), None, 0)
        found = [entry.name for entry in entries if not entry.problem]
        assert found == ["a.png", "b 1.png", "d/c.png", "e#1.png", "f 0.png", "g.png", "h.png"]
        assert [(e.name, e.problem) for e in entries if e.problem] == [("gone.png", "does not exist")]


def test_archives_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(write_photo(tmp_path / "a.png"), "a.png")
    for name, told in (("images.zip", r"is an archive \(zip"), ("a.png", "is a single image")):
        with pytest.raises(UserError, match=told):
            sources.list_images(str(tmp_path / name), None, 0)


def test_lists_of_homes_and_what_is_no_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_photo(tmp_path / "d" / "a.png")
    (tmp_path / "list.txt").write_text("~/d/a.png\n")
    assert [entry.problem for entry in sources.list_images(str(tmp_path / "list.txt"), None, 0)] == [""]
    for text, told in (
        ("version https://git-lfs.github.com/spec/v1\nsize 3\n", "is a Git LFS pointer"),
        ("<!DOCTYPE html>\n404", "is a web page"),
    ):
        (tmp_path / "val.tar").write_text(text)
        with pytest.raises(UserError, match=told):
            sources.list_images(str(tmp_path / "val.tar"), None, 0)
        with pytest.raises(UserError, match=told):
            images.read_rgb(tmp_path / "val.tar")
