"""Commands of the README: all run, in its order, as they stand there, on stand-ins that cost seconds.

The networks have the real ones' names and a few channels, photos are small, presets and descents are two updates long.
The install line and the tests are what .ci/run runs.
"""

import importlib
import json
import multiprocessing
import re
import shlex
import tarfile
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import run_all
import run_pretrained_model
from models import descent
from models.backbones import ARCHITECTURES, Architecture, chain, named, random_parameters
from models.checkpoints import vlm_tensors, write_tensors
from models.errors import UserError
from models.projection import Projection
from models.vlm import VisualLanguageModel
from models.weights import find
from models.weights.downloads import RemoteFile, file_hash
from models.weights.origin import Origin
from pipeline import figures, results_page, sources
from pipeline.images import write_png
from pipeline.presets import PRESETS, Setting
from tests import tiny
from tests.conftest import make_photo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()]
SCRIPTS = [command for command in COMMANDS if ".py" in command]
FIND_WEIGHTS = find.find_weights
RANKS = 2  # of what torchrun starts
SHORT = {
    "prepare_images": {"num_images": 5},
    "extract_features": {"pca_positions": 200, "held_out": 1},
    "train_vlm": {"iterations": 2, "batch_size": 2},
}
DRAWN = [(figures, name) for name in ("loss_curves", "reconstruction_curves", "picture_row", "picture_grid")]
DRAWN += [(results_page, "results_figure")]


def test_install_line_and_tests_are_what_ci_runs() -> None:
    checked = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (install,) = (line for line in COMMANDS if line.startswith("pip install"))
    for part in install.split(" && "):
        assert part.replace("pip install", "pip install --quiet") in checked
    (tests,) = (line for line in COMMANDS if "pytest" in line)
    assert tests in checked.splitlines()
    assert len(SCRIPTS) == len(COMMANDS) - 2 > 12


def stand_in(name: str) -> Architecture:
    """A network with the taps of a chain of the registry, its convolutions six channels wide, and small images."""
    real = ARCHITECTURES[name]

    def build() -> nn.Sequential:
        layers: dict[str, nn.Module] = {}
        for number, layer in enumerate(real.vlm_layers[1:], start=1):
            layers[layer] = nn.Conv2d(3 if number == 1 else 6, 6, 3, stride=2 if number == 1 else 1, padding=1)
            layers[f"relu{number}"] = nn.ReLU()
        return named(**layers, pool5=nn.MaxPool2d(3, 2), flatten=nn.Flatten(), fc8=nn.Linear(6 * 5 * 5, 5))

    return chain(name, build, real.vlm_layers, crop=(22, 22), mean=real.mean, scale=real.scale)


def path_among(values: tuple) -> Path:
    """Where a picture is to be written, among the arguments of what draws it."""
    return next(value for value in values if isinstance(value, Path))


def shrink_here(folder: Path) -> None:
    """`shrink` for the whole life of this process."""
    shrink(pytest.MonkeyPatch(), folder)


def shrink(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Small networks with random weights, few and small sample photos, short runs, and checkpoints in `folder`.

    No pictures are drawn: matplotlib takes most of the time.
    """
    patch.chdir(folder)
    for name in ("alexnet", "vgg16"):
        patch.setitem(ARCHITECTURES, name, stand_in(name))
    patch.setattr(find, "find_weights", lambda architecture, _, **more: FIND_WEIGHTS(architecture, "random", **more))
    patch.setattr(sources, "sample_photos", lambda: sorted((folder / "samples").iterdir()))
    for preset in PRESETS.values():
        for stage, values in SHORT.items():
            for option, value in values.items():
                patch.setitem(preset[stage], option, Setting(value, "short"))
    patch.setitem(descent.DESCENTS, "fourier", replace(descent.FOURIER, iterations=2))
    patch.setattr(run_pretrained_model, "AT_MOST", 2)
    for module, name in DRAWN:
        patch.setattr(module, name, lambda *what, **how: write_png(path_among(what), np.zeros((2, 2, 3), np.uint8)))
    shipped = folder / "models" / "pretrained"
    patch.setattr(run_pretrained_model, "RECONSTRUCTION", shipped / "alexnet.safetensors")
    patch.setattr(run_pretrained_model, "SALIENCY", shipped / "vgg16.safetensors")
    patch.setattr(run_all, "SHIPPED", shipped / "alexnet.safetensors")


def ship(path: Path, architecture: Architecture) -> None:
    """A checkpoint of language models that have learnt nothing, with statistics of all layers and of pool5."""

    def plain(channels: int) -> Projection:
        kept = (channels + 1) // 2
        return Projection(torch.zeros(channels), torch.ones(channels), torch.eye(kept, channels), torch.zeros(channels))

    taps = (*architecture.vlm_layers, "pool5")
    channels = {tap: architecture.channels(tap) for tap in taps}
    statistics = {tap: {"mean": torch.zeros(n), "std": torch.ones(n)} for tap, n in channels.items()}
    vlm = VisualLanguageModel({layer: plain(channels[layer]) for layer in architecture.vlm_layers}, statistics)
    vlm.initialise(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"backbone": architecture.name, "layers": list(architecture.vlm_layers), "weights_sha256": "random-0"}
    write_tensors(path, vlm_tensors(vlm), facts)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the working one, with what the commands read: photos, ImageNet, the checkpoints that ship."""
    folder = tmp_path / "place"
    for number, path in enumerate(
        ["samples/china.jpg", "samples/flower.jpg", "photo.jpg", "holiday/beach.png", "photos/tree.png"]
        + [f"imagenet/{part}/n0{n % 2}/{n}.png" for n in range(5) for part in ("train", "val")]
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(make_photo(number, 40, 48)).save(folder / path)
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for photo in sorted((folder / "imagenet" / "val").rglob("*.png")):
            tar.add(photo, photo.name)
    shrink(monkeypatch, folder)
    for name in ("alexnet", "vgg16"):
        ship(folder / "models" / "pretrained" / f"{name}.safetensors", ARCHITECTURES[name])
    return folder


def run(command: str, folder: Path) -> None:
    """A command of the README in this process, or what torchrun starts in a few; fails where the command does."""
    words = shlex.split(command)
    if words[0] == "python":
        assert not importlib.import_module(words[1].removesuffix(".py")).main(words[2:])
        return
    from torch.distributed.run import parse_args

    assert words[0] == "torchrun"
    launched = parse_args(words[1:])
    stage = launched.training_script.removesuffix(".py")
    for code, output in tiny.run_ranks(
        RANKS, stage, launched.training_script_args, folder / "out", before=partial(shrink_here, folder)
    ):
        assert code == 0, output


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="processes cannot be forked")
def test_every_command_runs(place: Path, capfd: pytest.CaptureFixture) -> None:
    """One after the other, as a newcomer types them; the first prints what the README says that it prints."""
    for command in SCRIPTS:
        print(f"$ {command}")
        run(command, place)
    printed = capfd.readouterr().out
    assert run_all.GOES_ON in (place / "out/demo/report.html").read_text(encoding="utf-8")
    (told,) = (block for block in re.findall(r"^```text\n(.*?)^```", README, re.M | re.S) if "report.html" in block)
    for line in told.splitlines():
        if line != "…":
            assert re.search("^" + re.sub(r"\d+", r"\\d+", re.escape(line)), printed, re.M), line


def of_remote(patch: pytest.MonkeyPatch, remote: RemoteFile) -> None:
    """The complete weights of alexnet's stand-in are there, and are looked for."""

    def find_weights(architecture: Architecture, choice: str, **more) -> find.Weights:
        return FIND_WEIGHTS(architecture, choice if architecture.name == "alexnet" else "random", **more)

    patch.setattr(find, "find_weights", find_weights)
    origin = Origin(headless=True, remote=remote)
    patch.setitem(ARCHITECTURES, "alexnet", replace(ARCHITECTURES["alexnet"], origin=origin))


FC8 = ["photo.jpg", "--target", "fc8", "--out", "out/fc8", "--cache", "cache"]


def test_complete_weights_are_fetched_where_the_target_needs_them(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (place / "served").mkdir()
    torch.save(dict(random_parameters(ARCHITECTURES["alexnet"], 1)), place / "served" / "complete.pth")
    handler = partial(SimpleHTTPRequestHandler, directory=place / "served")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/complete.pth"
        digest = file_hash(place / "served" / "complete.pth")
        of_remote(monkeypatch, RemoteFile("complete.pth", (address,), "ours", sha256=digest))
        run_pretrained_model.main(FC8)
        server.shutdown()
    printed = capsys.readouterr().out
    assert printed.index("complete.pth from cache") < printed.index("where people look, after")
    assert "statistics of fc8" in printed and "measured on" in printed and "sample photos" in printed
    facts = json.loads((place / "out/fc8/reconstructions/vlm/parameters.json").read_text(encoding="utf-8"))
    assert (facts["target"], facts["measured"], facts["weights_sha256"]) == ("fc8", ["fc8"], digest)


def test_weights_that_cannot_be_fetched_are_told_before_any_work(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_remote(monkeypatch, RemoteFile("complete.pth", ("http://127.0.0.1:9/complete.pth",), "ours", sha256="0" * 64))
    with pytest.raises(UserError, match=r"127.0.0.1:9/complete.pth \(sha256 0+\): download that .* --weights FILE"):
        run_pretrained_model.main(FC8)
    assert not (place / "out").exists()
    with pytest.raises(UserError, match="alexnet has no tap 'fc9'"):
        run_pretrained_model.main([*FC8, "--target", "fc9"])
