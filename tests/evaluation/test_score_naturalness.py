"""evaluate.py naturalness on made-up losses, and on a tiny network: scores, controls, resuming, mistakes."""

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import evaluate
import saliency
from evaluation import naturalness_metrics, naturalness_tables, score_naturalness, tables
from evaluation.naturalness_readers import MODEL, NOTHING, PREDICTORS, RANDOM, RELATIVE
from evaluation.spoiling import SPOILINGS, Spoiling
from models import checkpoints, naturalness
from models.backbones import ARCHITECTURES, Backbone, central_part, centre_crop, random_parameters
from models.errors import UserError
from models.vlm import DIRECTIONS, layer_loss, layer_map, predict_nothing, repeat_last
from pipeline import array_files, artefacts, figures
from pipeline.images import write_png
from pipeline.scaling import area_scale
from tests.conftest import make_photo
from tests.models.test_checkpoints import tiny_model
from tests.tiny import TINY

NAMES = ["noise 25", "mirrored", "pasted 1/2", "region blurred"]


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "tiny", TINY)
        patch.setattr(tables, "RESAMPLES", 50)
        patch.setattr(
            figures, "picture_grid", lambda rows, path, **_: write_png(path, np.zeros((len(rows), 1), np.uint8))
        )
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of conv1 and conv2, weights of another seed than the control's, a folder of five photos."""
    root = tmp_path_factory.mktemp("data")
    configuration = {"backbone": "tiny", "layers": ["conv1", "conv2"]}
    configuration["training"] = {
        "conv1": {"held_out_names": ["p3.png", "p1.png", "p0.png"]},
        "conv2": {"held_out_names": ["p0.png", "p3.png", "p4.png"]},
    }
    checkpoints.write_tensors(root / "vlm.safetensors", checkpoints.vlm_tensors(tiny_model()), configuration)
    save_file(random_parameters(TINY, 5), root / "weights.safetensors")
    (root / "photos").mkdir()
    for number in range(5):
        Image.fromarray(make_photo(number, 60 + number, 50)).save(root / "photos" / f"p{number}.png")
    return root


def options(data: Path, out: Path, *more: object) -> list[str]:
    weights = ("--vlm", data / "vlm.safetensors", "--weights", data / "weights.safetensors", "--device", "cpu")
    return ["naturalness", *map(str, (*more, *weights, "--out", out))]


def on_photos(data: Path, out: Path, *more: object) -> list[str]:
    return options(data, out, data / "photos", "--spoilings", *NAMES, *more)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    assert evaluate.main(on_photos(data, out)) == 0
    return out


def read_csv(out: Path) -> list[dict[str, str]]:
    with (out / "scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_shares_and_aucs_of_made_up_losses() -> None:
    assert [naturalness_metrics.higher(*pair) for pair in ((2, 1), (1, 2), (3, 3))] == [1, 0, 0.5]
    assert math.isnan(naturalness_metrics.higher(math.nan, 1))
    settings = {"confidence": 0.95, "resamples": 200, "seed": 0}
    originals = np.array([1.0, 2.0, 3.0, 4.0])
    assert naturalness_metrics.auc_with_interval(originals + 10, originals, **settings) == (1, 1, 1)
    assert naturalness_metrics.auc_with_interval(originals, originals + 10, **settings) == (0, 0, 0)
    value, low, high = naturalness_metrics.auc_with_interval(originals, originals, **settings)
    assert value == low == high == 0.5, "equal losses tell nothing, whichever images are drawn"
    value, low, high = naturalness_metrics.auc_with_interval(originals + 0.5, originals, **settings)
    assert value == 10 / 16 and low <= value <= high, "of 16 pairs the copy is higher in 10, in all 4 own ones"
    one = naturalness_metrics.auc_with_interval(np.array([2.0]), np.array([1.0]), **settings)
    assert one[0] == 1 and math.isnan(one[1])
    assert math.isnan(naturalness_metrics.auc_with_interval(np.empty(0), np.empty(0), **settings)[0])


def test_auc_interval_is_about_the_auc() -> None:
    random = np.random.default_rng(3)
    for count in (8, 32, 128):
        originals = random.normal(0, 1, count)
        copies = originals + 0.01  # every copy is higher than its own original, yet the AUC is hardly above ½
        value, low, high = naturalness_metrics.auc_with_interval(
            copies, originals, confidence=0.95, resamples=2000, seed=1
        )
        assert value == pytest.approx(0.5 + 0.5 / count, abs=0.02) and low <= value <= high
    copies, originals = random.normal(0.8, 1, 60), random.normal(0, 1, 60)  # independent: a sample of each by itself
    value, low, high = naturalness_metrics.auc_with_interval(copies, originals, confidence=0.9, resamples=2000, seed=1)
    draws = [(random.choice(copies, 60)[:, None] > random.choice(originals, 60)).mean() for _ in range(2000)]
    np.testing.assert_allclose([low, high], np.quantile(draws, [0.05, 0.95]), atol=0.03)


def test_region_auc_of_known_maps() -> None:
    mask = np.zeros((40, 40), bool)
    mask[12:20, 20:32] = True
    values = np.zeros((9, 9))
    assert naturalness_metrics.region_auc(values, mask, 4) == 0.5
    values[3, 6] = 1.0  # 4 × 9 = 36 pixels, 2 at either edge: its cell is rows 14-17, columns 26-29, inside the region
    assert naturalness_metrics.region_auc(values, mask, 4) > 0.6
    assert naturalness_metrics.region_auc(-values, mask, 4) < 0.4
    exact = mask[2:38, 2:38].astype(float)
    assert naturalness_metrics.region_auc(exact, mask, 1) == 1, "36 pixels lie in the middle of 40"
    assert naturalness_metrics.region_auc(np.pad(exact, 4), mask, 1) == 1, "a map larger than its image is cropped"
    rim = np.zeros((40, 40), bool)
    rim[:2] = True
    assert math.isnan(naturalness_metrics.region_auc(values, rim, 4)), "the map does not reach there"


def test_losses_and_maps_are_those_of_each_image() -> None:
    p = torch.randn(3, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    for predictor in (predict_nothing, repeat_last):
        predictors = dict.fromkeys(DIRECTIONS, predictor)
        losses, maps = naturalness.losses_and_maps(p, predictors)
        torch.testing.assert_close(maps, layer_map(p, predictors))
        for loss, image in zip(losses, p, strict=True):
            torch.testing.assert_close(loss, layer_loss(image[None], predictors))


def test_mean_image_is_subtracted_before_the_crop() -> None:
    mean = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1)) * 200
    backbone = Backbone(TINY, random_parameters(TINY, 5), mean)
    photo = make_photo(1, 32, 32)
    vlm = tiny_model()
    whole = torch.from_numpy(photo).permute(2, 0, 1)[None].float()
    features = backbone(centre_crop(backbone.preprocess(whole), 25, 24), ["conv2"])["conv2"]
    found = naturalness.features_of_crops(backbone, vlm, central_part(photo, 25, 24)[None], ["conv2"])["conv2"]
    torch.testing.assert_close(found, vlm.projections["conv2"](features))


def test_percentiles_of_held_out_losses() -> None:
    held = naturalness.quantiles(range(101))
    assert held[0] == 0 and held[-1] == 100 and len(held) == len(naturalness.LEVELS)
    assert [naturalness.percentile(loss, held) for loss in (-5, 0, 33, 50.5, 100, 1000)] == [0, 0, 33, 50.5, 100, 100]


def made_up(losses: dict[str, tuple[float, float]], regions: dict[str, float]) -> dict:
    """Scores of one layer: by image original and copy of `bad`, for the language model; the controls know nothing."""
    scores = {}
    for image, (original, copy) in losses.items():
        entry = {"original": original, "copies": {"bad": copy}, "regions": {}, "untouched": {}}
        if image in regions:
            entry["regions"], entry["untouched"] = {"bad": regions[image]}, {"bad": 0.5}
        flat = entry | {"copies": {"bad": original}}
        scores[image] = {"net-conv": {name: entry if name == MODEL else flat for name in PREDICTORS}}
    return scores


def test_summary_of_made_up_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {"a": (1.0, 2.0), "b": (2.0, 1.5), "c": (3.0, 5.0), "d": (4.0, 4.5)}
    scores = made_up(losses, {"a": 0.9, "c": 0.7})
    spoilings = {"bad": "made up", "never": "no image has it"}
    found = naturalness_tables.summarise(scores, spoilings, 0)["net-conv"]
    assert found[MODEL]["share"]["bad"] == 0.75
    assert found[MODEL]["auc"]["bad"] == (1.5 + 1 + 4 + 4) / 16
    assert found[MODEL]["regions"]["bad"] == pytest.approx(0.8) and found[MODEL]["untouched"]["bad"] == 0.5
    for control in set(PREDICTORS) - {MODEL}:
        assert found[control]["share"]["bad"] == found[control]["auc"]["bad"] == 0.5
    assert found[MODEL]["share"]["never"] is None and found[MODEL]["auc"]["never"] is None
    pairs = naturalness_tables.differences(scores, spoilings, 0)
    assert {(d["second"], d["bad"]) for d in pairs} == {(c, 0.25) for c in PREDICTORS if c != MODEL}


def test_failures_are_said_by_the_intervals() -> None:
    shares = {"worse": (0.9, 1), "better": (0.0, 0.2), "dim": (0.3, 0.7), "mirror": (0.4, 0.6), "moved": (0.6, 0.9)}
    share = {"intervals": shares, **{name: sum(ends) / 2 for name, ends in shares.items()}}
    fine = {"intervals": {name: (0.6, 1) if name != "mirror" else (0.4, 0.6) for name in shares}}
    summary = {"models": {"net": {MODEL: {"share": share}, RELATIVE: {"share": fine}}}}
    summary |= {"spoilings": shares, "harmless": ["mirror"]}
    line = naturalness_tables.failures(summary).splitlines()[-1]
    assert line == "- net, relative, fails nowhere"
    summary["harmless"] += ["moved"]
    line = naturalness_tables.failures(summary).splitlines()[-2]
    assert "*more* natural than the original: better;" in line and "cannot tell from the original: dim;" in line
    assert line.endswith("though it is as natural: moved") and "worse" not in line and "mirror" not in line


def test_gains_are_said_by_the_paired_intervals() -> None:
    intervals = {"up": (0.1, 0.3), "down": (-0.2, -0.1), "level": (-0.1, 0.1), "unknown": None}
    pairs = [{"model": "net", "second": NOTHING, "intervals": intervals}, {"model": "net", "second": RANDOM}]
    assert naturalness_tables.gains({"differences": pairs}).splitlines()[2:] == ["- net: more on up; less on down"]


def test_every_copy_layer_and_control_is_in_the_tables(finished: Path) -> None:
    summary, lines = json.loads((finished / "summary.json").read_text()), read_csv(finished)
    assert list(summary["models"]) == ["tiny-conv1", "tiny-conv2"] and summary["images"] == 5
    assert len(lines) == 5 * 2 * len(PREDICTORS) * len(NAMES)
    table = (finished / "table.md").read_text()
    for title, of_title in summary["models"].items():
        assert list(of_title) == list(PREDICTORS) and f"### {title}" in table
        for predictor, found in of_title.items():
            own = [x for x in lines if (x["model"], x["predictor"]) == (title, predictor)]
            for name in NAMES:
                pairs = [(float(x["loss_copy"]), float(x["loss_original"])) for x in own if x["spoiling"] == name]
                if predictor != RELATIVE:  # of an untrained model nearly 1 in all images, in the digits of a table
                    assert found["share"][name] == np.mean([copy > original for copy, original in pairs])
                regions = [x["region_auc"] for x in own if x["spoiling"] == name]
                if SPOILINGS[name].side is None:
                    assert set(regions) == {""} and name not in found["regions"]
                else:
                    assert found["regions"][name] == pytest.approx(np.mean([float(r) for r in regions]), abs=1e-5)
    by_key = {(x["model"], x["predictor"], x["image"], x["spoiling"]): float(x["loss_copy"]) for x in lines}
    for (title, predictor, *rest), loss in by_key.items():
        if predictor == RELATIVE:
            parts = [by_key[title, name, *rest] for name in (MODEL, NOTHING)]
            assert loss == pytest.approx(parts[0] / parts[1], rel=1e-4)
    assert table.count("| spoiled copy ") == 6 and table.count(f"| {RANDOM} ") == 6
    assert "Where the measure fails" in table
    for title in summary["models"]:
        assert Image.open(finished / f"regions-{title}.png").height == 5
    assert not list(finished.glob("*.partial"))


def test_losses_are_those_of_the_network(finished: Path, data: Path) -> None:
    vlm, _ = checkpoints.load_vlm(data / "vlm.safetensors")
    for seed, predictor in ((5, MODEL), (0, RANDOM)):
        backbone = Backbone(TINY, random_parameters(TINY, seed))
        line = next(x for x in read_csv(finished) if x["predictor"] == predictor and x["spoiling"] == "mirrored")
        stored = area_scale(make_photo(0, 60, 50), 256, 256)
        original = stored[116:140, 116:140]
        for key, picture in (("loss_original", original), ("loss_copy", original[:, ::-1])):
            x = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float()
            p = vlm.projections["conv1"](backbone(backbone.preprocess(x), ["conv1"])["conv1"])
            assert float(line[key]) == pytest.approx(layer_loss(p, vlm.layers["conv1"]).item(), rel=1e-4)


def test_a_made_up_spoiling_is_one_entry(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered from outside it is an option, a line of the tables, and its images are what it makes."""
    monkeypatch.setitem(SPOILINGS, "blacked out", Spoiling("made up", lambda rgb, random, other: rgb * 0))
    assert evaluate.main(on_photos(data, tmp_path, "--spoilings", "blacked out", "--layer", "conv1")) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["spoilings"] == {"blacked out": "made up"}
    assert summary["models"]["tiny-conv1"]["repeat last"]["share"]["blacked out"] == 0, "black repeats itself"
    table = (tmp_path / "table.md").read_text()
    assert "| blacked out " in table and "- blacked out: made up" in table


def test_held_out_images_of_stage_1(data: Path, tmp_path: Path) -> None:
    import prepare_images

    source, root = str(data / "photos"), str(tmp_path)
    prepare_images.main(["--preset", "demo", "--source", source, "--root", root, "--num-images", "5"])
    out = tmp_path / "out"
    assert evaluate.main(options(data, out, "--images", tmp_path / "images.npy", "--spoilings", *NAMES)) == 0
    assert {line["image"] for line in read_csv(out)} == {"p0.png", "p3.png"}, "those that both layers held out"
    same = [line for line in read_csv(out) if line["spoiling"] == "mirrored" and line["image"] == "p3.png"]
    assert evaluate.main(on_photos(data, tmp_path / "folder")) == 0
    lines = [x for x in read_csv(tmp_path / "folder") if x["spoiling"] == "mirrored" and x["image"] == "p3"]
    assert [{**line, "image": "p3"} for line in same] == lines, "a folder's images are scaled as stage 1 does"


def write_reconstruction(folder: Path, image: str, regularizer: str, original: np.ndarray, made: np.ndarray) -> None:
    """What reconstruct.py leaves of an image, as far as it is read here."""
    folder.mkdir(parents=True)
    Image.fromarray(original).save(folder / "image.png")
    array_files.write_array(folder / "reconstruction.npy", made.astype(np.float32))
    facts = {"stage": "reconstruct", "input": image, "input_sha256": image * 2, "regularizer": regularizer}
    facts |= {
        "target": "conv2",
        "backbone": "tiny",
        "weights_sha256": "w",
        "descent": "authors",
        "shape": list(made.shape),
        "dtype": "float32",
    }
    artefacts.write_json(folder / "reconstruction.npy.json", facts)


def test_reconstructions_are_spoiled_copies(data: Path, tmp_path: Path) -> None:
    photos = {name: make_photo(seed, 24, 24) for seed, name in enumerate(("a.png", "b.png", "c.png"))}
    noise = np.random.default_rng(0).normal(0, 300, (24, 24, 3))
    for name, photo in photos.items():
        write_reconstruction(tmp_path / "r" / f"{name}-vlm", name, "vlm", photo, photo)
        if name != "c.png":
            write_reconstruction(tmp_path / "r" / f"{name}-tv", name, "tv", photo, photo + noise)
    assert evaluate.main(options(data, tmp_path / "out", "--reconstructions", tmp_path / "r")) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["images"], summary["reconstructed"]) == (0, 3)
    assert list(summary["spoilings"]) == ["reconstruction tv", "reconstruction vlm"]
    for found in summary["models"]["tiny-conv1"].values():
        assert found["share"]["reconstruction vlm"] == 0.5, "a perfect reconstruction has its original's loss"
    assert summary["models"]["tiny-conv1"]["repeat last"]["share"]["reconstruction tv"] == 1
    counts = [line["spoiling"] for line in read_csv(tmp_path / "out") if line["predictor"] == MODEL]
    assert counts.count("reconstruction tv") == 2 * 2 and counts.count("reconstruction vlm") == 3 * 2
    both = on_photos(data, tmp_path / "both", "--reconstructions", tmp_path / "r", "--limit", 3)
    assert evaluate.main(both) == 0
    summary = json.loads((tmp_path / "both" / "summary.json").read_text())
    assert (summary["images"], summary["reconstructed"]) == (3, 3)
    assert list(summary["spoilings"]) == [*NAMES, "reconstruction tv", "reconstruction vlm"]
    assert "3 images and 3 reconstructed ones" in (tmp_path / "both" / "table.md").read_text()


def test_finished_is_shown_again_and_killed_goes_on(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    capsys.readouterr()
    assert evaluate.main(on_photos(data, finished)) == 0
    printed = capsys.readouterr().out
    assert "nothing to do" in printed and (finished / "table.md").read_text() in printed
    with pytest.raises(UserError, match="--overwrite"):
        evaluate.main(on_photos(data, finished, "--limit", 4))
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    score_item, seen = score_naturalness.score_item, []

    def killed_at_third(readers, item):
        seen.append(item.name)
        if seen == ["p0", "p1", "p2"]:
            raise KeyboardInterrupt
        return score_item(readers, item)

    monkeypatch.setattr(score_naturalness, "score_item", killed_at_third)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(on_photos(data, tmp_path))
    assert evaluate.main(on_photos(data, tmp_path)) == 0
    assert seen == ["p0", "p1", "p2", "p2", "p3", "p4"]
    for name in ("scores.csv", "table.md"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name
    again, whole = (json.loads((out / "summary.json").read_text()) for out in (tmp_path, finished))
    assert {**again, "versions": None} == {**whole, "versions": None}


def test_saliency_writes_losses_and_percentiles(data: Path, finished: Path, tmp_path: Path) -> None:
    tensors, configuration = checkpoints.read_tensors(data / "vlm.safetensors")
    losses = {
        line["image"]: float(line["loss_original"])
        for line in read_csv(finished)
        if (line["model"], line["predictor"]) == ("tiny-conv1", MODEL)
    }
    configuration["training"]["conv1"]["held_out_quantiles"] = naturalness.quantiles(losses.values())
    checkpoints.write_tensors(tmp_path / "kept.safetensors", tensors, configuration)
    common = ["--weights", str(data / "weights.safetensors"), "--layer", "conv1", "conv2", "--device", "cpu"]
    for file in (tmp_path / "kept.safetensors", data / "vlm.safetensors"):
        out = tmp_path / file.stem
        command = [str(data / "photos"), "--vlm", str(file), *common, "--out", str(out)]
        assert saliency.main(command) == 0
    assert saliency.main([*command[:-1], str(tmp_path / "maps"), "--no-naturalness"]) == 0
    assert not list((tmp_path / "maps").glob("*-naturalness*")), "the network's other pass is not made"
    ranks = {image: rank for rank, image in enumerate(sorted(losses, key=losses.get))}
    for image, loss in losses.items():
        found = {f: artefacts.read_json(tmp_path / f / f"{image}-naturalness.json") for f in ("kept", "vlm")}
        assert found["kept"]["tiny-conv1"]["loss"] == pytest.approx(loss, rel=1e-4), "that of stage 1's size and crop"
        assert found["kept"]["tiny-conv1"]["percentile"] == pytest.approx(100 * ranks[image] / 4, abs=1)
        assert found["kept"]["tiny-conv2"]["percentile"] is None
        assert found["vlm"]["tiny-conv1"] == {**found["kept"]["tiny-conv1"], "percentile": None}


def test_quantiles_that_a_foreign_file_states_are_not_believed() -> None:
    for values in (None, "no", [1.0], [2.0, 1.0], ["1", "2"], [[1, 2], [3]]):
        assert naturalness.kept_quantiles({"held_out_quantiles": values}) is None
    assert naturalness.kept_quantiles({"held_out_quantiles": [1, 2.5]}) == [1, 2.5]


def test_mistakes(data: Path, tmp_path: Path) -> None:
    cases = [
        (options(data, tmp_path / "out"), "give a folder of images, --images FILE or --reconstructions"),
        (on_photos(data, tmp_path / "out", "--limit", 1), "one image has no other"),
        (on_photos(data, tmp_path / "out", "--layer", "conv9"), "there is no layer 'conv9'"),
        (on_photos(data, tmp_path / "out", "--images", data / "vlm.safetensors"), "give one of them"),
        (options(data, tmp_path / "out", tmp_path), "holds no images"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            evaluate.main(arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(SystemExit):
        evaluate.main(options(data, tmp_path, data / "photos", "--spoilings", "nonsense"))
