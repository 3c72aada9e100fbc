"""Images of every kind in, sources of every kind, and what is refused."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare_images
from models.errors import UserError
from pipeline import artefacts
from pipeline.images import fit_to, limit_side, read_rgb, resize_to_square
from pipeline.sources import list_images
from tests.conftest import make_photo

RGB = make_photo(0, 40, 60)


def encoded(mode: str, form: str = "PNG", **options) -> io.BytesIO:
    buffer = io.BytesIO()
    Image.fromarray(RGB).convert(mode).save(buffer, format=form, **options)
    buffer.seek(0)
    return buffer


def test_modes() -> None:
    grey = np.asarray(Image.fromarray(RGB).convert("L"))
    assert np.array_equal(read_rgb(encoded("RGB"), "x"), RGB)
    assert np.array_equal(read_rgb(encoded("RGBA"), "x"), RGB), "alpha is dropped"
    for mode in ("L", "LA"):
        assert np.array_equal(read_rgb(encoded(mode), "x"), np.repeat(grey[:, :, None], 3, axis=2))
    palette = read_rgb(encoded("P"), "x")
    assert palette.shape == RGB.shape and np.abs(palette.astype(int) - RGB).mean() < 40, "colours, not indices"
    cmyk = read_rgb(encoded("CMYK", "JPEG", quality=95), "x")
    assert np.abs(cmyk.astype(int) - RGB).mean() < 12, "converted, not C, M, Y taken for R, G, B"
    lab = read_rgb(encoded("RGB", "WEBP", lossless=True), "x")
    assert np.array_equal(lab, RGB)


@pytest.mark.parametrize("kind", ["uint16", "int32", "float32 0-1", "float32 0-255"])
def test_deep_grey(kind: str) -> None:
    grey = RGB[:, :, 0]
    values = {
        "uint16": grey.astype(np.uint16) * 257,
        "int32": grey.astype(np.int32) * 257,
        "float32 0-1": grey.astype(np.float32) / 255,
        "float32 0-255": grey.astype(np.float32),
    }[kind]
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="TIFF")
    buffer.seek(0)
    assert np.array_equal(read_rgb(buffer, "x")[:, :, 1], grey)


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    assert np.array_equal(read_rgb(encoded("RGB", "PNG", exif=exif), "x"), np.rot90(RGB, -1))


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.fromarray(make_photo(i, 20, 20)) for i in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, format="PNG", save_all=True, append_images=frames[1:])
    buffer.seek(0)
    assert np.array_equal(read_rgb(buffer, "x"), np.asarray(frames[0]))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "not an image"), (b"hello", "not an image"), (encoded("RGB").getvalue()[:300], "is damaged")],
)
def test_unreadable_images(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_rgb(path)
    assert str(path) in str(caught.value)


def test_missing_folder_and_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_rgb(tmp_path / "x.png")
    with pytest.raises(UserError, match="is a folder"):
        read_rgb(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="is too large"):
        read_rgb(encoded("RGB"), "bomb.png")


def test_resizing() -> None:
    blocks = np.kron(np.arange(4, dtype=np.uint8).reshape(2, 2, 1) * 50, np.ones((128, 256, 3), np.uint8))
    small = resize_to_square(blocks.astype(np.uint8))
    assert small.shape == (256, 256, 3)
    assert small[0, 0, 0] == 0 and small[0, 255, 0] == 50 and small[255, 0, 0] == 100, "rows and columns in place"
    doubled = np.repeat(np.repeat(RGB, 2, axis=0), 2, axis=1)
    assert np.array_equal(limit_side(doubled, 60), RGB), "area averaging"
    assert limit_side(RGB, 60) is RGB and limit_side(RGB, None) is RGB
    assert fit_to(RGB, 40, 60) is RGB and fit_to(RGB, 30, 30).shape == (30, 30, 3)


def add(tar: tarfile.TarFile, name: str, content: bytes, **attributes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in attributes.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(make_photo(seed, 30 + seed, 40)).save(buffer, format="PNG")
    return buffer.getvalue()


def prepared(source: Path, root: Path, *options: str) -> tuple[np.ndarray, list[str], str]:
    prepare_images.main(["--preset", "alexnet", "--source", str(source), "--root", str(root), *options])
    names = json.loads((root / "images.npy.json").read_text())["names"]
    return np.load(root / "images.npy"), names, (root / "rejected.csv").read_text()


def test_tar_folder_list_and_tar_of_tars_give_the_same(tmp_path: Path) -> None:
    flat, nested = tmp_path / "flat.tar", tmp_path / "nested.tar"
    folder = tmp_path / "folder"
    folder.mkdir()
    with tarfile.open(flat, "w") as tar, tarfile.open(nested, "w") as outer:
        for i in (2, 0, 1):
            add(tar, f"{i}.png", png(i))
            (folder / f"{i}.png").write_bytes(png(i))
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as class_tar:
                add(class_tar, "0.png", png(i))
            add(outer, f"n0{i}.tar", inner.getvalue())
    listing = tmp_path / "list.txt"
    listing.write_text("".join(f"folder/{i}.png\n" for i in (1, 0, 2)))
    expected = np.stack([resize_to_square(make_photo(i, 30 + i, 40)) for i in range(3)])
    for source, names in (
        (flat, ["0.png", "1.png", "2.png"]),
        (folder, ["0.png", "1.png", "2.png"]),
        (listing, ["folder/0.png", "folder/1.png", "folder/2.png"]),
        (nested, ["n00.tar/0.png", "n01.tar/0.png", "n02.tar/0.png"]),
    ):
        images, found, rejected = prepared(source, tmp_path / f"out-{source.stem}")
        assert np.array_equal(images, expected) and found == names
        assert rejected.strip() == "name,reason"
    assert {p.name for p in tmp_path.iterdir()} >= {"flat.tar", "folder"} and not (tmp_path / "0.png").exists()


def test_hostile_tar(tmp_path: Path) -> None:
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "good.png", png(0))
        add(tar, "../escape.png", png(1))
        add(tar, "/absolute.png", png(2))
        add(tar, "link.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "hard.png", b"", type=tarfile.LNKTYPE, linkname="good.png")
        add(tar, "device", b"", type=tarfile.CHRTYPE)
        add(tar, "twice.png", b"not the last")
        add(tar, "twice.png", png(3))
        add(tar, "text.jpg", b"no image")
    before = set(tmp_path.rglob("*"))
    images, names, rejected = prepared(path, tmp_path / "out")
    assert names == ["../escape.png", "/absolute.png", "good.png", "twice.png"] and len(images) == 4
    for name in ("link.png", "hard.png", "device", "text.jpg", "twice.png"):
        assert name in rejected
    outside = set(tmp_path.rglob("*")) - before - set((tmp_path / "out").rglob("*")) - {tmp_path / "out"}
    assert not outside and not (tmp_path.parent / "escape.png").exists()
    with pytest.raises(UserError, match="--strict"):
        prepared(path, tmp_path / "strict", "--strict")


def test_truncated_and_compressed_tars(tmp_path: Path) -> None:
    path = tmp_path / "whole.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(4):
            add(tar, f"{i}.png", png(i))
    cut = tmp_path / "cut.tar"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    images, names, rejected = prepared(cut, tmp_path / "out")
    assert 1 <= len(names) < 4 and len(images) == len(names)
    assert "truncated" in rejected or "damaged" in rejected
    with tarfile.open(tmp_path / "small.tgz", "w:gz") as tar:
        add(tar, "0.png", png(0))
    with pytest.raises(UserError, match="is compressed"):
        list_images(str(tmp_path / "small.tgz"), None, 0)


def test_subset_is_reproducible_and_sorted(photos: Path) -> None:
    first, second = (list_images(str(photos), 5, 7) for _ in range(2))
    assert first == second and [e.name for e in first] == sorted(e.name for e in first)
    assert list_images(str(photos), 5, 8) != first
    assert len(list_images(str(photos), 99, 0)) == 12


def test_odd_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(png(0))
    (tmp_path / "a" / ".hidden.png").write_bytes(png(0))
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / os.fsdecode(b"n\xffme.png")).write_bytes(png(1))
    entries = list_images(str(tmp_path), None, 0)
    assert sorted(e.name for e in entries) == ["a/0.png", "n\\udcffme.png"]
    with pytest.raises(UserError, match="holds no files"):
        list_images(str(tmp_path / "a" / "nothing"), None, 0) if (tmp_path / "a" / "nothing").mkdir() is None else None
    with pytest.raises(UserError, match="does not exist"):
        list_images(str(tmp_path / "x"), None, 0)


def test_killed_preparation_goes_on(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, names, _ = prepared(photos, tmp_path / "whole", "--workers", "1")
    monkeypatch.setattr(prepare_images, "MARK_EVERY", 3)
    load = prepare_images.load_square
    calls = []

    def failing(entry):
        calls.append(entry.name)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return load(entry)

    monkeypatch.setattr(prepare_images, "load_square", failing)
    with pytest.raises(KeyboardInterrupt):
        prepared(photos, tmp_path / "cut", "--workers", "1")
    calls.clear()
    monkeypatch.setattr(prepare_images, "load_square", lambda entry: calls.append(entry.name) or load(entry))
    again, names_again, _ = prepared(photos, tmp_path / "cut", "--workers", "1")
    assert len(calls) < 12 and names_again == names and np.array_equal(again, whole)
    for name in ("images.npy", "rejected.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_array_artefacts_are_refused_where_they_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    with pytest.raises(UserError, match="run it first"):
        artefacts.open_array(path, "it")
    artefacts.write_array(path, np.zeros((3, 2), np.float32))
    with pytest.raises(UserError, match="has no sidecar"):
        artefacts.open_array(path, "it")
    sidecar = artefacts.sidecar_path(path)
    artefacts.write_json(sidecar, {"shape": [3, 2], "dtype": "float32"})
    assert artefacts.open_array(path, "it")[0].shape == (3, 2)
    artefacts.write_json(sidecar, {"shape": [3, 3], "dtype": "float32"})
    with pytest.raises(UserError, match="its sidecar says"):
        artefacts.open_array(path, "it")
    sidecar.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        artefacts.open_array(path, "it")
    artefacts.write_json(sidecar, {"shape": [3, 2], "dtype": "float32"})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="cannot be read"):
        artefacts.open_array(path, "it")
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        artefacts.open_array(path, "it")
    with pytest.raises(UserError, match="has .* free"):
        artefacts.check_disk(tmp_path, 10**18)
