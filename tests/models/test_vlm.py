"""The language model against closed forms, plain loops and its own symmetries."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.descent import MomentumSGD, Schedule
from models.errors import UserError
from models.projection import Moments, Projection, draw_positions, fit_pca, positions_per_image
from models.training import default_decays, draw_rows
from models.vlm import (
    DIRECTIONS,
    LayerModel,
    direction_error_map,
    direction_loss,
    fused_layer_loss,
    layer_loss,
    layer_map,
    predict_nothing,
    repeat_last,
    to_grid,
    to_sequences,
    trivial_losses,
)
from tests.rounding import assert_rounded

sizes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 6), st.integers(2, 6))


def random_layer(size: int, seed: int = 0, scale: float = 0.4) -> LayerModel:
    layer = LayerModel(size)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, scale, generator=generator)
    return layer


def terms_summed(p: torch.Tensor) -> int:
    """The longest sum in the gradient of a loss on p (N, D, H, W): over all places, of products of 3·D and a bias."""
    return p.shape[0] * p.shape[2] * p.shape[3] + 3 * p.shape[1] + 1


def read(p: np.ndarray, direction: str, step: int, line: int) -> np.ndarray:
    """The vector (N, D) that a scan reads at a step of a column or row, by plain indexing."""
    last = (p.shape[2] if direction in ("down", "up") else p.shape[3]) - 1
    position = last - step if direction in ("up", "left") else step
    return p[:, :, position, line] if direction in ("down", "up") else p[:, :, line, position]


@settings(max_examples=25, deadline=None)
@given(sizes, st.sampled_from(DIRECTIONS), st.integers(0, 10**6))
def test_losses_of_trivial_predictors_by_plain_loops(shape, direction, seed) -> None:
    p = np.random.default_rng(seed).normal(size=shape)
    vertical = direction in ("down", "up")
    steps, lines = (shape[2], shape[3]) if vertical else (shape[3], shape[2])
    nothing = repeat = 0.0
    for line in range(lines):
        for t in range(steps - 1):
            seen, following = read(p, direction, t, line), read(p, direction, t + 1, line)
            nothing += t / (steps - 1) * (following**2).sum()
            repeat += t / (steps - 1) * ((following - seen) ** 2).sum()
    count = shape[0] * shape[1] * lines * (steps - 1)
    tensor = torch.from_numpy(p)
    assert direction_loss(tensor, direction, predict_nothing).item() == pytest.approx(nothing / count)
    assert direction_loss(tensor, direction, repeat_last).item() == pytest.approx(repeat / count)


@settings(max_examples=25, deadline=None)
@given(sizes, st.sampled_from(DIRECTIONS))
def test_to_grid_undoes_to_sequences(shape, direction) -> None:
    p = torch.arange(int(np.prod(shape)), dtype=torch.float32).view(shape)
    assert torch.equal(to_grid(to_sequences(p, direction), direction, shape[0]).permute(0, 3, 1, 2), p)


def test_error_stands_where_the_original_put_it() -> None:
    """One bright cell: its error is one before it forward, at it backward, weighted by how much was read."""
    p = torch.zeros(1, 1, 5, 6, dtype=torch.float64)
    p[0, 0, 3, 2] = 1.0
    expected = {"down": (2, 2, 2 / 4), "up": (3, 2, 0.0), "right": (3, 1, 1 / 5), "left": (3, 2, 2 / 5)}
    for direction, (row, column, weight) in expected.items():
        found = direction_error_map(p, direction, predict_nothing)[0]
        wanted = torch.zeros_like(found)
        wanted[row, column] = weight
        assert torch.equal(found, wanted), direction


def test_map_is_the_sum_of_four_cut_maps() -> None:
    p = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    layer = random_layer(3).double()
    maps = [direction_error_map(p, d, layer[d]) for d in DIRECTIONS]
    assert [tuple(m.shape) for m in maps] == [(2, 4, 7), (2, 4, 7), (2, 5, 6), (2, 5, 6)]
    by_hand = sum(m[:, :4, :6] for m in maps)
    torch.testing.assert_close(layer_map(p, layer), by_hand)


def test_flips_and_transposition_exchange_the_directions() -> None:
    p = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    model = random_layer(3).double()["down"]
    loss = direction_loss(p, "down", model)
    torch.testing.assert_close(direction_loss(p.flip(2), "up", model), loss)
    torch.testing.assert_close(direction_loss(p.transpose(2, 3), "right", model), loss)
    torch.testing.assert_close(direction_loss(p.transpose(2, 3).flip(3), "left", model), loss)
    assert abs(direction_loss(p, "up", model) - loss) > 1e-4, "swapped directions would go unnoticed"


def test_predictions_see_only_what_was_read() -> None:
    p = torch.randn(1, 2, 6, 4)
    layer = random_layer(2)
    changed = p.clone()
    changed[0, :, 4, 1] += 1
    before, after = (direction_error_map(x, "down", layer["down"]) for x in (p, changed))
    different = (before != after)[0].nonzero().tolist()
    assert different == [[3, 1], [4, 1]]


def test_loss_does_not_depend_on_the_order_of_images() -> None:
    p = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    layer = random_layer(3).double()
    for loss in (layer_loss, fused_layer_loss):
        torch.testing.assert_close(loss(p, layer), loss(p.flip(0), layer))


@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (1, 2, 9, 9), (3, 1, 2, 2), (1, 2, 50, 50)])
def test_fused_lstm_equals_nn_lstm(shape) -> None:
    layer = random_layer(shape[1]).double()
    p = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    results = []
    for loss in (layer_loss(p, layer), fused_layer_loss(p, layer)):
        layer.zero_grad()
        p.grad = None
        loss.backward()
        results.append([loss.detach(), p.grad, *(q.grad.clone() for q in layer.parameters() if q.requires_grad)])
    for a, b in zip(*results, strict=True):
        assert_rounded(a, b, terms_summed(p))


@pytest.mark.parametrize("shape", [(16, 24, 6, 6), (1, 2, 40, 40)])
def test_fused_float32_is_within_rounding_of_nn_lstm(shape) -> None:
    layer, p = random_layer(shape[1], scale=0.2), torch.randn(shape)
    assert layer.is_faster_fused(p)
    results = []
    for loss in (layer_loss(p, layer), layer.loss(p)):
        layer.zero_grad()
        loss.backward()
        results.append([loss.detach(), *(q.grad.clone() for q in layer.parameters() if q.requires_grad)])
    for a, b in zip(*results, strict=True):
        assert_rounded(a, b, terms_summed(p), torch.float32)


def test_few_sequences_and_other_shapes_take_nn_lstm() -> None:
    layer = random_layer(24)
    assert layer.is_faster_fused(torch.zeros(4, 24, 6, 6))
    for other in (torch.zeros(3, 24, 6, 6), torch.zeros(9, 24, 6, 7), torch.zeros(9, 24, 6, 6).double()):
        assert not layer.is_faster_fused(other)


def test_fused_gradient_to_the_input_alone() -> None:
    layer = random_layer(2).requires_grad_(False).double()
    p = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    fused_layer_loss(p, layer).backward()
    gradient = p.grad.clone()
    p.grad = None
    layer_loss(p, layer).backward()
    assert_rounded(gradient, p.grad, terms_summed(p))


def test_one_pixel_has_nothing_to_predict() -> None:
    with pytest.raises(UserError, match="nothing to predict along 'down'"):
        layer_loss(torch.zeros(1, 2, 1, 5), random_layer(2))


def test_initial_weights() -> None:
    layer = LayerModel(64)
    layer.initialise(5, "conv5")
    weights = torch.cat([p.flatten() for n, p in layer.named_parameters() if "weight" in n])
    assert weights.std().item() == pytest.approx(0.01, rel=0.02) and abs(weights.mean()) < 1e-4
    assert all((p == 0).all() for n, p in layer.named_parameters() if "bias" in n)
    again = LayerModel(64)
    again.initialise(5, "conv5")
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), again.parameters(), strict=True))
    assert not torch.equal(layer["down"].linear.weight, layer["up"].linear.weight)


def test_second_bias_stays_frozen() -> None:
    layer = LayerModel(3)
    frozen = {n for n, p in layer.named_parameters() if not p.requires_grad}
    assert frozen == {f"{d}.lstm.bias_hh_l{i}" for d in DIRECTIONS for i in (0, 1)}


def test_training_learns_what_repeats() -> None:
    """Every row of a map is its column's number: after some updates the model beats predicting nothing."""
    columns = torch.tensor([1.0, -1, 1, -1, 1, -1])
    p = columns.expand(2, 2, 6, 6).contiguous()
    layer = random_layer(2)
    optimizer = MomentumSGD([q for q in layer.parameters() if q.requires_grad], 0.5)
    for _ in range(300):
        optimizer.zero_grad()
        loss = layer.loss(p)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * trivial_losses(p)["predict nothing"]


def test_momentum_is_the_originals_when_the_rate_changes() -> None:
    w = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    optimizer = MomentumSGD([w], lr=0.1)
    value, velocity = 1.0, 0.0
    for lr in (0.1, 0.1, 0.02, 0.02):
        optimizer.lr = lr
        optimizer.zero_grad()
        (w**2).sum().backward()
        velocity = 0.9 * velocity - lr * 2 * value
        value += velocity
        optimizer.step()
    assert w.item() == pytest.approx(value, rel=1e-14)


def test_schedule_is_the_originals() -> None:
    schedule = Schedule(10.0, default_decays(20_001))
    assert schedule.decay_at == (5000, 10000, 15000)
    rates = [schedule.rate(i) for i in (0, 5000, 5001, 10000, 10001, 15001, 20000)]
    assert rates == pytest.approx([10, 10, 1, 1, 0.1, 0.01, 0.01])
    images = np.arange(7)
    assert np.array_equal(draw_rows(0, 3, images, 16), draw_rows(0, 3, images, 16))
    drawn = np.concatenate([draw_rows(0, i, images, 16) for i in range(200)])
    counts = np.bincount(drawn, minlength=7)
    assert counts.min() > 350 and counts.max() < 570, "uniform, with replacement"


def test_moments_in_float64_by_streaming() -> None:
    x = torch.randn(6, 3, 4, 5) * torch.tensor([1e-3, 1, 50]).view(3, 1, 1) + 100
    moments = Moments(3)
    for part in x.split(2):
        moments.update(part)
    torch.testing.assert_close(moments.mean, x.double().mean((0, 2, 3)))
    torch.testing.assert_close(moments.std, x.double().std((0, 2, 3), correction=0), rtol=1e-4, atol=0)


def test_constant_channels_are_guarded() -> None:
    """differs from the original: there they became NaN or divisions by zero."""
    x = torch.full((2, 3, 4, 4), 7.3)
    x[:, 1] = torch.randn(2, 4, 4)
    moments = Moments(3)
    moments.update(x)
    std, constant = moments.guarded_std()
    assert constant == [0, 2] and std[0] == std[2] == 1
    samples = ((x - moments.mean.float()[:, None, None]) / std.float()[:, None, None]).permute(0, 2, 3, 1)
    projection = Projection.fit(moments.mean, std, samples.reshape(-1, 3).numpy())
    assert torch.isfinite(projection(x)).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(2, 40), st.integers(0, 10**6))
def test_pca(channels, count, seed) -> None:
    random = np.random.default_rng(seed)
    samples = random.normal(size=(count, channels)) @ random.normal(size=(channels, channels))
    components, mean, variance = fit_pca(samples)
    assert components.shape == (min(count, channels), channels)
    np.testing.assert_allclose(components @ components.T, np.eye(len(components)), atol=1e-9)
    assert (np.diff(variance) <= 1e-9).all() and (variance >= 0).all()
    if count > channels:
        np.testing.assert_allclose((samples - mean) @ components.T @ components + mean, samples, atol=1e-8)
        np.testing.assert_allclose(variance, ((samples - mean) @ components.T).var(axis=0, ddof=1), atol=1e-8)


def test_projection_keeps_half_and_inverts_within_it() -> None:
    samples = np.random.default_rng(0).normal(size=(500, 5))
    projection = Projection.fit(torch.zeros(5), torch.ones(5), samples).double()
    assert projection.size == 3
    p = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    back = torch.einsum("dc,ndhw->nchw", projection.components, p) + projection.pca_mean[:, None, None]
    assert_rounded(projection(back), p, 5 + 3, torch.float32)  # the components are orthonormal to float32


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_change_of_basis_changes_no_prediction(cell: str) -> None:
    """Where all components are kept: in either basis the predictions are of the same features."""
    random = np.random.default_rng(0)

    def projection() -> Projection:
        rotation = np.linalg.qr(random.normal(size=(5, 5)))[0]
        parts = (random.normal(size=5), random.uniform(1, 3, 5), rotation, random.normal(size=5))
        return Projection(*map(torch.from_numpy, parts))

    old, new = projection(), projection()
    x = torch.from_numpy(random.normal(size=(2, 5, 4, 3)) * 2).float()
    weight, offset = old.change_to(new)
    changed = torch.einsum("de,nehw->ndhw", weight, old(x).double()) + offset[:, None, None]
    assert_rounded(changed, new(x).double(), 30, torch.float32)
    model, moved = LayerModel(5, cell), LayerModel(5, cell)
    model.initialise(3, "x")
    for parameter in model.parameters():
        parameter.data.mul_(30)
    moved.load_state_dict(model.state_dict())
    moved.change_basis(new.change_to(old), old.change_to(new))
    for direction in DIRECTIONS:
        said = model[direction](to_sequences(old(x), direction)).double() @ weight.T + offset
        found = moved[direction](to_sequences(new(x), direction)).double()
        torch.testing.assert_close(found, said, rtol=1e-4, atol=1e-4)


def test_positions_for_pca() -> None:
    assert positions_per_image(50_000, 100_000) == 3 and positions_per_image(900, 100_000) == 112
    drawn = draw_positions(0, "conv5", 4, 2000, 9)
    assert np.array_equal(drawn, draw_positions(0, "conv5", 4, 2000, 9))
    assert np.bincount(drawn, minlength=9).min() > 150
    assert not np.array_equal(drawn, draw_positions(0, "conv4", 4, 2000, 9))
