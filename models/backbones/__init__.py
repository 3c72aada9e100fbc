"""The pre-trained CNNs: a registry of networks with named taps, and any classification network of torchvision.

A further network is one `Architecture`, put into `ARCHITECTURES`; every module of it is a tap.
"""

from difflib import get_close_matches

from models.backbones.architecture import Architecture
from models.backbones.backbone import Backbone, central_part, centre_crop, random_parameters
from models.backbones.chains import CHAINS, chain, named
from models.backbones.efficientnet_lite import EFFICIENTNET_LITE0, EFFICIENTNET_LITE2
from models.errors import UserError

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Backbone",
    "central_part",
    "centre_crop",
    "chain",
    "find_architecture",
    "named",
    "random_parameters",
]

ARCHITECTURES: dict[str, Architecture] = {a.name: a for a in (*CHAINS, EFFICIENTNET_LITE0, EFFICIENTNET_LITE2)}


def find_architecture(name: str) -> Architecture:
    """The network of a name: of the registry, else of torchvision.

    Raises:
        UserError: there is none; names the nearest.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    from models.backbones.torchvision_networks import torchvision_architecture, torchvision_names

    others = torchvision_names()
    if name in others:
        return torchvision_architecture(name)
    near = get_close_matches(name, [*ARCHITECTURES, *others], n=4, cutoff=0.5)
    raise UserError(
        f"there is no backbone {name!r:.80}{' (nearest: ' + ', '.join(near) + ')' if near else ''}: choose from "
        f"{', '.join(ARCHITECTURES)}, or a classification network of torchvision"
    )
