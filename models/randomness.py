"""Seeds as functions of what is drawn, so that a resumed run draws what an undisturbed one would."""

import hashlib


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed from a run's seed and the name of the thing to draw, e.g. `seed_for(0, "batch", 17)`."""
    digest = hashlib.sha256("/".join(str(p) for p in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
