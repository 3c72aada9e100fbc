"""Every script run for seconds, killed, resumed, rerun, and fed mistakes."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import extract_features
import prepare_images
import reconstruct
import run_all
import run_pretrained_model
import saliency
import train_vlm
from models.checkpoints import load_vlm, read_tensors, write_tensors
from models.errors import UserError
from models.randomness import split_images
from models.training import draw_rows
from models.vlm import prediction_errors
from pipeline import program, reconstruction, views
from pipeline.features import read_batch
from pipeline.progress import Terminated
from pipeline.views import Views
from tests.conftest import RUN, make_photo

ROOT = Path(__file__).parent.parent


def call(script: str, *arguments: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def files_without_times(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_artefacts_of_the_first_stages(workspace: Path) -> None:
    images = np.load(workspace / "images.npy")
    assert images.shape == (10, 256, 256, 3) and images.dtype == np.uint8
    facts = json.loads((workspace / "images.npy.json").read_text())
    assert facts["names"] == sorted(facts["names"]) and len(facts["names"]) == 10
    for layer, size in (("conv4", 128), ("conv5", 128)):
        features = np.load(workspace / "features" / f"{layer}.npy")
        assert features.shape == (10, 13, 13, size) and features.dtype == np.float16
        assert (workspace / "features" / f"{layer}.npy.json").is_file()
    vlm, notes = load_vlm(workspace / "vlm.safetensors")
    assert list(vlm.layers) == notes.configuration["layers"] == ["conv4", "conv5"]
    assert {"data", "pool5", "fc8", "conv5"} <= vlm.statistics.keys()
    assert notes.training["conv5"]["iterations_done"] == 4
    with (workspace / "log.csv").open() as file:
        assert {row["layer"] for row in csv.DictReader(file)} == {"conv4", "conv5"}
    assert (workspace / "figures" / "loss.png").is_file()
    assert not list(workspace.rglob("*.partial")) and not list(workspace.rglob("*.progress"))


def test_projected_features_are_standardised_components(workspace: Path) -> None:
    training, _ = split_images(10, 16, 3)
    features = np.load(workspace / "features" / "conv5.npy")[training].reshape(-1, 128)
    variance = features.var(axis=0)
    assert (np.abs(features.mean(axis=0)) < 5 * np.sqrt(variance / 400)).all(), "PCA saw some 400 positions"
    assert variance[0] > variance[20] > variance[100] > 0


def test_rerun_does_nothing(workspace: Path, photos: Path, capsys: pytest.CaptureFixture) -> None:
    before = files_without_times(workspace)
    common = [*RUN, "--root", str(workspace)]
    prepare_images.main([*common, "--source", str(photos), "--num-images", "10"])
    features = [*common, "--weights", "random", "--layers", "conv4", "conv5"]
    extract_features.main([*features, "--pca-positions", "400", "--batch-size", "4"])
    train_vlm.main([*common, "--iterations", "4", "--checkpoint-every", "2", "--batch-size", "2"])
    assert capsys.readouterr().out.count("nothing to do") == 3
    assert files_without_times(workspace) == before


def test_changed_arguments_are_refused(workspace: Path, photos: Path) -> None:
    with pytest.raises(UserError, match="num_images is 10, not 5.*--overwrite"):
        prepare_images.main([*RUN, "--root", str(workspace), "--source", str(photos), "--num-images", "5"])
    with pytest.raises(UserError, match="batch_size is 2, not 3"):
        train_vlm.main([*RUN, "--root", str(workspace), "--iterations", "4", "--batch-size", "3"])


def test_layers_trained_apart_equal_joint_training(workspace: Path, tmp_path: Path) -> None:
    """Disjoint parameters: with the rate scaled to the number of layers, two runs merge into the joint result."""
    shutil.copytree(workspace / "features", tmp_path / "features")
    options = [*RUN, "--root", str(tmp_path), "--iterations", "4", "--batch-size", "2"]
    for layer in ("conv4", "conv5"):
        train_vlm.main([*options, "--layers", layer])
    apart, _ = read_tensors(tmp_path / "vlm.safetensors")
    joint, _ = read_tensors(workspace / "vlm.safetensors")
    assert apart.keys() == joint.keys()
    for name, value in joint.items():
        torch.testing.assert_close(apart[name], value, rtol=1e-5, atol=1e-7)


def test_killed_training_resumes_bit_for_bit(workspace: Path, tmp_path: Path) -> None:
    options = ["--preset", "demo", "--iterations", "12", "--checkpoint-every", "3", "--batch-size", "2"]
    roots = {name: tmp_path / name for name in ("killed", "undisturbed")}
    for root in roots.values():
        shutil.copytree(workspace / "features", root / "features")
    command = [sys.executable, str(ROOT / "train_vlm.py"), *options, "--root", str(roots["killed"])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    state = roots["killed"] / "train_state" / "conv4-conv5.safetensors"
    deadline = time.monotonic() + 120
    while not state.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with safe_open(state, framework="pt") as file:
        done = json.loads(file.metadata()["configuration"])["iteration"]
    assert 0 < done <= 12
    for root in roots.values():
        train_vlm.main([*options, "--root", str(root)])
    first, second = ((root / "vlm.safetensors").read_bytes() for root in roots.values())
    assert first == second
    assert not list(roots["killed"].rglob("*.partial"))


def test_a_finished_run_can_be_trained_longer(workspace: Path, tmp_path: Path) -> None:
    options = [*RUN, "--layers", "conv5", "--batch-size", "2", "--decay-at", "5", "--root"]
    for root in (tmp_path / "extended", tmp_path / "whole"):
        shutil.copytree(workspace / "features", root / "features")
    train_vlm.main([*options, str(tmp_path / "extended"), "--iterations", "4", "--log-every", "4"])
    for root in (tmp_path / "extended", tmp_path / "whole"):
        train_vlm.main([*options, str(root), "--iterations", "8", "--log-every", "4"])
    first, second = (read_tensors(tmp_path / name / "vlm.safetensors")[0] for name in ("extended", "whole"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(UserError, match="decay_at is"):
        train_vlm.main([*options[:-3], "--decay-at", "2", "--root", str(tmp_path / "whole"), "--iterations", "9"])


def test_training_goes_on_from_an_exported_checkpoint(workspace: Path, tmp_path: Path) -> None:
    """--export rounds to float16; --init takes its place in the schedule, with the momentum at zero."""
    here = ["--root", str(workspace)]
    train_vlm.main([*RUN, *here, "--export", str(tmp_path / "half.safetensors")])
    half, noted = load_vlm(tmp_path / "half.safetensors")
    assert noted.configuration["dtype"] == "float16" and noted.training["conv5"]["iterations_done"] == 4
    full, _ = load_vlm(workspace / "vlm.safetensors")
    for a, b in zip(half.parameters(), full.parameters(), strict=True):
        assert torch.equal(a, b.half().float())
    assert torch.equal(half.projections["conv5"].mean, full.projections["conv5"].mean)

    root = tmp_path / "root"
    root.mkdir()
    shutil.copytree(workspace / "features", root / "features")
    options = [*RUN, "--root", str(root), "--layers", "conv5", "--init", str(tmp_path / "half.safetensors")]
    options += ["--batch-size", "2", "--checkpoint-every", "1", "--decay-at", "5", "--log-every", "1"]
    train_vlm.main([*options, "--from-iteration", "4", "--iterations", "5"])
    trained, noted = load_vlm(root / "vlm.safetensors")
    facts = noted.training["conv5"]
    assert facts["iterations_done"] == 5 and facts["init"]["iteration"] == 4 and len(facts["init"]["sha256"]) == 64
    features = np.load(root / "features" / "conv5.npy")
    rows = draw_rows(3, 4, split_images(10, facts["held_out"], 3)[0], 2)
    half.layers["conv5"].loss(read_batch(features, rows, "cpu")).backward()
    for a, b in zip(trained.layers["conv5"].parameters(), half.layers["conv5"].parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a, b - facts["learning_rate"] * b.grad, rtol=1e-4, atol=1e-7)
    train_vlm.main([*options, "--from-iteration", "4", "--iterations", "6"])
    assert load_vlm(root / "vlm.safetensors")[1].training["conv5"]["iterations_done"] == 6
    with pytest.raises(UserError, match="was made otherwise.*init"):
        train_vlm.main([*options, "--from-iteration", "3", "--iterations", "7"])
    with pytest.raises(UserError, match="give both, or neither"):
        train_vlm.main([*RUN, "--root", str(root), "--from-iteration", "3"])


def test_only_a_fitting_checkpoint_is_gone_on_from(workspace: Path, tmp_path: Path) -> None:
    tensors, noted = read_tensors(workspace / "vlm.safetensors")
    other = tmp_path / "other.safetensors"
    options = [*RUN, "--root", str(workspace), "--out", str(tmp_path / "out.safetensors"), "--init", str(other)]
    options += ["--overwrite", "--layers", "conv5"]
    for facts, more, message in (
        ({"backbone": "vgg16"}, [], "'conv4', which vgg16 has not"),
        ({}, ["--cell", "gru"], "has a lstm for conv5"),
    ):
        write_tensors(other, tensors, {**noted, **facts})
        with pytest.raises(UserError, match=message):
            train_vlm.main([*options, *more])


def test_weights_of_another_projection_are_expressed_in_the_new_one(workspace: Path, tmp_path: Path, capsys) -> None:
    """Components in another order are the same features, and the same model."""
    tensors, noted = read_tensors(workspace / "vlm.safetensors")
    other, root = tmp_path / "other.safetensors", tmp_path / "root"
    flipped = tensors["conv5.projection.components"].flip(0).contiguous()
    write_tensors(other, tensors | {"conv5.projection.components": flipped}, noted)
    shutil.copytree(workspace / "features", root / "features")
    options = [*RUN, "--root", str(root), "--layers", "conv5", "--init", str(other), "--iterations", "1"]
    train_vlm.main([*options, "--learning-rate", "1e-30"])
    assert "conv5: the weights of" in capsys.readouterr().out
    moved = load_vlm(root / "vlm.safetensors")[0].layers["conv5"]
    kept = load_vlm(workspace / "vlm.safetensors")[0].layers["conv5"]
    p = torch.randn(1, kept.size, 4, 4, generator=torch.Generator().manual_seed(0))
    for direction in kept:
        expected = prediction_errors(p.flip(1), direction, kept[direction]).flip(2)
        torch.testing.assert_close(prediction_errors(p, direction, moved[direction]), expected, rtol=1e-4, atol=1e-4)


def test_interrupted_extraction_resumes_to_the_same_files(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(workspace / "images.npy", tmp_path)
    shutil.copy(workspace / "images.npy.json", tmp_path)
    monkeypatch.setattr("pipeline.features.SAVE_EVERY", 0.0)
    options = [*RUN, "--root", str(tmp_path), "--weights", "random", "--layers", "conv4", "conv5"]
    options += ["--pca-positions", "400", "--batch-size", "4"]
    whole = views.network_batches

    def cut_short(images, backbone, size, first, *views):
        for number, batch in enumerate(whole(images, backbone, size, first, *views)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(views, "network_batches", cut_short)
    interruptions = 0
    for _ in range(10):
        try:
            extract_features.main(options)
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions >= 2
    for name in ("projection.safetensors", "conv4.npy", "conv5.npy"):
        assert (tmp_path / "features" / name).read_bytes() == (workspace / "features" / name).read_bytes()
    assert not list(tmp_path.rglob("*.partial")) + list(tmp_path.rglob("*.progress")) + list(tmp_path.rglob("*.npz"))


def test_diverging_training_stops_and_keeps_the_checkpoint(workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace / "features", tmp_path / "features")
    options = [*RUN, "--root", str(tmp_path), "--layers", "conv5", "--batch-size", "2", "--decay-at", "500"]
    with pytest.raises(UserError, match="no longer finite at iteration .* smaller --learning-rate"):
        train_vlm.main([*options, "--iterations", "60", "--checkpoint-every", "1", "--learning-rate", "1e25"])
    vlm, _ = load_vlm(tmp_path / "vlm.safetensors")
    assert all(torch.isfinite(p).all() for p in vlm.parameters())


def test_reconstruct_with_and_without_language_model(workspace: Path, photos: Path, tmp_path: Path) -> None:
    image = next((photos / "class0").iterdir())
    results = {}
    for regularizer in ("vlm", "none"):
        out = tmp_path / regularizer
        options = [str(image), *RUN, "--root", str(workspace), "--weights", "random", "--regularizer", regularizer]
        options += ["--iterations", "6", "--snapshot-every", "2", "--restarts", "2", "--out", str(out)]
        reconstruct.main([*options, "--target", "pool5", "--descent", "authors", "--learning-rate", "2000"])
        results[regularizer] = np.load(out / "reconstruction.npy")
        assert results[regularizer].shape == (227, 227, 3)
        facts = json.loads((out / "parameters.json").read_text())
        assert facts["regularizer"] == regularizer and facts["restarts"] == 2
        with (out / "curves.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 12 and float(rows[5]["feature"]) < float(rows[0]["feature"])
        names = {p.name for p in out.iterdir()}
        assert {"reconstruction.png", "comparison.png", "curves.png", "restart-0.png", "restart-1.png"} <= names
        assert len(list((out / "snapshots").glob("*.png"))) == 4
        assert not list(out.glob("*.state.*"))
    assert not np.array_equal(results["vlm"], results["none"])


def test_interrupted_reconstruction_resumes_bit_for_bit(
    workspace: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = next((photos / "class1").iterdir())
    options = [str(image), *RUN, "--root", str(workspace), "--weights", "random", "--target", "conv5"]
    options += ["--iterations", "5", "--snapshot-every", "2", "--learning-rate", "100", "--regularizer", "vlm"]
    options += ["--descent", "authors"]
    reconstruct.main([*options, "--out", str(tmp_path / "whole")])
    picture = reconstruction.Restart.snapshot

    def interrupted(self) -> None:
        picture(self)
        if len(self.curves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(reconstruction.Restart, "snapshot", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reconstruct.main([*options, "--out", str(tmp_path / "cut")])
    assert (tmp_path / "cut" / "reconstruction.png").is_file(), "Ctrl-C keeps what is there"
    monkeypatch.undo()
    reconstruct.main([*options, "--out", str(tmp_path / "cut")])
    for name in ("reconstruction.npy", "reconstruction.png", "curves.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_reconstruct_from_a_stored_feature(workspace: Path, tmp_path: Path) -> None:
    feature = np.random.default_rng(0).normal(size=(256, 6, 6)).astype(np.float32)
    np.save(tmp_path / "feature.npy", feature)
    options = [str(tmp_path / "feature.npy"), *RUN, "--root", str(workspace), "--weights", "random"]
    options += ["--target", "pool5", "--iterations", "2", "--regularizer", "none", "--learning-rate", "0.1"]
    reconstruct.main([*options, "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "reconstruction.png").is_file()
    np.save(tmp_path / "feature.npy", feature[:, :5])
    with pytest.raises(UserError, match=r"the target is \(1, 256, 5, 6\), pool5"):
        reconstruct.main([*options, "--out", str(tmp_path / "other")])


def test_saliency_of_a_folder(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    shapes = {"a.png": (90, 140), "b.png": (151, 97), "b.jpg": (80, 80)}
    for i, (name, shape) in enumerate(shapes.items()):
        Image.fromarray(make_photo(i, *shape)).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"no picture")
    Image.new("RGB", (9, 9)).save(folder / "tiny.png")
    out = tmp_path / "out"
    options = [
        str(folder),
        *RUN,
        "--root",
        str(workspace),
        "--weights",
        "random",
        "--layer",
        "conv5",
        "--out",
        str(out),
    ]
    assert saliency.main(options) == 2
    errors = capsys.readouterr().err
    assert "broken.jpg is not an image" in errors and errors.count("\n") == 2
    assert "tiny.png: an image of 9×9 pixels is too small for conv5 of alexnet: give one of at least" in errors
    for name, shape in (("a", (90, 140)), ("b.png", (151, 97)), ("b.jpg", (80, 80))):
        result = np.load(out / f"{name}.npy")
        assert result.shape == shape and result.min() == 0 and result.max() == 1
        assert {p.name for p in out.glob(f"{name}*")} >= {f"{name}.png", f"{name}-overlay.png"}
    before = files_without_times(out)
    saliency.main(options)
    assert files_without_times(out) == before


def test_run_all_demo_stages(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--root", str(tmp_path), "--source", str(photos), "--weights", "random", "--layers", "conv5"]
    options += ["--iterations", "2", "--reconstruction-iterations", "2", "--image", str(photos / "class0/photo00.png")]
    run_all.main(options)
    printed = capsys.readouterr().out
    for stage in run_all.STAGES:
        assert f"$ python {stage}.py" in printed
    for name in ("summary.png", "loss.png"):
        assert (tmp_path / "figures" / name).is_file()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for shown in ("conv5 by update: training from", "with language models", "without them", "saliency map"):
        assert shown in page
    assert "vlm.safetensors" in (tmp_path / "README.txt").read_text(encoding="utf-8")
    run_all.main([*options, "--from", "3", "--to", "train_vlm"])
    printed = capsys.readouterr().out
    assert "prepare_images" not in printed and "nothing to do" in printed
    with pytest.raises(UserError, match="comes after"):
        run_all.main([*options, "--from", "5", "--to", "1"])


def test_printed_command_works_by_hand(workspace: Path, capsys: pytest.CaptureFixture) -> None:
    run_all.main(["--root", str(workspace), "--dry-run", "--preset", "demo"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "$ python train_vlm.py" in line)
    result = call(*line.split("$ python ")[1].split(), "--layers", "conv9")
    assert result.returncode == 2 and "has no features of conv9" in result.stderr


def test_the_demo_goes_on_from_the_language_models_that_ship(capsys: pytest.CaptureFixture) -> None:
    """Of the CNN that they read, and said in the command that is printed."""
    for weights, told in ((["--weights", "random"], False), ([], True)):
        run_all.main(["--dry-run", *weights])
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "$ python train_vlm.py" in line)
        assert ("--init" in line and "pretrained/alexnet.safetensors" in line) is told


def test_dry_run_prints_every_value_with_its_source(capsys: pytest.CaptureFixture) -> None:
    run_all.main(["--preset", "alexnet_caffe", "--dry-run"])
    rows = {tuple(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert ("iterations", "20001", "original", "code") in rows
    assert ("joint_learning_rate", "10.0", "original", "code") in rows
    assert ("target", "fc8", "original", "code") in rows


def test_user_mistakes_cost_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    cases = [
        (prepare_images, ["--source", tmp_path / "nothing"], "does not exist"),
        (train_vlm, ["--root", tmp_path], "run extract_features.py first"),
        (extract_features, ["--root", tmp_path], "run prepare_images.py first"),
        (train_vlm, ["--iterations", "-1"], "argument --iterations"),
        (saliency, [tmp_path / "x.jpg", "--vlm", tmp_path / "y"], "does not exist"),
    ]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for script, arguments, message in cases:
            capsys.readouterr()
            try:
                code = program.run(lambda script=script, argv=arguments: script.main([*map(str, argv)]))
            except SystemExit as exit:
                code = exit.code
            told = capsys.readouterr().err
            assert code == 2 and message in told and told.count("\n") == 1, told
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_pretrained_page(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The shipped checkpoints, on CPU, with random CNN weights so that nothing has to be downloaded."""
    image = tmp_path / "photo.png"
    Image.fromarray(make_photo(5, 120, 160)).convert("P").save(image)
    out = tmp_path / "out"
    options = ["--weights", "random", "--iterations", "1", "--target", "fc8", "--out", str(out)]
    program._introduce.cache_clear()  # other tests of this process have printed it
    run_pretrained_model.main([str(image), *options])
    printed = capsys.readouterr().out
    page = out / "report.html"
    assert printed.index(str(page)) < printed.index("cnn-vlm ") < printed.rindex(str(page)), "the page, first and last"
    assert "arguments:" not in printed
    assert np.load(out / "saliency" / "photo.npy").shape == (120, 160)
    assert (out / "figure.png").is_file()
    layers = load_vlm(run_pretrained_model.RECONSTRUCTION)[1].configuration["layers"]
    assert len(layers) == 6
    for layer in layers:
        assert np.load(out / "unnaturalness" / f"alexnet-{layer}.npy").ndim == 2
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size < 5_000_000 and "Not finished" not in text and "fc8, with language models" in text
    for name, descent in {"vlm": "fourier", "none": "fourier", "authors": "authors"}.items():
        facts = json.loads((out / "reconstructions" / name / "parameters.json").read_text())
        assert (facts["target"], facts["descent"]) == ("fc8", descent)
    told = [line.split("  ")[0] for line in (out / "README.txt").read_text(encoding="utf-8").splitlines()[2:]]
    assert told and {path.name for path in out.iterdir() if not path.name.startswith(".")} - {"README.txt"} == {
        name.split("/")[0] for name in told
    }


@pytest.mark.parametrize("name", ["alexnet", "vgg16"])
def test_shipped_checkpoints_beat_the_trivial_predictors(name: str) -> None:
    _, notes = load_vlm(run_pretrained_model.PRETRAINED / f"{name}.safetensors")
    assert notes.backbone == name
    for layer, facts in notes.training.items():
        losses = facts["losses"]
        assert losses["validation_loss"] < losses["predict_nothing"], layer


def test_interruption_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def stop(error):
        def main():
            raise error

        return main

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        assert program.run(stop(KeyboardInterrupt())) == 130
        assert program.run(stop(Terminated())) == 143
        assert program.run(stop(Terminated(signal.SIGHUP))) == 129
        assert program.run(stop(UserError("two\nlines"))) == 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert "two lines" in capsys.readouterr().err


def test_views_add_crops_and_mirror_images_of_training_images(workspace: Path, tmp_path: Path) -> None:
    for name in ("images.npy", "images.npy.json"):
        shutil.copy(workspace / name, tmp_path)
    options = [*RUN, "--root", str(tmp_path), "--weights", "random", "--layers", "data", "--pca-positions", "400"]
    with pytest.raises(UserError, match="--views 2 or more"):
        extract_features.main([*options, "--views", "2"])
    extract_features.main([*options, "--views", "3", "--random-crop", "--flip"])
    projection = (tmp_path / "features" / "projection.safetensors").read_bytes()
    rows = np.load(tmp_path / "features" / "data.npy")
    count = len(np.load(tmp_path / "images.npy", mmap_mode="r"))
    assert len(rows) == 3 * count
    train_vlm.main([*RUN, "--root", str(tmp_path), "--iterations", "1", "--batch-size", "2"])
    facts = load_vlm(tmp_path / "vlm.safetensors")[1].training["data"]
    assert (facts["num_images"], facts["views"], facts["flip"], facts["held_out"]) == (count, 3, True, count // 10)
    extract_features.main([*options, "--overwrite"])
    assert (tmp_path / "features" / "projection.safetensors").read_bytes() == projection
    np.testing.assert_allclose(np.load(tmp_path / "features" / "data.npy"), rows[:count], atol=1e-5)  # other batches


def test_a_view_is_a_mirrored_crop_of_its_image() -> None:
    image = torch.arange(3 * 256 * 256, dtype=torch.float32).reshape(3, 256, 256)
    crops = set()
    mirrored = 0
    for number in range(40):
        view = Views(2, True, True, seed=1).cut(image, 1, number, 227, 227)
        step = int(view[0, 0, 1] - view[0, 0, 0])
        assert abs(step) == 1
        mirrored += step == -1
        corner = int((view if step == 1 else view.flip(2))[0, 0, 0])
        top, left = divmod(corner, 256)
        assert max(top, left) <= 29
        assert torch.equal(view if step == 1 else view.flip(2), image[:, top : top + 227, left : left + 227])
        crops.add(corner)
    assert 10 <= mirrored <= 30 and len(crops) > 30


def test_training_draws_every_view_and_no_held_out_image() -> None:
    training, held = split_images(40, 4, 0)
    rows = np.concatenate([draw_rows(0, i, training, 8, views=3, count=40) for i in range(200)])
    assert set(rows // 40) == {0, 1, 2}
    assert not set(rows % 40) & set(held)
    one, three = draw_rows(0, 5, training, 8), draw_rows(0, 5, training, 8, views=3, count=40)
    assert np.array_equal(one, three % 40)
