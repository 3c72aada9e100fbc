"""Area averaging: an output pixel is the mean of the rectangle of the source that it covers."""

from functools import lru_cache

import numpy as np

ROWS_AT_ONCE = 32  # so that what is summed stays in the processor's cache


@lru_cache(maxsize=256)
def _shares(size: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `size` pixels each of `cells` equal cells of a line covers, and how much of them.

    Returns:
        taps (k, cells), indices of pixels; shares (k, cells), integers in units of 1/cells pixel. The shares of a
        cell add up to `size`; where it covers fewer than k pixels, the last shares are 0.
    """
    edges = np.arange(cells + 1) * size
    first = edges[:-1] // cells
    most = int((-(-edges[1:] // cells) - first).max())
    taps = first + np.arange(most)[:, None]  # (k, cells)
    shares = np.minimum(edges[1:], (taps + 1) * cells) - np.maximum(edges[:-1], taps * cells)
    return np.minimum(taps, size - 1), np.maximum(shares, 0)


def _summed(values: np.ndarray, taps: np.ndarray, shares: np.ndarray, axis: int) -> np.ndarray:
    """Weighted sums along an axis, in the shares' type."""
    total = np.take(values, taps[0], axis=axis) * shares[0]
    for tap, share in zip(taps[1:], shares[1:], strict=True):
        total += np.take(values, tap, axis=axis) * share
    return total


def area_means(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W) or (H, W, C) -> float64 (height, width) or (height, width, C), shrunk or enlarged by area averaging.

    Of bytes the means are exact but for one rounding, so that truncating them is exact.
    """
    h, w, *channels = values.shape
    flat = values.reshape(h, -1)  # (H, W·C)
    count = flat.shape[1] // w
    exact = np.float32 if values.dtype == np.uint8 and h < 2**16 else np.float64  # holds 255·H
    row_taps, row_shares = _shares(h, height)
    row_shares = row_shares[:, :, None].astype(exact)
    taps, shares = _shares(w, width)
    taps = (taps[:, :, None] * count + np.arange(count)).reshape(len(taps), -1)  # (k, width·C)
    shares = np.repeat(shares, count, axis=1).astype(np.float64)
    means = np.empty((height, width * count))
    for start in range(0, height, ROWS_AT_ONCE):
        block = slice(start, start + ROWS_AT_ONCE)
        rows = _summed(flat, row_taps[:, block], row_shares[:, block], axis=0)  # (rows, W·C)
        np.divide(_summed(rows.astype(np.float64), taps, shares, axis=1), h * w, out=means[block])
    return means.reshape(height, width, *channels)


def area_scale(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3) -> (height, width, 3): exact area means, truncated to 8 bits (original code: `-scale`)."""
    if rgb.shape[:2] == (height, width):
        return rgb
    return area_means(rgb, height, width).astype(np.uint8)
