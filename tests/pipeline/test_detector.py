"""The detector: one pass for all readings, the layout on CPUs, controls."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.unnaturalness import layer_features, postprocess, unnaturalness_map
from models.vlm import DIRECTIONS, predict_nothing, repeat_last
from pipeline import detector, networks
from tests.conftest import make_photo

CPU = torch.device("cpu")
RANDOM = networks.WeightsChoice(weights="random")


def test_one_pass_gives_every_reading(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers, controls and further checkpoints of the same CNN; each equals its map made alone."""
    checkpoint = detector.Checkpoint.load(workspace / "vlm.safetensors", CPU)
    again = detector.Checkpoint.load(workspace / "vlm.safetensors", CPU)
    assert not any(parameter.requires_grad for parameter in checkpoint.vlm.parameters())
    trivial = {"predict-nothing": predict_nothing, "repeat-last": repeat_last}
    readings = [detector.Reading(f"conv4 {name}", checkpoint, "conv4", name) for name in ("vlm", *trivial)]
    readings.append(detector.Reading("conv5 again", again, "conv5"))
    (found,) = detector.load_detectors(readings, RANDOM, CPU)
    assert found.backbone.conv4.weight.is_contiguous(memory_format=torch.channels_last)
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
    np.testing.assert_array_equal(finished, postprocess(maps["conv5 again"], 100, 120, 16))
    assert list(found.unnaturalness(rgb, ["conv5 again"])) == ["conv5 again"] and list(passes[-1][2]) == ["conv5"]
