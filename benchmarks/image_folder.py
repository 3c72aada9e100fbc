"""saliency.py --no-naturalness on a folder of images against the bare network on the same pixels, in its better layout.

Decoding, language models, post-processing and writing are the stage's; the network gets its input ready.
"""

import contextlib
import io
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import saliency
from benchmarks.random_networks import make_backbone, make_projection
from benchmarks.timing import SEED, Figure, Report, Setup, ratio, seconds
from models.vlm import VisualLanguageModel
from pipeline.detector import Checkpoint, Detector, Reading
from pipeline.images import read_rgb
from pipeline.networks import lay_out

GOAL = 0.92
BACKBONE, LAYER = "vgg16", "conv5_3"
SIZE, IMAGES = (600, 800), 4
QUICK_SIZE, QUICK_IMAGES = (64, 80), 2


def write_images(folder: Path, count: int, size: tuple[int, int]) -> dict[str, Path]:
    """JPEG files by name: smooth colours with some noise, of which a photo's share of bytes is left."""
    random, (height, width) = np.random.default_rng(SEED), size
    files = {}
    for name in map(str, range(count)):
        coarse = random.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float64)
        rgb = (smooth + random.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
        files[name] = folder / f"{name}.jpg"
        Image.fromarray(rgb).save(files[name], quality=90)
    return files


def make_detector(setup: Setup) -> Detector:
    """The network with random weights, and a random language model of the layer."""
    backbone = make_backbone(BACKBONE, LAYER, setup)
    vlm = VisualLanguageModel({LAYER: make_projection(backbone.architecture.channels(LAYER))}, {})
    vlm.initialise(SEED)
    checkpoint = Checkpoint(Path("random"), BACKBONE, vlm.freeze().to(setup.device), "0" * 64)
    return Detector(lay_out(backbone), {}, "random", {"map": Reading("map", checkpoint, LAYER)})


def measure(setup: Setup) -> Report:
    """The network's time over the whole stage's, and what the layout in memory gains."""
    count, size = (QUICK_IMAGES, QUICK_SIZE) if setup.quick else (IMAGES, SIZE)
    files = write_images(setup.folder, count, size)
    detector, out = make_detector(setup), setup.folder / "maps"
    layouts = {"as loaded": torch.contiguous_format, "channels last": torch.channels_last}
    networks = {name: make_backbone(BACKBONE, LAYER, setup).to(memory_format=f) for name, f in layouts.items()}
    x = [torch.from_numpy(read_rgb(f).copy()).permute(2, 0, 1)[None].float().to(setup.device) for f in files.values()]
    inputs = {
        name: [networks[name].preprocess(one).contiguous(memory_format=f) for one in x] for name, f in layouts.items()
    }

    def stage() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            failed = saliency.make_maps([detector], files, out, {}, None, True, naturalness=False)
        if failed:
            raise AssertionError(f"{failed} images failed")

    def network(name: str) -> None:
        with torch.no_grad():
            for one in inputs[name]:
                networks[name](one, [LAYER])

    functions = {name: lambda name=name: network(name) for name in layouts}
    took = seconds({"saliency.py": stage, **functions}, setup, lambda: shutil.rmtree(out, ignore_errors=True))
    best = min(layouts, key=lambda name: float(np.median(took[name])))
    per_image = {name: float(np.median(values)) / count for name, values in took.items()}
    what = f"saliency.py, {BACKBONE} to {LAYER}, {size[1]}×{size[0]}"
    note = f"{per_image[best]:.3g} of {per_image['saliency.py']:.3g} s per image; the network {best}"
    figures = [Figure(f"{what}: network / whole", ratio(took[best], took["saliency.py"]), "%", GOAL, note=note)]
    layouts_note = ", ".join(f"{name} {per_image[name]:.3g} s" for name in layouts)
    gain = ratio(took["as loaded"], took["channels last"])
    figures.append(Figure(f"{what}: network as loaded / channels last", gain, note=layouts_note))
    return Report(figures, {"images": count, "seconds": {name: values.tolist() for name, values in took.items()}})
