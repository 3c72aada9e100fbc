"""reconstruct.py beside torch-lucent's feature inversion: pool5 of AlexNet, one photo, the same weights.

torch-lucent has its notebook's settings: product of features and blur as objective, moved pictures, 512 updates. Since
a product does not fix the feature's size, its error is given at the best scale too. It needs its own environment:

    pip install decorator ipython && pip install --no-deps torch-lucent==0.1.8 kornia==0.4.1
    python benchmarks/beside_lucent.py PHOTO
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from lucent.optvis import objectives, param, render, transform  # noqa: E402

import reconstruct  # noqa: E402
from models.backbones import Backbone, central_part  # noqa: E402
from models.weights.find import load_backbone  # noqa: E402
from pipeline import networks  # noqa: E402
from pipeline.images import read_rgb  # noqa: E402

TAP, SIDE, UPDATES, STEPS = "pool5", 224, 200, (25, 50, 100, 200, 512)  # updates of ours and theirs


def errors(backbone: Backbone, found: np.ndarray, photo: np.ndarray) -> str:
    """|φ(x) - φ₀|² / |φ₀|² of pictures (H, W, 3) in 0-255, as it is and with φ(x) at its best scale."""
    pictures = torch.from_numpy(np.stack([found, photo]).astype(np.float32)).permute(0, 3, 1, 2)
    with torch.no_grad():
        x, target = backbone(backbone.preprocess(pictures), [TAP])[TAP].flatten(1)
    cosine = float(torch.dot(x, target) / x.norm() / target.norm())
    return f"feature error {float((x - target).square().sum() / target.square().sum()):.3f}, scaled {1 - cosine**2:.3f}"


def ours(backbone: Backbone, photo: Path, out: Path) -> np.ndarray:
    """With language models, as run_pretrained_model.py; returns what was inverted, (227, 227, 3)."""
    run, vlm = reconstruct.run, networks.PRETRAINED / "alexnet.safetensors"

    took: list[float] = []

    def timed(*values) -> None:
        took.append(-time.perf_counter())
        run(*values)
        took[0] += time.perf_counter()

    reconstruct.run = timed
    more = ["--target", TAP, "--regularizer", "vlm", "--descent", "fourier", "--iterations", str(UPDATES)]
    reconstruct.main([str(photo), "--vlm", str(vlm), "--out", str(out), "--overwrite", *more])
    told = errors(backbone, np.load(out / "reconstruction.npy"), inverted := read_rgb(out / "image.png"))
    print(f"ours: {UPDATES / took[0]:.1f} updates/s; after {UPDATES}, {took[0]:.1f} s: {told}", flush=True)
    return inverted


def lucent(backbone: Backbone, photo: np.ndarray) -> None:
    """Print the error after so many updates."""
    scales, angles = [0.9, 0.95, 1.05, 1.1] + [1] * 4, [*range(-5, 5)] + [0] * 5
    moves = [transform.pad(8, mode="constant", constant_value=0.5), transform.jitter(8)]
    moves += [transform.random_scale(scales), transform.random_rotate(angles), transform.jitter(2)]
    objective = objectives.Objective(lambda tap: -(tap(TAP)[0] * tap(TAP)[1]).sum()) + objectives.blur_input_each_step()
    network = backbone.network[: list(dict(backbone.network.named_children())).index(TAP) + 1]
    target = torch.from_numpy(np.array(photo, np.float32)).permute(2, 0, 1) / 255
    for steps in STEPS:
        torch.manual_seed(0)
        parameters, picture = param.image(SIDE)
        both = (parameters, lambda picture=picture: torch.stack([picture()[0], target]))
        began = time.perf_counter()
        options = {"transforms": moves, "thresholds": (steps,), "show_image": False, "progress": False}
        found = render.render_vis(network, objective, lambda both=both: both, **options)[0][0]
        took = time.perf_counter() - began
        told = errors(backbone, 255 * found, photo)
        print(f"lucent: {steps / took:.1f} updates/s; after {steps}, {took:.1f} s: {told}", flush=True)


if __name__ == "__main__":
    alexnet = load_backbone("alexnet", layers=[TAP])[0]
    with tempfile.TemporaryDirectory() as folder:
        lucent(alexnet, central_part(ours(alexnet, Path(sys.argv[1]), Path(folder)), SIDE, SIDE))
