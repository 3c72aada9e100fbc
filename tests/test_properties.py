"""Properties that hold for any input: mirrors and transpositions, order, inverses, monotone maps of a score's input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evaluation import fixation_metrics as metrics
from models.projection import Projection
from models.unnaturalness import postprocess
from models.vlm import (
    DIRECTIONS,
    TRIVIAL_PREDICTORS,
    LayerModel,
    direction_error_map,
    direction_loss,
    fused_layer_loss,
    layer_loss,
    layer_map,
    to_sequences,
)
from tests.evaluation.test_fixation_metrics import SINGLE, score

CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # of float64, summed in another order
UPSIDE_DOWN = {"down": "up", "up": "down", "right": "right", "left": "left"}
MIRRORED = {"down": "down", "up": "up", "right": "left", "left": "right"}
TRANSPOSED = {"down": "right", "up": "left", "right": "down", "left": "up"}
# What is done to a map (N, D, H, W), and which direction then reads what another one read before.
SYMMETRIES = {
    "upside down": (lambda p: p.flip(2), UPSIDE_DOWN),
    "mirrored": (lambda p: p.flip(3), MIRRORED),
    "transposed": (lambda p: p.mT, TRANSPOSED),
}
few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**32 - 1)
sides = st.integers(2, 6)


def features(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_model(size: int, seed: int) -> LayerModel:
    """Weights large enough that predictions are far from zero, different in every direction."""
    model = LayerModel(size)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias_hh" not in name:
                parameter.normal_(0, 0.5, generator=generator)
    return model.requires_grad_(False).double()


def exchanged(model: LayerModel, directions: dict[str, str]) -> LayerModel:
    """The model in which each direction has the weights of another."""
    other = LayerModel(model.size).requires_grad_(False).double()
    for direction, source in directions.items():
        other[direction].load_state_dict(model[source].state_dict())
    return other


def sets_of_sequences(sequences: Tensor) -> Tensor:
    """(T, B, D) with the B sequences in an order of their own content."""
    order = sorted(range(sequences.shape[1]), key=lambda i: sequences[:, i].flatten().tolist())
    return sequences[:, order]


@pytest.mark.parametrize("name", SYMMETRIES)
@few
@given(st.integers(1, 3), st.integers(1, 4), sides, sides, seeds)
def test_directions_read_each_other_s_sequences(name: str, n: int, d: int, h: int, w: int, seed: int) -> None:
    change, directions = SYMMETRIES[name]
    p = features(seed, n, d, h, w)
    for direction, source in directions.items():
        found, expected = to_sequences(change(p), direction), to_sequences(p, source)
        assert torch.equal(sets_of_sequences(found), sets_of_sequences(expected))
        if direction != source:
            assert torch.equal(found, expected), "even the sequences' order is the same"
    (before, after) = ((2, 3), (3, 2)) if name == "transposed" else ((2, 3), (2, 3))
    assert [change(p).shape[i] for i in after] == [p.shape[i] for i in before]


@pytest.mark.parametrize("name", SYMMETRIES)
@few
@given(st.integers(1, 3), st.integers(1, 10), sides, sides, seeds)
def test_loss_of_exchanged_directions(name: str, n: int, d: int, h: int, w: int, seed: int) -> None:
    """Both ways in which the loss is computed; square maps and others."""
    change, directions = SYMMETRIES[name]
    p, model = features(seed, n, d, h, w), layer_model(d, seed)
    other = exchanged(model, directions)
    torch.testing.assert_close(other.loss(change(p)), model.loss(p), **CLOSE)
    if h == w:
        torch.testing.assert_close(fused_layer_loss(change(p), other), model.loss(p), **CLOSE)
    for direction, source in directions.items():
        found = direction_loss(change(p), direction, model[source])
        torch.testing.assert_close(found, direction_loss(p, source, model[source]), **CLOSE)


@few
@given(st.integers(2, 6), seeds)
def test_exchange_is_needed(side: int, seed: int) -> None:
    """The directions do differ: without the exchange a mirror changes the loss."""
    p, model = features(seed, 2, 3, side + 1, side + 1), layer_model(3, seed)
    for change, directions in SYMMETRIES.values():
        before, after = model.loss(p), model.loss(change(p))
        assert abs(float(before - after)) > 1e-5 * float(before)
        assert abs(float(exchanged(model, directions).loss(change(p)) - before)) < 1e-4 * float(before)


@few
@given(st.integers(2, 5), st.integers(1, 10), sides, sides, seeds)
def test_loss_is_the_mean_over_images_in_any_order(n: int, d: int, h: int, w: int, seed: int) -> None:
    p, model = features(seed, n, d, h, w), layer_model(d, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    for loss in (layer_loss, *([fused_layer_loss] if h == w else [])):
        whole = loss(p, model)
        torch.testing.assert_close(loss(p[order], model), whole, **CLOSE)
        torch.testing.assert_close(torch.stack([loss(image[None], model) for image in p]).mean(), whole, **CLOSE)
    torch.testing.assert_close(model.unnaturalness_map(p[order]), model.unnaturalness_map(p)[order], **CLOSE)


def parts_of_map(p: Tensor, model: LayerModel) -> tuple[Tensor, Tensor]:
    """Errors of the vertical directions (N, H-1, W) and of the horizontal ones (N, H, W-1), not cut."""
    maps = {direction: direction_error_map(p, direction, model[direction]) for direction in DIRECTIONS}
    return maps["down"] + maps["up"], maps["right"] + maps["left"]


@pytest.mark.parametrize("name", SYMMETRIES)
@few
@given(st.integers(1, 2), st.integers(1, 4), sides, sides, seeds)
def test_error_maps_turn_with_the_features(name: str, n: int, d: int, h: int, w: int, seed: int) -> None:
    """Before they are cut. Errors stand at the last vector read, for backward directions at the predicted one: both
    count the T-1 steps from the top or the left, so that a mirror of the map is a mirror of those T-1 places."""
    change, directions = SYMMETRIES[name]
    p, model = features(seed, n, d, h, w), layer_model(d, seed)
    for direction, source in directions.items():
        found = direction_error_map(change(p), direction, model[source])
        expected = change(direction_error_map(p, source, model[source])[:, None])[:, 0]
        torch.testing.assert_close(found, expected, **CLOSE)


@few
@given(st.integers(1, 2), st.integers(1, 4), sides, sides, seeds)
def test_unnaturalness_map_under_mirrors(n: int, d: int, h: int, w: int, seed: int) -> None:
    """Cut to its first (H-1)×(W-1) cells, the map is equivariant but for the cut: a mirror makes it drop the other end
    of the directions that read across, the first column (row) in place of the last."""
    p, model = features(seed, n, d, h, w), layer_model(d, seed)
    vertical, horizontal = parts_of_map(p, model)
    torch.testing.assert_close(model.unnaturalness_map(p), vertical[..., :-1] + horizontal[:, :-1], **CLOSE)
    mirrored = exchanged(model, MIRRORED).unnaturalness_map(p.flip(3))
    torch.testing.assert_close(mirrored.flip(2), vertical[..., 1:] + horizontal[:, :-1], **CLOSE)
    upside_down = exchanged(model, UPSIDE_DOWN).unnaturalness_map(p.flip(2))
    torch.testing.assert_close(upside_down.flip(1), vertical[..., :-1] + horizontal[:, 1:], **CLOSE)
    transposed = exchanged(model, TRANSPOSED).unnaturalness_map(p.mT)
    torch.testing.assert_close(transposed.mT, model.unnaturalness_map(p), **CLOSE)  # cuts the same cells


@few
@given(st.integers(1, 4), sides, sides, seeds)
def test_unnaturalness_map_of_equal_columns_is_mirrored_exactly(d: int, h: int, w: int, seed: int) -> None:
    p, model = features(seed, 1, d, h, 1).expand(1, d, h, w), layer_model(d, seed)
    found = exchanged(model, MIRRORED).unnaturalness_map(p.flip(3)).flip(2)
    torch.testing.assert_close(found, model.unnaturalness_map(p), **CLOSE)


@few
@given(st.integers(1, 4), sides, sides, seeds)
def test_trivial_predictors_do_not_care_which_way(d: int, h: int, w: int, seed: int) -> None:
    p = features(seed, 2, d, h, w)
    for predictor in TRIVIAL_PREDICTORS.values():
        same = dict.fromkeys(DIRECTIONS, predictor)
        for change, _ in SYMMETRIES.values():
            torch.testing.assert_close(layer_loss(change(p), same), layer_loss(p, same), **CLOSE)
        torch.testing.assert_close(layer_loss(3 * p, same), 9 * layer_loss(p, same), **CLOSE)
        torch.testing.assert_close(layer_map(p.mT, same).mT, layer_map(p, same), **CLOSE)


# projection


def fitted(channels: int, seed: int) -> Projection:
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(60, channels)) @ random.normal(size=(channels, channels))
    mean, std = random.normal(size=channels), random.uniform(0.5, 3, channels)
    return Projection.fit(torch.from_numpy(mean), torch.from_numpy(std), mixed).double()


def inverse(projection: Projection, p: Tensor) -> Tensor:
    """The raw features in the kept subspace that project to p (N, D, H, W)."""
    standard = torch.einsum("dc,ndhw->nchw", projection.components, p) + projection.pca_mean[:, None, None]
    return standard * projection.std[:, None, None] + projection.mean[:, None, None]


@few
@given(st.integers(1, 12), seeds)
def test_projection_has_an_inverse_in_the_kept_subspace(channels: int, seed: int) -> None:
    projection = fitted(channels, seed)
    assert projection.size == (channels + 1) // 2
    p = features(seed, 2, projection.size, 3, 4)
    torch.testing.assert_close(projection(inverse(projection, p)), p, rtol=1e-3, atol=1e-3)
    x = features(seed + 1, 2, channels, 3, 4)
    kept = inverse(projection, projection(x))  # the nearest features of the subspace
    torch.testing.assert_close(projection(kept), projection(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(inverse(projection, projection(kept)), kept, rtol=1e-3, atol=1e-3)
    residual = (x - kept) / projection.std[:, None, None]
    across = torch.einsum("dc,nchw->ndhw", projection.components, residual)
    assert across.abs().max() < 1e-3, "what is lost is orthogonal to what is kept"


@few
@given(st.integers(1, 8), st.floats(0.1, 10), st.floats(-5, 5), seeds)
def test_projection_does_not_depend_on_the_features_unit(channels: int, scale: float, shift: float, seed: int) -> None:
    projection, x = fitted(channels, seed), features(seed, 1, channels, 3, 3)
    other = Projection(
        projection.mean * scale + shift, projection.std * scale, projection.components, projection.pca_mean
    ).double()  # its buffers were rounded to float32
    torch.testing.assert_close(other(x * scale + shift), projection(x), rtol=1e-3, atol=1e-3)


# saliency map


@few
@given(sides, sides, st.integers(1, 4), st.integers(0, 4), st.integers(0, 4), seeds)
def test_postprocessing_turns_with_the_map(h: int, w: int, stride: int, rows: int, columns: int, seed: int) -> None:
    """Where the padding is even; an odd pixel goes to the bottom or right."""
    values = np.random.default_rng(seed).uniform(0, 5, (h, w))
    height, width = h * stride + 2 * rows, w * stride + 2 * columns
    expected = postprocess(values, height, width, stride, 0.5, 0.03)
    np.testing.assert_allclose(
        postprocess(values[:, ::-1].copy(), height, width, stride, 0.5, 0.03)[:, ::-1], expected, atol=1e-9
    )
    np.testing.assert_allclose(
        postprocess(values[::-1].copy(), height, width, stride, 0.5, 0.03)[::-1], expected, atol=1e-9
    )
    np.testing.assert_allclose(postprocess(values.T.copy(), width, height, stride, 0.5, 0.03).T, expected, atol=1e-9)
    np.testing.assert_allclose(postprocess(7 * values, height, width, stride, 0.5, 0.03), expected, atol=1e-7)


# fixation metrics


INCREASING = {
    "cube": lambda v: (v - 10.0) ** 3,
    "exponential": lambda v: np.exp(v / 3),
    "squashed": lambda v: np.arctan(v / 5),
    "ranks": lambda v: np.unique(v, return_inverse=True)[1].reshape(v.shape),
    "stretched": lambda v: 3 * v - 50,
}
SIGMA = 2.0


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """A map of whole numbers (so that no transformation makes ties), fixations on it, and others."""
    random = np.random.default_rng(draw(seeds))
    height, width = draw(st.integers(2, 12)), draw(st.integers(2, 12))
    values = random.integers(0, draw(st.integers(2, 30)), (height, width)).astype(np.float64)
    values[0, 0], values[-1, -1] = 0, 1  # not constant
    counts = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    own, others = (
        (random.integers(0, width, count).astype(float), random.integers(0, height, count).astype(float))
        for count in counts
    )
    return values, own, others


@few
@given(cases())
def test_aucs_do_not_change_under_increasing_maps(case) -> None:
    values, own, others = case
    auc, shuffled = score("auc", values, *own), score("sauc", values, *own, *others)
    for change in INCREASING.values():
        assert score("auc", change(values), *own) == auc
        assert score("sauc", change(values), *own, *others) == shuffled
    assert score("auc", -values, *own) == pytest.approx(1 - auc)
    assert score("sauc", -values, *own, *others) == pytest.approx(1 - shuffled)
    assert score("sauc", values, *others, *own) == pytest.approx(1 - shuffled)


@few
@given(cases(), st.floats(0.01, 100), st.floats(-100, 100))
def test_nss_and_cc_do_not_change_under_affine_maps(case, scale: float, shift: float) -> None:
    values, own, _ = case
    for metric, options in ((SINGLE["nss"], {}), (SINGLE["cc"], {"sigma": SIGMA})):
        before = metric(values, *own, **options)
        assert metric(scale * values + shift, *own, **options) == pytest.approx(before, abs=1e-7)
        assert metric(-scale * values + shift, *own, **options) == pytest.approx(-before, abs=1e-7)
    for metric in (SINGLE["sim"], SINGLE["kld"]):  # densities: they see a shift, but no factor
        before = metric(values, *own, sigma=SIGMA)
        assert metric(scale * values, *own, sigma=SIGMA) == pytest.approx(before, abs=1e-7)
    assert 0 <= score("sim", values, *own, sigma=SIGMA) <= 1 + 1e-12
    assert score("kld", values, *own, sigma=SIGMA) > -1e-9


@few
@given(cases())
def test_metrics_turn_with_map_and_fixations(case) -> None:
    values, own, others = case
    height, width = values.shape

    def scores(values: np.ndarray, own: tuple, others: tuple) -> dict[str, float]:
        return metrics.all_scores(values, *own, *others, sigma=SIGMA)

    def moved(points: tuple, mirror: bool) -> tuple:
        x, y = points
        return (width - 1 - x, y) if mirror else (x, height - 1 - y)

    expected = pytest.approx(scores(values, own, others), abs=1e-9)
    assert scores(values[:, ::-1], moved(own, True), moved(others, True)) == expected
    assert scores(values[::-1], moved(own, False), moved(others, False)) == expected
    assert scores(values.T, own[::-1], others[::-1]) == expected
    assert scores(values, tuple(c[::-1] for c in own), tuple(c[::-1] for c in others)) == expected
    assert scores(values, tuple(np.tile(c, 3) for c in own), tuple(np.tile(c, 2) for c in others)) == expected
