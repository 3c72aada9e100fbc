"""Surprise: by hand, by what it must not depend on, and in the detector."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.surprise import SHRINKAGE, surprise
from models.unnaturalness import layer_features
from models.vlm import DIRECTIONS, layer_map, predict_nothing, prediction_errors, ramp, to_grid
from pipeline import detector, networks
from tests.conftest import make_photo


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("steps", [1, 5, 40])  # fewer errors than components, and more
def test_surprise_by_hand(steps: int) -> None:
    errors = drawn(steps, 2, 6) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 0.1])
    vectors = errors.double().numpy().reshape(-1, 6)
    covariance = np.zeros((6, 6))
    for e in vectors:
        covariance += np.outer(e, e) / len(vectors)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.trace(covariance) / 6 * np.eye(6)
    expected = np.array([e @ np.linalg.inv(covariance) @ e / 6 for e in vectors]).reshape(steps, 2)
    np.testing.assert_allclose(surprise(errors).numpy(), expected, rtol=1e-9)


def test_surprise_depends_neither_on_scale_nor_on_a_rotation() -> None:
    errors = drawn(30, 4, 5).double()
    rotation, _ = torch.linalg.qr(drawn(5, 5).double())
    torch.testing.assert_close(surprise(1000 * errors @ rotation), surprise(errors))


def test_a_rare_direction_is_surprising_and_a_large_common_one_is_not() -> None:
    """Mean squares say the opposite."""
    errors = 0.01 * drawn(50, 4, 8)
    errors[..., 0] += 3 * drawn(50, 4)  # large and common
    errors[7, 1] = 0
    errors[7, 1, 5] = 1.5  # smaller, and alone in its component
    assert surprise(errors).flatten().argmax() == 7 * 4 + 1
    assert errors.square().mean(2).flatten().argmax() != 7 * 4 + 1


def test_errors_of_zero_have_no_surprise() -> None:
    assert not surprise(torch.zeros(4, 3, 5)).any()


def test_detector_reads_surprise_and_rarity(workspace: Path) -> None:
    """The paper's map with another measure of each error: same ramp, same places."""
    checkpoint = detector.Checkpoint.load(workspace / "vlm.safetensors", torch.device("cpu"))
    readings = [detector.Reading(name, checkpoint, "conv5", name) for name in ("vlm", "surprise", "rarity")]
    choice = networks.WeightsChoice(weights="random")
    (found,) = detector.load_detectors(readings, choice, torch.device("cpu"))
    rgb = make_photo(0, 100, 120)
    maps = found.unnaturalness(rgb)
    plain, _ = networks.load_backbone(choice, "alexnet", ["conv5"], torch.device("cpu"))
    with torch.no_grad():
        p = checkpoint.vlm.projections["conv5"](layer_features(plain, rgb, ["conv5"])["conv5"])  # (1, D, h, w)
        expected = {}
        nothing = dict.fromkeys(DIRECTIONS, predict_nothing)
        for name, predictors in (("surprise", checkpoint.vlm.layers["conv5"]), ("rarity", nothing)):
            total = torch.zeros(p.shape[2] - 1, p.shape[3] - 1, dtype=torch.float64)
            for direction in DIRECTIONS:
                weighted = surprise(errors := prediction_errors(p, direction, predictors[direction]))
                weighted = weighted * ramp(len(errors), p)[:, None]
                total += to_grid(weighted, direction, 1)[0, : total.shape[0], : total.shape[1]]
            expected[name] = total.numpy()
        torch.testing.assert_close(
            torch.from_numpy(maps["vlm"]), layer_map(p, checkpoint.vlm.layers["conv5"])[0], rtol=1e-4, atol=1e-6
        )
    for name, values in expected.items():
        np.testing.assert_allclose(maps[name], values, rtol=1e-3)
