"""The pictures whose naturalness is measured: originals with their spoiled copies."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation import spoiling
from evaluation.journal import text_sha256, whole_images
from evaluation.score_reconstructions import find_results, group_by_model, read_original
from evaluation.spoiling import Copy
from models.backbones import central_part
from models.errors import UserError
from models.randomness import seed_for
from models.weights.downloads import file_hash
from pipeline import array_files
from pipeline.images import STORED_SIZE, list_images, open_stored, read_rgb
from pipeline.paths import utf8_name
from pipeline.scaling import area_scale
from pipeline.splits import rows_of


@dataclass(frozen=True)
class Picture:
    """An image that is measured: `read` gives it as stage 1 stores it, (256, 256, 3) uint8; `digest` is its hash."""

    name: str
    digest: str
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Item:
    """What is scored at once: `make` gives an original and its copies by spoiling, for a crop (height, width)."""

    name: str
    digest: str
    make: Callable[[tuple[int, int]], tuple[np.ndarray, dict[str, Copy]]]


def stored_pictures(path: Path, names: Sequence[str]) -> list[Picture]:
    """The images of stage 1 in `path` that are called so; a UserError where a name is of none, or of several."""
    images, facts = open_stored(path)

    def picture(row: int) -> Picture:
        return Picture(facts["names"][row], array_files.hash_rows(images[row]), lambda: np.array(images[row]))

    return [picture(row) for row in rows_of(names, facts["names"], "the checkpoint")]


def pictures_inside(folder: Path) -> list[Picture]:
    """The images of a folder, which are brought to the size of stage 1 as it does; damaged ones are left out.

    Raises:
        UserError: there are none.
    """

    def picture(name: str, path: Path) -> Picture:
        return Picture(utf8_name(name), file_hash(path), lambda: area_scale(read_rgb(path), STORED_SIZE, STORED_SIZE))

    files, _ = list_images([str(folder)])
    whole = set(whole_images(list(files.values()))[0])
    return [picture(name, path) for name, path in files.items() if path in whole]


def items_of(pictures: Sequence[Picture], wanted: list[str], seed: int) -> list[Item]:
    """Every picture with its spoiled copies; what is pasted is cut from another one, which the seed draws.

    Raises:
        UserError: there are fewer than two.
    """
    if len(pictures) < 2:
        raise UserError("one image has no other to paste a piece of: give two or more")

    def item(number: int, picture: Picture) -> Item:
        """A picture with its copies."""
        others = [*pictures[:number], *pictures[number + 1 :]]
        other = others[np.random.default_rng(seed_for(seed, "other", picture.name)).integers(len(others))]

        def make(crop: tuple[int, int]) -> tuple[np.ndarray, dict[str, Copy]]:
            original = central_part(picture.read(), *crop)
            return original, spoiling.copies(original, central_part(other.read(), *crop), picture.name, wanted, seed)

        return Item(picture.name, picture.digest, make)

    return [item(number, picture) for number, picture in enumerate(pictures)]


def reconstruction_items(folders: Sequence[Path]) -> tuple[list[Item], dict[str, str]]:
    """The images that reconstruct.py inverted with what it made of them, and what each kind of copy is.

    Copies are called `reconstruction <regulariser>`; images that some regulariser lacks go without that copy.
    """
    by_model = group_by_model(find_results(list(folders))) if folders else {}
    about = {f"reconstruction {name}": f"what reconstruct.py makes with {name} of the feature" for name in by_model}

    def item(image: str) -> Item:
        """An inverted image with what was made of it."""
        results = {f"reconstruction {name}": found[image] for name, found in by_model.items() if image in found}
        original = next(iter(results.values()))

        def make(_: tuple[int, int]) -> tuple[np.ndarray, dict[str, Copy]]:
            copies = {name: Copy(spoiling.to_bytes(result.read())) for name, result in results.items()}
            return read_original(original), copies

        digests = [file_hash(result.folder / "reconstruction.npy") for result in results.values()]
        return Item(f"reconstructed {image.rpartition(' ')[0]}", text_sha256("".join(digests)), make)

    return [item(image) for image in sorted(set().union(*by_model.values()))], about
