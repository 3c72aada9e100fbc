"""Which images are held out: by number, by name, and what statistics, PCA and training then read."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import extract_features
import prepare_images
import train_vlm
from models.errors import UserError
from models.randomness import split_images
from pipeline.splits import choose_held_out, rows_matching, rows_of
from tests.conftest import RUN

NAMES = ["a/1.png", "a/2.png", "b/1.png", "b/3.png"]


def test_a_number_draws_from_the_seed() -> None:
    names = [str(i) for i in range(40)]
    assert choose_held_out(3, names, 7) == split_images(40, 3, 7)[1].tolist()
    assert choose_held_out(0, names, 7) == []


def test_names_are_whole_or_their_last_part() -> None:
    assert rows_of(["3.png", "a/1.png", "elsewhere/2.png"], NAMES, "x") == [0, 1, 3]
    for wanted, what in (("1.png", "2 of the 4"), ("9.png", "none of the 4")):
        with pytest.raises(UserError, match=what):
            rows_of([wanted], NAMES, "x")


def test_a_file_of_names(tmp_path: Path) -> None:
    listing = tmp_path / "held.txt"
    listing.write_text("\ufeffa/2.png\n\n  b/3.png \r\n", encoding="utf-8")
    assert choose_held_out(listing, NAMES, 0) == [1, 3]
    listing.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is no text file"):
        choose_held_out(listing, NAMES, 0)


def test_patterns() -> None:
    assert rows_matching(["a/*", "3*"], NAMES) == [0, 1, 3]
    with pytest.raises(UserError, match="no image is called like 'c"):
        rows_matching(["c*"], NAMES)


def test_held_out_images_reach_neither_statistics_nor_training(photos: Path, tmp_path: Path, capsys) -> None:
    """Two sources; what is held out by name may as well hold anything else."""
    held = tmp_path / "held.txt"
    held.write_text("photo03.png\nphoto04.png\n")
    stage = [*RUN, "--root"]
    results = []
    for number, sources in enumerate(([photos / "class0", photos / "class1"], [photos / "class0", photos / "class1"])):
        root = tmp_path / str(number)
        prepare_images.main([*stage, str(root), "--num-images", "12", "--source", *map(str, sources)])
        facts = json.loads((root / "images.npy.json").read_text())
        assert facts["sources"] == {"class0": 6, "class1": 6} and facts["names"][0] == "class0/photo00.png"
        if number:  # other pixels in the held-out rows
            images = np.load(root / "images.npy")
            images[[facts["names"].index(name) for name in ("class1/photo03.png", "class0/photo04.png")]] = 77
            np.save(root / "images.npy", images)
        options = ["--weights", "random", "--layers", "conv5", "--held-out", str(held), "--pca-positions", "200"]
        extract_features.main([*stage, str(root), *options])
        train_vlm.main([*stage, str(root), "--iterations", "3", "--batch-size", "4"])
        results.append((root, load_file(root / "vlm.safetensors")))
    (_, one), (root, other) = results
    assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
    noted = json.loads((root / "vlm.safetensors.json").read_text())
    assert noted["sources"] == {"class0": 6, "class1": 6}
    assert noted["training"]["conv5"]["held_out_names"] == ["class0/photo04.png", "class1/photo03.png"]
    capsys.readouterr()
    train_vlm.main([*stage, str(root), "--iterations", "3", "--held-out", "1", "--exclude", "class1/*", "--overwrite"])
    assert "note: statistics and PCA were fitted on 1 of the 1 held-out images" in capsys.readouterr().out
    with pytest.raises(UserError, match="nothing is left to train on"):
        train_vlm.main([*stage, str(root), "--iterations", "3", "--exclude", "*", "--overwrite"])
