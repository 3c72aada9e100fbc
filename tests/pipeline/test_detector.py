"""The detector: one pass for all readings, the layout on CPUs, controls."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from models.backbones import Backbone
from models.errors import UserError
from models.unnaturalness import feature_contrast, layer_features, postprocess
from models.vlm import DIRECTIONS, VisualLanguageModel, layer_map, predict_nothing, repeat_last
from pipeline import detector, networks
from tests.conftest import make_photo

CPU = torch.device("cpu")
RANDOM = networks.WeightsChoice(weights="random")


def unnaturalness_map(backbone: Backbone, vlm: VisualLanguageModel, rgb: np.ndarray, layer: str, by=None) -> np.ndarray:
    """Map (h-1, w-1) float64 of a layer for an image (H, W, 3) uint8, of the model's or of other predictors."""
    features = layer_features(backbone, rgb, [layer])[layer]
    with torch.no_grad():
        return layer_map(vlm.projections[layer](features), by or vlm.layers[layer])[0].double().numpy()


def test_one_pass_gives_every_reading(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers, controls and further checkpoints of the same CNN; each equals its map made alone."""
    checkpoint = detector.Checkpoint.load(workspace / "vlm.safetensors", CPU)
    again = detector.Checkpoint.load(workspace / "vlm.safetensors", CPU)
    assert not any(parameter.requires_grad for parameter in checkpoint.vlm.parameters())
    trivial = {"predict-nothing": predict_nothing, "repeat-last": repeat_last}
    readings = [detector.Reading(f"conv4 {name}", checkpoint, "conv4", name) for name in ("vlm", *trivial)]
    readings.append(detector.Reading("conv5 again", again, "conv5"))
    (found,) = detector.load_detectors(readings, RANDOM, CPU)
    assert next(p for p in found.backbone.parameters() if p.ndim == 4).is_contiguous(memory_format=torch.channels_last)
    passes = []
    monkeypatch.setattr("models.unnaturalness.layer_features", lambda *a: passes.append(a) or layer_features(*a))
    rgb = make_photo(0, 100, 120)
    maps = found.unnaturalness(rgb)
    assert len(passes) == 1 and list(maps) == [reading.name for reading in readings]
    plain, _ = networks.load_backbone(RANDOM, "alexnet", ["conv5"], CPU)
    for name, values in maps.items():
        layer, predictor = name.split()
        predictors = dict.fromkeys(DIRECTIONS, trivial[predictor]) if predictor in trivial else None
        expected = unnaturalness_map(plain, checkpoint.vlm, rgb, layer, predictors)
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-6 * expected.max())
    finished = found.saliency("conv5 again", maps["conv5 again"], 100, 120)
    np.testing.assert_array_equal(finished, postprocess(maps["conv5 again"], 100, 120, 16, 0.5, 0.03))
    assert list(found.unnaturalness(rgb, ["conv5 again"])) == ["conv5 again"] and list(passes[-1][2]) == ["conv5"]


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_threads_are_shared_out(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = detector.side_by_side(lambda item: torch.tensor([item, torch.get_num_threads()]), range(4))
        assert torch.get_num_threads() == threads, "the caller's stay"
    finally:
        torch.set_num_threads(before)
    assert [values.tolist() for values in found] == [[item, max(threads // 4, 1)] for item in range(4)]


def test_feature_contrast_is_a_sum_over_channels() -> None:
    features = torch.randn(1, 3, 12, 20, generator=torch.Generator().manual_seed(0))
    expected = sum(np.abs(c - gaussian_filter(c, (2.4, 4))) for c in features[0].double().numpy())
    np.testing.assert_allclose(feature_contrast(features)[0].numpy(), expected, rtol=1e-4)
    assert not feature_contrast(torch.full((1, 2, 5, 6), 3.0)).numpy().round(5).any(), "constant features"


@pytest.mark.parametrize("kind", ["float", "original"])
def test_centre_prior_is_a_gaussian_of_the_sides(kind: str) -> None:
    raw = np.random.default_rng(0).random((9, 14))
    plain, centred = (detector.Postprocess(kind, 1.0, 0.05, prior)(raw, 160, 240, 16) for prior in (0.0, 0.3))
    y, x = (np.arange(160) + 0.5) / 160 - 0.5, (np.arange(240) + 0.5) / 240 - 0.5
    expected = plain * np.exp(-(y[:, None] ** 2 + x**2) / (2 * 0.3**2))
    expected = (expected - expected.min()) / np.ptp(expected) * (255 if kind == "original" else 1)
    assert centred.dtype == plain.dtype
    np.testing.assert_allclose(centred, expected, atol=1 if kind == "original" else 1e-9)


def test_one_value_for_all_checkpoints_or_one_for_each() -> None:
    assert detector.each(0.5, 3, "--power") == [0.5] * 3 and detector.each([1, 2], 2, "--power") == [1, 2]
    with pytest.raises(UserError, match="--power has 2 values for 3 checkpoints: give one, or one for each"):
        detector.each([1, 2], 3, "--power")
    with pytest.raises(UserError, match="no predictor 'best': choose from vlm, surprise, predict-nothing"):
        detector.Reading("a", None, "conv5", "best")
