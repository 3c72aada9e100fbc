"""Shortcuts of feature extraction: they give what the plain way gives, and keep memory small."""

from pathlib import Path

import numpy as np
import pytest
import torch

import extract_features
from models.backbones import Backbone, centre_crop, random_parameters
from models.projection import Projection, fold_deepest
from pipeline import array_files
from pipeline.features import FeatureFiles, feature_facts
from pipeline.views import Views
from tests.rounding import assert_rounded
from tests.tiny import TINY


def make_projection(channels: int, seed: int = 0) -> Projection:
    generator = torch.Generator().manual_seed(seed)
    mean, pca_mean = (torch.randn(channels, generator=generator) * 3 for _ in range(2))
    std = torch.rand(channels, generator=generator) + 0.1
    return Projection(mean, std, torch.randn((channels + 1) // 2, channels, generator=generator), pca_mean)


def test_a_projection_is_one_product() -> None:
    projection = make_projection(7)
    x = torch.randn(2, 7, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 5
    weight, offset = (part.double() for part in projection.as_product())
    expected = projection.double()(x).permute(0, 2, 3, 1)
    found = x.permute(0, 2, 3, 1) @ weight.T + offset
    assert_rounded(found, expected, 7 + 1, torch.float32)  # the product is stored in float32


@pytest.mark.parametrize(("mean_image", "dtype"), [(False, "float32"), (True, "float32"), (False, "float16")])
def test_features_equal_the_plain_way(mean_image: bool, dtype: str, tmp_path: Path) -> None:
    """More images than are projected at once; with a mean image the crop cannot come first."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (6, 256, 256, 3), dtype=np.uint8)
    mean = torch.from_numpy(generator.uniform(90, 130, (3, 256, 256))) if mean_image else None
    backbone = Backbone(TINY, random_parameters(TINY, 0), mean)
    x = backbone.preprocess(torch.from_numpy(images).permute(0, 3, 1, 2).float())
    layers = {layer: make_projection(TINY.channels(layer)) for layer in ("data", "conv1", "conv2")}
    with torch.no_grad():
        features = backbone(centre_crop(x, 24, 24), list(layers))
        expected = {layer: p(features[layer]).permute(0, 2, 3, 1).numpy() for layer, p in layers.items()}
    views = Views()
    facts = {
        layer: feature_facts(len(images), backbone, layer, p.size, views, {"dtype": dtype})
        for layer, p in layers.items()
    }
    backbone.to(memory_format=torch.channels_last)
    files = FeatureFiles(tmp_path, facts, (0, len(images)))
    extract_features.write_features(images, backbone, layers, files, batch_size=5, views=views)
    for layer, values in expected.items():
        found = torch.from_numpy(np.load(tmp_path / f"{layer}.npy"))
        assert found.dtype == getattr(torch, dtype)
        if dtype == "float16":
            torch.testing.assert_close(found.float(), torch.from_numpy(values), rtol=2**-11, atol=1e-4)
        else:
            assert_rounded(found, torch.from_numpy(values), 27 + 54 + 20)  # two convolutions, the projection


def test_the_deepest_projection_is_part_of_its_convolution() -> None:
    """Other taps, other readers of the network, and taps that are no convolution stay as they are."""
    backbone = Backbone(TINY, random_parameters(TINY, 0))
    projections = {layer: make_projection(TINY.channels(layer)) for layer in ("conv1", "conv2")}
    x = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    before = backbone(x, ["conv1", "conv2"])
    network, folded = fold_deepest(backbone, projections)
    after = network(x, ["conv1", "conv2"])
    assert folded == "conv2" and torch.equal(after["conv1"], before["conv1"])
    torch.testing.assert_close(after["conv2"], projections["conv2"](before["conv2"]), rtol=1e-4, atol=1e-4)
    assert torch.equal(backbone(x, ["conv2"])["conv2"], before["conv2"])
    assert fold_deepest(backbone, {"data": make_projection(3)}) == (backbone, None)


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    writer = array_files.ArrayWriter(tmp_path / "rows.npy", (4, 2), "float32", {})
    writer.put(1, np.ones((2, 2)))
    for first, rows in ((3, np.ones((2, 2))), (-1, np.ones((1, 2))), (0, np.ones((1, 3)))):
        with pytest.raises(ValueError, match="rows"):
            writer.put(first, rows)
    writer.finish()
    assert np.load(tmp_path / "rows.npy").tolist() == [[0, 0], [1, 1], [1, 1], [0, 0]]


def resident_file_bytes() -> int:
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("RssFile"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux")
def test_pages_that_were_read_are_given_back(tmp_path: Path) -> None:
    size = 20_000_000
    np.save(tmp_path / "rows.npy", np.ones((1000, size // 4000), np.float32))
    rows = np.load(tmp_path / "rows.npy", mmap_mode="r")
    before = resident_file_bytes()
    assert rows.sum() > 0
    assert resident_file_bytes() > before + 0.8 * size
    array_files.release(rows)
    assert resident_file_bytes() < before + 0.2 * size
    assert rows[7, 7] == 1
    array_files.release(np.ones(3))
    chosen = np.random.default_rng(0).integers(0, 1000, 700)
    np.testing.assert_array_equal(array_files.read_rows(rows, chosen), np.ones((700, size // 4000)))
    assert resident_file_bytes() < before + 0.2 * size


def test_rows_are_read_in_the_order_asked_for(tmp_path: Path) -> None:
    array = np.arange(120).reshape(40, 3)
    np.save(tmp_path / "rows.npy", array)
    for rows in (array, np.load(tmp_path / "rows.npy", mmap_mode="r")):
        for chosen in (np.array([39, 0, 7, 7, *range(38), 5]), np.array([], dtype=int)):
            np.testing.assert_array_equal(array_files.read_rows(rows, chosen), array[chosen])
