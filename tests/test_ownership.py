"""No input is ever overwritten, and no file that this program did not write."""

import importlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.errors import UserError
from pipeline import artefacts, images, language_models, locks, ownership, paths, program
from tests.conftest import make_photo
from tests.pipeline.test_options import tiny, tiny_workspace  # noqa: F401 (fixtures)

PLACES = ["a", "b", "a/c"]
OUTPUTS = {  # of every script, names that it writes
    "prepare_images": ["x.npy", "x.npy.json", "x.npy.partial", "rejected.csv", ".x.npy.lock"],
    "saliency": [
        "photo.png",
        "photo.npy",
        "photo-overlay.png",
        "first.png",
        "first-unnaturalness.npy",
        "first.npy.json",
    ],
    "reconstruct": [
        "image.png",
        "reconstruction.png",
        "reconstruction.npy",
        "curves.csv",
        "restart-0.png",
        "snapshots",
    ],
    "evaluate fixations": [
        "summary.json",
        "scores.csv",
        "table.md",
        "scores.partial",
        "examples-tiny-conv2.png",
        "maps",
    ],
    "evaluate naturalness": ["summary.json", "scores.csv", "table.md", "scores.partial", "pictures.png"],
    "run_pretrained_model": ["figure.png", "report.html", "README.txt", "saliency", "reconstructions", "unnaturalness"],
    "train_vlm": ["x.safetensors", "x.safetensors.json", "x.safetensors.partial", "vlm.safetensors"],
    "train_vlm --iterations=1": ["x.safetensors", "x.safetensors.json", "log.csv", "train_state", "figures"],
    "extract_features": [
        "conv1.npy",
        "conv1.npy.json",
        "projection.safetensors",
        ".conv1.npy.lock",
        "conv1.npy.partial",
    ],
    "run_all": ["images.npy", "images.npy.json", "features", "vlm.safetensors", "report.html", "saliency", "log.csv"],
}
KINDS = ["photo", "symbolic", "hard", "own", "folder link"]
WORKSPACE = ["vlm.safetensors", "images.npy", "images.npy.json"]


def commands(script: str, root: Path, source: Path, out: Path) -> list[str]:
    """A command of a fraction of a second that reads `source` and writes into `out`."""
    vlm = ["--vlm", str(root / "vlm.safetensors"), "--weights", "random", "--device", "cpu", "--out", str(out)]
    once, stage = ["--iterations", "1"], ["--preset", "tiny", "--device", "cpu"]
    return {
        "prepare_images": ["--source", str(source), "--out", str(out / "x.npy"), "--root", str(root)],
        "saliency": [str(source), *vlm],
        "reconstruct": [str(source), *vlm, *once, "--target", "fc8", "--learning-rate", "1"],
        "evaluate fixations": ["--stimuli", str(source), "--fixations", str(root / "a" / "fixations.csv"), *vlm],
        "evaluate naturalness": [str(source), *vlm, "--spoilings", "mirrored"],
        "run_pretrained_model": [str(source), *vlm[2:], *once, "--target", "pool2"],
        "train_vlm": ["--out", str(root / "vlm.safetensors"), "--export", str(out / "x.safetensors")],
        "train_vlm --iterations=1": [*stage, "--root", str(root), "--batch-size", "1"]
        + ["--out", str(out / "x.safetensors")],
        "extract_features": [*stage, "--root", str(root), "--weights", "random", "--out", str(out)]
        + ["--layers", "conv1", "--pca-positions", "40"],
        "run_all": [*stage, "--root", str(out), "--source", str(source), "--weights", "random", *once]
        + ["--image", str(root / "picture.png"), "--layers", "conv1", "--reconstruction-iterations", "1"],
    }[script]


def place(root: Path, files: list[tuple[str, str, str]]) -> list[Path]:
    """A photo, a list, fixations, and `files` among three folders: photos, own notes, links; those that are files."""
    for folder in PLACES:
        (root / folder).mkdir(parents=True)
    ownership.forget()  # new files may have the numbers of earlier inputs
    images.write_png(root / "picture.png", make_photo(0, 20, 30))
    content = (root / "picture.png").read_bytes()
    first = root / "a" / "first.png"
    first.write_bytes(content)
    (root / "a" / "fixations.csv").write_text("image,x,y\nfirst,3,4\nfirst,9,9\nphoto,5,5\n")
    (root / "list").write_text("a/first.png\n")
    kept = [first, root / "a" / "fixations.csv", root / "list", root / "picture.png"]
    for folder, name, kind in files:
        path = root / folder / name
        if os.path.lexists(path):
            continue
        if kind == "photo":
            path.write_bytes(content)
        elif kind == "own":
            path.write_text("my own notes")
        elif kind == "symbolic":
            path.symlink_to(first)
        elif kind == "hard":
            os.link(first, path)
        elif not (root / folder / "link").exists():
            (root / folder / "link").symlink_to(root / "a", target_is_directory=True)
        if path.is_file() and not path.is_symlink():
            kept.append(path)
    return kept


def keep_their_bytes(script: str, root: Path, files: list, source: str, out: str, overwrite: bool) -> None:
    """Run a script twice, refused or not: every file that was there before has its bytes."""
    kept = place(root, files)
    kept += [path for name in WORKSPACE if (path := root / name).is_file()]
    kept += [path for path in (root / "features").glob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in kept}
    module, *command = script.split()
    argv = [*command, *commands(script, root, root / source, root / out), *(["--overwrite"] if overwrite else [])]
    for _ in range(2):
        try:
            importlib.import_module(module).main(argv)
        except SystemExit:
            break
        except Exception as error:
            assert program.explanation(error) is not None, argv
            break
    assert {path: path.read_bytes() for path in kept} == before


def placings(names: list[str]) -> st.SearchStrategy:
    """Files among the folders, by these names or others that the photos may have."""
    return st.lists(
        st.tuples(st.sampled_from(PLACES), st.sampled_from([*names, "photo.png", ".cnn-vlm"]), st.sampled_from(KINDS)),
        max_size=5,
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(placings(OUTPUTS["prepare_images"]), st.sampled_from(["a", "b", "list"]), st.sampled_from(PLACES), st.booleans())
def test_every_input_keeps_its_bytes(tmp_path: Path, files: list, source: str, out: str, overwrite: bool) -> None:
    """Any placing of photos, of somebody's own files and of links among a few folders; stage 1 reads and writes."""
    shutil.rmtree(tmp_path)
    keep_their_bytes("prepare_images", tmp_path, files, source, out, overwrite)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_input_keeps_its_bytes_after_any_script(
    tmp_path: Path, request: pytest.FixtureRequest, data: st.DataObject
) -> None:
    """The same through all scripts that read images or checkpoints, with a tiny network."""
    script = data.draw(st.sampled_from([name for name in OUTPUTS if name != "prepare_images"]))
    files = data.draw(placings(OUTPUTS[script]))
    sources = ["a", "b", "a/link"] if script.startswith("evaluate") else ["a", "a/first.png", "b/photo.png"]
    source = data.draw(st.sampled_from(["a/first.png"] if script == "run_pretrained_model" else sources))
    out, overwrite = data.draw(st.sampled_from([*PLACES, "a/link", "new", "."])), data.draw(st.booleans())
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    workspace = request.getfixturevalue("tiny_workspace")
    if script != "run_all":  # which may begin a finished workspace anew
        for name in WORKSPACE:
            shutil.copy(workspace / name, tmp_path)
        shutil.copytree(workspace / "features", tmp_path / "features", ignore=shutil.ignore_patterns(".*"))
    keep_their_bytes(script, tmp_path, files, source, out, overwrite)


def test_what_is_ours_may_be_written_again(tmp_path: Path) -> None:
    ownership.forget()
    for text in ("one", "two"):
        artefacts.write_text(tmp_path / "a.txt", text)
        ownership.forget()
    assert (tmp_path / "a.txt").read_text() == "two"
    with (tmp_path / ownership.LEDGER).open("a") as file:
        file.write('"cut o')  # by a full disk: the names after it count
    ownership.forget()
    artefacts.write_text(tmp_path / "b.txt", "one")
    ownership.forget()
    artefacts.write_text(tmp_path / "b.txt", "two")
    artefacts.write_json(tmp_path / "parameters.json", {})
    (tmp_path / "parameters.json.partial").write_text("cut off by a kill")
    ownership.forget()
    artefacts.write_json(tmp_path / "parameters.json", {})
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"mine.txt was not written by this program.*move it away, or write elsewhere"):
        artefacts.write_text(tmp_path / "mine.txt", "x")
    ownership.reading(tmp_path / "a.txt")
    (tmp_path / "link").mkdir()
    os.link(tmp_path / "a.txt", tmp_path / "link" / "b.txt")
    for path in (tmp_path / "a.txt", tmp_path / "link" / "b.txt"):
        with pytest.raises(UserError, match="is read by this run and would be replaced"):
            artefacts.write_text(path, "x")
    ownership.forget()


def test_what_stands_beside_a_new_name_is_theirs(tmp_path: Path) -> None:
    """Somebody's own sidecar or part of a file that is not there yet is refused before that is written."""
    for ending in (".json", ".partial", ".progress", ".json.partial", "-0of2"):
        beside = tmp_path / f"x.safetensors{ending}"
        beside.write_text("my own notes")
        for note in (False, True):
            with pytest.raises(UserError, match=f"x.safetensors{ending} was not written by this program"):
                ownership.check(tmp_path / "x.safetensors", note)
        beside.unlink()
    ownership.check(tmp_path / "x.safetensors")
    ownership.check(tmp_path / "x.safetensors.json")


def test_a_picture_that_somebody_replaced_is_theirs(tmp_path: Path) -> None:
    ownership.forget()
    for seed in (0, 0, 1):
        images.write_png(tmp_path / "a.png", make_photo(seed, 4, 4))
    (tmp_path / "copied").mkdir()
    for name in ("a.png", ownership.LEDGER):
        shutil.copyfile(tmp_path / name, tmp_path / "copied" / name)
    ownership.forget()
    images.write_png(tmp_path / "copied" / "a.png", make_photo(2, 4, 4))
    assert ownership.written(tmp_path) == {"a.png"}
    (tmp_path / "a.png").write_bytes(b"a photo")
    for _ in range(2):
        assert not ownership.written(tmp_path)
        with pytest.raises(UserError, match="was not written by this program"):
            images.write_png(tmp_path / "a.png", make_photo(1, 4, 4))
        ownership.forget()


def test_a_pipe_where_a_list_or_lock_is_to_be_is_refused(tmp_path: Path) -> None:
    """Opening it would wait for ever."""
    for name, work in (
        (ownership.LEDGER, lambda: artefacts.write_text(tmp_path / "a.txt", "x")),
        (".d.lock", lambda: ownership.check_lock(tmp_path / ".d.lock")),
    ):
        ownership.forget()
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match="its name is needed for one: move it away"):
            work()
        (tmp_path / name).unlink()


def test_a_lock_for_merging_is_a_lock(tmp_path: Path) -> None:
    ownership.forget()
    (tmp_path / "train_state").mkdir()
    (tmp_path / "train_state" / "merge.lock").write_text("my own notes")
    with pytest.raises(UserError, match="is no lock of this program"), language_models.merging(tmp_path):
        pass
    assert (tmp_path / "train_state" / "merge.lock").read_text() == "my own notes"


def test_files_of_earlier_versions_may_be_written_again(tmp_path: Path) -> None:
    for name in ("vlm.safetensors", "log.csv", "photo.png"):
        (tmp_path / name).write_text("old")
    (tmp_path / "vlm.safetensors.json").write_text('{"stage": "train_vlm"}')
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "loss.png").write_text("old")
    ownership.forget()
    for name in ("log.csv", "figures/loss.png"):
        artefacts.write_text(tmp_path / name, "new")
    with pytest.raises(UserError, match=r"photo.png was not written"):
        artefacts.write_text(tmp_path / "photo.png", "new")


def test_a_finished_artefact_that_was_copied_here_may_be_written_again(tmp_path: Path) -> None:
    ownership.forget()
    artefacts.write_text(tmp_path / "first.txt", "here is a ledger")
    for name, facts in (("vlm.safetensors", '{"weights_sha256": "0"}'), ("picture.npy", '{"seed": 3, "prompt": "a"}')):
        (tmp_path / name).write_text("copied")
        (tmp_path / f"{name}.json").write_text(facts)
    artefacts.write_text(tmp_path / "vlm.safetensors", "new")
    artefacts.write_text(tmp_path / "vlm.safetensors.json", "new")
    for name in ("picture.npy", "picture.npy.json"):
        with pytest.raises(UserError, match="was not written by this program"):
            artefacts.write_text(tmp_path / name, "new")


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("saliency", "first.png"),
        ("reconstruct", "image.png"),
        ("evaluate fixations", "table.md"),
        ("run_pretrained_model", "figure.png"),
    ],
)
def test_what_would_be_refused_is_refused_before_the_work(
    script: str, name: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    place(root, [("b", name, "own")])
    shutil.copy(request.getfixturevalue("tiny_workspace") / "vlm.safetensors", root)
    there = sorted(path for path in root.rglob("*") if path.name != ".cnn-vlm")
    source = root / ("a" if script.startswith("evaluate") else "a/first.png")
    module, *command = script.split()
    with pytest.raises(UserError, match="was not written by this program"):
        importlib.import_module(module).main([*command, *commands(script, root, source, root / "b")])
    assert sorted(p for p in root.rglob("*") if not p.name.startswith(".")) == [p for p in there if p.name[0] != "."]


def test_unfinished_results_of_earlier_versions_can_be_finished(tmp_path: Path) -> None:
    """A picture is one of a result where something beside it says so; another stays somebody's own."""
    left = {
        "reconstruction": [
            "restart-0.state.safetensors",
            "restart-0.png",
            "image.png",
            "snapshots/restart-0-00100.png",
        ],
        "saliency": ["a-unnaturalness.npy", "a.png", "a-overlay.png"],
        "scores": ["summary.json", "summary.json.json", "table.md", "examples-x.png"],
    }
    for folder, names in left.items():
        for name in (*names, "mine.png"):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_text('{"stage": "old"}')
        ownership.forget()
        for name in names:
            artefacts.write_text(tmp_path / folder / name, "new")
        with pytest.raises(UserError, match=r"mine.png was not written"):
            artefacts.write_text(tmp_path / folder / "mine.png", "new")


def test_own_results_are_no_inputs(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"somebody's")
    images.write_png(tmp_path / "photo-overlay.png", np.zeros((2, 2), np.uint8))
    assert [path.name for path in images.list_images([str(tmp_path)])[0].values()] == ["photo.png"]


def test_one_place_is_one_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.user_path("~/x") == tmp_path / "x"
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to("d")
    with locks.claim(tmp_path / "d"):
        for other in (tmp_path / "link", tmp_path / "link" / ".." / "d"):
            with pytest.raises(UserError, match="is being written by"), locks.claim(other):
                pass
    monkeypatch.chdir(tmp_path / "d")
    for here in (".", "./"):
        with locks.claim(Path(here)):
            artefacts.write_text(Path(here) / "a.txt", here)
    assert paths.beside(Path("/"), ".", ".lock") == Path("/..lock")
