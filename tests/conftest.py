"""Fixtures: small made-up photos, and a workspace in which all stages ran on them."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
def workspace(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
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
