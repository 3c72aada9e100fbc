"""Folders of stimuli, tables and maps as people have them, through the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation import map_sources
from models.errors import UserError
from pipeline.images import output_name
from tests.conftest import make_photo

ROOT = Path(__file__).parents[2]
POSIX = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
ACCENT = "cafe\u0301.png"  # as some systems store café


@pytest.fixture
def stimuli(tmp_path: Path) -> Path:
    """Images, one turned by its EXIF data, one in a folder, one whose name is no text, one cut off; other files."""
    folder = tmp_path / "stimuli"
    (folder / "class").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    for seed, (name, more) in enumerate(
        {ACCENT: {}, "1.JPG": {"exif": exif}, "class/b.png": {}, "t.tif": {"exif": exif}}.items()
    ):
        Image.fromarray(make_photo(seed, 24, 40)).save(folder / name, **more)
    whole = (folder / "class" / "b.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(whole)  # no text in UTF-8
    for name in ("._1.JPG", "README.pdf", "features.h5", "notes.txt"):
        (folder / name).write_bytes(b"%PDF-1.4")
    return folder


def test_an_evaluation_of_what_people_have(stimuli: Path, tmp_path: Path) -> None:
    """Semicolons, other cases and accents, named subjects, lost samples; a damaged image is left out and listed."""
    lines = ["Image;Subject;X;Y"]
    for name in ("caf\u00e9.png", "1.jpg", "b", "T.tif"):
        high = 39 if name in ("1.jpg", "T.tif") else 23
        lines += [f"{name};{person};{5 + i},5;{high - i}" for i, person in enumerate(("s01", "s02", "NA"))]
    lines += ["b;s01;;", "b;s01;NA;3", "cut.png;s01;3;3"]
    (tmp_path / "fixations.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    options = ["--stimuli", str(stimuli), "--fixations", str(tmp_path / "fixations.csv"), "--baseline", "uniform"]
    command = [sys.executable, str(ROOT / "evaluate.py"), "fixations", *options, "--out", str(tmp_path / "out")]
    first = subprocess.run(
        command, capture_output=True, encoding="utf-8", cwd=tmp_path, timeout=500, env={**os.environ, **POSIX}
    )
    assert first.returncode == 0, first.stderr
    assert "cut.png is damaged" in first.stderr and first.stderr.count("left out: ") == 1
    assert "5 images, 12 fixations; left out: 1 images that cannot be read, 0 outside" in first.stdout
    assert " 2 lost, 1 of other images; images without fixations: 1" in first.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["images"], summary["images_scored"], summary["fixations"]) == (5, 4, 12)
    assert list(summary["unreadable"]) == ["cut.png"]


def test_a_map_is_of_one_stimulus(tmp_path: Path) -> None:
    maps, stimuli = tmp_path / "maps", tmp_path / "stimuli"
    maps.mkdir()
    stimuli.mkdir()
    images = [stimuli / name for name in ("1.jpg", "1.png", ACCENT, "2.PNG")]
    for image in images:
        image.write_bytes(b"")
    np.save(maps / "caf\u00e9.npy", np.zeros((2, 3)))
    np.save(maps / "2.npy", np.zeros((2, 3)))
    np.save(maps / "1.npy", np.zeros((2, 3)))
    sizes = dict.fromkeys(images, (2, 3))
    with pytest.raises(UserError, match=r"has no map of 1.jpg: add 1.jpg.npy"):
        map_sources.Folder("maps", maps, sizes)
    for name in ("1.jpg.npy", "1.PNG.npy"):
        np.save(maps / name, np.ones((2, 3)))
    found = map_sources.Folder("maps", maps, sizes).files
    assert [file.name for file in found.values()] == ["1.jpg.npy", "1.PNG.npy", "caf\u00e9.npy", "2.npy"]
    odd = stimuli / "a\n.png"
    np.save(maps / f"{output_name(odd.stem)}.npy", np.ones((2, 3)))  # as saliency.py calls it
    assert list(map_sources.Folder("maps", maps, {odd: (2, 3)}).files) == [odd]
    with pytest.raises(UserError, match="has no map of 1.png"):
        map_sources.Folder("maps", stimuli, {stimuli / "1.png": (2, 3)})
