"""Tolerances from arithmetic: they hold on any processor and for any order of sums."""

import torch
from torch import Tensor


def assert_rounded(found: Tensor, expected: Tensor, terms: int, dtype: torch.dtype | None = None) -> None:
    """Two results of one formula, each rounded `terms` times in a row, differ by no more than that.

    Args:
        terms: of the longest sums on the way, added up.
        dtype: that was rounded to, by default that of `found`.
    """
    epsilon = torch.finfo(dtype or found.dtype).eps  # two results, each off by half of it per rounding
    torch.testing.assert_close(found, expected, rtol=0, atol=terms * epsilon * float(expected.abs().max()))
