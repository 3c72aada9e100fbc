"""Every option of every script with values that make no sense: exit code 2 and one line, never a traceback.

The scripts and their commands come from the folders, the options from their own parsers, so that new ones are covered
by themselves. All runs are on a workspace of a tiny network, in this process; a value that is merely large may keep a
script busy, which is then interrupted. Of scripts without a command below, such as benchmarks, the parser alone is
tried.
"""

import argparse
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import reconstruct
import run_pretrained_model
from evaluation import classifier, picture_metrics
from models.backbones import ARCHITECTURES, random_parameters
from models.checkpoints import load_vlm
from models.errors import UserError
from models.weights import find
from pipeline import artefacts, figures, options, program, targets
from pipeline.presets import PRESETS, Setting
from pipeline.progress import Progress
from tests.conftest import make_photo
from tests.models.weights.test_weights import TINY

if sys.platform != "linux":
    pytest.skip("memory is limited and measured as Linux does it", allow_module_level=True)

ROOT = Path(__file__).parents[2]
MODULES = sorted(".".join(p.relative_to(ROOT).with_suffix("").parts) for p in ROOT.glob("*.py"))
MODULES += sorted(f"benchmarks.{p.stem}" for p in ROOT.glob("benchmarks/*.py"))
WRITTEN = {"root", "cache"}  # folders that need not exist, beside those of the writable types
NO_NUMBERS = ["", " ", "nonsense", "nan", "inf", "-1", "-0.5", "1e400", "1;2", "0x10"]
NO_PATHS = ["", " ", "nonsense", "-1"]
LARGE = ["9" * 40, "1000000000", "1e308"]
LONG = 30  # reports of progress after which a run is interrupted
NOBODY = 65534  # a user without rights
ROOM = 3 << 30  # bytes of further address space, so that a large value costs no more


@pytest.fixture(scope="module")
def tiny() -> Iterator[None]:
    """A network of some hundred parameters, and its preset, where the scripts look."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "tiny", TINY)
        preset = {stage: dict(settings) for stage, settings in PRESETS["demo"].items()}
        preset["extract_features"]["backbone"] = Setting("tiny", "ours")
        preset["reconstruct"]["target"] = Setting("fc8", "ours")
        patch.setitem(PRESETS, "tiny", preset)
        found = find.Weights(random_parameters(TINY, 0), "a package", "0")
        patch.setattr(find, "_from_package", lambda architecture: found)
        patch.setattr(targets, "ENERGY_VIEWS", 2)
        yield


@pytest.fixture(scope="module")
def tiny_workspace(tiny: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Stages 1-3 of the tiny network on three photos; `photo.png` and `list.txt` beside them."""
    root = tmp_path_factory.mktemp("tiny")
    (root / "photos").mkdir()
    for i in range(3):
        Image.fromarray(make_photo(i, 30, 40 + i)).save(root / "photos" / f"{i}.png")
    shutil.copy(root / "photos" / "0.png", root / "photo.png")
    for stage in ("prepare_images", "extract_features", "train_vlm"):
        import_module(stage).main(base_command(stage, root, fresh=False))
    with pytest.MonkeyPatch.context() as patch:
        for shipped in ("RECONSTRUCTION", "SALIENCY"):
            patch.setattr(run_pretrained_model, shipped, root / "vlm.safetensors")
        patch.setattr(classifier, "find_weights", lambda judge: None)
        patch.setattr(picture_metrics, "ssim", lambda *_: 0.5)  # its window is larger than these pictures
        draw_nothing(patch)
        reconstruct.main(base_command("reconstruct", root))
        (root / "maps").mkdir()
        for photo in (root / "photos").iterdir():
            np.save(root / "maps" / f"{photo.stem}.npy", np.asarray(Image.open(photo).convert("L")))
        (root / "fixations.csv").write_text("image,subject,x,y\n0.png,0,5,6\n0.png,1,7,8\n1.png,1,9,9\n")
        yield root


def base_command(script: str, root: Path, fresh: bool = True) -> list[str]:
    """A command of a second at most that works on the tiny workspace."""
    stage = ["--preset", "tiny", "--root", str(root), "--device", "cpu", *(["--overwrite"] if fresh else [])]
    random = ["--weights", "random"]
    once = ["--iterations", "1"]
    alone = ["--device", "cpu", *random, "--overwrite", "--out", str(root / "o")]
    maps = ["--maps", str(root / "maps"), "--vlm", str(root / "vlm.safetensors")]
    return {
        "prepare_images": [*stage, "--source", str(root / "photos"), "--num-images", "3"],
        "extract_features": [*stage, *random, "--layers", "conv1", "conv2", "--pca-positions", "40"],
        "train_vlm": [*stage, *once, "--batch-size", "1", "--layers", "conv1", "conv2"],
        "reconstruct": [str(root / "photo.png"), *stage, *random, *once, "--learning-rate", "1"],
        "saliency": [str(root / "photo.png"), *stage, *random],
        "run_all": [*stage, *random, *once, "--source", str(root / "photos"), "--reconstruction-iterations", "1"]
        + ["--image", str(root / "photo.png"), "--layers", "conv1", "--num-images", "3"],
        "run_pretrained_model": [str(root / "photo.png"), *alone, *once, "--target", "pool2"],
        "evaluate fixations": [*alone, "--stimuli", str(root / "photos"), "--fixations", str(root / "fixations.csv")]
        + maps,
        "evaluate reconstruction": [str(root / "reconstructions"), *alone],
        "evaluate naturalness": [str(root / "photos"), *alone, "--vlm", str(root / "vlm.safetensors"), "--limit", "2"]
        + ["--spoilings", "mirrored"],
    }[script]


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time."""
    for name in ("loss_curves", "reconstruction_curves", "picture_row", "picture_grid", "results_figure"):
        patch.setattr(figures, name, lambda *_, **__: None)


@contextmanager
def limits() -> Iterator[None]:
    """Interrupt what reports progress more than LONG times, refuse memory beyond ROOM, restore the signal handler."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.getsignal(signal.SIGTERM)
    update, updates = Progress.update, itertools.count()

    def interrupted(self: Progress, *arguments: object, **options: object) -> None:
        update(self, *arguments, **options)
        if next(updates) > LONG:
            raise KeyboardInterrupt

    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Progress, "update", interrupted)
            draw_nothing(patch)
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGTERM, handler)


def outcome(script: str, argv: list[str], capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """Exit code and stderr of a script in this process; exceptions that it does not catch are the test's failure."""
    capsys.readouterr()
    module, *command = script.split()
    try:
        with limits():
            code = program.run(lambda: import_module(module).main([*command, *argv]))
    except SystemExit as exit:
        code = exit.code
    return code, capsys.readouterr().err


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of every script, and of every command of a script that has several."""
    found = {}
    for module in MODULES:
        source = ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
        if "def get_parser(" not in source:
            assert "argparse" not in source, f"{module} has options that are not covered here"
            continue
        parser = import_module(module).get_parser()
        commands = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        found |= {f"{module} {n}": p for n, p in commands[0].choices.items()} if commands else {module: parser}
    return found


PARSERS = parsers()
SCRIPTS = [script for script in PARSERS if not script.startswith("benchmarks.")]


def options_of(script: str) -> list[argparse.Action]:
    return [a for a in PARSERS[script]._actions if not isinstance(a, argparse._HelpAction)]


def with_value(command: list[str], action: argparse.Action, value: str) -> list[str]:
    """The command with one option given, or its first positional argument replaced."""
    if action.option_strings:
        return [*command, f"{action.option_strings[0]}={value}"]
    return [value, *command[1:]]


def check(script: str, argv: list[str], capsys: pytest.CaptureFixture, allowed: tuple[int, ...]) -> None:
    code, err = outcome(script, argv, capsys)
    assert code in allowed, (argv[-3:], code, err)
    assert "Traceback" not in err
    assert code != 2 or err.count("\n") == 1, (argv, err)


CASES = [pytest.param(s, a, id=f"{s}-{a.dest}") for s in SCRIPTS for a in options_of(s)]


@pytest.mark.parametrize(("script", "action"), CASES)
def test_nonsense_is_refused_in_one_line(
    script: str,
    action: argparse.Action,
    tiny_workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "root"
    shutil.copytree(tiny_workspace, root)
    for value, allowed in nonsense(action, root / "photos" / "1.png", root / "photos").items():
        check(script, with_value(base_command(script, root), action, value), capsys, allowed)


def nonsense(action: argparse.Action, file: Path, folder: Path) -> dict[str, tuple[int, ...]]:
    """Values for an option and the exit codes they may lead to."""
    if action.nargs == 0:
        return dict.fromkeys(["", "yes", "0"], (2,))
    if action.choices is not None or is_number(action):
        return dict.fromkeys(NO_NUMBERS, (2,)) | dict.fromkeys(LARGE, (0, 2, 130)) | {"0": (0, 2), str(file): (2,)}
    allowed = (0, 2) if is_written(action) else (2,)
    values = dict.fromkeys([*NO_PATHS, "missing/path"], allowed) | {str(file): (0, 2), str(folder): (0, 2)}
    unused = allowed if action.dest == "cache" else (2,)
    return values | {str(file / "below"): (2,), "x" * 300: (2,), "/sys/x": unused}


def is_number(action: argparse.Action) -> bool:
    try:
        return isinstance(action.type("1"), int | float)
    except (TypeError, argparse.ArgumentTypeError):
        return False


def is_path(action: argparse.Action) -> bool:
    return action.nargs != 0 and action.choices is None and not is_number(action)


def is_written(action: argparse.Action) -> bool:
    return action.dest in WRITTEN or action.type in (options.writable_file, options.writable_folder)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Without the superuser's right to read and write everything."""
    if os.geteuid():
        yield
        return
    import_module("models.backbones.torchvision_networks")  # nobody may be unable to read the environment
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def locked(tiny_workspace: Path) -> Iterator[Path]:
    """A copy of the workspace that anybody may write, with `locked.png` and `locked/` that nobody may open."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        shutil.copytree(tiny_workspace, root, dirs_exist_ok=True)
        shutil.copy(root / "photo.png", root / "locked.png")
        (root / "locked").mkdir()
        for path in (root, *root.rglob("*")):
            path.chmod(0 if "locked" in path.name else 0o777)
        yield root
        (root / "locked").chmod(0o700)


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_permission_is_one_line(script: str, locked: Path, capsys: pytest.CaptureFixture) -> None:
    check(script, base_command(script, locked), capsys, (0,))  # it works, and has imported all it needs
    paths = filter(is_path, options_of(script))
    # what is written comes last: it may replace a locked file by a readable one
    for action in sorted(paths, key=lambda action: action.type is options.writable_file):
        allowed = (0, 2) if action.dest == "cache" or action.type is options.writable_file else (2,)
        for name in ("locked", "locked.png", "locked/below"):
            with unprivileged():
                check(script, with_value(base_command(script, locked), action, str(locked / name)), capsys, allowed)


@pytest.mark.parametrize("script", SCRIPTS)
def test_mistakes_with_options_themselves(script: str, capsys: pytest.CaptureFixture) -> None:
    for wrong in (["--no-such-option"], ["--seed"], ["--device", "abacus"], ["--seed=1\n2"], ["a", "b\nc", "--x=\n"]):
        check(script, wrong, capsys, (2,))


OTHERS = [pytest.param(s, a, id=f"{s}-{a.dest}") for s in PARSERS if s not in SCRIPTS for a in options_of(s)]


@pytest.mark.parametrize(("script", "action"), OTHERS)
def test_nonsense_is_no_value_of_other_scripts(
    script: str, action: argparse.Action, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if is_path(action) and action.type is None:
        pytest.skip("it takes any text")
    for value in [*NO_NUMBERS, "0x"] if not is_path(action) else ["", str(tmp_path / "a" / ("x" * 300))]:
        with pytest.raises(SystemExit) as caught:
            PARSERS[script].parse_args(with_value([], action, value))
        assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_every_script_is_here() -> None:
    assert {script.split()[0] for script in SCRIPTS} == {p.stem for p in ROOT.glob("*.py")}
    assert {"evaluate fixations", "evaluate reconstruction", "evaluate naturalness"} <= set(SCRIPTS) and len(
        CASES
    ) > 100


@pytest.mark.parametrize("script", SCRIPTS)
def test_mistakes_in_a_process_of_their_own(script: str, tmp_path: Path) -> None:
    module, *arguments = script.split()
    command = [sys.executable, str(ROOT / f"{module}.py"), *arguments, "--seed", "many"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    name = " ".join([f"{module}.py", *arguments])
    assert result.stderr.startswith(f"{name}: argument --seed: invalid natural value: 'many'")
    assert not result.stdout and not list(tmp_path.iterdir())


def test_layers_named_twice_count_once(tiny_workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = tmp_path / "root"
    shutil.copytree(tiny_workspace, root)
    for script in ("extract_features", "train_vlm", "saliency"):
        twice = [] if script == "saliency" else ["--layers", "conv1", "conv1"]
        check(script, [*base_command(script, root), *twice], capsys, (0,))
    assert list(load_vlm(root / "vlm.safetensors")[0].layers) == ["conv1"]


@pytest.mark.parametrize("layer", ["fc6", "relu1", "conv9"])
def test_layers_without_a_grid_are_refused(layer: str, tiny_workspace: Path, capsys: pytest.CaptureFixture) -> None:
    argv = [*base_command("extract_features", tiny_workspace), "--layers", layer]
    code, err = outcome("extract_features", argv, capsys)
    assert code == 2 and "choose from data, conv1, conv2, pool2" in err
    assert (f"{layer} of tiny gives no grid" if layer == "fc6" else f"tiny has no tap '{layer}'") in err


NO_WEIGHTS = {
    "pointer.safetensors": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "page.safetensors": "\n<!DOCTYPE html><html>404</html>",
    "empty.safetensors": "",
}


def test_an_image_behind_an_option_of_several_values(tiny_workspace: Path, capsys: pytest.CaptureFixture) -> None:
    photo, vlm = str(tiny_workspace / "photo.png"), ["--vlm", str(tiny_workspace / "vlm.safetensors")]
    code, err = outcome("saliency", [*vlm, photo], capsys)
    assert code == 2 and "--vlm takes all that follows it: put IMAGE|FOLDER before it, or after --" in err
    code, err = outcome("saliency", [*vlm, str(tiny_workspace / "photos")], capsys)
    assert code == 2 and "is a folder: give a file; --vlm takes all that follows it" in err
    more = ["--weights", "random", "--device", "cpu", "--out", str(tiny_workspace / "behind")]
    assert outcome("saliency", [*more, *vlm, "--", photo], capsys)[0] == 0


@pytest.mark.parametrize(
    ("script", "values", "message"),
    [
        ("prepare_images", ["--source", "samples", "--num-images", "1000000000"], "crops are too many"),
        ("extract_features", ["--pca-positions", "1000000000000"], "not an integer from 1 to"),
        ("saliency", ["--power", "1e30"], "beyond the range of numbers"),
        ("train_vlm", ["--layers", "conv1", "--out", "photos"], "'photos' is no file"),
        ("saliency", ["--vlm", "vlm.safetensors", "photo.png"], "photo.png is a PNG image: give another file"),
        ("saliency", ["--vlm", "pointer.safetensors"], "is a Git LFS pointer (git lfs pull fetches the file itself)"),
        ("saliency", ["--vlm", "page.safetensors"], "is a web page (the download needs another address, or a login)"),
        ("saliency", ["--vlm", "empty.safetensors"], "is an empty file: give another file"),
        ("saliency", ["--weights", "pointer.safetensors"], "is a Git LFS pointer"),
        ("saliency", ["--weights", "empty.safetensors"], "is an empty file"),
        *(
            ("reconstruct", ["--target", tap], f"no tap '{tap}'")
            for tap in ("mixed4a", "features.12", "Conv1", "pool3")
        ),
        ("reconstruct", ["--target", "Conv1"], "(nearest: conv1"),
    ],
)
def test_what_is_said(
    script: str, values: list[str], message: str, tiny_workspace: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    shutil.copytree(tiny_workspace, tmp_path / "root")
    monkeypatch.chdir(tmp_path / "root")
    for name, content in NO_WEIGHTS.items():
        Path(name).write_text(content)
    code, err = outcome(script, [*base_command(script, tmp_path / "root"), *values], capsys)
    assert code == 2 and message in err


def test_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match="samples need 1000000000.0 TB of memory"):
        artefacts.check_memory("samples", 10**21)
    errors = [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), ZeroDivisionError()]
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for error in errors[:2]:
        assert program.run(raising(error)) == 2
        assert "does not fit into memory" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        program.run(raising(errors[2]))


def raising(error: Exception):
    def main():
        raise error

    return main
