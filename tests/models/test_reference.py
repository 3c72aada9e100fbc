"""The original's numbers, matched by the code that the stages run."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import extract_features
import reconstruct
import train_vlm
from models import unnaturalness
from models.backbones import (
    ARCHITECTURES,
    Architecture,
    Backbone,
    Conv,
    Linear,
    LocalResponseNorm,
    MaxPool,
    ReLU,
    centre_crop,
)
from models.descent import MomentumSGD, Schedule
from models.fused_lstm import fused_lstm
from models.objective import ReconstructionLoss
from models.projection import Projection, fit_pca
from models.vlm import (
    DIRECTIONS,
    VisualLanguageModel,
    direction_error_map,
    layer_loss,
    layer_map,
    ramp,
    squared_errors,
    to_grid,
    to_sequences,
)
from pipeline.images import to_rgb_array

FOLDER = Path(__file__).parents[1] / "reference"
CODES = {"down": "2f", "up": "2b", "right": "3f", "left": "3b"}


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as archive:
        return dict(archive)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def assert_close(found, expected, tolerance: float) -> None:
    found = found.detach().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
    assert found.shape == np.shape(expected)
    assert np.abs(found.astype(np.float64) - expected).max() <= tolerance


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
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-7), (torch.float32, 3e-7)])
def test_recurrent_layer(direction: str, kind: str, dtype: torch.dtype, tolerance: float) -> None:
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
    assert_close(out, vectors[f"{code}_out"], tolerance)
    (out * tensor(vectors["grad_out"])).sum().backward()
    assert_close(x.grad, vectors[f"{code}_gx"], 2e-6)
    for weight, name in zip(weights, ("gWx", "gWh", "gb"), strict=True):
        expected = vectors[f"{code}_{name}"]
        assert_close(from_torch_gates(weight.grad), expected, 1e-6 * np.abs(expected).max())


def conv_features(vectors: dict, data: torch.Tensor) -> dict[str, torch.Tensor]:
    convolved = F.conv2d(data, tensor(vectors["convX_W"]), tensor(vectors["convX_b"]), padding=1)
    return {"data": data, "convX": convolved}


def test_vlm_layer() -> None:
    vectors = load("vlm_layer")
    vlm = model(vectors, ("data", "convX"))
    data = tensor(vectors["odd_data"]).requires_grad_()
    features = conv_features(vectors, data)
    for layer, x in features.items():
        scale = np.abs(vectors[f"odd_x_{layer}"]).max()
        assert_close(x, vectors[f"odd_x_{layer}"], 1e-6 * scale)
        assert_close(vlm.projections[layer].standardise(x), vectors[f"odd_std_{layer}"], 5e-6)
        p = vlm.projections[layer](x)
        assert_close(p, vectors[f"odd_pca_{layer}"], 5e-6)
        for direction, code in CODES.items():
            predictor = vlm.layers[layer][direction]
            whole = to_grid(predictor(to_sequences(p, direction)), direction, len(p)).permute(0, 3, 1, 2)
            assert_close(whole, vectors[f"odd_pred_{layer}_{code}"], 5e-6)
            squared = squared_errors(p, direction, predictor)
            per_channel = to_grid(squared * ramp(len(squared), p)[:, None, None], direction, len(p))
            expected = vectors[f"odd_err_{layer}_{code}"]
            assert_close(per_channel.permute(0, 3, 1, 2), expected, 1e-6 * expected.max())
            assert_close(direction_error_map(p, direction, predictor), expected.mean(axis=1), 2e-5)
        assert_close(layer_map(p, vlm.layers[layer]), vectors[f"odd_map_{layer}"], 2e-5)
    losses = vlm.losses(features)
    for layer, loss in losses.items():
        assert_close(loss, vectors[f"odd_loss_{layer}"], 4e-7)
    total = torch.stack(list(losses.values())).mean()
    assert_close(total, vectors["odd_loss"], 2e-7)
    total.backward()
    assert_close(data.grad, vectors["odd_g_data"], 2e-8)
    compared = 0
    for layer in features:
        for direction, code in CODES.items():
            for name, parameter in parameter_names(vlm.layers[layer][direction]).items():
                expected = vectors.get(f"odd_g_{layer}_{code}_{name}", vectors.get(f"odd_g_w_{layer}_{code}_{name}"))
                assert_close(in_original_form(name, parameter.grad), expected, 1.5e-8)
                compared += 1
    assert compared == 2 * 4 * 8


def test_axis_of_length_two_weighs_nothing() -> None:
    vlm = model(load("vlm_layer"), ("data",))
    p = torch.randn(1, 2, 2, 2)
    assert layer_loss(p, vlm.layers["data"]).item() == 0


def test_sgd() -> None:
    vectors = load("sgd")
    vlm = model(vectors, ("data", "convX"))
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
            assert_close(in_original_form(name, value), expected, 2e-7)

    for i, data in enumerate(vectors["inputs"]):
        if i == 5:
            optimizer.reset_momentum()
            optimizer.lr *= 0.1
            assert optimizer.lr == pytest.approx(float(vectors["lr_after_reset"]))
        features = conv_features(vectors, tensor(data))
        projected = {layer: vlm.projections[layer](x) for layer, x in features.items()}
        losses = train_vlm.update(vlm.layers, projected, optimizer)
        assert np.mean(list(losses.values())) == pytest.approx(vectors["losses"][i], abs=2e-7)
        if i + 1 in (1, 5, 7):
            compare(f"p{i + 1}", optimizer.parameters)
        if i + 1 in (5, 7):
            compare(f"v{i + 1}", optimizer.velocities)
    features = conv_features(vectors, tensor(vectors["inputs"][0]))
    final = np.mean([loss.item() for loss in vlm.losses(features).values()])
    assert final == pytest.approx(float(vectors["loss_final_on_input0"]), abs=2e-7)


def test_small_layers() -> None:
    v = load("small_layers")
    convolution = Conv("c", 4, 6, 3, groups=2)
    tiny = Architecture("tiny", (LocalResponseNorm("n"), convolution), (), (1, 1), True, (0, 0, 0), (1, 1, 1))
    backbone = Backbone(tiny, {"c.weight": torch.zeros(6, 2, 3, 3), "c.bias": torch.zeros(6)})
    assert_close(backbone._run(LocalResponseNorm("n"), tensor(v["lrn_x"])), v["lrn_out"], 1e-4)
    for key, window, stride in (("pool_3_2", 3, 2), ("pool_2_2", 2, 2)):
        assert_close(backbone._run(MaxPool("p", window, stride), tensor(v["pool_x"])), v[key], 0)
    grouped = [tensor(v[key]) for key in ("gconv_x", "gconv_W_caffe", "gconv_b")]
    assert_close(F.conv2d(*grouped, padding=(1, 2), groups=2), v["gconv_same"], 1e-5)
    assert_close(F.conv2d(*grouped, stride=2, groups=2), v["gconv_valid_stride2"], 1e-5)


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


def with_small_ends(architecture: Architecture, inputs: int) -> Architecture:
    sizes = {"fc6": (inputs, 64), "fc7": (64, 64), "fc8": (64, 10)}
    operations = tuple(Linear(o.name, *sizes[o.name]) if o.name in sizes else o for o in architecture.operations)
    return dataclasses.replace(architecture, operations=operations)


@pytest.mark.parametrize(
    ("name", "file", "inputs"), [("alexnet_caffe", "alexnet", 9216), ("vgg19_caffe", "vgg19", 2048)]
)
def test_network(name: str, file: str, inputs: int) -> None:
    vectors = load(file)
    architecture = with_small_ends(ARCHITECTURES[name], inputs)
    weights_seed, input_seed, side = (401, 404, 227) if file == "alexnet" else (411, 412, 64)
    backbone = Backbone(architecture, seeded_parameters(architecture, weights_seed))
    x = torch.from_numpy((np.random.RandomState(input_seed).randn(1, 3, side, side) * 60).astype(np.float32))
    x.requires_grad_()
    layers = [key.removesuffix("_shape") for key in vectors if key.endswith("_shape") and "prob" not in key]
    layers = [layer for layer in layers if layer in {o.name for o in architecture.operations}]
    assert len(layers) >= 10
    for layer, values in backbone(x, layers).items():
        full = values.detach().reshape(vectors[f"{layer}_shape"].tolist())
        assert list(full.shape) == vectors[f"{layer}_shape"].tolist()
        step, skip = vectors[f"{layer}_stride"]
        sub = full[:, ::step, ::skip, ::skip] if full.ndim == 4 else full[:, ::step]
        assert_close(sub.reshape(vectors[layer].shape), vectors[layer], 2e-5 * float(full.std()))
        stats = [full.mean(), full.square().mean(), full.min(), full.max()]
        np.testing.assert_allclose([float(s) for s in stats], vectors[f"{layer}_stats"], rtol=1e-4, atol=1e-4)
    if file == "alexnet":
        (backbone(x, ["fc8"])["fc8"][0] * tensor(vectors["grad_v"])).sum().backward()
        assert_close(x.grad[:, :, ::8, ::8], vectors["grad_data_sub"], 2e-9)


def tiny_backbone(vectors: dict, mean: bool = True) -> Backbone:
    """The small network of the vectors `pca` and `reconstruct`."""
    operations = (
        Conv("conv1", 3, 6, 3, padding=1),
        ReLU("relu1"),
        LocalResponseNorm("norm1"),
        MaxPool("pool1", 3, 2),
        Conv("conv2", 6, 8, 3, padding=1, groups=2),
        ReLU("relu2"),
        Linear("fc8", 200, 10),
    )
    architecture = Architecture(
        "tiny", operations, ("data", "conv1", "conv2"), (11, 12), True, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    )
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
    inputs = [x for _, x in extract_features.network_batches(vectors["images_rgb"], backbone, 4, 0)]
    assert_close(torch.cat(inputs), vectors["network_input"], 1e-5)
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
        pca_positions=36,
        batch_size=4,
        seed=0,
        state=tmp_path / "state.npz",
        facts={},
    )
    for tap in [*layers, "fc8"]:
        moments = statistics.moments[tap]
        scale = vectors[f"{tap}_std"].max()  # the original summed in float32, we in float64
        assert_close(moments.mean, vectors[f"{tap}_mean"].ravel(), 5e-6 * scale)
        assert_close(moments.std, vectors[f"{tap}_std"].ravel(), 5e-6 * scale)
    for layer in layers:
        moments = statistics.moments[layer]
        samples = torch.from_numpy(statistics.samples[layer]).flatten(0, 1)
        standardised = (samples - moments.mean.float()) / moments.guarded_std()[0].float()
        assert_close(standardised, vectors[f"{layer}_samples_std"], 5e-5)
        components, mean, variance = fit_pca(standardised.numpy())
        assert_close(mean, vectors[f"{layer}_pca_mean"], 1e-5)
        np.testing.assert_allclose(variance, vectors[f"{layer}_pca_var"], rtol=1e-4)
        cosines = np.abs((components * vectors[f"{layer}_pca_components"]).sum(axis=1))
        np.testing.assert_allclose(cosines, 1, atol=1e-5)
    kept = {layer: p.size for layer, p in extract_features.fit_projections(statistics, layers).items()}
    assert kept == {"data": 2, "conv1": 3, "conv2": 4}


def reconstruction_loss(vectors: dict) -> tuple[Backbone, ReconstructionLoss]:
    backbone = tiny_backbone(vectors)
    vlm = model(vectors, ("conv1", "conv2")).freeze()
    weights = dict(zip(("conv1", "conv2"), vectors["lambda_layer"].tolist(), strict=True))
    feature_weight, vlm_weight = vectors["lambda_loss"].tolist()
    loss = ReconstructionLoss(
        backbone,
        "fc8",
        tensor(vectors["target"])[None],
        tensor(vectors["fc8_std"]).ravel(),
        vlm,
        feature_weight=feature_weight,
        vlm_weight=vlm_weight,
        layer_weights=weights,
    )
    return backbone, loss


def test_reconstruction() -> None:
    vectors = load("reconstruct")
    backbone, loss = reconstruction_loss(vectors)
    rgba = Image.fromarray(vectors["target_image_rgba"])
    pixels = tensor(to_rgb_array(rgba)).permute(2, 0, 1)[None].float()
    assert_close(backbone(backbone.preprocess(pixels), ["fc8"])["fc8"][0], vectors["target"], 1e-4)
    x = tensor(vectors["x0"]).requires_grad_()
    terms = loss(x)
    terms["total"].backward()
    assert_close(terms["total"], vectors["loss_x0"], 2e-6)
    assert_close(terms["feature"], vectors["loss_target_x0"], 2e-6)
    for layer in ("conv1", "conv2"):
        assert_close(terms[layer], vectors[f"loss_lm_{layer}_x0"], 2e-6)
    assert_close(x.grad, vectors["grad_x0"], 4e-9)  # of 9e-3; 3.03e-9 with one thread, less with two
    losses = []

    def callback(i: int, terms: dict[str, float]) -> None:
        losses.append(terms["total"])
        if i in (0, 1):
            assert_close(x, vectors[f"lr64_x_after_{i + 1}"], 5e-5)

    optimizer = MomentumSGD([x], 64.0, float(vectors["momentum"]))
    reconstruct.descend(loss, x, optimizer, Schedule(64.0), 10, callback)
    assert_close(losses, vectors["lr64_losses"], 2e-6)
    assert_close(x, vectors["lr64_x_final"], 5e-5)
    assert np.array_equal(reconstruct.to_picture(backbone, x), vectors["lr64_png_rgb"])


@pytest.mark.parametrize("case", ["a", "c"])
def test_saliency_postprocessing_byte_for_byte(case: str) -> None:
    vectors = load("saliency_post")
    raw, (height, width) = vectors[f"{case}_map"], vectors[f"{case}_image_shape"][:2].tolist()
    assert np.array_equal(unnaturalness.to_bytes(raw**0.5), vectors[f"{case}_bytes"])
    final = unnaturalness.postprocess_original(raw, height, width, stride=16)
    assert final.dtype == np.uint8
    assert np.array_equal(final, vectors[f"{case}_final"])
    by_floats = unnaturalness.postprocess(raw, height, width, stride=16)
    assert np.abs(by_floats * 255 - vectors[f"{case}_final"]).max() < 1.5  # what the rounding to bytes costs


def bgr_backbone(mean: np.ndarray) -> Backbone:
    architecture = Architecture("io", (), (), (1, 1), True, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
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
        assert_close(backbone.subtract_mean(read_png(vectors[image]))[0], expected, 3e-5)
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
