"""The house rules that a machine can check."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = {"prepare_images", "extract_features", "train_vlm", "reconstruct", "saliency", "evaluate"}
DRIVERS = {"run_all", "run_pretrained_model"}
WINGS = ("models", "pipeline", "evaluation", "benchmarks")
SOURCES = [*sorted(ROOT.glob("*.py")), *(p for wing in WINGS for p in sorted((ROOT / wing).rglob("*.py")))]
MAY_NOT_IMPORT = {  # the first folder of a module's path -> what it never imports; "" are the scripts
    "models": {"pipeline", "evaluation", "argparse", *STAGES, *DRIVERS},
    "pipeline": {"evaluation", *STAGES, *DRIVERS},
    "evaluation": {*STAGES, *DRIVERS},
    "benchmarks": set(),
}

OWN_MODULES_THAT_IMPORT_TORCH = {  # imported inside functions by modules that scripts import before they parse
    "benchmarks/run.py": {"benchmarks.timing", "pipeline"},
    "models/backbones/__init__.py": {"models.backbones.torchvision_networks"},
    "pipeline/artefacts.py": {"models"},
}


def wing(path: Path) -> str:
    """The folder of the house that a module stands in, its own name for a script."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path: Path) -> None:
    names = imported(path)
    forbidden = set() if wing(path) in DRIVERS else MAY_NOT_IMPORT.get(wing(path), STAGES | DRIVERS)
    assert not names & (forbidden | {"utils"})


@pytest.mark.parametrize("path", [p for p in SOURCES if wing(p) == "models"], ids=lambda p: p.name)
def test_models_print_nothing(path: Path) -> None:
    calls = [n.func for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    assert not [c for c in calls if isinstance(c, ast.Name) and c.id == "print"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_functions_are_documented_and_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 70, node.name
            if not node.name.startswith("_") and node.end_lineno - node.lineno > 6:
                assert ast.get_docstring(node), node.name


def test_no_two_modules_are_called_alike() -> None:
    stems = [path.stem for path in SOURCES if path.stem != "__init__"]
    assert not [stem for stem in stems if stems.count(stem) > 1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    most = 250 if path.parent == ROOT else 350
    assert len(path.read_text(encoding="utf-8").splitlines()) <= most


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_mains_and_parsers_take_arguments(path: Path) -> None:
    """Cores take named, typed parameters; the commands of evaluate.py are mains."""
    allowed = {"fixations", "reconstruction", "naturalness"} if path.name == "evaluate.py" else set()
    taking = [
        node.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and any(argument.arg == "args" for argument in node.args.args)
    ]
    assert set(taking) <= allowed


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent != ROOT], ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_import_at_their_top(path: Path) -> None:
    """Scripts import what takes seconds once they have parsed their arguments; what they import before does not."""
    late = {"torch", "scipy", "matplotlib", "requests", "urllib3", "filelock", "tqdm", "resource"}
    late |= OWN_MODULES_THAT_IMPORT_TORCH.get(str(path.relative_to(ROOT)), set())
    functions = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef)]
    found = [node for function in functions for node in ast.walk(function)]
    names = {alias.name for node in found if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in found if isinstance(node, ast.ImportFrom)}
    assert {name for name in names if name not in late and name.partition(".")[0] not in late} == set()
