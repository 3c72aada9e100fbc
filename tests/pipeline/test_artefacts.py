"""Arrays and sidecars that are damaged, lie, or would execute code: every stage that reads them gives one line."""

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import evaluate
import extract_features
import prepare_images
import reconstruct
import run_all
import saliency
import train_vlm
from models.backbones import ARCHITECTURES
from models.errors import UserError
from pipeline import array_files, artefacts, features, figures, ownership, program, training_log
from pipeline.images import write_png
from tests.conftest import make_photo
from tests.models.weights.test_weights import TINY

COMMON = ["--device", "cpu"]
RANDOM = ["--weights", "random"]
STATED = b"x" * 40_000  # what lies about its length


class Payload:
    """Creates a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Stages 1-3, 5 and 4 of a network of some hundred parameters."""
    root = tmp_path_factory.mktemp("whole")
    (root / "photos").mkdir()
    for i in range(3):
        write_png(root / "photos" / f"{i}.png", make_photo(i, 30, 40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "tiny", TINY)
        patch.setattr(figures, "save_figure", lambda *_: None)  # drawing takes most of the time
        patch.setattr(program, "code_version", lambda: "tested")
        for stage in (prepare_images, extract_features, train_vlm, saliency, reconstruct):
            assert not stage.main(command(stage, root))
        yield root


def command(stage: Any, root: Path) -> list[str]:
    """A stage on the workspace, quickly."""
    return [
        *COMMON,
        *(["--root", str(root)] if stage is not evaluate else []),
        *{
            prepare_images: ["--source", str(root / "photos")],
            extract_features: [*RANDOM, "--backbone", "tiny", "--layers", "conv2", "--pca-positions", "40"],
            train_vlm: ["--iterations", "1", "--batch-size", "1"],
            saliency: [*RANDOM, str(root / "photos" / "0.png")],
            reconstruct: [*RANDOM, "--rows", "0", "--regularizer", "none", "--iterations", "1", "--target", "fc8"],
        }[stage],
    ]


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A copy of the workspace, to be spoiled."""
    shutil.copytree(whole, tmp_path / "root")
    return tmp_path / "root"


def npy(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def header(shape: str, descr: str = "'<f4'") -> bytes:
    """The start of a `.npy` file that claims anything."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def archive(payload: Payload) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.array([payload], dtype=object))
    return buffer.getvalue()


def spoiled_arrays(array: np.ndarray, payload: Payload) -> dict[str, bytes]:
    """Contents of a file in place of `array`, which no stage may take."""
    flat = npy(array.reshape(len(array), -1))
    records = np.zeros(array.shape, dtype=[("a", "u1"), ("b", "<f4")])
    return {
        "objects": npy(np.array([payload], dtype=object), allow_pickle=True),
        "objects of the right shape": npy(np.full(array.shape, payload, dtype=object), allow_pickle=True),
        "objects in records": header("(1,)", "[('a', '|O')]") + pickle.dumps([payload]),
        "a pickle": pickle.dumps(payload),
        "an archive of objects": archive(payload),
        "nothing": b"",
        "text": b"no array",
        "half": npy(array)[: len(npy(array)) // 2],
        "all but a byte": npy(array)[:-1],
        "half a header": npy(array)[:50],
        "a header of nonsense": b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16 + STATED,
        "a header of code": b"\x93NUMPY\x01\x00\x2a\x00__import__('os').mkdir('executed')        \n" + STATED,
        "a header of 4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + STATED,
        "a later format": b"\x93NUMPY\x09\x00" + npy(array)[8:],
        "a shape of petabytes": header("(1000000000, 1000, 1000, 3)") + STATED,
        "a shape that overflows": header(f"({2**62}, 4, 1, 1)") + STATED,
        "a shape beyond integers": header(f"({10**40},)") + STATED,
        "a negative shape": header("(-1, 13, 13, 3)") + STATED,
        "a shape of text": header("('a', 2)") + STATED,
        "no rows": npy(array[:0]),
        "a flat shape": flat,
        "too many axes": npy(array[None]),
        "a smaller grid": npy(np.ascontiguousarray(array[:, :1])),
        "other components": npy(np.ascontiguousarray(array[..., :1])),
        "no shape": npy(np.float32(1)),
        "doubles": npy(array.astype(np.float64)),
        "integers": npy(array.astype(np.int64)),
        "complex numbers": npy(array.astype(np.complex64)),
        "text values": npy(array.astype("U4")),
        "truth values": npy(array.astype(bool)),
        "dates": npy(array.astype("M8[s]")),
        "records": npy(records),
        "a type of no size": header("(3, 4, 4, 3)", "'|V0'") + STATED,
        "a type that is none": header("(3, 4, 4, 3)", "'nonsense'") + STATED,
    }


def change(**facts: Any) -> Callable[[dict], Any]:
    return lambda found: {**found, **facts}


def without(key: str) -> Callable[[dict], Any]:
    return lambda found: {k: v for k, v in found.items() if k != key}


SPOILED_SIDECARS: dict[str, bytes | Callable[[dict], Any]] = {
    "nothing": b"",
    "text": b"no facts",
    "half": b'{"shape": [3, ',
    "no UTF-8": b'{"stage": "\xff\xfe"}',
    "UTF-16": '{"stage": "x"}'.encode("utf-16"),
    "nested": b"[" * 100_000 + b"]" * 100_000,
    "nested facts": b'{"shape": ' * 100_000,
    "nested a little": lambda found: {**found, "shape": json.loads("[" * 900 + "]" * 900)},
    "a number of a million digits": b'{"shape": ' + b"9" * 1_000_000 + b"}",
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "no facts": b"{}",
    "no shape": without("shape"),
    "no type": without("dtype"),
    "another shape": change(shape=[1, 2, 3, 4]),
    "a shape of NaN": change(shape=[float("nan")] * 4),
    "a shape of infinities": change(shape=float("inf")),
    "a shape of text": change(shape="all"),
    "a huge shape": change(shape=[10**400] * 4),
    "a long shape": change(shape=list(range(500_000))),
    "another type": change(dtype="float64"),
    "a type of objects": change(dtype={"object": [1]}),
}
OF_IMAGES: dict[str, Callable[[dict], Any]] = {
    "no hash": without("content_sha256"),
    "a hash of numbers": change(content_sha256=[1, 2]),
    "no names": without("names"),
    "fewer names": lambda found: {**found, "names": found["names"][:-1]},
    "names of numbers": lambda found: {**found, "names": [1] * len(found["names"])},
    "names in text": change(names="abc"),
    "names by key": change(names={"0": "a"}),
}
OF_FEATURES: dict[str, Callable[[dict], Any]] = {
    "stale": change(projection_sha256="0" * 64),
    "a hash of NaN": change(projection_sha256=float("nan")),
    "no views": change(views=0),
    "views by name": change(views="two"),
    "views that do not fit": change(views=2),
    "nested views": change(views=[[[1]]]),
    "true views": change(views=True),
}


def spoil(sidecar: Path, how: bytes | Callable[[dict], Any]) -> None:
    content = how if isinstance(how, bytes) else json.dumps(how(json.loads(sidecar.read_text()))).encode()
    sidecar.write_bytes(content)


def refusal(stage: Any, argv: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line of a stage that ends with exit code 2."""
    capsys.readouterr()
    code = program.run(lambda: stage.main(argv))
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1 and len(lines[0]) < 1500 and lines[0].isprintable(), (code, lines)
    return lines[0]


READERS = [(extract_features, "images.npy"), (reconstruct, "images.npy"), (train_vlm, "features/conv2.npy")]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("stage", "name"), READERS)
def test_spoiled_arrays(
    stage: Any, name: str, root: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root.parent)
    path, executed = root / name, root.parent / "executed"
    sidecar = artefacts.sidecar_path(path)
    facts = json.loads(sidecar.read_text())
    for what, content in spoiled_arrays(np.load(path), Payload(executed)).items():
        path.write_bytes(content)
        for lying in (False, True):
            if lying:  # as far as it can be made to fit
                try:
                    found = array_files.map_array(path)
                except ValueError:
                    continue
                spoil(
                    sidecar, change(shape=list(found.shape), dtype=str(found.dtype), names=["a"] * len(facts["shape"]))
                )
            line = refusal(stage, command(stage, root), capsys)
            assert str(path) in line, (what, line)
            artefacts.write_json(sidecar, facts)
        assert not executed.exists(), what


@pytest.mark.parametrize(("stage", "name"), READERS)
def test_spoiled_sidecars(stage: Any, name: str, root: Path, capsys: pytest.CaptureFixture) -> None:
    path = root / name
    sidecar = artefacts.sidecar_path(path)
    facts = sidecar.read_bytes()
    for what, how in (SPOILED_SIDECARS | (OF_IMAGES if name == "images.npy" else OF_FEATURES)).items():
        spoil(sidecar, how)
        assert str(path) in refusal(stage, command(stage, root), capsys), what
        sidecar.write_bytes(facts)
    sidecar.unlink()
    assert "has no sidecar, so it is not finished: run" in refusal(stage, command(stage, root), capsys)
    sidecar.mkdir()
    assert "has no sidecar" in refusal(stage, command(stage, root), capsys)
    sidecar.rmdir()
    path.unlink()
    assert "does not exist: run" in refusal(stage, command(stage, root), capsys)


@pytest.mark.parametrize("how", ["nothing", "nested", "a list", "no facts", "a shape of NaN"])
def test_spoiled_sidecars_of_what_a_stage_made_before(how: str, root: Path, capsys: pytest.CaptureFixture) -> None:
    """A stage refuses to take it for finished, and --overwrite makes it anew."""
    made = {
        prepare_images: root / "images.npy",
        extract_features: root / "features" / "conv2.npy",
        saliency: root / "saliency" / "0.npy",
        reconstruct: next((root / "reconstructions").glob("*/reconstruction.npy")),
    }
    for stage, path in made.items():
        sidecar = artefacts.sidecar_path(path)
        facts = sidecar.read_text()
        spoil(
            sidecar,
            SPOILED_SIDECARS[how] if how != "a shape of NaN" else change(seed=float("nan"), layer=[[]], stage=1),
        )
        line = refusal(stage, command(stage, root), capsys)
        assert str(path) in line and ("--overwrite" in line or "remove it" in line)
        assert not stage.main([*command(stage, root), "--overwrite"])
        assert json.loads(sidecar.read_text()).keys() == json.loads(facts).keys()


@pytest.mark.parametrize("how", ["nothing", "nested", "a list", "null", "no facts"])
def test_spoiled_sidecar_of_a_checkpoint_is_written_again(how: str, root: Path, capsys: pytest.CaptureFixture) -> None:
    sidecar = root / "vlm.safetensors.json"
    facts = json.loads(sidecar.read_text())
    spoil(sidecar, SPOILED_SIDECARS[how])
    code = program.run(lambda: train_vlm.main(command(train_vlm, root)))
    assert code == 0 or len(capsys.readouterr().err.splitlines()) == 1 and code == 2
    if code == 0:
        found = json.loads(sidecar.read_text())
        for either in (found, facts):
            del either["versions"]["arguments"]  # they name the workspace
        assert found == facts


LOGS = {
    "text": b"no log\n",
    "other columns": b"layer,loss\nconv2,0.5\n",
    "a short line": b"conv1,1,1,1\n",
    "a word for a number": b"conv1,1,1,low,1,1,1,1\n",
    "half an iteration": b"conv1,1.5,1,1,1,1,1,1\n",
    "a number of a million digits": b"conv1," + b"9" * 1_000_000 + b",1,1,1,1,1,1\n",
    "an open quote": b'"conv1,' + b"1" * 200_000,
    "no UTF-8": b"\xff\xfe,1,1,1,1,1,1,1\n",
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("whole_head", [False, True])
def test_spoiled_log(whole_head: bool, root: Path, capsys: pytest.CaptureFixture) -> None:
    """A log edited by hand is refused before anything is trained, and nothing is lost."""
    path, checkpoint = root / "log.csv", (root / "vlm.safetensors").read_bytes()
    head = ",".join(training_log.COLUMNS).encode() + b"\n" if whole_head else b""
    for what, content in LOGS.items():
        path.write_bytes(head + content)
        line = refusal(train_vlm, [*command(train_vlm, root), "--overwrite"], capsys)
        assert str(path) in line and "remove it" in line, (what, line)
        assert (root / "vlm.safetensors").read_bytes() == checkpoint
    path.write_bytes(head + b"\n")
    assert not train_vlm.main([*command(train_vlm, root), "--overwrite"])
    assert training_log.read_log(path)


def test_spoiled_features_as_targets(
    root: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features that the user gives: no sidecar, any content."""
    monkeypatch.chdir(root.parent)
    path, executed = root / "feature.npy", root.parent / "executed"
    options = ["--root", str(root), *COMMON, *RANDOM, "--regularizer", "none", "--iterations", "1", "--target", "conv2"]
    feature = np.random.default_rng(0).normal(size=(1, 6, 4, 4)).astype(np.float32)
    spoiled = spoiled_arrays(feature, Payload(executed))
    spoiled |= {
        "NaN": npy(np.where(feature > 0, feature, np.nan)),
        "infinities": npy(np.full_like(feature, np.inf)),
        "doubles beyond floats": npy(np.full(feature.shape, 1e300)),
    }
    fine = {"doubles", "too many axes"}  # which are converted, and which are told apart by their shape
    for what, content in spoiled.items():
        if what in fine:
            continue
        path.write_bytes(content)
        line = refusal(reconstruct, [str(path), *options, "--out", str(root.parent / "out")], capsys)
        assert not executed.exists(), what
        assert str(path) in line or "the target " in line, (what, line)
    path.write_bytes(npy(feature.astype(">f8")))
    assert reconstruct.main([str(path), *options, "--out", str(root.parent / "fine")]) == 0
    path.write_bytes(npy(feature[0]))
    other = root / "objects.npy"
    other.write_bytes(spoiled["objects"])
    code = program.run(lambda: reconstruct.main([str(other), str(path), *options, "--out", str(root.parent / "both")]))
    assert code == 2 and (root.parent / "both" / "feature" / "reconstruction.png").is_file()


@pytest.mark.filterwarnings("error")
def test_spoiled_results_in_an_evaluation(root: Path, capsys: pytest.CaptureFixture) -> None:
    (path,) = (root / "reconstructions").glob("*/reconstruction.npy")
    sidecar = artefacts.sidecar_path(path)
    facts, content = sidecar.read_bytes(), path.read_bytes()
    argv = ["reconstruction", str(root), *COMMON, *RANDOM, "--out", str(root / "scores")]
    executed = root.parent / "executed"
    spoiled = {k: h for k, h in SPOILED_SIDECARS.items() if "shape" not in k and "type" not in k or k == "nested facts"}
    for key in ("stage", "input", "input_sha256", "target", "backbone", "weights_sha256", "regularizer"):
        spoiled |= {f"no {key}": without(key), f"{key} of NaN": change(**{key: [float("nan")]})}
    for how in {**spoiled, "other regularizer": change(regularizer="x"), "other tap": change(target="x")}.values():
        spoil(sidecar, how)
        refusal(evaluate, argv, capsys)
        sidecar.write_bytes(facts)
    for what, how in spoiled_arrays(np.load(path), Payload(executed)).items():
        if what in ("doubles", "no rows"):
            continue
        path.write_bytes(how)
        assert str(path.parent) in refusal(evaluate, argv, capsys), what
        assert not executed.exists()
        path.write_bytes(content)


def test_spoiled_map_in_the_summary(root: Path) -> None:
    executed = root.parent / "executed"
    spoiled = spoiled_arrays(np.load(root / "saliency" / "0.npy"), Payload(executed))
    del spoiled["a flat shape"]  # a map is flat
    for content in spoiled.values():
        (root / "saliency" / "0.npy").write_bytes(content)
        with pytest.raises(UserError, match="run saliency.py again"):
            run_all.show_results(root, root / "photos" / "0.png", "conv2", "authors", [], 1.0)
        assert not executed.exists()


NOTES: dict[str, bytes | Callable[[dict], Any]] = {
    **SPOILED_SIDECARS,
    "nothing done": change(done=-1),
    "too much done": change(done=10**9),
    "half done": change(done=0.5),
    "text done": change(done="1"),
    "true done": change(done=True),
    "no state": without("state"),
    "state in a list": change(state=[1]),
    "rejections in a list": change(state={"rejected": [1]}),
    "rejections by name": change(state={"rejected": {"a": "b"}}),
    "rejections of others": change(state={"rejected": {"77": "b"}}),
}


def test_spoiled_notes_of_progress(whole: Path, tmp_path: Path) -> None:
    """What a killed run noted is taken up where it fits; everything else counts as nothing done."""
    photos = whole / "photos"
    expected = (whole / "images.npy").read_bytes()
    facts = json.loads((whole / "images.npy.json").read_text())
    kept = {k: facts[k] for k in ("shape", "dtype", "stage", "sources", "inputs_sha256", "num_images", "seed")}
    for what, how in NOTES.items():
        out = tmp_path / "out" / "images.npy"
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        ownership.forget()
        artefacts.write_bytes(Path(f"{out}.partial"), expected)
        artefacts.write_json(Path(f"{out}.progress"), {"done": 1, "facts": kept, "state": {"rejected": {}}})
        spoil(Path(f"{out}.progress"), how)
        prepare_images.main([*COMMON, "--source", str(photos), "--out", str(out)])
        assert out.read_bytes() == expected, what


@pytest.mark.parametrize("how", ["nothing", "half", "a pickle", "an archive of objects", "other arrays"])
def test_spoiled_state_of_the_statistics(how: str, root: Path, capsys: pytest.CaptureFixture) -> None:
    executed = root.parent / "executed"
    payload = Payload(executed)
    good = io.BytesIO()
    np.savez(good, facts=np.array("x"), done=np.array(1))
    content = {
        "nothing": b"",
        "half": good.getvalue()[: len(good.getvalue()) // 2],
        "a pickle": pickle.dumps(payload),
        "an archive of objects": archive(payload),
        "other arrays": npy(np.zeros(3)),
    }[how]
    shutil.rmtree(root / "features")
    (root / "features").mkdir()
    (root / "features" / features.STATE).write_bytes(content)
    assert "is damaged" in refusal(extract_features, command(extract_features, root), capsys)
    assert not executed.exists()


def test_asking_whether_an_artefact_is_finished_changes_nothing(tmp_path: Path) -> None:
    """What clears the way says so by its name: `reuse`, `withdraw`."""
    path, facts = tmp_path / "x.npy", {"seed": 3}
    array_files.write_array(path, np.ones(2))
    Path(f"{path}.partial").touch()
    artefacts.write_json(artefacts.sidecar_path(path), facts)
    before = sorted(tmp_path.iterdir())
    assert artefacts.is_finished(path, facts) and not artefacts.is_finished(tmp_path / "y.npy", facts)
    with pytest.raises(UserError, match="seed is 3, not 4"):
        artefacts.is_finished(path, {"seed": 4})
    assert sorted(tmp_path.iterdir()) == before
    assert artefacts.reuse(path, facts, False) and not Path(f"{path}.partial").exists()
    assert not artefacts.reuse(path, facts, True) and not artefacts.is_finished(path, facts) and path.is_file()
