"""Killed, interrupted, on a full disk, started twice: every stage goes on, and ends in the same files."""

import multiprocessing
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
KILLS = 6  # per stage, at chosen operations; half of them are killed a second time
TIMED_KILLS = 3  # per stage, at random moments
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def arguments(stage: str, root: Path, photos: Path | None = None) -> list[str]:
    """A command that runs on a workspace in which the earlier stages ran."""
    photos = photos or root.parent / "photos"
    seeded = ["--seed", "5", "--device", "cpu"]
    common = ["--preset", "demo", *seeded, "--root", str(root)]
    weights = ["--weights", "random"]
    photo = str(photos / "photo0.png")
    return {
        "prepare_images": [*common, "--source", str(photos)],
        "extract_features": [*common, *weights, "--backbone", "tiny", "--layers", *LAYERS, "--batch-size", "2"],
        "train_vlm": [*common, "--iterations", "7", "--checkpoint-every", "3", "--log-every", "2", "--held-out", "1"],
        "reconstruct": [
            *[photo, *common, *weights, "--target", "conv2", "--iterations", "5", "--snapshot-every", "2"],
            *["--learning-rate", "10"],
        ],
        "saliency": [str(photos), *common, *weights, "--layer", "conv2", "--max-side", "40"],
        "evaluate": [
            *["fixations", "--stimuli", str(photos / "stimuli"), "--fixations", str(photos / "stimuli/fixations.csv")],
            *[*seeded, *weights, "--vlm", str(root / "vlm.safetensors"), "--layer", "conv2"],
            *["--out", str(root / "scores")],
        ],
    }[stage]


def write_photos(folder: Path, seed: int) -> None:
    """Five photos and a file that is none; in a folder within, three stimuli with fixations."""
    (folder / "stimuli").mkdir(parents=True)
    for i in range(5):
        Image.fromarray(make_photo(seed + i, 36 + i, 44)).save(folder / f"photo{i}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    lines = ["image,subject,x,y"]
    for i in range(3):
        Image.fromarray(make_photo(seed + 9 + i, 38, 42)).save(folder / "stimuli" / f"stimulus{i}.png")
        lines += [f"stimulus{i}.png,{person},{5 * person + 3 * i + 2},{4 * person + i + 3}" for person in range(3)]
    (folder / "stimuli" / "fixations.csv").write_text("\n".join(lines) + "\n")


def contents(root: Path) -> dict[str, object]:
    """Every file by name, but locks and ledgers; of logs all columns but the speed."""
    files: dict[str, object] = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file() and not p.name.endswith((".lock", ".cnn-vlm"))):
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
    write_photos(folder / "photos", 0)
    root = folder / "root"
    root.mkdir()
    found = {}
    for stage in STAGES:
        found[stage] = folder / f"before-{stage}"
        shutil.copytree(root, found[stage])
        code, output, _ = run(stage, arguments(stage, root), root, folder / "output")
        assert code == success(stage), output
    return {**found, "after": root}


def success(stage: str) -> int:
    """Exit code of an undisturbed run: one of the photos is none, which saliency.py reports."""
    return 2 if stage == "saliency" else 0


class Trial:
    """A fresh copy of a workspace, always at the same path since some artefacts state their inputs' paths."""

    def __init__(self, stage: str, before: dict[str, Path], start_from: str | None = None):
        self.stage, self.before = stage, before[start_from or stage]
        self.root = before["after"].parent / "trial"
        self.output = before["after"].parent / "output"
        self.reset()

    def reset(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.before, self.root)

    def run(self, accident: Accident = Accident(), arguments: list[str] | None = None) -> tuple[int, str, int]:  # noqa: B008
        return run(self.stage, arguments or self.arguments(), self.root, self.output, accident)

    def arguments(self, photos: Path | None = None) -> list[str]:
        return arguments(self.stage, self.root, photos)

    def finish(self, expected: dict[str, object]) -> None:
        """Run to the end; every file is as it would be undisturbed, and there are no others."""
        code, output, _ = self.run()
        assert code == success(self.stage), output
        found = contents(self.root)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []

    def lack_room(self, accident: Accident = Accident()) -> None:  # noqa: B008
        """Run on a full disk: one line with both sizes, and what was there before the stage is intact."""
        there = contents(self.before)
        code, output, _ = self.run(accident)
        assert code == 2, output
        told = [line for line in output.splitlines() if line.startswith(f"{self.stage}.py: ")][-1]
        assert re.search(r" needs (more than )?[\d.]+ \w?B and its disk has [\d.]+ \w?B free", told), output
        assert "Traceback" not in output
        kept = contents(self.root)
        assert [name for name in there if kept.get(name) != there[name]] == []


@dataclass(frozen=True)
class Undisturbed:
    """What a stage leaves where nothing happens, how often it changes a file, and how long it takes."""

    files: dict[str, object]
    count: int
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(before: dict[str, Path]) -> dict[str, Undisturbed]:
    """By stage."""
    found = {}
    for stage in STAGES:
        trial = Trial(stage, before)
        started = time.monotonic()
        _, output, count = trial.run()
        assert count > KILLS, output
        found[stage] = Undisturbed(contents(trial.root), count, time.monotonic() - started)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_killed_anywhere(stage: str, before: dict[str, Path], undisturbed: dict[str, Undisturbed]) -> None:
    """SIGKILL before chosen file operations, with the file being written cut in half, and at random moments."""
    trial, whole = Trial(stage, before), undisturbed[stage]
    draw = random.Random(stage)
    for i, at in enumerate(sorted(draw.sample(range(1, whole.count), KILLS - 1)) + [whole.count]):
        trial.reset()
        assert trial.run(Accident(at, signal.SIGKILL))[0] == -signal.SIGKILL
        if i % 2:
            trial.run(Accident(draw.randint(1, whole.count), signal.SIGKILL))
        trial.finish(whole.files)
    for _ in range(TIMED_KILLS):
        trial.reset()
        process = start(stage, trial.arguments(), trial.root, trial.output)
        process.join(draw.uniform(0.05, whole.seconds))
        process.kill()
        process.join()
        trial.finish(whole.files)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("stage", STAGES)
def test_stopped_by_a_signal(
    stage: str, number: int, before: dict[str, Path], undisturbed: dict[str, Undisturbed]
) -> None:
    """Ctrl-C, SIGTERM and SIGHUP: the exit code, one line that tells how to go on, and going on."""
    trial, whole = Trial(stage, before), undisturbed[stage]
    at = random.Random(f"{stage} {number}").randint(2, whole.count - 2)
    code, output, _ = trial.run(Accident(at, number))
    assert code == SIGNALS[number], output
    assert output.count("interrupted; the same command goes on from the last saved state") == 1
    assert "Traceback" not in output
    trial.finish(whole.files)


@pytest.mark.parametrize("stage", STAGES)
def test_full_disk(stage: str, before: dict[str, Path], undisturbed: dict[str, Undisturbed]) -> None:
    """No room from some moment on, and for the largest file: a line with both sizes; what was there is intact."""
    trial, whole = Trial(stage, before), undisturbed[stage]
    there = contents(trial.root)
    made = [path for name in whole.files if name not in there for path in [trial.root / name]]
    trial.run()
    largest = max(path.stat().st_size for path in made)
    draw = random.Random(f"full {stage}")
    for accident in (
        Accident(1, full=True),
        Accident(draw.randint(2, whole.count * 3 // 4), full=True),
        Accident(largest_file=largest * 2 // 3),
    ):
        trial.reset()
        trial.lack_room(accident)
        trial.finish(whole.files)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of its own, in memory, over a folder; the test is skipped where none may be mounted."""
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("stage", STAGES)
def test_disk_that_is_full(stage: str, before: dict[str, Path], undisturbed: dict[str, Undisturbed]) -> None:
    """As `test_full_disk`, on a disk that is: with room for some of the results, and once there is more."""
    trial, whole = Trial(stage, before), undisturbed[stage]
    there = contents(trial.root)
    trial.run()
    sizes = {str(p.relative_to(trial.root)): p.stat().st_size for p in trial.root.rglob("*") if p.is_file()}
    largest = max(size for name, size in sizes.items() if name in whole.files and name not in there)
    with small_disk(trial.root, 4 * sum(sizes.values()) + 2**20):
        for share in (0.2, 0.6):
            shutil.copytree(trial.before, trial.root, dirs_exist_ok=True)
            ballast = trial.root / "ballast"
            ballast.write_bytes(bytes(shutil.disk_usage(trial.root).free - int(share * largest)))
            trial.lack_room()
            ballast.unlink()
            trial.finish(whole.files)
            for path in trial.root.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("stage", STAGES)
def test_two_at_once(stage: str, before: dict[str, Path], undisturbed: dict[str, Undisturbed]) -> None:
    """The second run is refused, naming the first; the lock of a process that was killed keeps nobody out."""
    trial, whole = Trial(stage, before), undisturbed[stage]
    first = start(stage, trial.arguments(), trial.root, trial.output, Accident(whole.count // 2, signal.SIGSTOP))
    deadline = time.monotonic() + 60
    while "T" not in state_of(first.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    stopped = contents(trial.root)
    code, output, _ = trial.run()
    assert code == 2, output
    assert re.search(rf"is being written by process {first.pid} on .* since .* \({stage}.py ", output), output
    assert contents(trial.root) == stopped
    first.kill()
    first.join()
    trial.finish(whole.files)


def state_of(process: int) -> str:
    """R, S, T (stopped), …"""
    result = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True, check=False)
    return result.stdout.strip()


OTHER_OPTIONS = {
    "prepare_images": (["--num-images", "3"], "num_images is 128, not 3"),
    "extract_features": (["--dtype", "float32"], "dtype is 'float16', not 'float32'"),
    "train_vlm": (["--momentum", "0.5"], "momentum is 0.9, not 0.5"),
    "reconstruct": (["--iterations", "6"], "iterations is 5, not 6"),
    "saliency": (["--power", "0.7"], "power is 0.5, not 0.7"),
    "evaluate": (["--power", "0.7"], "power is 0.5, not 0.7"),
}
OTHER_WEIGHTS = ("extract_features", "reconstruct", "saliency", "evaluate")
OTHER_IMAGES = {  # fact that differs
    "prepare_images": "inputs_sha256",
    "reconstruct": "input_sha256",
    "saliency": "input_sha256",
    "evaluate": "images",
}


@pytest.mark.parametrize("stage", STAGES)
def test_changed_inputs_are_noticed(stage: str, before: dict[str, Path]) -> None:
    """Other options, other weights, other images: refused with what differs, nothing touched; --overwrite rebuilds."""
    trial = Trial(stage, before, "after")
    finished = contents(trial.root)
    other = before["after"].parent / "other" / "photos"
    if not other.is_dir():
        write_photos(other, 50)
    options, told = OTHER_OPTIONS[stage]
    changes = [([*trial.arguments(), *options], told)]
    if stage in OTHER_WEIGHTS:
        changes.append(
            ([*trial.arguments(), "--seed", "6"], "sources is" if stage == "evaluate" else "weights_sha256 is")
        )
    if stage in OTHER_IMAGES:
        changes.append((trial.arguments(other), f"{OTHER_IMAGES[stage]} is"))
    for argv, difference in changes:
        code, output, _ = trial.run(arguments=argv)
        assert code == 2 and difference in output and "--overwrite" in output, output
        assert contents(trial.root) == finished
    code, output, _ = trial.run(arguments=[*changes[-1][0], "--overwrite"])
    assert code == success(stage), output
    assert contents(trial.root) != finished


def test_results_of_earlier_stages_that_changed_are_noticed(before: dict[str, Path]) -> None:
    """Stages 1 and 2 are rebuilt from other images with other weights: the next stage refuses what stood on the old."""
    trial = Trial("prepare_images", before, "after")
    other = before["after"].parent / "other" / "photos"
    if not other.is_dir():
        write_photos(other, 50)
    assert trial.run(arguments=[*trial.arguments(other), "--overwrite"])[0] == 0
    trial.stage = "extract_features"
    code, output, _ = trial.run()
    assert code == 2 and "images_sha256 is" in output, output
    assert trial.run(arguments=[*trial.arguments(), "--overwrite", "--seed", "6"])[0] == 0
    trial.stage = "train_vlm"
    code, output, _ = trial.run()
    assert code == 2 and "projection_sha256 is" in output, output
