"""evaluate.py fixations on made-up photos: scores, controls, resuming, mistakes."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import evaluate
import saliency
from evaluation import fixation_metrics, score_fixations
from evaluation.baselines import BASELINES, Baseline
from evaluation.datasets import DATASETS, Dataset
from evaluation.fixations import image_sizes, read_csv, read_fixations
from models.backbones import ARCHITECTURES, Backbone, random_parameters
from models.checkpoints import load_vlm
from models.errors import UserError
from models.unnaturalness import centred, layer_features, postprocess
from models.vlm import DIRECTIONS, predict_nothing
from models.weights.find import load_backbone
from pipeline.detector import choose_layers
from tests.conftest import make_photo
from tests.pipeline.test_detector import unnaturalness_map

SIZES = {"b.png": (90, 130), "a.jpg": (110, 100), "c.png": (100, 120), "d.png": (96, 96)}
LOOKED_AT = ("a.jpg", "b.png", "c.png")  # nobody saw d.png


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stimuli/ and fixations.csv: four people, ten fixations each, around a point of each image."""
    root = tmp_path_factory.mktemp("data")
    (root / "stimuli").mkdir()
    random = np.random.default_rng(0)
    lines = ["image,subject,x,y,duration_ms"]
    for seed, (name, (height, width)) in enumerate(SIZES.items()):
        Image.fromarray(make_photo(seed, height, width)).save(root / "stimuli" / name)
        centre = random.uniform(0.3, 0.7, 2) * (width, height)
        for subject in range(4 if name in LOOKED_AT else 0):
            for x, y in np.clip(random.normal(centre, 8, (10, 2)), 0, (width - 1, height - 1)):
                lines.append(f"{name},{subject},{x:.2f},{y:.2f},200")
    (root / "fixations.csv").write_text("\n".join([*lines, "a.jpg,0,-5,3,100", "z.jpg,0,5,3,100"]) + "\n")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that stand for trained ones: random, of another seed than the control's."""
    path = tmp_path_factory.mktemp("weights") / "alexnet.safetensors"
    save_file(random_parameters(ARCHITECTURES["alexnet"], 5), path)
    return path


def options(data: Path, out: Path, *more: object) -> list[str]:
    inputs = ["--stimuli", data / "stimuli", "--fixations", data / "fixations.csv", "--out", out]
    return ["fixations", *map(str, (*inputs, *more))]


@pytest.fixture(scope="module")
def finished(data: Path, workspace: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of both layers of the workspace's checkpoint."""
    out = tmp_path_factory.mktemp("evaluation")
    vlm = ("--vlm", workspace / "vlm.safetensors", "--layer", "conv4", "conv5", "--weights", weights)
    assert evaluate.main(options(data, out, *vlm, "--baseline", "uniform")) == 0
    return out


def read_scores(out: Path) -> dict[str, dict[str, dict[str, float]]]:
    """By model, image and metric."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    with (out / "scores.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            numbers = {metric: float(line[metric] or "nan") for metric in fixation_metrics.METRICS}
            found.setdefault(line["model"], {})[line["image"]] = numbers
    return found


def expected_scores(data: Path, image: str, values: np.ndarray) -> dict[str, float]:
    files = sorted((data / "stimuli").iterdir())
    fixations = read_fixations(data / "fixations.csv", image_sizes(files))
    number = [file.name for file in files].index(image)
    return fixation_metrics.all_scores(values, *fixations.of_image(number)[:2], *fixations.elsewhere(number))


def test_table_has_every_model_and_control(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    kinds = {name: row["kind"] for name, row in summary["models"].items()}
    assert kinds == {
        "alexnet-conv4": "model",
        "alexnet-conv4/predict-nothing": "control",
        "alexnet-conv5": "model",
        "alexnet-conv5/predict-nothing": "control",
        "alexnet-conv4/random-cnn": "control",
        "alexnet-conv5/random-cnn": "control",
        "uniform": "baseline",
        "centre-gaussian": "baseline",
        "spectral-residual": "baseline",
        "inter-observer": "ceiling",
    }
    assert (summary["images"], summary["images_scored"], summary["fixations"]) == (4, 3, 120)
    assert summary["left_out"] == {"outside": 1, "not_finite": 0, "unknown": 1}
    table = (finished / "table.md").read_text()
    for name, row in summary["models"].items():
        assert f"| {name} " in table and f"{row['auc']:.3f}" in table
    for model in ("conv4", "conv5"):
        with Image.open(finished / f"examples-alexnet-{model}.png") as picture:
            assert min(picture.size) > 300
    assert not list(finished.glob("*.partial"))


def test_summary_is_the_mean_of_the_scores(finished: Path) -> None:
    summary, scores = json.loads((finished / "summary.json").read_text()), read_scores(finished)
    for name, row in summary["models"].items():
        assert set(scores[name]) == set(SIZES)
        for metric in fixation_metrics.METRICS:
            values = np.array([scores[name][image][metric] for image in LOOKED_AT])
            assert np.isnan(scores[name]["d.png"][metric])
            if name == "inter-observer" and metric in ("cc", "sim", "kld"):
                assert row[metric] is None and row["intervals"][metric] is None
                continue
            assert row[metric] == pytest.approx(values.mean(), abs=1e-6)
            low, high = row["intervals"][metric]
            assert values.min() - 1e-6 <= low <= row[metric] + 1e-6 and row[metric] - 1e-6 <= high
    assert summary["models"]["uniform"]["auc"] == summary["models"]["uniform"]["sauc"] == 0.5
    assert summary["models"]["uniform"]["nss"] == 0
    assert summary["models"]["inter-observer"]["auc"] > 0.9, "the made-up people agree"


def test_differences_are_paired(finished: Path) -> None:
    summary, scores = json.loads((finished / "summary.json").read_text()), read_scores(finished)
    pairs = {(d["first"], d["second"]): d for d in summary["differences"]}
    baselines = {"uniform", "centre-gaussian", "spectral-residual"}
    controls = {"predict-nothing", "random-cnn"}
    assert set(pairs) == {
        *((f"alexnet-conv{n}", f"alexnet-conv{n}/{control}") for n in (4, 5) for control in controls),
        *((f"alexnet-conv{n}", baseline) for n in (4, 5) for baseline in baselines),
        ("alexnet-conv4", "alexnet-conv5"),
    }
    for (first, second), pair in pairs.items():
        values = [scores[first][image]["nss"] - scores[second][image]["nss"] for image in LOOKED_AT]
        assert pair["nss"] == pytest.approx(np.mean(values), abs=2e-6)
        assert min(values) - 2e-6 <= pair["intervals"]["nss"][0] <= pair["intervals"]["nss"][1] <= max(values) + 2e-6


def test_model_is_what_saliency_py_makes(
    finished: Path, data: Path, workspace: Path, weights: Path, tmp_path: Path
) -> None:
    vlm = ["--vlm", str(workspace / "vlm.safetensors"), "--layer", "conv4"]
    saliency.main([str(data / "stimuli"), *vlm, "--weights", str(weights), "--out", str(tmp_path / "maps")])
    for image in LOOKED_AT:
        expected = expected_scores(data, image, np.load(tmp_path / "maps" / f"{Path(image).stem}.npy"))
        found = read_scores(finished)["alexnet-conv4"][image]
        assert found == pytest.approx(expected, abs=2e-5)  # saliency.py stores float32
    # and the same maps from their folder
    evaluate.main(options(data, tmp_path / "out", "--maps", tmp_path / "maps"))
    for image in LOOKED_AT:
        found = read_scores(tmp_path / "out")
        assert found["maps"][image] == pytest.approx(read_scores(finished)["alexnet-conv4"][image], abs=2e-5)
        assert found["centre-gaussian"][image] == read_scores(finished)["centre-gaussian"][image]


def looks(data: Path, image: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the fixations on an image among the first ones."""
    files = sorted((data / "stimuli").iterdir())[:limit]
    number = [file.name for file in files].index(image)
    return read_fixations(data / "fixations.csv", image_sizes(files)).of_image(number)[:2]


def ramp_energy(p: np.ndarray) -> np.ndarray:
    """Squared features (D, H, W) under the ramp of all four directions, cell by cell, as the paper's code cuts them."""
    energy = (p**2).mean(axis=0)
    height, width = energy.shape
    total = np.zeros((height - 1, width - 1))
    for i in range(height - 1):
        for j in range(width - 1):
            total[i, j] += energy[i + 1, j] * i / (height - 1)  # down: the error of row i+1 stands at i
            total[i, j] += energy[i, j] * (height - 2 - i) / (height - 1)  # up: row i is predicted from below
            total[i, j] += energy[i, j + 1] * j / (width - 1)
            total[i, j] += energy[i, j] * (width - 2 - j) / (width - 1)
    return total


def test_controls_are_what_they_say(finished: Path, data: Path, workspace: Path, weights: Path) -> None:
    vlm, _ = load_vlm(workspace / "vlm.safetensors")
    scores = read_scores(finished)
    for image in LOOKED_AT:
        rgb = np.asarray(Image.open(data / "stimuli" / image).convert("RGB"))
        trained, _ = load_backbone("alexnet", weights)
        p = vlm.projections["conv5"](layer_features(trained, rgb, ["conv5"])["conv5"])[0].double().numpy()
        expected = expected_scores(data, image, postprocess(ramp_energy(p), *rgb.shape[:2], 16, 0.5, 0.03))
        assert scores["alexnet-conv5/predict-nothing"][image] == pytest.approx(expected, abs=1e-5)
        random, _ = load_backbone("alexnet", "random", seed=0)
        p = vlm.projections["conv5"](layer_features(random, rgb, ["conv5"])["conv5"])
        with torch.no_grad():
            raw = vlm.layers["conv5"].unnaturalness_map(p)[0].double().numpy()
        expected = expected_scores(data, image, postprocess(raw, *rgb.shape[:2], 16, 0.5, 0.03))
        assert scores["alexnet-conv5/random-cnn"][image] == pytest.approx(expected, abs=1e-5)


def test_maps_of_several_layers_are_added(
    data: Path, workspace: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_fixations, "draw_examples", lambda *a: None)
    vlm = ["--vlm", str(workspace / "vlm.safetensors"), "--layer", "conv4", "conv5", "--weights", str(weights)]
    evaluate.main(options(data, tmp_path / "out", *vlm, "--add", "--limit", 2))
    saliency.main([str(data / "stimuli" / "b.png"), *vlm, "--out", str(tmp_path / "maps")])
    scores = read_scores(tmp_path / "out")
    title = "alexnet-conv4+alexnet-conv5"
    rgb = np.asarray(Image.open(data / "stimuli" / "b.png"))
    loaded, _ = load_vlm(workspace / "vlm.safetensors")
    nothing = dict.fromkeys(DIRECTIONS, predict_nothing)
    trained, random = load_backbone("alexnet", weights)[0], load_backbone("alexnet", "random", seed=0)[0]
    for name, cnn, predictors in (
        ("", trained, None),
        ("/predict-nothing", trained, nothing),
        ("/random-cnn", random, None),
    ):
        raws = [unnaturalness_map(cnn, loaded, rgb, layer, predictors) for layer in ("conv4", "conv5")]
        total = sum(postprocess(raw, *rgb.shape[:2], 16, 0.5, 0.03) for raw in raws)  # each from 0 to 1
        found = fixation_metrics.METRICS["nss"](fixation_metrics.Case.of(total, *looks(data, "b.png", limit=2)))
        assert scores[title + name]["b.png"]["nss"] == pytest.approx(found, abs=1e-5)
        if not name:
            written = np.load(tmp_path / "maps" / "b.npy")
            assert written.min() == 0 and written.max() == 1
            np.testing.assert_allclose(written, (total - total.min()) / np.ptp(total), atol=1e-6)
    names = {p.name for p in (tmp_path / "maps").glob("*.npy")}
    assert names == {"b.npy", "b-unnaturalness-alexnet-conv4.npy", "b-unnaturalness-alexnet-conv5.npy"}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["models"][title]["kind"] == "model"
    assert {d["second"] for d in summary["differences"] if d["first"] == title} >= {
        f"{title}/predict-nothing",
        f"{title}/random-cnn",
    }
    with pytest.raises(UserError, match="one model only, nothing to add"):
        evaluate.main(options(data, tmp_path / "one", *vlm[:3], "conv5", "--weights", weights, "--add"))


def test_finished_evaluation_is_shown_again(
    finished: Path, data: Path, workspace: Path, weights: Path, capsys: pytest.CaptureFixture
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    vlm = ("--vlm", workspace / "vlm.safetensors", "--layer", "conv4", "conv5", "--weights", weights)
    same = options(data, finished, *vlm, "--baseline", "uniform")
    capsys.readouterr()
    assert evaluate.main(same) == 0
    printed = capsys.readouterr().out
    assert "nothing to do" in printed and (finished / "table.md").read_text() in printed
    with pytest.raises(UserError, match="blur is 0.03, not 0.05.*--overwrite"):
        evaluate.main([*same, "--blur", "0.05"])
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_killed_evaluation_goes_on(
    finished: Path, data: Path, workspace: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = ("--vlm", workspace / "vlm.safetensors", "--layer", "conv4", "conv5", "--weights", weights)
    same = options(data, tmp_path, *vlm, "--baseline", "uniform")
    score_image = score_fixations.score_image
    seen = []

    def killed_at_third(maps, fixations, number):
        seen.append(number)
        if seen == [0, 1, 2]:
            raise KeyboardInterrupt
        return score_image(maps, fixations, number)

    monkeypatch.setattr(score_fixations, "score_image", killed_at_third)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(same)
    journal = tmp_path / "scores.partial"
    journal.write_text(journal.read_text()[:-20])  # the second image's line is cut off
    computed = []
    monkeypatch.setattr("models.unnaturalness.layer_features", lambda *a: computed.append(a) or layer_features(*a))
    evaluate.main(same)
    assert seen == [0, 1, 2, 1, 2, 3]
    assert len(computed) == 2, "the trained and the random CNN on the last image: other maps were kept"
    for name in ("scores.csv", "table.md", "examples-alexnet-conv5.png"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name
    summaries = [(folder / "summary.json").read_text().replace(str(folder), "OUT") for folder in (tmp_path, finished)]
    assert summaries[0] == summaries[1]


def test_overwrite_starts_afresh(data: Path, workspace: Path, weights: Path, tmp_path: Path, monkeypatch) -> None:
    """All rows and pictures share one pass of each CNN over an image."""
    vlm = ("--vlm", workspace / "vlm.safetensors", "--layer", "conv4", "conv5", "--weights", weights, "--limit", 2)
    same = options(data, tmp_path, *vlm)
    with monkeypatch.context() as patch:
        patch.setattr(score_fixations, "draw_examples", lambda *a: None)
        evaluate.main(same)
    (tmp_path / "summary.json").unlink()
    passes = []
    forward = Backbone.forward
    monkeypatch.setattr(Backbone, "forward", lambda *a: passes.append(sorted(a[2])) or forward(*a))
    evaluate.main(same)
    assert not passes, "all maps were kept"
    evaluate.main([*same, "--overwrite"])
    assert passes == [["conv4", "conv5"]] * 4, "the trained and the random CNN on both images"


def test_subset_of_the_images(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    evaluate.main(options(data, tmp_path, "--baseline", "uniform", "--skip", 1, "--limit", 2))
    assert set(read_scores(tmp_path)["uniform"]) == {"b.png", "c.png"}
    assert "2 images, 80 fixations" in capsys.readouterr().out


def write_maps(data: Path, folder: Path) -> None:
    folder.mkdir()
    for name, (height, width) in SIZES.items():
        np.save(folder / f"{Path(name).stem}.npy", np.random.default_rng(0).random((height, width)))


def test_folder_of_maps(data: Path, tmp_path: Path) -> None:
    write_maps(data, tmp_path / "mine")
    y, x = np.mgrid[:110, :100]
    values = (257 * (x + y)).astype(np.uint16)
    (tmp_path / "mine" / "a.npy").unlink()
    Image.fromarray(values).save(tmp_path / "mine" / "a.jpg.png")
    evaluate.main(options(data, tmp_path / "out", "--maps", tmp_path / "mine"))
    found = read_scores(tmp_path / "out")["mine"]["a.jpg"]
    assert found == pytest.approx(expected_scores(data, "a.jpg", values), abs=1e-6)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "b.npy").unlink(), "no map of b.png: add b.npy or b.png"),
        (lambda f: np.save(f / "b.npy", np.zeros((45, 65))), "b.npy has 65×45 pixels, its stimulus 130×90"),
        (lambda f: np.save(f / "b.npy", np.zeros((130, 90))), "b.npy has 90×130 pixels, its stimulus 130×90"),
        (lambda f: np.save(f / "b.npy", np.zeros((90, 130, 3))), "a map is .height, width."),
        (lambda f: np.save(f / "b.npy", np.full((90, 130), np.nan)), "NaN"),
        (lambda f: np.save(f / "b.npy", np.array([None]), allow_pickle=True), "cannot be read as a map"),
        (lambda f: (f / "b.npy").write_bytes(b"no"), "cannot be read as a map"),
        (
            lambda f: Image.new("RGB", (130, 90)).save((f / "b.npy").unlink() or f / "b.png"),
            "mode RGB, not grey",
        ),
    ],
)
def test_wrong_maps_are_refused(data: Path, tmp_path: Path, spoil, message: str) -> None:
    write_maps(data, tmp_path / "mine")
    spoil(tmp_path / "mine")
    with pytest.raises(UserError, match=message) as caught:
        evaluate.main(options(data, tmp_path / "out", "--maps", tmp_path / "mine"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "summary.json").exists()


def test_mistakes(data: Path, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    vlm = workspace / "vlm.safetensors"
    cases = [
        (["fixations"], "either --dataset, or both"),
        (["fixations", "--stimuli", str(data)], "either --dataset, or both"),
        (options(data, tmp_path, "--dataset", "osie"), "either --dataset, or both"),
        (
            ["fixations", "--stimuli", str(tmp_path / "no"), "--fixations", str(data / "fixations.csv")],
            "is not a folder",
        ),
        (options(data, tmp_path, "--skip", 9), "no stimuli"),
        (options(data, tmp_path, "--skip", 3, "--vlm", vlm), "names none of the 1 stimuli"),
        (options(data, tmp_path, "--vlm", vlm, "--layer", "conv9"), "there is no layer 'conv9'"),
        (options(data, tmp_path, "--maps", tmp_path / "no"), "is not a folder"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            evaluate.main(arguments)
    for arguments in ([], ["nonsense"], options(data, tmp_path, "--baseline", "best")):
        with pytest.raises(SystemExit) as caught:
            evaluate.main(arguments)
        assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_layers_are_found_in_their_checkpoints() -> None:
    first, second = Path("first"), Path("second")
    there = {first: ["conv1", "conv5"], second: ["conv1", "conv5_3"]}
    assert choose_layers(there, None) == {first: ["conv5"], second: ["conv5_3"]}
    assert choose_layers(there, ["conv5_3", "conv5"]) == {first: ["conv5"], second: ["conv5_3"]}
    assert choose_layers(there, ["conv1"]) == {first: ["conv1"], second: ["conv1"]}
    with pytest.raises(UserError, match="second has none of the layers conv5: choose from conv1, conv5_3"):
        choose_layers(there, ["conv5"])


def test_metric_data_set_and_baseline_are_added_in_one_entry(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Made-up ones, from outside: offered by the command line, and seen in the tables."""
    cache = tmp_path / "cache" / "ours"
    shutil.copytree(data, cache)
    ours = Dataset((), lambda member: None, images="stimuli/*", count=4, fixations="fixations.csv", read=read_csv)
    monkeypatch.setitem(DATASETS, "ours", ours)
    monkeypatch.setitem(BASELINES, "left", Baseline("left is salient", lambda rgb: -np.indices(rgb.shape[:2])[1]))
    peak = fixation_metrics.Metric("Peak", lambda case: float(case.values.max()), of_people=True)
    monkeypatch.setitem(fixation_metrics.METRICS, "peak", peak)
    out = tmp_path / "out"
    chosen = ["--dataset", "ours", "--cache", str(tmp_path / "cache"), "--baseline", "left", "--out", str(out)]
    assert evaluate.main(["fixations", *chosen]) == 0
    scores, summary = read_scores(out), json.loads((out / "summary.json").read_text())
    assert scores["left"]["a.jpg"]["peak"] == 0 and scores["left"]["a.jpg"]["auc"] != 0.5
    assert 0 < summary["models"]["inter-observer"]["peak"] < 1, "of the others' fixations, blurred"
    table = (out / "table.md").read_text()
    assert "| KLD " in table and "| Peak" in table and "| left " in table and "- left: left is salient" in table
    assert table in capsys.readouterr().out


def test_options_of_each_checkpoint(
    data: Path, workspace: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A language model with the energy of another map added, each with its own power and blur: both scripts agree."""
    monkeypatch.setattr(score_fixations, "draw_examples", lambda *a: None)
    vlm = str(workspace / "vlm.safetensors")
    same = ["--vlm", vlm, vlm, "--layer", "conv5", "--weights", str(weights), "--centre-prior", "0.4"]
    same += ["--predictor", "vlm", "predict-nothing", "--power", "0.5", "1", "--blur", "0.03", "0.02"]
    evaluate.main(options(data, tmp_path / "out", *same, "--add", "--limit", 2, "--baseline", "feature-contrast"))
    saliency.main([str(data / "stimuli" / "b.png"), *same, "--out", str(tmp_path / "maps")])
    written = np.load(tmp_path / "maps" / "b.npy")
    rgb = np.asarray(Image.open(data / "stimuli" / "b.png"))
    loaded, trained = load_vlm(workspace / "vlm.safetensors")[0], load_backbone("alexnet", weights)[0]
    nothing = unnaturalness_map(trained, loaded, rgb, "conv5", dict.fromkeys(DIRECTIONS, predict_nothing))
    model = unnaturalness_map(trained, loaded, rgb, "conv5")
    parts = [postprocess(model, 90, 130, 16, 0.5, 0.03), postprocess(nothing, 90, 130, 16, 1.0, 0.02)]
    total = sum(centred(part, 0.4) for part in parts)
    np.testing.assert_allclose(written, (total - total.min()) / np.ptp(total), atol=1e-4)
    scores, title = read_scores(tmp_path / "out"), "alexnet-conv5+alexnet-conv5-predict-nothing"
    found = fixation_metrics.METRICS["nss"](fixation_metrics.Case.of(written, *looks(data, "b.png", limit=2)))
    assert scores[title]["b.png"]["nss"] == pytest.approx(found, abs=1e-4)
    assert f"{title}/feature-contrast" in scores and "alexnet-conv5/feature-contrast" in scores
    names = {p.name for p in (tmp_path / "maps").glob("*unnaturalness*.npy")}
    assert names == {f"b-unnaturalness-alexnet-conv5{more}.npy" for more in ("", "-predict-nothing")}
    with pytest.raises(UserError, match="--blur has 2 values for 1 checkpoints"):
        saliency.main([str(data / "stimuli" / "b.png"), "--vlm", vlm, "--blur", "0.1", "0.2", "--out", str(tmp_path)])
