"""One source of defaults: what presets say is what --help shows, --dry-run prints and the stages use."""

import argparse
import importlib
import re
from pathlib import Path

import pytest

import run_all
from models.training import default_decays
from pipeline import options, parsers
from pipeline.presets import CARRIED, CODE, DEFAULTS, PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_help_shows_every_default_of_the_preset(preset: str, capsys: pytest.CaptureFixture) -> None:
    for stage, settings in PRESETS[preset].items():
        parser = importlib.import_module(stage).get_parser()
        with pytest.raises(SystemExit):
            options.parse_args(parser, ["--preset", preset, "--help"], stage)
        shown = " ".join(capsys.readouterr().out.split())
        named = {action.dest for action in parser._actions}
        for name, setting in settings.items():
            if name in named:
                value = setting.rule if setting.value is None else parsers.show(setting.value)
                assert f"(default: {value}; {setting.source})" in shown, (stage, name)


def test_no_option_of_stage_2_and_3_has_a_second_default() -> None:
    """The parser itself knows none of the values that presets give."""
    for stage in ("extract_features", "train_vlm"):
        parser = importlib.import_module(stage).get_parser()
        for action in parser._actions:
            if action.dest in DEFAULTS[stage]:
                assert action.default in (None, False, argparse.SUPPRESS), (stage, action.dest)


def test_a_preset_claims_only_what_the_original_did() -> None:
    """It reconstructed from AlexNet's fc8 alone, and made maps of VGG-19 alone."""
    for name, preset in PRESETS.items():
        carried = "saliency" if name.startswith(("alexnet", "demo", "efficientnet")) else "reconstruct"
        assert CODE not in {setting.source for setting in preset[carried].values()}, name
        assert CARRIED in {setting.source for setting in preset[carried].values()}, name
    assert PRESETS["alexnet_caffe"]["reconstruct"]["target"].source == CODE


def planned(text: str) -> list[tuple[str, dict[str, str]]]:
    """Stage and values by name, of each command that --dry-run prints."""
    found: list[tuple[str, dict[str, str]]] = []
    for line in text.splitlines():
        if match := re.match(r"  \$ python (\w+)\.py", line):
            found.append((match[1], {}))
        elif match := re.match(r"    (\w+) +(\S+) +(paper|original code|ours|given)", line):
            found[-1][1][match[1]] = match[2]
    return found


def announced(text: str) -> list[tuple[str, dict[str, str]]]:
    """Stage and values by name, of each stage that ran."""
    found = []
    for line in text.splitlines():
        if match := re.match(r"\$ python (\w+)\.py", line):
            found.append((match[1], {}))
        elif line.startswith("arguments: "):
            found[-1][1].update(re.findall(r"(\w+)=(\S*)", line))
    return found


def test_a_dry_run_prints_what_the_stages_then_announce(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["--preset", "demo", "--root", str(tmp_path), "--source", str(photos), "--weights", "random"]
    command += ["--layers", "conv5", "--iterations", "2", "--num-images", "5", "--reconstruction-iterations", "2"]
    command += ["--image", str(photos / "class0" / "photo00.png")]
    run_all.main([*command, "--dry-run"])
    before = planned(capsys.readouterr().out)
    run_all.main([*command, "--verbose"])
    after = announced(capsys.readouterr().out)
    assert [stage for stage, _ in before] == [stage for stage, _ in after]
    assert [stage for stage, _ in before] == [*run_all.STAGES[:3], "reconstruct", *run_all.STAGES[3:]]
    for (stage, values), (_, used) in zip(before, after, strict=True):
        assert values.keys() >= PRESETS["demo"][stage].keys()
        for name, value in values.items():
            assert used[name] == value, (stage, name)
    train = dict(before)["train_vlm"]
    assert train["decay_at"] == parsers.show(default_decays(2)) and train["learning_rate"] == "1.0"
