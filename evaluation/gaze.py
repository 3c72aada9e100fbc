"""Fixations from the raw gaze of an eye tracker, as MIT1003's authors found them.

The rule is that of `checkFixations.m` in the data set's own code archive (B. Hidalgo-Sotelo 2005, T. Judd 2009): a
saccade begins where the gaze accelerates and ends where it has slowed down; what lies between saccades is a fixation.
"""

import numpy as np

RATE = 240  # samples per second
ACCELERATION = 6 * 34  # 6 degrees per second of 34 pixels, gained from one sample to the next
WINDOW = 4  # samples over which speed is averaged
RUN = 3  # samples in a row above ACCELERATION that make a saccade
SEARCH = 25  # samples after which a deceleration no longer belongs to it
SHORTEST = 12  # samples (50 ms) that a pause between two saccades must exceed to be a fixation


def fixation_centres(gaze: np.ndarray) -> np.ndarray:
    """Median position (K, 2) of every fixation in a trial's gaze (T, 2), in the order of time.

    Lost samples may be NaN, or negative as in MIT1003: a fixation among these has a median outside the image. Without
    saccades the whole trial is one fixation; without a sample there is none.
    """
    gaze = np.asarray(gaze, dtype=np.float64)
    starts, ends = [0], []
    for first, last in _saccades(_acceleration(gaze), len(gaze)):
        ends.append(first)
        starts.append(last + 1)
    pieces = [gaze[start:end] for start, end in zip(starts, [*ends, len(gaze)], strict=True) if end > start]
    seen = [[column[~np.isnan(column)] for column in piece.T] for piece in pieces]
    return np.array([[np.median(values) if values.size else np.nan for values in columns] for columns in seen])


def _acceleration(gaze: np.ndarray) -> np.ndarray:
    """(T,) gain of speed in pixels per second between two overlapping windows that start at a sample and the next."""
    gain = np.zeros(len(gaze))
    if len(gaze) <= WINDOW + 2:
        return gain
    distance = np.concatenate(([0.0], np.hypot(*np.diff(gaze, axis=0).T)))  # (T,)
    smooth = np.convolve(distance, np.full(WINDOW, 1 / WINDOW))[: len(gaze)]
    # Sums over the samples k+1 … k+WINDOW+1 and k … k+WINDOW: all but their ends cancel. The first sample has none.
    gain[1 : -WINDOW - 1] = (smooth[WINDOW + 2 :] - smooth[1 : -WINDOW - 1]) * (RATE / WINDOW)
    return gain


def _saccades(gain: np.ndarray, samples: int) -> list[tuple[int, int]]:
    """First and last sample of every saccade; those with too short a pause between them are one."""
    found: list[tuple[int, int]] = []
    above = np.flatnonzero(gain > ACCELERATION)
    runs = [run for run in np.split(above, np.flatnonzero(np.diff(above) > 1) + 1) if len(run) >= RUN]
    for run in runs:
        end = _end_of_saccade(gain, int(run[-1]), samples)
        if end is None and len(runs) == 1 and run[-1] == np.flatnonzero(gain)[-1]:
            end = samples - 1  # the trial ended before the gaze could slow down
        if end is None:
            continue
        if found and run[0] - found[-1][1] <= SHORTEST:
            found[-1] = (found[-1][0], end)
        else:
            found.append((int(run[0]), end))
    if found and samples - 1 - found[-1][1] <= SHORTEST:
        found[-1] = (found[-1][0], samples - 1)
    return found


def _end_of_saccade(gain: np.ndarray, last: int, samples: int) -> int | None:
    """The last sample of the deceleration that follows sample `last`, or None if there is none in time."""
    slowing = gain < -ACCELERATION
    for place in range(last + 1, last + 1 + SEARCH):
        if place > last + 1 and place + 2 >= samples:
            return None
        if slowing[place] and not slowing[place + 1]:
            return place
    return None
