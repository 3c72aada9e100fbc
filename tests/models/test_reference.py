"""The original's numbers, matched by the code that the stages run."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import nn

import extract_features
from models import unnaturalness
from models.backbones import ARCHITECTURES, Architecture, Backbone, centre_crop, chain, named
from models.descent import MomentumSGD, Pixels, Schedule, descend
from models.fused_lstm import fused_lstm
from models.objective import ReconstructionLoss
from models.projection import Projection, fit_pca
from models.training import update
from models.vlm import (
    DIRECTIONS,
    VisualLanguageModel,
    direction_error_map,
    layer_loss,
    layer_map,
    prediction_errors,
    ramp,
    to_grid,
    to_sequences,
)
from pipeline.decoding import to_rgb_array
from pipeline.tap_statistics import fit_projections
from pipeline.views import network_batches

FOLDER = Path(__file__).parents[1] / "reference"
# The longest sums on the way: a convolution (28 terms), PCA (8), two recurrent layers (9 each), a linear one (5), and a
# gradient over the grid (60); for reconstruction fc8 (200) and its gradient to the pixels.
SMALL = [(torch.float64, 0), (torch.float32, 128)]
RECONSTRUCTION = [(torch.float64, 0), (torch.float32, 384)]
UNIT = 2.0**-24  # the largest relative error of one rounding to float32
CODES = {"down": "2f", "up": "2b", "right": "3f", "left": "3b"}


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as archive:
        return dict(archive)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def assert_close(found, expected, roundings: int = 0, *, own: int = 16, scale: float | None = None) -> None:
    """Compare with a vector, in units of one float32 rounding of `scale` (the vector's largest value).

    Args:
        roundings: how often values were rounded to float32 on our way: the terms of the longest sums, added up. 0 where
            ours are float64, so that nothing depends on a processor's order of sums.
        own: how far the original's float32 arithmetic took the vector; a property of the vector, seen in float64.
    """
    found = found.detach().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
    assert found.shape == np.shape(expected)
    scale = np.abs(expected).max() if scale is None else scale
    assert np.abs(found.astype(np.float64) - expected).max() <= (own + roundings) * UNIT * scale


def to_torch_gates(block: np.ndarray) -> torch.Tensor:
    """Gates input, forget, output, candidate -> PyTorch's input, forget, candidate, output."""
    i, f, o, g = np.split(block, 4)
    return torch.from_numpy(np.concatenate([i, f, g, o]))


def from_torch_gates(block: torch.Tensor) -> np.ndarray:
    i, f, g, o = np.split(block.detach().numpy(), 4)
    return np.concatenate([i, f, o, g])


def projection(vectors: dict, layer: str) -> Projection:
    components = vectors[f"{layer}_pca_components"]
    kept = (len(components) + 1) // 2
    parts = (vectors[f"{layer}_mean"], vectors[f"{layer}_std"], components[:kept], vectors[f"{layer}_pca_mean"])
    return Projection(*map(tensor, parts))


def parameter_names(direction_model) -> dict[str, torch.nn.Parameter]:
    """The original's names of a direction's parameters."""
    names = {"Wx3": direction_model.linear.weight, "b3": direction_model.linear.bias}
    for number in (1, 2):
        for ours, theirs in (("weight_ih", "Wx"), ("weight_hh", "Wh"), ("bias_ih", "b")):
            names[f"{theirs}{number}"] = getattr(direction_model.lstm, f"{ours}_l{number - 1}")
    return names


def model(vectors: dict, layers: tuple[str, ...]) -> VisualLanguageModel:
    vlm = VisualLanguageModel({layer: projection(vectors, layer) for layer in layers}, {})
    with torch.no_grad():
        for layer in layers:
            for direction, code in CODES.items():
                for name, parameter in parameter_names(vlm.layers[layer][direction]).items():
                    value = vectors[f"w_{layer}_{code}_{name}"]
                    parameter.copy_(tensor(value) if name in ("Wx3", "b3") else to_torch_gates(value))
    return vlm


def in_original_form(name: str, value: torch.Tensor) -> np.ndarray:
    return value.detach().numpy() if name in ("Wx3", "b3") else from_torch_gates(value)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", ["nn.LSTM", "fused"])
@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float64, 0), (torch.float32, 48)])  # the sum of gWx
def test_recurrent_layer(direction: str, kind: str, dtype: torch.dtype, roundings: int) -> None:
    vectors = load("recurrent_layer")
    x = tensor(vectors["x"]).to(dtype).requires_grad_()
    weights = [to_torch_gates(vectors[name]).to(dtype).requires_grad_() for name in ("Wx", "Wh", "b")]
    sequences = to_sequences(x, direction)  # (T, B, 5)
    if kind == "fused":
        side_by_side = torch.cat([weights[0], weights[1], weights[2][:, None]], dim=1)
        hidden = fused_lstm(sequences.transpose(1, 2)[:, None], side_by_side[None])
        hidden = hidden[:, 0].transpose(1, 2)
    else:
        lstm = torch.nn.LSTM(5, 7, dtype=dtype)
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        values = dict(zip(names, [*weights, torch.zeros(28, dtype=dtype)], strict=True))
        hidden, _ = torch.func.functional_call(lstm, values, (sequences,))
    out = to_grid(hidden, direction, 2).permute(0, 3, 1, 2)
    code = {"down": "a2_f", "up": "a2_b", "right": "a3_f", "left": "a3_b"}[direction]
    assert_close(out, vectors[f"{code}_out"], roundings)
    (out * tensor(vectors["grad_out"])).sum().backward()
    assert_close(x.grad, vectors[f"{code}_gx"], roundings)
    for weight, name in zip(weights, ("gWx", "gWh", "gb"), strict=True):
        expected = vectors[f"{code}_{name}"]
        assert_close(from_torch_gates(weight.grad), expected, roundings)


def conv_features(vectors: dict, data: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = [tensor(vectors[f"convX_{name}"]).to(data.dtype) for name in "Wb"]
    convolved = F.conv2d(data, *weights, padding=1)
    return {"data": data, "convX": convolved}


@pytest.mark.parametrize(("dtype", "roundings"), SMALL)
def test_vlm_layer(dtype: torch.dtype, roundings: int) -> None:
    vectors = load("vlm_layer")
    vlm = model(vectors, ("data", "convX")).to(dtype)
    data = tensor(vectors["odd_data"]).to(dtype).requires_grad_()
    features = conv_features(vectors, data)
    for layer, x in features.items():
        assert_close(x, vectors[f"odd_x_{layer}"], roundings)
        assert_close(vlm.projections[layer].standardise(x), vectors[f"odd_std_{layer}"], roundings)
        p = vlm.projections[layer](x)
        assert_close(p, vectors[f"odd_pca_{layer}"], roundings)
        for direction, code in CODES.items():
            predictor = vlm.layers[layer][direction]
            whole = to_grid(predictor(to_sequences(p, direction)), direction, len(p)).permute(0, 3, 1, 2)
            assert_close(whole, vectors[f"odd_pred_{layer}_{code}"], roundings)
            squared = prediction_errors(p, direction, predictor).square()
            per_channel = to_grid(squared * ramp(len(squared), p)[:, None, None], direction, len(p))
            expected = vectors[f"odd_err_{layer}_{code}"]
            assert_close(per_channel.permute(0, 3, 1, 2), expected, roundings)
            assert_close(direction_error_map(p, direction, predictor), expected.mean(axis=1), roundings)
        assert_close(layer_map(p, vlm.layers[layer]), vectors[f"odd_map_{layer}"], roundings)
    losses = vlm.losses(vlm.project(features))
    for layer, loss in losses.items():
        assert_close(loss, vectors[f"odd_loss_{layer}"], roundings)
    total = torch.stack(list(losses.values())).mean()
    assert_close(total, vectors["odd_loss"], roundings)
    total.backward()
    assert_close(data.grad, vectors["odd_g_data"], roundings)
    compared = 0
    for layer in features:
        for direction, code in CODES.items():
            for name, parameter in parameter_names(vlm.layers[layer][direction]).items():
                expected = vectors.get(f"odd_g_{layer}_{code}_{name}", vectors.get(f"odd_g_w_{layer}_{code}_{name}"))
                assert_close(in_original_form(name, parameter.grad), expected, roundings)
                compared += 1
    assert compared == 2 * 4 * 8


def test_axis_of_length_two_weighs_nothing() -> None:
    vlm = model(load("vlm_layer"), ("data",))
    p = torch.randn(1, 2, 2, 2)
    assert layer_loss(p, vlm.layers["data"]).item() == 0


@pytest.mark.parametrize(("dtype", "roundings"), SMALL)
def test_sgd(dtype: torch.dtype, roundings: int) -> None:
    vectors = load("sgd")
    vlm = model(vectors, ("data", "convX")).to(dtype)
    trained = {
        f"{layer}_{code}_{name}": (name, parameter)
        for layer in vlm.layers
        for direction, code in CODES.items()
        for name, parameter in parameter_names(vlm.layers[layer][direction]).items()
    }
    optimizer = MomentumSGD([p for _, p in trained.values()], float(vectors["lr"]), float(vectors["momentum"]))

    def compare(prefix: str, values) -> None:
        for (key, (name, _)), value in zip(trained.items(), values, strict=True):
            expected = vectors.get(f"{prefix}_{key}", vectors.get(f"{prefix}_w_{key}"))
            assert_close(in_original_form(name, value), expected, roundings)

    for i, data in enumerate(vectors["inputs"]):
        if i == 5:
            optimizer.reset_momentum()
            optimizer.lr *= 0.1
            assert optimizer.lr == pytest.approx(float(vectors["lr_after_reset"]))
        features = conv_features(vectors, tensor(data).to(dtype))
        projected = {layer: vlm.projections[layer](x) for layer, x in features.items()}
        losses = update(vlm.layers, projected, optimizer)
        assert_close(np.mean(list(losses.values())), vectors["losses"][i], roundings)
        if i + 1 in (1, 5, 7):
            compare(f"p{i + 1}", optimizer.parameters)
        if i + 1 in (5, 7):
            compare(f"v{i + 1}", optimizer.velocities)
    features = conv_features(vectors, tensor(vectors["inputs"][0]).to(dtype))
    final = np.mean([loss.item() for loss in vlm.losses(vlm.project(features)).values()])
    assert_close(final, vectors["loss_final_on_input0"], roundings)


def test_small_layers() -> None:
    v = load("small_layers")
    alexnet, vgg = (ARCHITECTURES[name].skeleton for name in ("alexnet_caffe", "vgg19_caffe"))
    assert_close(alexnet.norm1(tensor(v["lrn_x"]).double()), v["lrn_out"])
    assert_close(alexnet.pool1(tensor(v["pool_x"])), v["pool_3_2"], 0)
    assert_close(vgg.pool1(tensor(v["pool_x"])), v["pool_2_2"], 0)
    grouped = [tensor(v[key]).double() for key in ("gconv_x", "gconv_W_caffe", "gconv_b")]
    assert_close(F.conv2d(*grouped, padding=(1, 2), groups=2), v["gconv_same"])
    assert_close(F.conv2d(*grouped, stride=2, groups=2), v["gconv_valid_stride2"])


def seeded_parameters(architecture: Architecture, seed: int) -> dict[str, torch.Tensor]:
    """The recipe that the reference networks' weights were drawn with."""
    random = np.random.RandomState(seed)
    parameters = {}
    for name, shape in architecture.parameter_shapes().items():
        layer, kind = name.split(".")
        if kind == "weight":
            value = random.randn(*shape) * np.sqrt(2 / np.prod(shape[1:])) * (0.02 if layer == "fc8" else 1)
        else:
            value = random.randn(*shape) * 0.1
        parameters[name] = torch.from_numpy(value.astype(np.float32))
    return parameters


def with_small_ends(architecture: Architecture, inputs: int, side: int) -> Architecture:
    def build() -> nn.Sequential:
        network = architecture.build()
        network.fc6, network.fc7, network.fc8 = nn.Linear(inputs, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        return network

    return dataclasses.replace(architecture, build=build, crop=(side, side))


@pytest.mark.parametrize(
    ("name", "file", "inputs"), [("alexnet_caffe", "alexnet", 9216), ("vgg19_caffe", "vgg19", 2048)]
)
def test_network(name: str, file: str, inputs: int) -> None:
    vectors = load(file)
    weights_seed, input_seed, side = (401, 404, 227) if file == "alexnet" else (411, 412, 64)
    architecture = with_small_ends(ARCHITECTURES[name], inputs, side)
    backbone = Backbone(architecture, seeded_parameters(architecture, weights_seed)).double()
    x = torch.from_numpy((np.random.RandomState(input_seed).randn(1, 3, side, side) * 60).astype(np.float32)).double()
    x.requires_grad_()
    layers = [key.removesuffix("_shape") for key in vectors if key.endswith("_shape") and "prob" not in key]
    layers = [layer for layer in layers if layer in dict(architecture.skeleton.named_children())]
    assert len(layers) >= 10
    for layer, values in backbone(x, layers).items():
        full = values.detach().reshape(vectors[f"{layer}_shape"].tolist())
        assert list(full.shape) == vectors[f"{layer}_shape"].tolist()
        step, skip = vectors[f"{layer}_stride"]
        sub = full[:, ::step, ::skip, ::skip] if full.ndim == 4 else full[:, ::step]
        assert_close(sub.reshape(vectors[layer].shape), vectors[layer], own=64)  # 19 layers of up to 4608 terms
        stats = [full.mean(), full.square().mean(), full.min(), full.max()]
        np.testing.assert_allclose([float(s) for s in stats], vectors[f"{layer}_stats"], rtol=1e-4, atol=1e-4)
    if file == "alexnet":
        (backbone(x, ["fc8"])["fc8"][0] * tensor(vectors["grad_v"])).sum().backward()
        assert_close(x.grad[:, :, ::8, ::8], vectors["grad_data_sub"])


def tiny_backbone(vectors: dict, mean: bool = True) -> Backbone:
    """The small network of the vectors `pca` and `reconstruct`."""

    def build() -> nn.Sequential:
        return named(
            conv1=nn.Conv2d(3, 6, 3, padding=1),
            relu1=nn.ReLU(),
            norm1=nn.LocalResponseNorm(5),
            pool1=nn.MaxPool2d(3, 2),
            conv2=nn.Conv2d(6, 8, 3, padding=1, groups=2),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc8=nn.Linear(200, 10),
        )

    pixels = {"bgr": True, "mean_image": True, "mean": (0.0, 0.0, 0.0), "scale": (1.0, 1.0, 1.0)}
    architecture = chain("tiny", build, ("data", "conv1", "conv2"), crop=(11, 12), **pixels)
    parameters = {
        f"{layer}.{kind}": tensor(vectors[f"{layer}_{letter}"])
        for layer in ("conv1", "conv2", "fc8")
        for kind, letter in (("weight", "W"), ("bias", "b"))
    }
    parameters["fc8.weight"] = parameters["fc8.weight"].reshape(10, 200)
    return Backbone(architecture, parameters, tensor(vectors["mean_image"]) if mean else None)


def test_pca(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    vectors = load("pca")
    backbone = tiny_backbone(vectors)
    inputs = [x for _, x in network_batches(vectors["images_rgb"], backbone, 4, np.arange(len(vectors["images_rgb"])))]
    assert_close(torch.cat(inputs), vectors["network_input"], 1, scale=255)
    layers = ["data", "conv1", "conv2"]
    monkeypatch.setattr(
        "models.projection.draw_positions",
        lambda seed, layer, image, count, grid: vectors[f"{layer}_sample_indices"][image],
    )
    statistics = extract_features.collect_statistics(
        vectors["images_rgb"],
        backbone,
        layers,
        ["fc8"],
        rows=np.arange(len(vectors["images_rgb"])),
        pca_positions=36,
        batch_size=4,
        seed=0,
        state=tmp_path / "state.npz",
        facts={},
    )
    for tap in [*layers, "fc8"]:
        moments = statistics.moments[tap]
        scale = vectors[f"{tap}_std"].max()  # the original summed in float32, we in float64
        assert_close(moments.mean, vectors[f"{tap}_mean"].ravel(), own=128, scale=scale)
        assert_close(moments.std, vectors[f"{tap}_std"].ravel(), own=128, scale=scale)
    for layer in layers:
        moments = statistics.moments[layer]
        samples = torch.from_numpy(statistics.samples[layer]).flatten(0, 1)
        standardised = (samples - moments.mean.float()) / moments.guarded_std()[0].float()
        assert_close(standardised, vectors[f"{layer}_samples_std"], 28)  # the samples are a convolution's, in float32
        components, mean, variance = fit_pca(standardised.numpy())
        assert_close(mean, vectors[f"{layer}_pca_mean"], 28)
        np.testing.assert_allclose(variance, vectors[f"{layer}_pca_var"], rtol=1e-4)
        cosines = np.abs((components * vectors[f"{layer}_pca_components"]).sum(axis=1))
        np.testing.assert_allclose(cosines, 1, atol=1e-5)
    kept = {layer: p.size for layer, p in fit_projections(statistics).items()}
    assert kept == {"data": 2, "conv1": 3, "conv2": 4}


def reconstruction_loss(vectors: dict, dtype: torch.dtype) -> tuple[Backbone, ReconstructionLoss]:
    backbone = tiny_backbone(vectors).to(dtype)
    vlm = model(vectors, ("conv1", "conv2")).to(dtype).freeze()
    weights = dict(zip(("conv1", "conv2"), vectors["lambda_layer"].tolist(), strict=True))
    feature_weight, vlm_weight = vectors["lambda_loss"].tolist()
    loss = ReconstructionLoss(
        backbone,
        "fc8",
        tensor(vectors["target"]).to(dtype)[None],
        tensor(vectors["fc8_std"]).to(dtype).ravel(),
        vlm,
        feature_weight=feature_weight,
        vlm_weight=vlm_weight,
        layer_weights=weights,
    )
    return backbone, loss


@pytest.mark.parametrize(("dtype", "roundings"), RECONSTRUCTION)
def test_reconstruction(dtype: torch.dtype, roundings: int) -> None:
    vectors = load("reconstruct")
    backbone, loss = reconstruction_loss(vectors, dtype)
    rgba = Image.fromarray(vectors["target_image_rgba"])
    pixels = tensor(to_rgb_array(rgba)).permute(2, 0, 1)[None].to(dtype)
    assert_close(backbone(backbone.preprocess(pixels), ["fc8"])["fc8"][0], vectors["target"], roundings)
    x = tensor(vectors["x0"]).to(dtype).requires_grad_()
    terms = loss(x)
    terms["total"].backward()
    assert_close(terms["total"], vectors["loss_x0"], roundings)
    assert_close(terms["feature"], vectors["loss_target_x0"], roundings)
    for layer in ("conv1", "conv2"):
        assert_close(terms[layer], vectors[f"loss_lm_{layer}_x0"], roundings)
    assert_close(x.grad, vectors["grad_x0"], roundings)
    losses, image = [], Pixels(x)
    optimizer = MomentumSGD(image.parameters, 64.0, float(vectors["momentum"]))

    def callback(i: int, terms: dict[str, float]) -> None:
        losses.append(terms["total"])
        if i in (0, 1):
            assert_close(image(), vectors[f"lr64_x_after_{i + 1}"], roundings)

    descend(loss, image, optimizer, Schedule(64.0), 10, callback)
    assert_close(losses, vectors["lr64_losses"], roundings)
    assert_close(image(), vectors["lr64_x_final"], roundings)
    grey_levels = np.abs(
        backbone.to_rgb(image().detach())[0].permute(1, 2, 0).numpy().astype(np.uint8).astype(int)
        - vectors["lr64_png_rgb"]
    )
    assert grey_levels.max() <= (dtype == torch.float32), "truncation turns one rounding into one grey level"


@pytest.mark.parametrize("case", ["a", "c"])
def test_saliency_postprocessing_byte_for_byte(case: str) -> None:
    vectors = load("saliency_post")
    raw, (height, width) = vectors[f"{case}_map"], vectors[f"{case}_image_shape"][:2].tolist()
    assert np.array_equal(unnaturalness.to_bytes(raw**0.5), vectors[f"{case}_bytes"])
    final = unnaturalness.postprocess_original(raw, height, width, 16, 0.5, 0.03)
    assert final.dtype == np.uint8
    assert np.array_equal(final, vectors[f"{case}_final"])
    by_floats = unnaturalness.postprocess(raw, height, width, 16, 0.5, 0.03)
    assert np.abs(by_floats * 255 - vectors[f"{case}_final"]).max() < 1.5  # what the rounding to bytes costs


@pytest.mark.parametrize(("size", "stride"), [((90, 131), 16), ((47, 80), (8, 4)), ((30, 33), 8)])
def test_saliency_postprocessing_step_by_step(size: tuple[int, int], stride: int | tuple[int, int]) -> None:
    """Enlarged, padded or cropped, and blurred one after the other: what two products of matrices do at once."""
    raw = np.random.default_rng(0).random((5, 8))
    for blur in (0.03, 0.0):
        found = unnaturalness.postprocess(raw, *size, stride, power=0.7, blur=blur)
        values = torch.from_numpy(unnaturalness.to_unit(raw**0.7))[None, None]
        scale = float(stride) if isinstance(stride, int) else tuple(map(float, stride))
        enlarged = F.interpolate(values, scale_factor=scale, mode="bilinear")[0, 0].numpy()
        padded = unnaturalness.pad_to(enlarged, *size)
        blurred = gaussian_filter(padded, (blur * size[0], blur * size[1])) if blur else padded
        assert_allclose(found, unnaturalness.to_unit(blurred), rtol=0, atol=1e-12)


def bgr_backbone(mean: np.ndarray) -> Backbone:
    zero, one = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    architecture = chain("io", named, (), crop=(1, 1), mean=zero, scale=one, bgr=True, mean_image=True)
    return Backbone(architecture, {}, tensor(mean))


def read_png(array: np.ndarray) -> torch.Tensor:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    with Image.open(buffer) as image:
        return tensor(to_rgb_array(image)).permute(2, 0, 1)[None].float()


def test_image_reading_and_mean() -> None:
    vectors = load("image_io")
    compared = 0
    for key, expected in vectors.items():
        if not key.startswith("load_"):
            continue
        image, _, mean = key.removeprefix("load_").partition("_mean_")
        if image not in vectors:
            continue
        backbone = bgr_backbone(vectors[f"mean_{mean}"])
        assert_close(backbone.subtract_mean(read_png(vectors[image]).double())[0], expected, scale=255)
        compared += 1
    assert compared >= 3


def test_crops() -> None:
    vectors = load("image_io")
    for key, shape in vectors.items():
        if key.startswith("clip_") and key.endswith("_shape"):
            height, width = map(int, key.split("_")[1:3])
            expected = vectors[key.removesuffix("_shape")]
            if 0 in shape[-2:]:  # the original's empty crop where nothing is to be cut, on purpose not ours
                expected = vectors["clip_in"][:, : height or None, : width or None]
                continue
            assert np.array_equal(centre_crop(tensor(vectors["clip_in"]), height, width).numpy(), expected)
    whole = tensor(vectors["clip_in"])
    assert torch.equal(centre_crop(whole, *whole.shape[-2:]), whole)
