"""Several processes give what one gives: all rows, the same losses and weights, whatever their number."""

import json
import multiprocessing
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import train_vlm
from models.checkpoints import load_vlm, read_tensors
from models.errors import UserError
from models.training import check_precision
from pipeline import artefacts, distributed
from pipeline.language_models import build_model
from tests.conftest import make_photo
from tests.tiny import Accident, run, run_ranks, touched

pytestmark = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="processes cannot be forked here"
)
LAYERS = ["conv1", "conv2"]
PHOTOS = 7
# One process and several sum in other orders: float64 sums of the statistics, float32 sums of the gradients.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def extraction(root: Path) -> list[str]:
    common = ["--preset", "demo", "--seed", "5", "--device", "cpu", "--root", str(root), "--weights", "random"]
    return [*common, "--backbone", "tiny", "--layers", *LAYERS, "--batch-size", "2"]


def training(root: Path, *more: str) -> list[str]:
    common = ["--preset", "demo", "--seed", "5", "--device", "cpu", "--root", str(root)]
    schedule = ["--iterations", "6", "--batch-size", "4", "--checkpoint-every", "2", "--log-every", "3"]
    return [*common, *schedule, "--learning-rate", "66", *more]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace where one process did stages 1 to 3."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "photos").mkdir()
    for i in range(PHOTOS):
        Image.fromarray(make_photo(i, 36 + i, 44)).save(folder / "photos" / f"photo{i}.png")
    root = folder / "root"
    commands = {
        "prepare_images": ["--preset", "demo", "--root", str(root), "--source", str(folder / "photos")],
        "extract_features": extraction(root),
        "train_vlm": training(root, "--held-out", "2"),
    }
    for stage, argv in commands.items():
        code, output, _ = run(stage, argv, root, folder / "output")
        assert code == 0, output
    return root


def copy(one: Path, root: Path, *names: str) -> Path:
    root.mkdir()
    for name in names:
        for path in one.glob(f"{name}*"):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, root / path.name)
    return root


def assert_equal_tensors(found: Path, expected: Path) -> None:
    first, second = read_tensors(found)[0], read_tensors(expected)[0]
    assert first.keys() == second.keys()
    for name, value in second.items():
        torch.testing.assert_close(first[name], value, **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("ranks", [2, 3, 5])  # 4 batches of up to 2 images: unequal parts, an empty one
def test_extraction(one: Path, tmp_path: Path, ranks: int) -> None:
    root = copy(one, tmp_path / "root", "images.npy")
    results = run_ranks(ranks, "extract_features", extraction(root), root)
    assert [code for code, _ in results] == [0] * ranks, results
    assert "written" in results[0][1] and results[1][1] == "", "rank 0 alone speaks"
    assert_equal_tensors(root / "features" / "projection.safetensors", one / "features" / "projection.safetensors")
    for layer in LAYERS:
        features = np.load(root / "features" / f"{layer}.npy")
        np.testing.assert_allclose(features, np.load(one / "features" / f"{layer}.npy"), rtol=1e-4, atol=1e-5)
    names = {p.name for p in (root / "features").iterdir()}
    assert names == {p.name for p in (one / "features").iterdir()}, "nothing temporary is left"
    again = run_ranks(ranks, "extract_features", extraction(root), root)
    assert again[0][0] == 0 and "nothing to do" in again[0][1]


@pytest.mark.parametrize("ranks", [2, 3, 5])  # a batch of 4: unequal parts, an empty one
def test_training(one: Path, tmp_path: Path, ranks: int) -> None:
    root = copy(one, tmp_path / "root", "features")
    results = run_ranks(ranks, "train_vlm", training(root, "--held-out", "2"), root)
    assert [code for code, _ in results] == [0] * ranks, results
    assert touched(0, root) > 0 and [touched(rank, root) for rank in range(1, ranks)] == [0] * (ranks - 1)
    assert_equal_tensors(root / "vlm.safetensors", one / "vlm.safetensors")
    start = build_model(read_tensors(one / "features" / "projection.safetensors")[0], LAYERS, 5)
    trained, _ = load_vlm(root / "vlm.safetensors")
    moved = [(a - b).abs().max() for a, b in zip(trained.parameters(), start.parameters(), strict=True)]
    assert max(moved) > 1e-2, "the tolerance is small beside what was learnt"
    logs = [np.genfromtxt(r / "log.csv", delimiter=",", skip_header=1)[:, 1:-1] for r in (root, one)]
    np.testing.assert_allclose(*logs, rtol=1e-5)
    assert {p.name for p in root.iterdir()} == {p.name for p in one.iterdir()} - {"images.npy", "images.npy.json"} - {
        "rejected.csv",
        ".images.npy.lock",
        ".features.lock",
    }


def contents(folder: Path) -> dict[str, Any]:
    """All files of a folder by name: JSON without the arguments, in which the folder stands, as the page has it too."""
    found: dict[str, Any] = {}
    for path in (
        p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".lock", ".html") and p.name != ".cnn-vlm"
    ):
        content = path.read_bytes()
        if path.suffix == ".json":
            content = json.loads(content)
            content.get("versions", {}).pop("arguments", None)
        found[str(path.relative_to(folder))] = content
    return found


def test_saliency(one: Path, tmp_path: Path) -> None:
    root = copy(one, tmp_path / "root", "vlm.safetensors")
    photos = str(one.parent / "photos")
    common = ["--preset", "demo", "--seed", "5", "--device", "cpu", "--root", str(root), "--weights", "random"]
    alone = [photos, *common, "--out", str(root / "alone")]
    assert run("saliency", alone, root, tmp_path / "output")[0] == 0
    results = run_ranks(3, "saliency", [photos, *common], root)
    assert [code for code, _ in results] == [0, 0, 0], results
    assert f"{PHOTOS} saliency maps" in results[0][1]
    first, second = (contents(root / name) for name in ("alone", "saliency"))
    assert first == second and len(first) == 6 * PHOTOS


@pytest.fixture(scope="module")
def evaluations(one: Path) -> dict[str, list[str]]:
    """A command of each kind of evaluation in the workspace, that needs --out."""
    photos = sorted((one.parent / "photos").glob("*.png"))
    fixations = one / "fixations.csv"
    rows = [f"{p.name},{person},{7 * person + i},{5 * person + i}" for i, p in enumerate(photos) for person in range(3)]
    fixations.write_text("\n".join(["image,subject,x,y", *rows]) + "\n")
    common = ["--seed", "5", "--device", "cpu", "--weights", "random"]
    for regularizer in ("none", "l2"):
        options = ["--root", str(one), "--target", "conv2", "--iterations", "1", "--regularizer", regularizer]
        options += ["--learning-rate", "1"]
        code, output, _ = run(
            "reconstruct", [str(one.parent / "photos"), *common, *options], one, one.parent / "output"
        )
        assert code == 0, output
    stimuli = ["--stimuli", str(one.parent / "photos"), "--fixations", str(fixations)]
    return {
        "fixations": ["fixations", *common, *stimuli, "--vlm", str(one / "vlm.safetensors"), "--layer", "conv2"],
        "reconstruction": ["reconstruction", str(one / "reconstructions"), *common],
        "naturalness": [
            *["naturalness", str(one.parent / "photos"), *common, "--vlm", str(one / "vlm.safetensors")],
            *["--layer", "conv2", "--spoilings", "noise 10", "pasted 1/4"],
        ],
    }


@pytest.mark.parametrize("kind", ["fixations", "reconstruction", "naturalness"])
def test_evaluation(kind: str, evaluations: dict[str, list[str]], one: Path, tmp_path: Path) -> None:
    """Three ranks, seven images, one of the ranks killed first: the same files as by one process."""
    roots = {name: tmp_path / name for name in ("alone", "shared")}
    commands = {name: [*evaluations[kind], "--out", str(root / "out")] for name, root in roots.items()}
    code, output, _ = run("evaluate", commands["alone"], roots["alone"], tmp_path / "output")
    assert code == 0, output
    results = run_ranks(3, "evaluate", commands["shared"], roots["shared"], {1: Accident(3, signal.SIGKILL)})
    assert results[1][0] in (-signal.SIGKILL, 0)
    results = run_ranks(3, "evaluate", commands["shared"], roots["shared"])
    assert [code for code, _ in results] == [0, 0, 0], results
    assert f"{PHOTOS} images" in results[0][1] and results[1][1] == results[2][1] == ""
    first, second = map(contents, roots.values())
    assert first == second and "out/summary.json" in first


def test_an_evaluation_is_taken_up_by_another_number_of_ranks(
    evaluations: dict[str, list[str]], tmp_path: Path
) -> None:
    root = tmp_path / "root"
    command = [*evaluations["fixations"], "--out", str(root / "out")]
    assert run("evaluate", command, root, tmp_path / "output", Accident(30, signal.SIGTERM))[0] == 143
    results = run_ranks(2, "evaluate", command, root)
    assert [code for code, _ in results] == [0, 0], results
    assert "images were scored before" in results[0][1]
    assert not list(root.rglob("*.partial*"))


def test_a_mistake_of_one_rank_ends_all(evaluations: dict[str, list[str]], one: Path, tmp_path: Path) -> None:
    """A reconstruction that only the second rank reads is no picture."""
    folder = tmp_path / "reconstructions"
    shutil.copytree(one / "reconstructions", folder)
    for damaged in folder.rglob("photo1*/**/reconstruction.npy"):
        np.save(damaged, np.load(damaged) * np.nan)
    command = [str(folder) if text == str(one / "reconstructions") else text for text in evaluations["reconstruction"]]
    results = run_ranks(2, "evaluate", [*command, "--out", str(tmp_path / "root" / "out")], tmp_path / "root")
    assert [code for code, _ in results] == [2, 2], results
    assert "or holds NaN" in results[1][1] and "NaN" not in results[0][1]


def test_interrupted_training(one: Path, tmp_path: Path) -> None:
    """SIGTERM reaches one rank: all stop after the same update, its state is saved, the same command goes on."""
    roots = {name: copy(one, tmp_path / name, "features") for name in ("cut", "whole")}
    options = ["--held-out", "2"]
    accident = {1: Accident(at_update=3, signal=signal.SIGTERM)}
    results = run_ranks(2, "train_vlm", training(roots["cut"], *options), roots["cut"], accident)
    assert [code for code, _ in results] == [143, 143], results
    assert results[0][1].count("goes on from the last saved state") == 1
    assert read_tensors(roots["cut"] / "train_state" / "conv1-conv2.safetensors")[1]["iteration"] == 3
    for root in roots.values():
        assert [code for code, _ in run_ranks(2, "train_vlm", training(root, *options), root)] == [0, 0]
    first, second = ((root / "vlm.safetensors").read_bytes() for root in roots.values())
    assert first == second


@pytest.mark.parametrize("at", [2, 9, 16])
def test_killed_extraction(one: Path, tmp_path: Path, at: int) -> None:
    """One rank dies; the others end too; the same command goes on, also with another number of ranks."""
    roots = {name: copy(one, tmp_path / name, "images.npy") for name in ("cut", "whole")}
    accident = {at % 2: Accident(at, signal.SIGKILL)}
    results = run_ranks(2, "extract_features", extraction(roots["cut"]), roots["cut"], accident)
    assert -signal.SIGKILL in [code for code, _ in results]
    if at == 9:
        run_ranks(3, "extract_features", extraction(roots["cut"]), roots["cut"], {2: Accident(5, signal.SIGKILL)})
    for root in roots.values():
        results = run_ranks(2, "extract_features", extraction(root), root)
        assert [code for code, _ in results] == [0, 0], results
    first, second = (
        {  # sidecars state the arguments, the folder among them
            p.name: p.read_bytes().replace(str(root).encode(), b"ROOT")
            for p in (root / "features").iterdir()
            if p.suffix != ".lock" and p.name != ".cnn-vlm"
        }
        for root in roots.values()
    )
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_a_mistake_is_told_once(one: Path, tmp_path: Path) -> None:
    root = copy(one, tmp_path / "root", "images.npy", "features")
    results = run_ranks(2, "extract_features", [*extraction(root), "--dtype", "float32"], root)
    assert [code for code, _ in results] == [2, 2]
    assert "dtype is 'float16', not 'float32'" in results[0][1] and results[1][1] == ""


def test_torchrun(one: Path, tmp_path: Path) -> None:
    """What it starts finds its rank; that the stages share their work, the tests above say."""
    root = copy(one, tmp_path / "root", "features")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.tiny"]
    command = [*torchrun, "train_vlm", *training(root, "--held-out", "2")]
    cwd = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("one of 2 processes") == 1
    assert_equal_tensors(root / "vlm.safetensors", one / "vlm.safetensors")


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 9))
def test_parts_cover_everything_once(count: int, unit: int, ranks: int) -> None:
    items, rows, sizes = [], [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "size", lambda: ranks)
        for rank in range(ranks):
            patch.setattr(distributed, "rank", lambda rank=rank: rank)
            items += distributed.share(range(count))
            first, stop = distributed.span(count, unit)
            assert first % unit == 0 or first == count
            sizes.append(-(-(stop - first) // unit))
            rows += range(first, stop)
    assert sorted(items) == rows == list(range(count))
    assert max(sizes) - min(sizes) <= 1


def test_a_single_process_needs_no_group() -> None:
    rows = np.arange(6).reshape(3, 2)
    assert distributed.rank() == 0 and distributed.size() == 1 and not distributed.launched()
    assert distributed.first(lambda: 3) == 3 and distributed.total(2.5) == 2.5 and distributed.all_of(True)
    assert distributed.gather_rows(rows) is rows and distributed.share("abc") == ["a", "b", "c"]


def trained_apart(one: Path, folder: Path) -> dict[str, Path]:
    """Workspaces with the same projection, each of which trained one layer."""
    roots = {layer: copy(one, folder / layer, "features") for layer in LAYERS}
    for layer, root in roots.items():
        train_vlm.main(training(root, "--held-out", "2", "--layers", layer, "--learning-rate", "33"))
    return roots


def test_merging_checkpoints_of_several_workspaces(one: Path, tmp_path: Path) -> None:
    roots = trained_apart(one, tmp_path)
    files = {layer: root / "vlm.safetensors" for layer, root in roots.items()}
    target = ["--preset", "demo", "--root", str(tmp_path / "joined")]
    train_vlm.main([*target, "--merge", *map(str, files.values())])
    joined, facts = load_vlm(tmp_path / "joined" / "vlm.safetensors")
    assert facts.configuration["layers"] == LAYERS == list(facts.training)
    for layer, file in files.items():
        alone, noted = load_vlm(file)
        assert facts.training[layer] == noted.training[layer]
        for a, b in zip(joined.layers[layer].parameters(), alone.layers[layer].parameters(), strict=True):
            assert torch.equal(a, b)
    assert_equal_tensors(tmp_path / "joined" / "vlm.safetensors", one / "vlm.safetensors")
    train_vlm.main([*target, "--merge", str(files["conv1"])])  # the same again changes nothing
    other = training(roots["conv1"], "--held-out", "2", "--layers", "conv1", "--overwrite", "--momentum", "0.5")
    train_vlm.main(other)
    with pytest.raises(UserError, match="hold other weights of conv1: use --overwrite"):
        train_vlm.main([*target, "--merge", str(files["conv1"])])
    train_vlm.main([*target, "--merge", str(files["conv1"]), "--overwrite"])
    assert load_vlm(tmp_path / "joined" / "vlm.safetensors")[1].training["conv1"]["momentum"] == 0.5


def test_merging_needs_one_projection(one: Path, tmp_path: Path) -> None:
    tensors, facts = read_tensors(one / "vlm.safetensors")
    artefacts.write_tensors(tmp_path / "other.safetensors", tensors, {**facts, "projection_sha256": "another"})
    root = copy(one, tmp_path / "root", "vlm.safetensors")
    before = (root / "vlm.safetensors").read_bytes()
    with pytest.raises(UserError, match="is of another projection"):
        train_vlm.main(["--preset", "demo", "--root", str(root), "--merge", str(tmp_path / "other.safetensors")])
    assert (root / "vlm.safetensors").read_bytes() == before


def test_mixed_precision(one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains where the device can, and says so where it cannot."""
    root = copy(one, tmp_path / "root", "features")
    options = training(root, "--held-out", "2", "--precision", "bfloat16")
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.LSTM, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("no primitive\nfor it")))
        with pytest.raises(UserError, match=r"bfloat16 does not work on cpu \(no primitive\): use float32"):
            train_vlm.main(options)
    assert not (root / "train_state" / "conv1-conv2.safetensors").exists()
    try:
        check_precision("bfloat16", torch.device("cpu"))
    except UserError:
        return
    train_vlm.main(options)
    logs = [np.genfromtxt(r / "log.csv", delimiter=",", skip_header=1)[:, 3] for r in (root, one)]
    np.testing.assert_allclose(*logs, rtol=0.02)
    assert not np.array_equal(*logs)
    assert load_vlm(root / "vlm.safetensors")[1].training["conv1"]["precision"] == "bfloat16"
    with pytest.raises(UserError, match="precision is 'bfloat16', not 'float32'"):
        train_vlm.main(training(root, "--held-out", "2"))
