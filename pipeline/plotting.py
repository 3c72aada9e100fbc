"""The one place that imports matplotlib: neither the environment nor a user's settings change a figure."""

import os
import warnings
from functools import cache
from typing import Any


@cache
def without_figures() -> Any:
    """matplotlib with its own style, drawing to files only, whatever MPLBACKEND and matplotlibrc files say."""
    os.environ["MPLBACKEND"] = "agg"  # read, and refused where it is unknown, when it is imported
    import matplotlib

    warnings.filterwarnings("ignore", "Glyph")  # letters of a name that no font has
    matplotlib.rcdefaults()
    matplotlib.use("agg")
    return matplotlib


@cache
def matplotlib() -> Any:
    """The same with its figures, which take longer to import than all else of it."""
    found = without_figures()
    import matplotlib.figure  # noqa: F401 (what is found has it then)

    return found


def colormap(name: str) -> Any:
    """A colour map: values (…) in 0…1 -> (…, 4) RGBA in 0…1."""
    return without_figures().colormaps[name]
