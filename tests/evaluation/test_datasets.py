"""Public data sets from a server in this process, and fixations found in raw gaze."""

import functools
import hashlib
import http.server
import io
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import evaluate
from evaluation import datasets
from evaluation.datasets import DATASETS, obtain
from evaluation.fixations import image_sizes, read_fixations
from evaluation.gaze import fixation_centres
from models.errors import UserError
from models.weights.downloads import RemoteFile

QUICK = {"retries": 1, "timeout": 0.3, "pause": 0.001}


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and counts."""

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        super().do_GET()


@pytest.fixture
def server(tmp_path: Path):
    (tmp_path / "served").mkdir()
    handler = functools.partial(Handler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        httpd.paths, httpd.folder = [], tmp_path / "served"
        httpd.base = f"http://127.0.0.1:{httpd.server_port}"
        threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield httpd
        httpd.shutdown()


def jpeg(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "JPEG")
    return buffer.getvalue()


def mat(**variables) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, variables)
    return buffer.getvalue()


def cells(values: list) -> np.ndarray:
    cell = np.empty(len(values), dtype=object)
    for place, value in enumerate(values):
        cell[place] = value
    return cell


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in members.items():
            archive.writestr(name, body)
    return buffer.getvalue()


def serve(server, monkeypatch: pytest.MonkeyPatch, name: str, files: dict[str, bytes], count: int) -> None:
    """Makes a data set of `count` images consist of these files of the server."""
    remotes = []
    for file, body in files.items():
        path = server.folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        remotes.append(RemoteFile(file, (f"{server.base}/{name}/{file}",), "none", md5=hashlib.md5(body).hexdigest()))
    changed = replace(DATASETS[name], files=tuple(remotes), count=count)
    monkeypatch.setitem(datasets.DATASETS, name, changed)


def toronto() -> dict[str, bytes]:
    maps = [np.zeros((20, 30), np.uint8) for _ in range(11)]
    maps[9][4, 7] = maps[10][19, 29] = maps[0][0, 0] = 1
    folder = "eyetrackingdata/fixdens/"
    members = {f"{folder}Original Image Set/{n}.jpg": jpeg(30, 20) for n in range(1, 12)}
    members |= {f"{folder}origfixdata.mat": mat(white=cells(maps)), f"{folder}other/1.jpg": b"", "__MACOSX/9.jpg": b""}
    return {"eyetrackingdata.zip": zipped(members)}


def gaze_between(points: list[tuple[float, float]], rest: int = 60, moving: int = 6) -> np.ndarray:
    """Rest at the first point, move smoothly to the next, …: (T, 2)."""
    parts = [np.tile(points[0], (rest, 1))]
    for start, end in zip(points, points[1:], strict=False):
        u = np.arange(1, moving + 1)[:, None] / (moving + 1)
        parts += [start + (3 * u**2 - 2 * u**3) * (np.array(end) - start), np.tile(end, (rest, 1))]
    return np.concatenate(parts)


LONG = "i" + "x" * 70  # MATLAB cuts the names of variables at 63 letters


def mit1003() -> dict[str, bytes]:
    images = {f"ALLSTIMULI/{name}.jpeg": jpeg(300, 200) for name in ("i1", LONG)}
    people = {"hp": [(150, 100), (20, 30), (250, 150)], "CNG": [(150, 100), (40, 50), (-500, 20), (70, 80)]}
    files = {"DATA/.svn/hp/i1.mat": b"", "DATA/x.txt": b""}
    for person, points in people.items():
        trial = {"imgName": "i1.jpeg", "DATA": {"eyeData": gaze_between(points)}}
        files[f"DATA/{person}/i1.mat"] = mat(i1=trial)
    files[f"DATA/hp/{LONG}.mat"] = mat(**{LONG[:63]: {"DATA": {"eyeData": gaze_between([(1, 1), (200, 90)])}}})
    return {"ALLSTIMULI.zip": zipped(images), "DATA.zip": zipped(files)}


def test_addresses_of_the_archives() -> None:
    assert len(DATASETS["osie"].files) == 701
    hashed = {file.name: file.md5 for dataset in DATASETS.values() for file in dataset.files if file.md5}
    assert hashed == {
        "fixations.mat": "8efdf6fe66f38b6e70f854c7ff45aa70",
        "eyetrackingdata.zip": "38d5c02217060d4d2d1a4649cc632af1",
        "ALLSTIMULI.zip": "0d7df8b954ecba69b6796e77b9afe4b6",
        "DATA.zip": "ea19d74ad0a0144428c53e9d75c2d71c",
    }


def test_archive_is_fetched_once_and_unpacked(server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(server, monkeypatch, "toronto", toronto(), 11)
    images, path = obtain("toronto", tmp_path / "cache", **QUICK)
    assert [image.name for image in images] == [f"{n}.jpg" for n in range(1, 12)]
    found = read_fixations(path, image_sizes(images))
    assert (found.image_index.tolist(), found.x.tolist(), found.y.tolist()) == ([0, 9, 10], [0, 7, 29], [0, 4, 19])
    images[3].write_bytes(b"another")
    with pytest.raises(UserError, match="4.jpg was not written by this program, and would be replaced: move it away"):
        obtain("toronto", tmp_path / "cache", **QUICK)
    images[3].unlink()
    images[5].unlink()
    assert obtain("toronto", tmp_path / "cache", **QUICK)[0] == images
    assert images[3].read_bytes() == images[5].read_bytes() == jpeg(30, 20)
    assert server.paths == ["/toronto/eyetrackingdata.zip"]


def test_raw_gaze_of_mit1003(server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(server, monkeypatch, "mit1003", mit1003(), 2)
    images, path = obtain("mit1003", tmp_path / "cache", **QUICK)
    assert len(images) == 2 and path.is_dir()
    found = read_fixations(path, image_sizes(images))
    assert found.image_index.tolist() == [0, 0, 0, 0, 1] and found.subject.tolist() == [0, 0, 1, 1, 1]
    assert found.x.tolist() == [40, 70, 20, 250, 200] and found.y.tolist() == [50, 80, 30, 150, 90]
    assert found.outside == 1, "the look outside"
    (path / "hp" / "i1.mat").write_bytes(mat(i1={"DATA": {"eyeData": np.zeros((5, 1))}}))
    with pytest.raises(UserError, match="eyeData is not a table"):
        read_fixations(path, image_sizes(images))
    (path / "hp" / "i1.mat").write_bytes(mat(other=1.0))
    with pytest.raises(UserError, match="lacks the field i1"):
        read_fixations(path, image_sizes(images))


def test_images_one_by_one(server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    person = {"fix_x": np.array([3.0, 4.0]), "fix_y": np.array([5.0, 6.0]), "fix_duration": np.array([1.0, 1.0])}
    entry = {"img": "1001.jpg", "subjects": cells([person])}
    files = {"fixations.mat": mat(fixations=cells([entry])), "stimuli/1001.jpg": jpeg(8, 9)}
    serve(server, monkeypatch, "osie", files | {"stimuli/1002.jpg": jpeg(8, 9)}, 2)
    (server.folder / "osie" / "stimuli" / "1002.jpg").unlink()  # the host fails in the middle
    with pytest.raises(UserError, match="1002.jpg could not be downloaded .*404.*--stimuli DIR --fixations FILE"):
        obtain("osie", tmp_path / "cache", **QUICK)
    (server.folder / "osie" / "stimuli" / "1002.jpg").write_bytes(jpeg(8, 9))
    images, path = obtain("osie", tmp_path / "cache", **QUICK)
    assert len(images) == 2 and len(read_fixations(path, image_sizes(images))) == 2
    assert server.paths.count("/osie/fixations.mat") == server.paths.count("/osie/stimuli/1001.jpg") == 1


def test_dead_host_damaged_file_and_missing_images(server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = toronto()
    serve(server, monkeypatch, "toronto", files, 12)
    with pytest.raises(UserError, match="has 11 images of toronto instead of 12: remove that folder"):
        obtain("toronto", tmp_path / "cache", **QUICK)
    serve(server, monkeypatch, "toronto", files, 11)
    (server.folder / "toronto" / "eyetrackingdata.zip").write_bytes(files["eyetrackingdata.zip"][:-1])
    with pytest.raises(UserError, match="eyetrackingdata.zip could not be downloaded .*another md5"):
        obtain("toronto", tmp_path / "other", **QUICK)
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="no connection.*or put it at .*other/toronto/eyetrackingdata.zip") as caught:
        obtain("toronto", tmp_path / "other", **QUICK)
    assert "\n" not in str(caught.value)
    (tmp_path / "other" / "toronto" / "eyetrackingdata.zip").write_bytes(files["eyetrackingdata.zip"])
    assert len(obtain("toronto", tmp_path / "other", **QUICK)[0]) == 11, "an archive got elsewhere serves"


def test_no_archive_is_refused(server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(server, monkeypatch, "toronto", {"eyetrackingdata.zip": b"no zip"}, 11)
    with pytest.raises(UserError, match="is damaged"):
        obtain("toronto", tmp_path / "cache", **QUICK)


def test_evaluation_of_a_data_set(server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    serve(server, monkeypatch, "toronto", toronto(), 11)
    arguments = ["fixations", "--dataset", "toronto", "--baseline", "uniform", "--cache", str(tmp_path / "cache")]
    assert evaluate.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "11 images, 3 fixations" in printed and "images without fixations: 8" in printed
    assert "| inter-observer" in printed, "unknown subjects: a row without numbers"


def test_rests_of_the_gaze_are_fixations() -> None:
    points = [(500.0, 400.0), (100.0, 150.0), (800.0, 600.0), (650.0, 90.0)]
    np.testing.assert_array_equal(fixation_centres(gaze_between(points)), points)
    shaky = gaze_between(points) + np.random.default_rng(0).normal(0, 0.5, (258, 2))
    np.testing.assert_allclose(fixation_centres(shaky), points, atol=0.5)


def test_short_pauses_are_no_fixations() -> None:
    first, on_the_way, last = (500.0, 400.0), (300.0, 300.0), (100.0, 150.0)
    parts = [gaze_between([first, on_the_way], rest=60)[:-60], gaze_between([on_the_way, last], rest=60)[60 - 8 :]]
    assert fixation_centres(np.concatenate(parts)).tolist() == [[*first], [*last]]
    ending = gaze_between([first, on_the_way, last])[: -60 + 8]
    assert fixation_centres(ending).tolist() == [[*first], [*on_the_way]], "the last pause is too short as well"


def test_trials_without_saccades() -> None:
    drift = np.linspace((100, 100), (110, 100), 300)
    np.testing.assert_allclose(fixation_centres(drift), [[105, 100]])
    drift[50:60] = np.nan
    assert fixation_centres(drift).shape == (1, 2)
    for samples in range(1, 9):
        assert fixation_centres(np.full((samples, 2), 7.0)).tolist() == [[7, 7]]
    assert np.isnan(fixation_centres(np.full((9, 2), np.nan))).all()
    assert len(fixation_centres(np.empty((0, 2)))) == 0
