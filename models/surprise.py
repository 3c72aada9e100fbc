"""Surprise in the word's own sense: how improbable an error of prediction is, not how large.

differs from the paper, whose maps hold mean squared errors. Nothing of it is a default.
"""

import torch
from torch import Tensor

from models.vlm import accumulation_type

SHRINKAGE = 0.1  # so that few errors of many components have an invertible covariance too


def surprise(errors: Tensor) -> Tensor:
    """Squared Mahalanobis distance of error vectors, over D: (T, B, D) -> (T, B), about 1 on average.

    It is, but for a constant and the factor 2 / D, the negative log-likelihood of each under a Gaussian of mean 0 whose
    covariance Σ is that of all these errors, of one direction in one image: e' Σ⁻¹ e / D. Σ is shrunk by a tenth to a
    multiple of the identity (Ledoit & Wolf 2004, with a fixed share). Errors that are all zero have no surprise.
    """
    vectors = errors.flatten(0, 1).to(accumulation_type(errors))  # (K, D)
    count, size = vectors.shape
    covariance = vectors.T @ vectors / count  # (D, D)
    mean_variance = covariance.trace() / size
    covariance = (1 - SHRINKAGE) * covariance
    covariance.diagonal().add_((SHRINKAGE * mean_variance).clamp_min(torch.finfo(covariance.dtype).tiny))
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), vectors.T, upper=False)  # (D, K)
    return whitened.square().mean(dim=0).reshape(errors.shape[:2])
