"""What a long piece of work shows, and where signals may stop it."""

import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from pipeline import distributed

LINE_INTERVAL = 20.0  # seconds between progress lines where there is no terminal

NARROW = 100  # columns of a terminal below which numbers matter more than the bar
NARROW_BAR = "{percentage:.0f}%, {remaining} left: {desc}, {n_fmt}/{total_fmt}{postfix}"  # what is cut off comes last


class Progress:
    """A tqdm bar on a terminal, a line every `LINE_INTERVAL` seconds elsewhere.

    Args:
        total: units of work in all.
        what: what is being done.
        unit: name of one unit.
        done: units that an earlier run did.
    """

    def __init__(self, total: int | None, what: str, unit: str = "it", done: int = 0):
        self.total, self.what, self.unit = total, what, unit
        self.done = self.first = done
        self.started = self.printed = time.monotonic()
        self.bar = None
        if self._has_terminal() and total is not None:
            self._open_bar()

    @staticmethod
    def _has_terminal() -> bool:
        return sys.stderr.isatty() and distributed.rank() == 0

    def _open_bar(self) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=self.total,
            desc=self.what,
            unit=self.unit,
            unit_scale=self.unit == "B",
            initial=self.first,
            dynamic_ncols=True,
            bar_format=NARROW_BAR if shutil.get_terminal_size().columns < NARROW else None,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, count: int = 1, note: str = "") -> None:
        """Report `count` further units, with a short note such as a loss."""
        self.done += count
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif time.monotonic() - self.printed >= LINE_INTERVAL:
            self.printed = time.monotonic()
            rate = (self.done - self.first) / (self.printed - self.started)
            left = f", {(self.total - self.done) / rate:.0f} s left" if self.total and rate else ""
            of = f"/{self.total}" if self.total else ""
            note = f"  {note}" if note else ""
            print(f"{self.what}: {self.done}{of} {self.unit}, {rate:.2f} {self.unit}/s{left}{note}", flush=True)

    def download(self, done: int, total: int | None) -> None:
        """The callback of `models.weights.downloads.fetch`: `done` of `total` bytes are there."""
        self.total = total
        if self.bar is None and self._has_terminal():
            self._open_bar()
        self.update(done - self.done)


class Terminated(BaseException):
    """A signal asks to end: SIGTERM, or SIGHUP where the terminal was closed."""

    def __init__(self, number: int = signal.SIGTERM):
        super().__init__(number)
        self.number = number


def endings() -> list[int]:
    """Signals that `Terminated` stands for, but for a SIGHUP that is ignored (nohup)."""
    names = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return [n for n in names if n == signal.SIGTERM or signal.getsignal(n) != signal.SIG_IGN]


class SafePoints:
    """Holds Ctrl-C, SIGTERM and SIGHUP back, so that they stop a loop only where its state is whole and can be saved.

        with SafePoints() as signals:
            for …:
                …one step…
                signals.check(save)

    A second signal acts at once; what was saved before stands. Without a signal, `check` saves where it last did so
    `every` seconds ago.
    """

    def __init__(self, every: float = math.inf):
        self.every, self.saved = every, time.monotonic()
        self.caught: int | None = None
        self.earlier: dict[int, Any] = {}

    def __enter__(self) -> "SafePoints":
        if threading.current_thread() is threading.main_thread():
            self.earlier = {n: signal.signal(n, self._note) for n in (signal.SIGINT, *endings())}
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if kind is None:
            self.check()

    def _note(self, number: int, _frame: object) -> None:
        if self.caught is not None:
            raise _stop(number)
        self.caught = number

    def check(self, save: Callable[[], object] | None = None, everywhere: bool = False) -> None:
        """If a signal came, here or (`everywhere`) to another rank: call `save`, then raise what it stands for."""
        number = self.caught
        stopped = number is not None or everywhere
        if save is not None and (stopped or time.monotonic() - self.saved >= self.every):
            save()
            self.saved = time.monotonic()
        if stopped:
            self.caught = None
            raise _stop(number)


def _stop(number: int | None) -> BaseException:
    """What a signal stands for; None came to another rank."""
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(number or signal.SIGTERM)
