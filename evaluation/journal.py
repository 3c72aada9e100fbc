"""What an evaluation has scored so far, so that one that was killed goes on."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline import artefacts, distributed


def text_sha256(text: str) -> str:
    """Hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


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
            file.unlink()
        return {name: scores for name, (_, scores) in lines.items()}

    def add(self, name: str, scores: Any) -> None:
        """Note the scores of an image, JSON values."""
        self.scores[name] = scores
        artefacts.append_text(self.path, json.dumps([name, scores]) + "\n")
