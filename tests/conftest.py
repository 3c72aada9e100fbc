"""Fixtures: small made-up photos, and a workspace in which all stages ran on them."""

import os
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # each has a core; what a test starts inherits it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

FLUSH = os.fsync

sys.path.insert(0, str(Path(__file__).parent.parent))

RUN = ["--preset", "demo", "--seed", "3"]


def make_photo(seed: int, height: int, width: int) -> np.ndarray:
    """Smooth colours with a bright disc: (H, W, 3) uint8."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / random.uniform(9, 40) + y / random.uniform(9, 40) + random.uniform(0, 6)) for _ in range(3)]
    picture = 110 + 60 * np.stack(waves, axis=2)
    disc = (x - random.uniform(0.3, 0.7) * width) ** 2 + (y - random.uniform(0.3, 0.7) * height) ** 2
    picture[disc < (min(height, width) / 6) ** 2] = random.uniform(150, 255, 3)
    return (picture + random.normal(0, 5, picture.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session", autouse=True)
def unflushed() -> Iterator[None]:
    """Files are not flushed to the disk, for which thousands of writes would wait; no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve photos of two classes."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(12):
        (folder / f"class{i % 2}").mkdir(exist_ok=True)
        photo = Image.fromarray(make_photo(i, 100 + 5 * i, 150 - 4 * i))
        photo.save(folder / f"class{i % 2}" / f"photo{i:02d}.png")
    return folder


@pytest.fixture(scope="session")
def light() -> Iterator[None]:
    """Random weights of a network are drawn once for all tests, AlexNet has 61 million; energies are of few views."""
    from models.weights import find
    from pipeline import targets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "ENERGY_VIEWS", 2)
        patch.setattr(find, "random_parameters", lru_cache(2)(find.random_parameters))
        yield


@pytest.fixture(scope="session")
def workspace(photos: Path, light: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages 1-3 run on the photos with a random AlexNet, on conv4 and conv5."""
    import extract_features
    import prepare_images
    import train_vlm

    root = tmp_path_factory.mktemp("workspace")
    prepare_images.main([*RUN, "--root", str(root), "--source", str(photos), "--num-images", "10"])
    features = [*RUN, "--root", str(root), "--weights", "random", "--layers", "conv4", "conv5"]
    extract_features.main([*features, "--pca-positions", "400", "--batch-size", "4"])
    train_vlm.main([*RUN, "--root", str(root), "--iterations", "4", "--checkpoint-every", "2", "--batch-size", "2"])
    return root
