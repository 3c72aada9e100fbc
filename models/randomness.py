"""Seeds as functions of what is drawn, so that a resumed run draws what an undisturbed one would."""

import hashlib

import numpy as np


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed from a run's seed and the name of the thing to draw, e.g. `seed_for(0, "batch", 17)`."""
    digest = hashlib.sha256("/".join(str(p) for p in parts).encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def split_images(count: int, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of the training and of the held-out images; never more than a tenth is held out."""
    held = np.sort(np.random.default_rng(seed_for(seed, "held out")).permutation(count)[: min(held_out, count // 10)])
    return np.setdiff1d(np.arange(count), held), held
