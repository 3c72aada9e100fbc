"""Regularisers against closed forms and plain loops; reconstruct.py on several inputs."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import reconstruct
from models import descent, objective
from models.backbones import ARCHITECTURES, Backbone, random_parameters
from models.descent import (
    DESCENTS,
    FOURIER,
    IMAGE_NORM,
    OPTIMIZERS,
    PARAMETRIZATIONS,
    STARTS,
    Adam,
    Fourier,
    MomentumSGD,
    Pixels,
    Schedule,
    descend,
)
from models.errors import UserError
from models.objective import REGULARIZERS, Regularizer, descent_for, penalties_for
from models.randomness import split_images
from models.vlm import VisualLanguageModel
from pipeline import reconstruction, targets
from tests.conftest import RUN, make_photo


def pixels(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 60, shape)).requires_grad_()


@pytest.fixture(scope="module")
def alexnet() -> Backbone:
    architecture = ARCHITECTURES["alexnet"]
    convolutions = {n: v for n, v in random_parameters(architecture, 1).items() if n.startswith("conv")}
    return Backbone(architecture, convolutions)


def test_total_variation_and_its_gradient_equal_plain_loops() -> None:
    x = pixels(0, 1, 3, 5, 7)
    value = objective.total_variation(x)
    value.backward()
    a = x.detach().numpy()
    expected, gradient = 0.0, np.zeros_like(a)
    for c in range(3):
        for i in range(5):
            for j in range(7):
                for k, l in ((i + 1, j), (i, j + 1)):
                    if k < 5 and l < 7:
                        step = a[0, c, k, l] - a[0, c, i, j]
                        expected += step**2
                        gradient[0, c, k, l] += 2 * step
                        gradient[0, c, i, j] -= 2 * step
    np.testing.assert_allclose(value.item(), expected, rtol=1e-12)
    np.testing.assert_allclose(x.grad.numpy(), gradient, rtol=1e-9, atol=1e-9)


def test_total_variation_of_known_pictures() -> None:
    assert objective.total_variation(torch.full((1, 3, 6, 6), 40.0)) == 0
    ramp = torch.arange(5.0).expand(1, 1, 4, 5)  # 4 rows of 4 unit steps to the right, none down
    assert objective.total_variation(ramp) == 16
    assert objective.total_variation(ramp.mT) == 16


@pytest.mark.parametrize(("name", "exponent"), [("l2", 2), ("l6", 6)])
def test_norm_penalties_and_their_gradients(name: str, exponent: int) -> None:
    x = pixels(1, 1, 3, 4, 4)
    value = objective.penalty(name, x)
    value.backward()
    a = x.detach().numpy()
    np.testing.assert_allclose(value.item(), (a**exponent).sum() / (2 * IMAGE_NORM**2), rtol=1e-12)
    np.testing.assert_allclose(x.grad.numpy(), exponent * a ** (exponent - 1) / (2 * IMAGE_NORM**2), rtol=1e-9)


def test_relative_feature_loss() -> None:
    target = torch.tensor([[3.0, 4.0]])
    assert objective.relative_feature_loss(target, target) == 0
    assert objective.relative_feature_loss(torch.zeros(1, 2), target) == 1
    assert objective.relative_feature_loss(torch.tensor([[3.0, 9.0]]), target) == 1


def test_start_has_the_norm_of_an_image() -> None:
    start = descent.noise_of_norm((227, 227), 5)
    assert start.shape == (1, 3, 227, 227)
    assert start.norm().item() == pytest.approx(IMAGE_NORM, rel=1e-5)
    assert abs(start.mean().item()) < 1
    assert torch.equal(start, descent.noise_of_norm((227, 227), 5))
    assert not torch.equal(start, descent.noise_of_norm((227, 227), 6))


def test_total_variation_weight_grows_with_depth() -> None:
    by_tap = {"data": 1, "conv1": 1, "conv2": 1, "conv3": 10, "conv4": 10, "conv5": 100, "pool5": 100, "fc8": 100}
    by_tap |= {"conv1_2": 1, "conv2_2": 1, "conv3_3": 10, "conv4_4": 10, "conv5_4": 100, "block16": 100, "logits": 100}
    for tap, weight in by_tap.items():
        assert penalties_for("tv", tap) == {"tv": weight, "l6": 8e-10}
    assert penalties_for("none", "pool5") == {}
    assert descent_for("authors", "tv").learning_rate == pytest.approx(0.004 * IMAGE_NORM**2)


def test_mahendran_updates_equal_their_form(alexnet: Backbone) -> None:
    """v = 0.9 v - lr·∇(regularisers) - lr·s²/|φ₀|²·∇|φ - φ₀|², x = x + v, at lr = 0.004."""
    rate = 0.004
    x, other = 40 * torch.randn(2, 1, 3, 67, 67, generator=torch.Generator().manual_seed(2))
    target = alexnet(alexnet.from_pixels(other), ["conv3"])["conv3"]
    loss = objective.ReconstructionLoss(alexnet, "conv3", target, None, None, penalties=penalties_for("tv", "conv3"))
    ours = Pixels(x)
    schedule = Schedule(descent_for("authors", "tv").learning_rate)
    descend(loss, ours, MomentumSGD(ours.parameters, 0), schedule, 3, lambda *_: None)
    velocity = torch.zeros_like(x)
    for _ in range(3):
        x = x.detach().requires_grad_()
        feature = alexnet(alexnet.from_pixels(x), ["conv3"])["conv3"]
        (data,) = torch.autograd.grad((feature - target).square().sum(), x)
        squares = x.diff(dim=2).square().sum() + x.diff(dim=3).square().sum()
        (prior,) = torch.autograd.grad(10 / 2 * squares + 8e-10 / 2 * x.pow(6).sum(), x)
        velocity = 0.9 * velocity - rate * prior - rate * IMAGE_NORM**2 / target.square().sum() * data
        x = x + velocity
    torch.testing.assert_close(ours().detach(), x.detach(), rtol=1e-4, atol=1e-2)


def test_learning_rate_steps_and_momentum_resets() -> None:
    """The experiments' 0.004·[1 × 100, 0.1 × 200, 0.01 × 100] on a slope, where the velocity is known."""
    authors = descent_for("authors", "tv")
    rates, speeds = [], []
    x = Pixels(torch.zeros(1))
    optimizer = MomentumSGD(x.parameters, authors.learning_rate, 0.9)

    def note(i: int, terms: dict[str, float]) -> None:
        rates.append(optimizer.lr)
        speeds.append(optimizer.velocities[0].item())

    schedule = Schedule(authors.learning_rate, tuple(authors.decays(authors.iterations)))
    descend(lambda p, _: {"total": p.sum()}, x, optimizer, schedule, authors.iterations, note)
    expected = [
        0.004 * IMAGE_NORM**2 * factor for factor, count in ((1, 100), (0.1, 200), (0.01, 100)) for _ in range(count)
    ]
    np.testing.assert_allclose(rates, expected)
    for at in (0, 100, 300):
        assert speeds[at] == pytest.approx(-rates[at]), "the momentum starts anew"
        assert speeds[at + 1] == pytest.approx(-1.9 * rates[at])


def test_a_decay_resets_the_momentum_whatever_its_factor() -> None:
    x = Pixels(torch.zeros(1))
    optimizer, speeds = MomentumSGD(x.parameters, 0), []
    schedule = Schedule(2.0, decay_at=(1, 3), decay_factor=1.0)
    descend(
        lambda p, _: {"total": p.sum()},
        x,
        optimizer,
        schedule,
        5,
        lambda *_: speeds.append(optimizer.velocities[0].item()),
    )
    assert speeds == pytest.approx([-2, -3.8, -2, -3.8, -2]), "after updates 1 and 3, counted from 0"


def test_every_term_of_the_loss_is_weighted(alexnet: Backbone, workspace: Path) -> None:
    from models.checkpoints import load_vlm

    vlm: VisualLanguageModel = load_vlm(workspace / "vlm.safetensors")[0].freeze()
    x = descent.noise_of_norm((227, 227), 4)
    target = torch.zeros(1, 256, 13, 13) + 1
    weights = {"conv4": 0.5, "conv5": 0.25}
    loss = objective.ReconstructionLoss(
        alexnet,
        "conv5",
        target,
        torch.full((256,), 2.0),
        vlm,
        feature_weight=3,
        vlm_weight=7,
        layer_weights=weights,
        penalties={"tv": 11.0},
    )
    terms = {name: value.item() for name, value in loss(x).items()}
    assert list(terms) == ["total", "feature", "conv4", "conv5", "tv"]
    expected = 3 * terms["feature"] + 7 * (0.5 * terms["conv4"] + 0.25 * terms["conv5"]) + 11 * terms["tv"]
    assert terms["total"] == pytest.approx(expected, rel=1e-6)
    loss.energy_weight, loss.energies = 5.0, {"conv4": 2.0, "conv5": 3.0}
    with_energy = {name: value.item() for name, value in loss(x).items()}
    p = vlm.project(alexnet(alexnet.from_pixels(x), list(weights)))
    energies = {layer: float(np.mean(np.square(value.numpy()))) for layer, value in p.items()}
    by_hand = 0.5**0.5 * (energies["conv4"] / 2 - 1) ** 2 + 0.25**0.5 * (energies["conv5"] / 3 - 1) ** 2
    assert with_energy["energy"] == pytest.approx(by_hand, rel=1e-5)
    assert with_energy["total"] == pytest.approx(terms["total"] + 5 * by_hand, rel=1e-5)
    loss.energy_weight, loss.in_turn = 0.0, True
    turns = [loss(x, update) for update in range(8)]
    assert all(turns[i]["conv4"] == turns[i + 4]["conv4"] for i in range(4)), "four updates look along all directions"
    for layer in weights:
        seen = [turns[i][layer].item() for i in range(4)]
        assert len(set(seen)) == 4 and np.mean(seen) == pytest.approx(terms[layer], rel=1e-6)


def run(workspace: Path, *arguments: object, tap: str = "conv5") -> int:
    options = [*RUN, "--root", str(workspace), "--weights", "random", "--target", tap, "--descent", "authors"]
    return reconstruct.main([*map(str, arguments), *options])


@pytest.mark.parametrize(
    ("regularizer", "tap", "terms"),
    [
        ("l2", "conv1", ["l2"]),  # from random weights, deeper taps have no gradient at its start, the mean colour
        ("tv", "conv5", ["tv", "l6"]),
        ("vlm+tv", "conv5", ["conv4", "conv5", "tv"]),
    ],
)
def test_regularizers_of_the_script(
    workspace: Path, photos: Path, tmp_path: Path, regularizer: str, tap: str, terms: list[str]
) -> None:
    image = next((photos / "class0").iterdir())
    options = [image, "--regularizer", regularizer, "--iterations", 4, "--learning-rate", 100, "--out", tmp_path]
    assert run(workspace, *options, tap=tap) == 0
    with (tmp_path / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["restart", "iteration", "total", "feature", *terms] and len(rows) == 4
    assert float(rows[3]["feature"]) < float(rows[0]["feature"])
    assert all(float(rows[3][term]) > 0 for term in terms)
    facts = json.loads((tmp_path / "parameters.json").read_text())
    assert facts["regularizer"] == regularizer and facts["decay_at"] == ([] if "vlm" in regularizer else [0, 2])
    assert np.asarray(Image.open(tmp_path / "image.png")).shape == (227, 227, 3)


NOT_ASKED = {"learning_rate": None, "iterations": None, "momentum": None, "noise": None}


def choose(name: str, regularizer: str, decay_at: list[int] | None = None, settings: dict | None = None, **asked):
    return reconstruction.choose_descent(name, regularizer, decay_at, settings or {}, **NOT_ASKED | asked)


def test_authors_settings_are_the_defaults() -> None:
    for regularizer, start, rate, iterations, decays in (
        ("vlm", "data", 2**19, 1000, ()),
        ("vlm+tv", "data", 2**19, 1000, ()),
        ("none", "data", 2**19, 1000, ()),
        ("tv", "norm", 0.004 * IMAGE_NORM**2, 400, (99, 299)),
        ("l2", "zero", 0.0004 * IMAGE_NORM**2, 400, (99, 299)),
    ):
        chosen, schedule = choose("authors", regularizer)
        assert (chosen.start, chosen.noise, chosen.momentum, chosen.iterations) == (start, 1, 0.9, iterations)
        assert schedule.decay_at == decays and schedule.learning_rate == pytest.approx(rate)
        assert (chosen.parametrization, chosen.optimizer) == ("pixels", "momentum")


def test_one_descent_for_all_regularizers() -> None:
    assert len({str(choose("fourier", regularizer)) for regularizer in REGULARIZERS}) == 1
    settings = {"exponent": 0.5, "decorrelate": None}
    chosen, schedule = choose("fourier", "tv", [7], settings, iterations=9, noise=0.3, learning_rate=2.0)
    assert chosen.settings == {"exponent": 0.5, "decorrelate": True} and chosen.noise == 0.3
    assert schedule == Schedule(2.0, (7,))


def test_presets_name_the_descent() -> None:
    for preset, expected in (("alexnet", "fourier"), ("demo", "fourier"), ("alexnet_caffe", "authors")):
        args = reconstruct.options.parse_args(reconstruct.get_parser(), ["--preset", preset], "reconstruct")
        assert args.descent == expected and args.vlm_weight is None
        assert descent_for(args.descent, "vlm").vlm_weight == (10 if expected == "authors" else 3)


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (8, 7), (7, 12), (227, 227), (1, 1)])
@pytest.mark.parametrize("settings", [{}, {"bgr": True}, {"exponent": 0.3}, {"decorrelate": False, "exponent": 0}])
def test_pixels_to_coefficients_to_pixels(size: tuple[int, int], settings: dict) -> None:
    x = 60 * torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(Fourier(x, **settings)(), x, rtol=0, atol=2e-2)
    exact = Fourier(x.double(), **settings)
    torch.testing.assert_close(exact(), x.double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [(6, 6), (5, 7)])
def test_gradient_of_coefficients_is_the_chain_rule(size: tuple[int, int]) -> None:
    image = Fourier(torch.randn(1, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    (z,) = image.parameters
    weights = torch.arange(3.0 * size[0] * size[1], dtype=torch.float64).view(1, 3, *size).cos()

    def value() -> Tensor:
        return (weights * image().pow(3)).sum()

    value().backward()
    for index in np.ndindex(*z.shape):
        ends = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                z[index] += step
                ends.append(value().item())
                z[index] -= step
        assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(z.grad[index].item(), rel=1e-6, abs=1e-6)


def test_low_frequencies_and_grey_are_varied_most() -> None:
    """A step of one size in every coefficient changes the image as natural images vary."""
    image = Fourier(torch.zeros(1, 3, 32, 32))
    with torch.no_grad():
        image.parameters[0][:, :, 1, 0, 0] = 1
        slow = image().std()
        image.parameters[0].zero_()[:, :, 8, 0, 0] = 1
        assert slow > 7 * image().std()
        image.parameters[0].zero_()[:, 0, 1, 0, 0] = 1
        grey = image()[0]
    torch.testing.assert_close(grey[0], grey[1], rtol=0.1, atol=0)
    red_first = Fourier(torch.zeros(1, 3, 4, 4)).colors
    assert torch.equal(red_first.flip(0), Fourier(torch.zeros(1, 3, 4, 4), bgr=True).colors)
    assert red_first.norm(dim=0).max().item() == pytest.approx(1)


def test_equal_images_have_equal_objectives(alexnet: Backbone) -> None:
    x, other = 40 * torch.randn(2, 1, 3, 67, 67, generator=torch.Generator().manual_seed(5))
    target = alexnet(alexnet.from_pixels(other), ["conv3"])["conv3"]
    loss = objective.ReconstructionLoss(alexnet, "conv3", target, None, None, penalties=penalties_for("tv", "conv3"))
    terms = [{name: v.item() for name, v in loss(image()).items()} for image in (Pixels(x), Fourier(x))]
    assert terms[0] == pytest.approx(terms[1], rel=1e-5)


def test_adam_is_torchs_and_its_reset_forgets_the_momentum_alone() -> None:
    ours, theirs = (torch.linspace(-2, 3, 8).requires_grad_() for _ in range(2))
    optimizer, reference = Adam([ours], 0.1), torch.optim.Adam([theirs], 0.1)
    for _ in range(20):
        for x, o in ((ours, optimizer), (theirs, reference)):
            o.zero_grad()
            (x**4).sum().backward()
            o.step()
    torch.testing.assert_close(ours, theirs)
    squares = optimizer.squares[0].clone()
    optimizer.reset_momentum()
    assert not optimizer.velocities[0].any() and torch.equal(optimizer.squares[0], squares)
    before = ours.detach().clone()
    optimizer.zero_grad()
    (ours**4).sum().backward()
    gradient = ours.grad.clone()
    optimizer.step()
    scale = (optimizer.squares[0] / (1 - 0.999**21)).sqrt()
    torch.testing.assert_close(before - ours.detach(), 0.1 * gradient / scale, msg="as if it were the first")


def test_few_updates_on_coefficients_lower_the_objective_more(alexnet: Backbone) -> None:
    data = {"mean": torch.zeros(3), "std": torch.ones(3)}
    photo = torch.from_numpy(make_photo(3, 227, 227)).permute(2, 0, 1)[None].float()
    target = alexnet(alexnet.preprocess(photo), ["conv5"])["conv5"]
    std = target.std(dim=(0, 2, 3)) + 1e-3
    loss, last = objective.ReconstructionLoss(alexnet, "conv5", target, std, None), {}
    for name in DESCENTS:
        chosen = descent_for(name, "none")
        image = chosen.image(STARTS[chosen.start](alexnet, data, chosen.noise, 7))
        optimizer = OPTIMIZERS[chosen.optimizer](image.parameters, 0)
        terms: list[float] = []
        descend(
            loss, image, optimizer, Schedule(chosen.learning_rate), 12, lambda i, t, to=terms: to.append(t["total"])
        )
        last[name] = min(terms)
    assert last["fourier"] < 0.8 * last["authors"]


@pytest.mark.parametrize(
    "settings",
    [
        ["--regularizer", "tv", "--learning-rate", 1e4],
        ["--regularizer", "vlm", "--descent", "fourier"],
        ["--regularizer", "tv", "--descent", "fourier", "--decay-at", 2, 5],
    ],
)
def test_descent_resumes_across_a_step_of_the_rate(
    workspace: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list
) -> None:
    image = next((photos / "class1").iterdir())

    def go(out: str) -> None:
        options = [*RUN, "--root", str(workspace), "--weights", "random", "--target", "conv5", "--descent", "authors"]
        more = [image, "--iterations", 8, "--snapshot-every", 3, *settings, "--out", tmp_path / out]
        reconstruct.main([*options, *map(str, more)])

    go("whole")
    picture = reconstruction.Restart.snapshot

    def interrupted(self) -> None:
        picture(self)
        if len(self.curves) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(reconstruction.Restart, "snapshot", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go("cut")
    monkeypatch.undo()
    go("cut")
    for name in ("reconstruction.npy", "curves.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_several_inputs_go_into_folders_of_their_own(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(2):
        Image.fromarray(make_photo(i, 90, 120)).save(folder / f"photo{i}.png")
    options = ["--regularizer", "none", "--iterations", 1, "--out", tmp_path / "out"]
    assert run(workspace, folder, "--rows", 7, *options) == 0
    images = json.loads((workspace / "images.npy.json").read_text())["names"]
    row = f"00007-{Path(images[7]).stem}"
    assert {p.name for p in (tmp_path / "out").glob("[!.]*")} == {"photo0", "photo1", row}
    stored = np.load(workspace / "images.npy")[7]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / row / "image.png")), stored[14:241, 14:241])
    (folder / "broken.png").write_bytes(b"no picture")
    capsys.readouterr()
    assert run(workspace, folder, "--rows", 7, *options) == 2, "one bad input does not stop the others"
    printed = capsys.readouterr()
    assert printed.out.count("is finished: nothing to do") == 3
    assert "broken.png is not an image" in printed.err


def test_held_out_rows(workspace: Path, tmp_path: Path) -> None:
    assert run(workspace, "--held-out", "--regularizer", "none", "--iterations", 1, "--out", tmp_path / "out") == 0
    (folder,) = (tmp_path / "out").glob("[!.]*")  # a tenth of ten images
    training, held = split_images(10, 16, 3)
    assert folder.name.startswith(f"{held[0]:05d}-") and held[0] not in training
    by_layer = json.loads((workspace / "vlm.safetensors.json").read_text())["training"]
    facts = json.loads((workspace / "images.npy.json").read_text())
    assert targets.held_out_rows(by_layer, facts) == held.tolist()
    moved = {**facts, "names": ["other.png", *(f"elsewhere/{name}" for name in facts["names"])]}
    assert targets.held_out_rows(by_layer, moved) == (held + 1).tolist(), "found by name among more images"
    with pytest.raises(UserError, match="which none of the 1 images is called"):
        targets.held_out_rows(by_layer, {"names": ["other.png"]})
    by_layer["conv5"]["held_out_names"] = []
    with pytest.raises(UserError, match="different splits"):
        targets.held_out_rows(by_layer, facts)
    for layer in by_layer.values():
        layer["held_out_names"] = []
    with pytest.raises(UserError, match="held no images out"):
        targets.held_out_rows(by_layer, facts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to reconstruct"),
        (["--rows", "10"], "has no row 10: it holds 10 images"),
        (["nowhere.png"], "nowhere.png does not exist"),
        (["--rows", "1", "--tv-weight", "3"], "--tv-weight means nothing to --regularizer vlm"),
        (["--rows", "1", "--regularizer", "tv", "--l2-weight", "3"], "--l2-weight means nothing to --regularizer tv"),
        (["--rows", "1", "--regularizer", "l2", "--restarts", "2"], "use --restarts 1"),
        (["--rows", "1", "--frequency-exponent", "1"], "--frequency-exponent means nothing to --descent authors"),
        (["--rows", "1", "--no-decorrelate"], "--decorrelate means nothing to --descent authors"),
        (["--rows", "1", "--regularizer", "l2", "--start-noise", "1"], "--start-noise means nothing to l2"),
    ],
)
def test_mistakes(workspace: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(workspace, *arguments)


def test_results_without_language_model_outlive_a_longer_training(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A regulariser that reads no language model is not redone when that was trained further."""
    for name in ("images.npy", "images.npy.json", "vlm.safetensors"):
        shutil.copy(workspace / name, tmp_path)
    options = ["--rows", 2, "--regularizer", "none", "--iterations", 1]
    run(tmp_path, *options)
    from models.checkpoints import load_vlm, vlm_tensors, write_tensors

    vlm, notes = load_vlm(tmp_path / "vlm.safetensors")
    with torch.no_grad():
        vlm.layers["conv5"]["up"].linear.bias += 1
    write_tensors(tmp_path / "vlm.safetensors", vlm_tensors(vlm), notes.configuration)
    capsys.readouterr()
    run(tmp_path, *options)
    assert "nothing to do" in capsys.readouterr().out
    vlm.statistics["data"]["mean"] += 1
    write_tensors(tmp_path / "vlm.safetensors", vlm_tensors(vlm), notes.configuration)
    with pytest.raises(UserError, match="made otherwise .*statistics_sha256"):
        run(tmp_path, *options)


def test_statistics_that_nobody_measured_are_of_the_sample_photos(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "SAMPLE_VIEWS", 3)
    options = ["--rows", 2, "--regularizer", "none", "--iterations", 1, "--out", tmp_path]
    assert run(workspace, *options, tap="conv2") == 0
    assert "statistics of conv2: neither the checkpoint nor --statistics has them" in capsys.readouterr().out
    (folder,) = tmp_path.glob("[!.]*")
    assert json.loads((folder / "parameters.json").read_text())["measured"] == ["conv2"]
    backbone = Backbone(ARCHITECTURES["alexnet"], random_parameters(ARCHITECTURES["alexnet"], 3))
    found = targets.sample_statistics(backbone, "data")
    values = []
    for view in targets.list_views("samples", 3, seed=0):
        rgb = targets.area_scale(view.read(), 256, 256)[14:241, 14:241].reshape(-1, 3) / 255
        values.append((rgb - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225])
    np.testing.assert_allclose(found["std"], np.concatenate(values).std(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found["mean"], np.concatenate(values).mean(axis=0), atol=1e-5)


def test_regularizers_are_complete() -> None:
    assert list(REGULARIZERS) == ["none", "l2", "tv", "vlm", "vlm+tv"]
    for regularizer in REGULARIZERS.values():
        assert isinstance(regularizer, Regularizer)
        assert regularizer.penalties.keys() <= objective.PENALTIES.keys()
        assert regularizer.descent.parametrization == "pixels"


def test_a_regularizer_and_a_descent_are_an_entry_each(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Added from outside, both are choices of the script."""
    monkeypatch.setitem(objective.PENALTIES, "l1", lambda x: x.abs().sum())
    monkeypatch.setitem(REGULARIZERS, "l1", Regularizer(penalties={"l1": 5.0}))
    monkeypatch.setitem(PARAMETRIZATIONS, "squashed", lambda start, **_: Squashed(start))
    monkeypatch.setitem(DESCENTS, "bounded", dataclasses.replace(FOURIER, parametrization="squashed", settings={}))
    options = [*RUN, "--root", workspace, "--weights", "random", "--target", "conv5", "--rows", 1, "--iterations", 2]
    options += ["--regularizer", "l1", "--descent", "bounded", "--out", tmp_path]
    assert reconstruct.main(list(map(str, options))) == 0
    facts = json.loads(next(tmp_path.glob("*/parameters.json")).read_text())
    assert facts["losses"]["l1"] > 0 and facts["penalties"] == {"l1": 5.0} and facts["descent"] == "bounded"


class Squashed(Pixels):
    """Pixels that cannot leave ±120."""

    def __call__(self) -> Tensor:
        return 120 * torch.tanh(self.parameters[0])
