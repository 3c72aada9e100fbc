"""Stored images as network input: centre crops, and the other views that training may see of an image."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from models.backbones import Backbone, centre_crop
from models.errors import UserError
from models.randomness import seed_for


@dataclass(frozen=True)
class Views:
    """The views of each image that become rows: row k·N + i is view k of image i.

    View 0 is the centre crop; the others are drawn, from the seed.
    """

    count: int = 1
    random_crop: bool = False
    flip: bool = False
    seed: int = 0

    def facts(self) -> dict[str, Any]:
        """What a sidecar says of them: nothing where there is the centre crop alone."""
        return {} if self.count == 1 else {"views": self.count, "random_crop": self.random_crop, "flip": self.flip}

    @classmethod
    def checked(cls, count: int, random_crop: bool, flip: bool, seed: int) -> "Views":
        """As options ask for them; a UserError where further views would be the same, or differ in no way."""
        if (count > 1) != (random_crop or flip):
            raise UserError("--views 2 or more goes together with --random-crop, --flip or both: give both or neither")
        return cls(count, random_crop, flip, seed)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "Views | None":
        """The views that a sidecar states; None where what it says makes no sense."""
        values = facts.get("views", 1), facts.get("random_crop", False), facts.get("flip", False)
        fits = tuple(map(type, values)) == (int, bool, bool) and values[0] >= 1
        return cls(*values) if fits else None

    def cut(self, x: torch.Tensor, view: int, image: int, height: int, width: int) -> torch.Tensor:
        """View `view` (3, height, width) of a preprocessed image (3, H, W), the `image`-th of the workspace."""
        if view == 0:
            return centre_crop(x, height, width)
        # differs from the paper: it trains on centre crops alone
        generator = np.random.default_rng(seed_for(self.seed, "view", view, image))
        top, left = (int(generator.integers(0, room + 1)) for room in (x.shape[1] - height, x.shape[2] - width))
        mirrored = bool(generator.integers(0, 2))
        x = x[:, top : top + height, left : left + width] if self.random_crop else centre_crop(x, height, width)
        return x.flip(2) if self.flip and mirrored else x


def network_batches(
    images: np.ndarray, backbone: Backbone, size: int, rows: np.ndarray, views: Views | None = None
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Batches of network input from stored images (N, 256, 256, 3).

    Yields:
        `size` of the `rows` (see `Views`) and their input (B, 3, h, w), cropped to the backbone's size. The mean is
        subtracted before the crop, so a mean image of 256 × 256 is subtracted per pixel.
    """
    views = views or Views()
    crop = backbone.architecture.crop
    early = views.count == 1 and backbone.mean_image is None  # then a crop of bytes is the same, and less work
    for start in range(0, len(rows), size):
        chosen = rows[start : start + size]
        batch = torch.from_numpy(images[chosen % len(images)]).permute(0, 3, 1, 2)  # (B, 3, 256, 256)
        if early:
            batch = centre_crop(batch, *crop)
        batch = batch.to(torch.float32, memory_format=torch.contiguous_format).to(backbone.device)
        batch = backbone.preprocess(batch)
        if not early:
            numbered = zip(batch, chosen.tolist(), strict=True)
            batch = torch.stack([views.cut(x, *divmod(row, len(images)), *crop) for x, row in numbered])
        yield chosen, batch
