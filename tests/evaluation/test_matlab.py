"""MATLAB files: values equal to those that scipy reads. What is damaged or means harm: see test_fixations.py."""

import struct

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from evaluation.matlab import read_matlab


@pytest.mark.parametrize("compressed", [False, True])
def test_matlab_values_equal_scipys(tmp_path, compressed):
    path = tmp_path / "x.mat"
    numbers = {f"n{k}": np.arange(24).reshape(2, 3, 4).astype(k) for k in "bBhHiIqQfd"}
    savemat(path, {**numbers, "text": "häß€", "flag": np.eye(3, dtype=bool)}, do_compression=compressed)
    ours, theirs = read_matlab(path, (*numbers, "text", "flag")), loadmat(path)
    assert ours["text"] == theirs["text"][0] == "häß€"
    for name in (*numbers, "flag"):
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_big_endian_file(tmp_path):
    matrix = struct.pack(">IIII", 6, 8, 6, 0) + struct.pack(">IIii", 5, 8, 1, 2) + struct.pack(">HH4s", 1, 1, b"v")
    matrix += struct.pack(">IIdd", 9, 16, 1.5, -2)
    path = tmp_path / "x.mat"
    header = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(">H", 0x0100) + b"MI"
    path.write_bytes(header + struct.pack(">II", 14, len(matrix)) + matrix)
    np.testing.assert_array_equal(loadmat(path)["v"], [[1.5, -2]])
    np.testing.assert_array_equal(read_matlab(path, ["v"])["v"], [[1.5, -2]])
