"""Images of every kind in, sources of every kind, and what is refused."""

import io
import json
import os
import shutil
import struct
import tarfile
import tempfile
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import prepare_images
import reconstruct
import saliency
from models.backbones import ARCHITECTURES
from models.checkpoints import vlm_tensors, write_tensors
from models.errors import UserError
from models.projection import Projection
from models.vlm import VisualLanguageModel
from pipeline import array_files, artefacts, figures, parsers, program
from pipeline.decoding import to_rgb_array, upright_size
from pipeline.images import (
    LONGEST_NAME,
    fit_to,
    limit_side,
    output_name,
    output_names,
    read_rgb,
)
from pipeline.scaling import area_scale
from pipeline.sources import list_images
from tests.conftest import make_photo
from tests.models.weights.test_weights import TINY
from tests.odd_images import READABLE, REFUSED, postscript
from tests.odd_images import encoded as encode
from tests.pipeline.test_options import unprivileged

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


@pytest.mark.parametrize("form", ["TIFF", "PNG"])
def test_sixteen_bits(form: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(RGB[:, :, 0].astype(np.uint16) * 257).save(buffer, format=form)
    assert np.array_equal(read_rgb(buffer, "x")[:, :, 1], RGB[:, :, 0])


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("f4", 0, 1), ("f4", -1, 1), ("f4", 0, 65535), ("i4", -(2**31), 2**31 - 1), ("i4", 0, 255), ("u2", 0, 4095)],
)
def test_deep_grey_by_range(kind: str, low: float, high: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """No range is guessed: floats and 32 bits need one, and what lies outside is black or white."""
    grey = np.arange(256).reshape(16, 16)
    values = (low + (high - low) * grey / 255).astype(kind)
    values[0, 0], values[-1, -1] = (low, high) if kind != "f4" else (low - 0.5, high * 1.02)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="TIFF")
    if kind != "u2":
        with pytest.raises(UserError, match="nothing says which are black and white: give --range LOW HIGH"):
            read_rgb(buffer, "x")
    monkeypatch.setattr(parsers, "image_range", [low, high])
    assert np.abs(read_rgb(buffer, "x")[:, :, 1].astype(int) - grey).max() <= (kind in ("i4", "u2"))


def test_unsigned_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    bits = np.array([[0, 2**31 - 1], [-(2**31), -1]], np.int32)  # those of 0, …, 2³² - 1
    Image.fromarray(bits).save(buffer, format="TIFF")
    signed, unsigned = (struct.pack("<HHIH", 339, 3, 1, kind) for kind in (2, 1))
    assert signed in buffer.getvalue()
    buffer = io.BytesIO(buffer.getvalue().replace(signed, unsigned))
    monkeypatch.setattr(parsers, "image_range", [0, 2**32 - 1])
    found = read_rgb(buffer, "x")[:, :, 0].ravel().tolist()
    assert found[0] == 0 and found[3] == 255 and {found[1], found[2]} <= {127, 128}


UPRIGHT = {  # what is shown of pixels (H, W, 3) that were stored so
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


ODD_TAGS = (  # EXIF that Pillow reads and cannot write: number, type, count, value
    (282, 2, 4, b"abc\0"),  # a resolution that is text
    (282, 10, 1, struct.pack("<I", 38)),  # one of -1/0, with a sign
    (258, 4, 1, struct.pack("<I", 70_000)),  # bits of a sample
)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("form", ["JPEG", "TIFF", "PNG", "WEBP"])
def test_orientations(form: str, orientation: int) -> None:
    """Pixels and size, also where another tag could not be written again."""
    for odd in (None, *ODD_TAGS) if form == "JPEG" else (None,):
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = exif.tobytes()
        if odd:
            head = struct.pack("<6s2sHIHHHII", b"Exif\0\0", b"II", 42, 8, 2, 274, 3, 1, orientation)
            content = head + struct.pack("<HHI4sIii", *odd, 0, -1, 0)
        buffer = io.BytesIO()
        settings = {"exif": exif if form == "TIFF" else content, **({"lossless": True} if form == "WEBP" else {})}
        Image.fromarray(RGB).save(buffer, format=form, **settings)
        with Image.open(buffer) as stored:
            plain = RGB if form != "JPEG" else np.asarray(Image.open(io.BytesIO(jpeg_without_exif(buffer))))
            assert upright_size(stored) == UPRIGHT[orientation](RGB).shape[:2]
        assert np.array_equal(read_rgb(buffer, "x"), UPRIGHT[orientation](plain))


def jpeg_without_exif(buffer: io.BytesIO) -> bytes:
    content = buffer.getvalue()
    start = content.index(b"\xff\xe1")
    return content[:start] + content[start + 2 + int.from_bytes(content[start + 2 : start + 4], "big") :]


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
    [(b"", "an empty file"), (b"hello", "not an image"), (encoded("RGB").getvalue()[:300], "is damaged")],
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
    small = area_scale(blocks.astype(np.uint8), 256, 256)
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
    expected = np.stack([area_scale(make_photo(i, 30 + i, 40), 256, 256) for i in range(3)])
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
        array_files.open_array(path, "it")
    array_files.write_array(path, np.zeros((3, 2), np.float32))
    with pytest.raises(UserError, match="has no sidecar"):
        array_files.open_array(path, "it")
    sidecar = artefacts.sidecar_path(path)
    artefacts.write_json(sidecar, {"shape": [3, 2], "dtype": "float32"})
    assert array_files.open_array(path, "it")[0].shape == (3, 2)
    artefacts.write_json(sidecar, {"shape": [3, 3], "dtype": "float32"})
    with pytest.raises(UserError, match="its sidecar says"):
        array_files.open_array(path, "it")
    sidecar.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        array_files.open_array(path, "it")
    artefacts.write_json(sidecar, {"shape": [3, 2], "dtype": "float32"})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="cannot be read"):
        array_files.open_array(path, "it")
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        array_files.open_array(path, "it")
    with pytest.raises(UserError, match="has .* free"):
        artefacts.check_disk(tmp_path, 10**18)


@pytest.mark.parametrize("name", READABLE)
def test_odd_images_are_read(name: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    content, expected, tolerance = READABLE[name]
    (tmp_path / name).write_bytes(content)
    for found in (read_rgb(tmp_path / name), read_rgb(io.BytesIO(content), name)):
        assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
        if expected is not None:
            assert found.shape == expected.shape
            assert np.abs(found.astype(int) - expected).mean() <= tolerance
    assert capfd.readouterr() == ("", ""), "neither Pillow nor its libraries speak"


@pytest.mark.parametrize("name", REFUSED)
def test_odd_images_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    started = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch '{started}'\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for source in (tmp_path / name, io.BytesIO(content)):
        with pytest.raises(UserError) as caught:
            read_rgb(source, name)
        assert str(caught.value).startswith(name) and message in str(caught.value)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 400
    assert not started.exists(), "PostScript would be a program"
    assert capfd.readouterr() == ("", "")


def test_ghostscript_would_have_been_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap of the test above works."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch '{tmp_path / 'started'}'\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(OSError), Image.open(io.BytesIO(postscript())) as image:
        image.load()
    assert (tmp_path / "started").exists()


def test_size_is_judged_from_the_header(tmp_path: Path) -> None:
    """In the smallest room: a bomb of 900 million pixels is refused before it is unpacked."""
    for name in ("bomb.png", "bomb.tif", "bomb.gif", "smaller bomb.png"):
        assert len(REFUSED[name][0]) < 200_000
        tracemalloc.start()
        with pytest.raises(UserError, match="is too large"):
            read_rgb(io.BytesIO(REFUSED[name][0]), name)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5_000_000


def odd_folder(folder: Path) -> tuple[set[str], set[str]]:
    """Every odd image in a folder, and links that lead nowhere; which of them can be read, and which cannot."""
    folder.mkdir()
    for name, (content, *_) in (READABLE | REFUSED).items():
        (folder / name).write_bytes(content)
    (folder / "itself.png").symlink_to("itself.png")
    (folder / "nowhere.png").symlink_to("missing.png")
    (folder / "device.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.png")
    for name in ("1x1", "1x5000", "5000x1"):
        width, height = map(int, name.split("x"))
        Image.new("RGB", (width, height), (9, 9, 9)).save(folder / f"{name}.png")
    return set(READABLE), {*REFUSED, "itself.png", "nowhere.png", "device.png", "pipe.png"}


SMALL = {"1x1.png", "1x5000.png", "5000x1.png"}


def test_prepare_lists_what_it_cannot_read(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    good, bad = odd_folder(tmp_path / "in")
    _, names, rejected = prepared(tmp_path / "in", tmp_path / "out")
    assert set(names) == good | SMALL
    assert {line.split(",")[0] for line in rejected.splitlines()[1:]} == bad
    assert capfd.readouterr().err == ""
    with pytest.raises(UserError, match="--strict"):
        prepared(tmp_path / "in", tmp_path / "strict", "--strict")


@pytest.fixture(scope="module")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three prepared images and an untrained language model of a network of some hundred parameters."""
    root = tmp_path_factory.mktemp("tiny")
    (root / "photos").mkdir()
    for i in range(3):
        Image.fromarray(make_photo(i, 30, 40 + i)).save(root / "photos" / f"{i}.png")
    prepare_images.main(["--root", str(root), "--source", str(root / "photos")])
    identity = {
        layer: Projection(torch.zeros(n), torch.ones(n), torch.eye(n)[: n // 2], torch.zeros(n))
        for layer, n in (("conv1", 4), ("conv2", 6))
    }
    statistics = {tap: {"mean": torch.zeros(n), "std": torch.ones(n)} for tap, n in (("data", 3), ("conv2", 6))}
    vlm = VisualLanguageModel(identity, statistics)
    vlm.initialise(0)
    write_tensors(root / "vlm.safetensors", vlm_tensors(vlm), {"backbone": "tiny", "layers": ["conv1", "conv2"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "tiny", TINY)
        patch.setattr(figures, "save_figure", lambda *_: None)  # drawing takes most of the time
        patch.setattr(program, "code_version", lambda: "tested")
        yield root


def outcome(stage, arguments: list, capfd: pytest.CaptureFixture) -> tuple[int, list[str]]:
    """Exit code and lines on stderr, C libraries' included."""
    capfd.readouterr()
    code = program.run(lambda: stage.main([*map(str, arguments), "--device", "cpu", "--weights", "random"]))
    return code, capfd.readouterr().err.splitlines()


def test_saliency_goes_on_past_what_it_cannot_read(
    tiny_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    good, bad = odd_folder(tmp_path / "in")
    inputs = [tmp_path / "in", tmp_path / "missing.png", tmp_path / ("x" * 300), tmp_path / "vacant"]
    (tmp_path / "vacant").mkdir()
    options = ["--root", tiny_root, "--layer", "conv2", "--out", tmp_path / "out"]
    code, lines = outcome(saliency, [*inputs, *options], capfd)
    assert code == 2
    for name in bad | SMALL | {"missing.png", "x" * 300, "vacant"}:
        assert sum(f"/{name}" in line for line in lines) == 1, (name, lines)
    assert len(lines) == len(bad) + len(SMALL) + 3
    assert all(line.startswith("saliency.py: ") and line.isprintable() for line in lines)
    for name in SMALL:
        (line,) = (line for line in lines if f"/{name}:" in line)
        assert line.endswith("is too small for conv2 of tiny: give one of at least 7×7")
    stems = [Path(name).stem for name in READABLE]
    expected = {Path(name).stem if stems.count(Path(name).stem) == 1 else name for name in good}
    assert {p.name[: -len("-unnaturalness.npy")] for p in (tmp_path / "out").glob("*-unnaturalness.npy")} == expected
    assert outcome(saliency, [*inputs, *options], capfd) == (code, lines), "again, with what is finished"


def test_reconstruct_goes_on_past_what_it_cannot_read(
    tiny_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    odd_folder(tmp_path / "in")
    for name in set(READABLE) - {"lab.tif", "transparent palette.png"} | {"5000x1.png"}:  # each takes a while
        (tmp_path / "in" / name).unlink()
    inputs = [tmp_path / "missing.png", tmp_path / "in", tmp_path / ("x" * 300), "--rows", "0"]
    options = ["--root", tiny_root, "--regularizer", "none", "--iterations", "1", "--target", "conv2"]
    code, lines = outcome(reconstruct, [*inputs, *options, "--out", tmp_path / "out"], capfd)
    assert code == 2 and len(lines) == len(REFUSED) + 4 + 2
    assert all(line.startswith("reconstruct.py: ") and line.isprintable() for line in lines)
    done = {p.parent.name for p in (tmp_path / "out").glob("*/reconstruction.npy.json")}
    assert {"lab", "transparent palette", "1x1", "1x5000"} < done and len(done) == 5
    for stage, more in ((saliency, []), (reconstruct, ["--target", "conv2"])):
        one = [tmp_path / "in" / "cut.png", "--root", tiny_root, "--out", tmp_path / "one", *more]
        code, lines = outcome(stage, one, capfd)
        assert code == 2 and len(lines) == 1 and "cut.png is damaged" in lines[0]


def test_image_that_memory_cannot_hold(
    tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The kernel would end the process, and with it the other images."""
    assert TINY.memory("conv1", 10, 12) == 4 * (3 * 10 * 12 + 4 * 8 * 10)
    assert TINY.memory("conv2", 90, 90) == 4 * (4 * 88 * 88 + 6 * 86 * 86)  # from relu1 to conv2
    for name, side in (("small", 30), ("large", 90)):
        Image.fromarray(make_photo(0, side, side)).save(tmp_path / f"{name}.png")
    there = TINY.memory("conv2", 60, 60)
    monkeypatch.setattr(os, "sysconf", lambda name: there if name == "SC_PHYS_PAGES" else 1)
    inputs = [tmp_path / "large.png", tmp_path / "small.png"]
    options = ["--root", tiny_root, "--layer", "conv2", "--out", tmp_path / "out"]
    code, lines = outcome(saliency, [*inputs, *options], capfd)
    assert code == 2 and len(lines) == 1
    assert "large.png: 90×90 pixels, which --max-side can shrink, need 301.4 KB of memory" in lines[0]
    assert (tmp_path / "out" / "small.png").is_file()
    assert outcome(saliency, [*inputs, *options, "--max-side", "50", "--overwrite"], capfd) == (0, [])


def test_folders_without_permission(tiny_root: Path, capfd: pytest.CaptureFixture) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for place in ("open", "locked", "unlisted"):
            (folder / place).mkdir()
            (folder / place / f"{place}.png").write_bytes(encode(Image.fromarray(make_photo(1, 80, 80)), "PNG"))
        (folder / "open" / "secret.png").write_bytes(b"x")
        (folder / "out").mkdir()
        shutil.copy(tiny_root / "vlm.safetensors", folder)
        for place, mode in {"open/secret.png": 0, "locked": 0, "unlisted": 0o400, "out": 0o777, ".": 0o755}.items():
            (folder / place).chmod(mode)
        (folder / "vlm.safetensors").chmod(0o644)
        inputs = [folder / place for place in ("locked", "open", "locked/locked.png", "unlisted")]
        out = folder / "out" / "maps"
        with unprivileged():
            options = ["--vlm", folder / "vlm.safetensors", "--layer", "conv2", "--out", out]
            code, lines = outcome(saliency, [*inputs, *options], capfd)
        assert code == 2 and len(lines) == 4 and all("cannot be read: permission denied" in line for line in lines)
        assert {p.name for p in out.glob("*.npy")} == {"open.npy", "open-unnaturalness.npy"}
        for place in ("locked", "unlisted"):
            (folder / place).chmod(0o700)


def test_names_of_outputs_never_meet() -> None:
    paths = ["a/x.png", "b/x.png", "c/a/x.png", "x.jpg", "y.png", "Y.jpg", "z.png", "a-z.png", "a/z.png"]
    paths += ["p.png", "p-overlay.png", "p-unnaturalness.png", "q", "a-b/c.png", "a/b-c.png", "/a/b/c.png", "x.jpg"]
    suffixes = ("-overlay", "-unnaturalness")
    names = output_names([Path(path) for path in paths], suffixes)
    assert set(names.values()) == set(map(Path, paths)) and len(names) == len(set(paths))
    endings = [(name + suffix).casefold() for name in names for suffix in ("", *suffixes)]
    assert len(set(endings)) == len(endings)
    assert names["q"] == Path("q") and names["p.png"] == Path("p.png")
    assert not any("/" in name for name in names)


def test_outputs_of_added_maps_never_meet(tiny_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """An image that is called as another one's map of a layer costs neither its results."""
    pictures = [tmp_path / "b.png", tmp_path / "b-unnaturalness-tiny-conv1.png"]
    for i, path in enumerate(pictures):
        Image.fromarray(make_photo(i, 30, 40 + i)).save(path)
    out = tmp_path / "out"
    code, lines = outcome(saliency, [*pictures, "--root", tiny_root, "--layer", "conv1", "conv2", "--out", out], capfd)
    assert code == 0 and not lines
    expected = {f"{p.name}{view}" for p in pictures for view in ("", *(f"-unnaturalness-tiny-conv{i}" for i in (1, 2)))}
    assert {p.stem for p in out.glob("*.npy")} == expected
    for i, path in enumerate(pictures):
        assert np.load(out / f"{path.name}.npy").shape == (30, 40 + i)


@given(st.lists(st.text("aA-./é", min_size=1, max_size=6), min_size=1, max_size=12))
def test_names_of_outputs_are_unique_for_all_files(texts: list[str]) -> None:
    files = [Path(text) for text in texts if Path(text).name]
    names = output_names(files, ("-a",))
    assert set(names.values()) == set(files)
    endings = Counter((name + ending).casefold() for name in names for ending in ("", "-a"))
    assert max(endings.values(), default=1) == 1


@given(st.binary(min_size=1, max_size=300).filter(lambda name: b"/" not in name and b"\0" not in name))
def test_any_name_gives_a_usable_one(name: bytes) -> None:
    usable = output_name(os.fsdecode(name))
    assert usable.isprintable() and len(usable.encode()) <= LONGEST_NAME + 9
    if (text := os.fsdecode(name)).isprintable() and len(name) <= LONGEST_NAME:
        assert usable == text


def test_odd_names_through_the_stages(tiny_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Names of 255 bytes, not UTF-8, with line breaks and escapes, and of one name in several folders."""
    folder = tmp_path / "in"
    odd = [b"n\xffme.png", b"l" * 251 + b".png", "é".encode() * 125 + b".png", b"two\nlines.png", b"\x1b[2J.png"]
    for i, name in enumerate([*odd, b"a.png", b"sub/a.png", b"sub2/sub/a.png", b"a-overlay.png"]):
        path = folder / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(Image.fromarray(make_photo(i, 70 + i, 80)), "PNG"))
    (folder / os.fsdecode(b"bad\xff\n\x1b.png")).write_bytes(b"no image")
    images, names, rejected = prepared(folder, tmp_path / "out")
    assert len(images) == 9 and all(name.isprintable() for name in names)
    assert rejected.count("\n") == 2 and "bad\\udcff\\n\\x1b.png is not an image" in rejected
    inputs = [folder, folder / "sub", folder / "sub2" / "sub"]
    out = tmp_path / "maps"
    code, lines = outcome(saliency, [*inputs, "--root", tiny_root, "--layer", "conv2", "--out", out], capfd)
    assert code == 2 and len(lines) == 1 and lines[0].isprintable() and "bad\\udcff\\n\\x1b.png" in lines[0]
    maps = [p for p in out.glob("*.npy") if not p.name.endswith("-unnaturalness.npy")]
    assert sorted(np.load(p).shape for p in maps) == [(70 + i, 80) for i in range(9)], "none overwrote another"
    assert len(list(out.glob("[!.]*"))) == 6 * 9
    options = ["--root", tiny_root, "--regularizer", "none", "--iterations", "1", "--target", "conv2"]
    inputs = [folder / os.fsdecode(name) for name in (*odd, b"a.png", b"sub/a.png")]
    assert outcome(reconstruct, [*inputs, *options, "--out", tmp_path / "pictures"], capfd) == (0, [])
    assert len(list((tmp_path / "pictures").glob("*/reconstruction.npy.json"))) == 7


def test_threads_do_not_disturb_one_another(tmp_path: Path) -> None:
    """Warnings are the process's: what one thread ignores must not let another one read a bomb."""
    contents = [encoded("RGB").getvalue(), REFUSED["smaller bomb.png"][0], READABLE["broken exif.jpg"][0]] * 40
    with ThreadPoolExecutor(8) as pool, warnings.catch_warnings(record=True):
        filters = list(warnings.filters)
        results = list(pool.map(lambda content: readable(content), contents))
        assert list(warnings.filters) == filters
    assert results == [True, False, True] * 40


def readable(content: bytes) -> bool:
    try:
        read_rgb(io.BytesIO(content), "x")
    except UserError:
        return False
    return True


def test_deep_grey_is_converted_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.linspace(0, 1, 3_000_000, dtype=np.float32).reshape(1500, 2000)
    image = Image.fromarray(values)
    monkeypatch.setattr(parsers, "image_range", [0, 1])
    tracemalloc.start()
    found = to_rgb_array(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.abs(found[:, :, 0] - 255.0 * values).max() <= 0.51
    assert peak < 8 * values.size + 60_000_000, "floats, bytes, three channels, and strips of doubles"


def test_files_larger_than_any_image(tmp_path: Path) -> None:
    path = tmp_path / "large.webp"
    path.write_bytes(b"RIFF")
    os.truncate(path, 3 << 30)
    with pytest.raises(UserError, match=r"large.webp has 3.2 GB, more than any image needs"):
        read_rgb(path)
