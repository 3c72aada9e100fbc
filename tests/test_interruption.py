"""Killed, interrupted, on a full disk, started twice: every stage goes on, and ends in the same files."""

import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from PIL import Image

from models.checkpoints import read_tensors
from tests.conftest import make_photo
from tests.tiny import STAGES, Accident, run, start

pytestmark = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="processes cannot be forked here"
)
LAYERS = ["conv1", "conv2"]
KILLS = 9  # per stage, at chosen operations; half of them are killed a second time
TIMED_KILLS = 3  # per stage, at random moments


def arguments(stage: str, root: Path) -> list[str]:
    """A command that runs on a workspace in which the earlier stages ran."""
    common = ["--preset", "demo", "--seed", "5", "--device", "cpu", "--root", str(root)]
    weights = ["--weights", "random"]
    photo = str(root.parent / "photos" / "photo0.png")
    return {
        "prepare_images": [*common, "--source", str(root.parent / "photos")],
        "extract_features": [*common, *weights, "--backbone", "tiny", "--layers", *LAYERS, "--batch-size", "2"],
        "train_vlm": [*common, "--iterations", "7", "--checkpoint-every", "3", "--log-every", "2", "--held-out", "1"],
        "reconstruct": [
            *[photo, *common, *weights, "--target", "conv2", "--iterations", "5", "--snapshot-every", "2"],
            *["--learning-rate", "10"],
        ],
        "saliency": [str(root.parent / "photos"), *common, *weights, "--layer", "conv2", "--max-side", "40"],
    }[stage]


def contents(root: Path) -> dict[str, object]:
    """Every file by name, but locks; of logs all columns but the speed."""
    files: dict[str, object] = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file() and not p.name.endswith(".lock")):
        name = str(path.relative_to(root))
        files[name] = path.read_bytes()
        if name == "log.csv":
            files[name] = [line.rsplit(",", 1)[0] for line in path.read_text().splitlines()]
        elif path.suffix == ".safetensors" and "train_state" in name:
            tensors, noted = read_tensors(path)
            noted["log"] = [line[:-1] for line in noted["log"]]
            files[name] = {key: value.numpy().tobytes() for key, value in tensors.items()}, noted
    return files


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Workspaces in which all stages before a given one ran, `after` all; made in one process each."""
    folder = tmp_path_factory.mktemp("stages")
    (folder / "photos").mkdir()
    for i in range(5):
        Image.fromarray(make_photo(i, 36 + i, 44)).save(folder / "photos" / f"photo{i}.png")
    (folder / "photos" / "broken.png").write_bytes(b"no picture")
    root = folder / "root"
    root.mkdir()
    found = {}
    for stage in STAGES:
        found[stage] = folder / f"before-{stage}"
        shutil.copytree(root, found[stage])
        code, output, _ = run(stage, arguments(stage, root), root, folder / "output")
        assert code == (2 if stage == "saliency" else 0), output  # broken.png
    return {**found, "after": root}


class Trial:
    """A fresh copy of a workspace, always at the same path since some artefacts state their inputs' paths."""

    def __init__(self, stage: str, before: dict[str, Path]):
        self.stage, self.before = stage, before[stage]
        self.root = before["after"].parent / "trial"
        self.output = before["after"].parent / "output"

    def reset(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.before, self.root)

    def run(self, accident: Accident = Accident()) -> tuple[int, str, int]:  # noqa: B008
        return run(self.stage, arguments(self.stage, self.root), self.root, self.output, accident)

    def finish(self, expected: dict[str, object]) -> None:
        """Run to the end; every file is as it would be undisturbed, and there are no others."""
        code, output, _ = self.run()
        assert code == (2 if self.stage == "saliency" else 0), output
        found = contents(self.root)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []


@pytest.mark.parametrize("stage", STAGES)
def test_killed_anywhere(stage: str, before: dict[str, Path]) -> None:
    """SIGKILL before chosen file operations, with the file being written cut in half, and at random moments."""
    trial = Trial(stage, before)
    trial.reset()
    started = time.monotonic()
    _, output, count = trial.run()
    seconds = time.monotonic() - started
    expected = contents(trial.root)
    assert count > KILLS, output
    draw = random.Random(stage)
    for i, at in enumerate(sorted(draw.sample(range(1, count), KILLS - 1)) + [count]):
        trial.reset()
        assert trial.run(Accident(at, signal.SIGKILL))[0] == -signal.SIGKILL
        if i % 2:
            trial.run(Accident(draw.randint(1, count), signal.SIGKILL))
        trial.finish(expected)
    for _ in range(TIMED_KILLS):
        trial.reset()
        process = start(stage, arguments(stage, trial.root), trial.root, trial.output)
        process.join(draw.uniform(0.05, seconds))
        process.kill()
        process.join()
        trial.finish(expected)
