"""What every evaluation does: it takes up what an earlier run scored, scores the rest, and writes its results."""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from models.errors import UserError
from pipeline import artefacts, distributed, ownership
from pipeline.images import readable
from pipeline.progress import Progress

JOURNAL = "scores.partial"


def text_sha256(text: str) -> str:
    """sha256 of a text in UTF-8, as hex digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


class Journal:
    """Scores of the images done so far, a JSON line each, so that a killed evaluation goes on.

    Every rank writes its own; whatever number of them goes on takes up all that there are. The first line is the hash
    of the facts; a journal of other facts is dropped.
    """

    def __init__(self, path: Path, facts: artefacts.Facts, overwrite: bool):
        head = text_sha256(json.dumps(facts)) + "\n"
        self.scores = distributed.first(lambda: self._take_up(path, head, overwrite))
        self.path = artefacts.rank_path(path)
        if self.path != path:
            artefacts.write_text(self.path, head)

    @staticmethod
    def _take_up(path: Path, head: str, overwrite: bool) -> dict[str, Any]:
        """Put the lines of all journals into one."""
        lines = {}
        for file in sorted(path.parent.glob(f"{path.name}*")) if not overwrite else []:
            first, *others = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) or [""]
            for line in others if first == head else []:
                try:
                    name, scores = json.loads(line)
                except ValueError:  # a line that a kill cut off
                    break
                lines[name] = line, scores
        artefacts.write_text(path, head + "".join(line for line, _ in lines.values()))
        for file in path.parent.glob(f"{path.name}-*"):
            ownership.remove(file)
        return {name: scores for name, (_, scores) in lines.items()}

    def add(self, name: str, scores: Any) -> None:
        """Note the scores of an image, JSON values."""
        self.scores[name] = scores
        artefacts.append_text(self.path, json.dumps([name, scores]) + "\n")


def is_shown(out: Path, facts: artefacts.Facts, overwrite: bool) -> bool:
    """Whether an evaluation of these facts is finished in `out`; then its tables are printed.

    Raises:
        UserError: one of other facts is, or somebody's own files stand where the results would.
    """
    if not distributed.first(lambda: artefacts.reuse(out / "summary.json", facts, overwrite)):
        distributed.first(lambda: ownership.foresee(out, "scores.csv", "table.md", "summary.json"))
        return False
    artefacts.discard(out / JOURNAL)
    print((out / "table.md").read_text(encoding="utf-8"))
    print(f"{out} is finished: nothing to do")
    return True


def whole_images(files: Sequence[Path]) -> tuple[list[Path], dict[Path, str]]:
    """The images that can be read to their end, and why others cannot, which is said.

    Raises:
        UserError: none can.
    """
    images, unreadable = readable(files)
    if unreadable and not images:
        raise UserError(f"none of the {len(unreadable)} images can be read; {next(iter(unreadable.values()))}")
    if distributed.leads():
        for problem in unreadable.values():
            print(f"evaluate.py: left out: {problem}", file=sys.stderr)
    return images, unreadable


def score_all(
    names: Sequence[str], score: Callable[[str], Any], out: Path, facts: artefacts.Facts, overwrite: bool
) -> dict[str, Any]:
    """Scores (JSON values) by name, in order. Ranks share what an earlier run of these facts left unscored."""
    journal = Journal(out / JOURNAL, facts, overwrite)
    if journal.scores:
        print(f"{len(journal.scores)} images were scored before")
    mine = distributed.share([name for name in names if name not in journal.scores])

    def score_mine() -> None:
        """Of this rank; an error names the image."""
        with Progress(len(mine), "evaluating", "images") as progress:
            for name in mine:
                try:
                    journal.add(name, score(name))
                except UserError as error:
                    raise UserError(str(error) if name in str(error) else f"{name}: {error}") from None
                progress.update(note=f"{name:.40}")

    distributed.together(score_mine)
    found = {name: of_image for part in distributed.gather(journal.scores) for name, of_image in part.items()}
    return {name: found[name] for name in names}


def write_results(
    out: Path,
    facts: artefacts.Facts,
    *,
    scores: str,
    table: str,
    summary: artefacts.Facts,
    pictures: Callable[[], object],
    what: str,
) -> None:
    """scores.csv, table.md, the pictures, which are drawn now, summary.json and last its sidecar; says so.

    Args:
        scores, table, summary: contents of scores.csv, table.md and summary.json.
        pictures: draws them into `out`.
        what: the pictures, and of how many images, for the last line.
    """
    artefacts.write_text(out / "scores.csv", scores)
    artefacts.write_text(out / "table.md", table)
    pictures()
    artefacts.write_json(out / "summary.json", summary)
    artefacts.write_json(artefacts.sidecar_path(out / "summary.json"), facts)
    artefacts.discard(out / JOURNAL)
    print(table)
    print(f"{out}: scores.csv, summary.json, table.md and {what}")
