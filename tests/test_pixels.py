"""One picture, stored in every way that turns it or has more than 8 bits, is the same picture to every script."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
import prepare_images
import reconstruct
import saliency
from models.errors import UserError
from pipeline.images import fit_to, read_rgb
from pipeline.scaling import area_scale
from tests.conftest import make_photo
from tests.pipeline.test_options import tiny, tiny_workspace  # noqa: F401 (fixtures)

HEIGHT, WIDTH = 20, 30
PHOTO = make_photo(0, HEIGHT, WIDTH)
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # what a viewer turns back, by orientation
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[:, ::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[::-1].swapaxes(0, 1),
}
FORMATS = {"png": {}, "tif": {}, "webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}


def write_turned(folder: Path) -> None:
    """The photo by all eight orientations in all four formats."""
    folder.mkdir()
    for orientation, turn in STORED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for form, more in FORMATS.items():
            Image.fromarray(np.ascontiguousarray(turn(PHOTO))).save(
                folder / f"{orientation}-{form}.{form}", exif=exif, **more
            )


def write_deep(folder: Path) -> dict[str, list[str]]:
    """The grey photo by numbers of many kinds; --range of each, in a folder of its own."""
    grey = PHOTO[:, :, 0].astype(np.float64)
    kinds = {
        "unit": (grey / 255, "f4", "0 1"),
        "signed": (grey / 127.5 - 1, "f4", "-1 1"),
        "wide": (grey * 257, "f4", "0 65535"),
        "int": (grey * 16843009 - 2**31, "i4", f"{-(2**31)} {2**31 - 1}"),
        "twelve": (grey * 4095 / 255, "u2", "0 4095"),
        "sixteen": (grey * 257, "u2", ""),
    }
    for name, (values, kind, _) in kinds.items():
        (folder / name).mkdir(parents=True)
        Image.fromarray(np.rint(values).astype(kind) if kind != "f4" else values.astype(kind)).save(
            folder / name / "photo.tif"
        )
    return {name: ["--range", *given.split()] if given else [] for name, (_, _, given) in kinds.items()}


def results(folder: Path, root: Path, *more: str) -> dict[str, tuple[np.ndarray, tuple[int, int], np.ndarray | None]]:
    """By file name: the row of stage 1, the shape of the saliency map, the picture that stage 4 inverts."""
    common = ["--device", "cpu", "--vlm", str(root / "vlm.safetensors"), "--weights", "random", *more]
    prepare_images.main(["--source", str(folder), "--root", str(folder / "ws"), *more])
    assert saliency.main([str(folder), *common, "--out", str(folder / "maps")]) == 0
    some = sorted(path for path in folder.glob("*.*") if path.stem[0] in "6p")  # on its side, or the only one
    inverted = ["--target", "fc8", "--iterations", "1", "--out", str(folder / "inverted")]
    assert not reconstruct.main([*map(str, some), *common, *inverted])
    rows, names = (
        np.load(folder / "ws" / "images.npy"),
        json.loads((folder / "ws" / "images.npy.json").read_text())["names"],
    )
    found = {}
    for row, name in zip(rows, names, strict=True):
        picture = folder / "inverted" / (Path(name).stem if len(some) > 1 else "") / "image.png"
        inverted = read_rgb(picture) if picture.is_file() else None
        found[name] = row, np.load(folder / "maps" / f"{Path(name).stem}.npy").shape, inverted
    return found


def test_orientations_through_every_script(
    tmp_path: Path,
    tiny_workspace: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "turned"
    write_turned(folder)
    expected = area_scale(PHOTO, 256, 256), (HEIGHT, WIDTH), fit_to(PHOTO, 8, 8)
    found = results(folder, tiny_workspace)
    assert len(found) == 32 and sum(inverted is not None for _, _, inverted in found.values()) == 4
    for name, (row, shape, inverted) in found.items():
        exact = 0 if not name.endswith("jpg") else 12
        assert shape == expected[1], name
        assert np.abs(row.astype(int) - expected[0]).max() <= exact, name
        assert inverted is None or np.abs(inverted.astype(int) - expected[2]).max() <= exact, name
    corner = "".join(f"{name},0,{WIDTH - 0.5},{HEIGHT - 0.5}\n{name},1,3,3\n" for name in found)
    (tmp_path / "fixations.csv").write_text(f"image,subject,x,y\n{corner}")
    for place in ("ws", "maps", "inverted"):
        (folder / place).rename(tmp_path / place)
    capsys.readouterr()
    looks = ["fixations", "--stimuli", str(folder), "--fixations", "fixations.csv", "--maps", "maps", "--out", "scores"]
    assert evaluate.main(looks) == 0
    assert "32 images, 64 fixations; left out: 0 outside their image" in capsys.readouterr().out


def test_deep_images_through_every_script(
    tmp_path: Path,
    tiny_workspace: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By --range, which is a fact of what is made; floats without it cost a line, 16 bits need none."""
    monkeypatch.chdir(tmp_path)
    grey = np.repeat(PHOTO[:, :, :1], 3, axis=2)
    (tmp_path / "fixations.csv").write_text("image,x,y\nphoto.tif,3,4\nphoto.tif,20,9\n")
    for name, given in write_deep(tmp_path / "deep").items():
        folder = tmp_path / "deep" / name
        if given and name != "twelve":
            with pytest.raises(UserError, match="give --range LOW HIGH"):
                prepare_images.main(["--source", str(folder), "--root", str(tmp_path / "refused")])
        ((row, shape, inverted),) = results(folder, tiny_workspace, *given).values()
        assert shape == (HEIGHT, WIDTH)
        assert np.abs(row.astype(int) - area_scale(grey, 256, 256)).max() <= 1, name
        assert np.abs(inverted.astype(int) - fit_to(grey, 8, 8)).max() <= 1, name
        evaluated = tmp_path / "evaluated" / name
        looks = ["fixations", "--stimuli", str(folder / "only"), "--fixations", str(tmp_path / "fixations.csv")]
        model = ["--vlm", str(tiny_workspace / "vlm.safetensors"), "--weights", "random", "--device", "cpu"]
        (folder / "only").mkdir()
        (folder / "photo.tif").rename(folder / "only" / "photo.tif")
        assert evaluate.main([*looks, *model, *given, "--out", str(evaluated)]) == 0
        ((raw,),) = [[*(evaluated / "maps" / "tiny-conv2").glob("photo-*.npy")]]
        assert np.array_equal(np.load(raw), np.load(folder / "maps" / "photo-unnaturalness.npy")), name
        if name == "unit":  # maps of another range are other maps, also where an evaluation was not finished
            (evaluated / "summary.json").unlink()
            assert evaluate.main([*looks, *model, "--range", "0", "2", "--out", str(evaluated)]) == 0
            assert len([*(evaluated / "maps" / "tiny-conv2").glob("photo-*.npy")]) == 2
        for sidecar in (folder / "ws" / "images.npy.json", folder / "maps" / "photo.npy.json"):
            stated = json.loads(sidecar.read_text()).get("range")
            assert stated == ([float(number) for number in given[1:]] or None)
