"""What long work shows on a terminal."""

import io
import sys

import pytest

from pipeline.progress import Progress


class Terminal(io.StringIO):
    """Standard error as a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("columns", "bar"), [(60, False), (140, True)])
def test_a_narrow_terminal_shows_numbers_and_no_bar(columns: int, bar: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    with Progress(120, "reconstructing", done=30) as progress:
        progress.update(60, note="loss 0.1")
    last = terminal.getvalue().split("\r")[-1]
    assert "75%" in last and "90/120" in last and ("|" in last) is bar and ("left" in last) is not bar


def test_on_the_narrowest_terminal_share_and_time_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "36")
    with Progress(120, "training data conv1 conv2 conv3 conv4 conv5") as progress:
        progress.update(60, note="loss 0.1")
    assert terminal.getvalue().split("\r")[-1].startswith("50%, 00:00 left: training")
