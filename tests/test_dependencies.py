"""The list of packages in SECURITY.md is that of the requirements, each with a reason."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = ("requirements.txt", "requirements-weights.txt", "requirements-dev.txt")
IMPORTED_AS = {"scikit-learn": "sklearn", "scikit-image": "skimage", "pillow": "PIL"}
OWN = {"models", "pipeline", "evaluation", "tests", "benchmarks"} | {path.stem for path in ROOT.glob("*.py")}


def required(name: str) -> list[str]:
    """Packages of a requirements file, without versions."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [re.split(r"[<>=!~\[; ]", line)[0] for line in lines if line and not line.startswith("-")]


def listed(name: str) -> dict[str, str]:
    """Packages and reasons of SECURITY.md's table for a requirements file."""
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8").partition(f"\n`{name}`, ")[2]
    table = re.split(r"\n`requirements|\n`pip-audit|\n## ", text)[0]
    return dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", table, re.MULTILINE))


def test_every_required_package_is_listed_with_a_reason() -> None:
    for name in FILES:
        found = listed(name)
        assert list(found) == required(name) or sorted(found) == sorted(required(name)), name
        assert found and all(len(reason) > 10 for reason in found.values())


def test_every_import_is_required() -> None:
    """Of what is not Python's own or this project's; the fuzzer's and the optional ones of tests are left out."""
    there = {IMPORTED_AS.get(name, name) for name in required("requirements.txt")} | {"urllib3"}  # of requests
    for path in (
        *ROOT.glob("*.py"),
        *(p for wing in ("models", "pipeline", "evaluation") for p in (ROOT / wing).rglob("*.py")),
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for top in {name.partition(".")[0] for name in names}:
                assert top in there | OWN or top in sys.stdlib_module_names, f"{path} imports {top}"
