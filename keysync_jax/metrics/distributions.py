"""Distances between two sets of pictures or clips, by the features of a network: Fréchet distance and CMMD.

Both compare samples, and both are too large for small ones: even two halves of one set are apart. So they are
compared at equal numbers alone, beside the distance of two halves of the real set.
"""

import numpy as np

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0

_BLOCK = 2048


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|m - n|^2 + tr(S + R - 2 (S R)^(1/2)) of means and covariances of features; 0 or more, lower is better.

    FID with the features of Inception, FVD with those of I3D (Heusel et al. 2017, Unterthiner et al. 2018).
    The trace of the root is the sum of the roots of the eigenvalues of S R, here of the symmetric S^(1/2) R
    S^(1/2),
    which has the same ones: no root of a matrix that need not have a real one.

    Args:
      a, b: features `[N, D]` and `[M, D]`, two or more rows each.

    Raises:
      ValueError: there are too few rows, or the widths differ.
    """
    (mean_a, cov_a), (mean_b, cov_b) = _moments(a), _moments(b)
    if len(mean_a) != len(mean_b):
        raise ValueError(f"expected features of one width, got {len(mean_a)} and {len(mean_b)}")
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    crossed = np.linalg.eigvalsh(root @ cov_b @ root)
    difference = mean_a - mean_b
    trace = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(np.maximum(crossed, 0)).sum()
    return float(difference @ difference + max(trace, 0.0))


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean `[D]` and unbiased covariance `[D, D]`, float64, in blocks of rows."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError("a covariance needs two or more rows of features")
    mean = features.mean(axis=0, dtype=np.float64)
    total = np.zeros((len(mean), len(mean)))
    for first in range(0, len(features), _BLOCK):
        centred = features[first : first + _BLOCK] - mean
        total += centred.T @ centred
    return mean, total / (len(features) - 1)


def cmmd(a: np.ndarray, b: np.ndarray, sigma: float = CMMD_SIGMA) -> float:
    """Squared maximum mean discrepancy of CLIP embeddings, times 1000; 0 or more, lower is better.

    Jayasumana et al. 2024: the V-statistic (the diagonals are counted) with a Gaussian kernel. Embeddings are
    scaled to length 1 here. For sigma 10 it is 10 |mean a - mean b|^2 to a percent.

    Args:
      a, b: embeddings `[N, D]` and `[M, D]`.

    Raises:
      ValueError: one of them is empty.
    """
    if not len(a) or not len(b):
        raise ValueError("no embedding to compare")
    x, y = (
        v / np.linalg.norm(v, axis=1, keepdims=True) for v in (np.asarray(a, float), np.asarray(b, float))
    )
    return CMMD_SCALE * (_kernel(x, x, sigma) + _kernel(y, y, sigma) - 2 * _kernel(x, y, sigma))


def _kernel(x: np.ndarray, y: np.ndarray, sigma: float) -> float:
    """Mean of exp(-|x_i - y_j|^2 / (2 sigma^2)) over all pairs of rows of length 1, block by block."""
    total = 0.0
    for first in range(0, len(x), _BLOCK):
        rows = x[first : first + _BLOCK]
        for start in range(0, len(y), _BLOCK):
            squares = 2 - 2 * rows @ y[start : start + _BLOCK].T
            total += float(np.exp(-np.maximum(squares, 0) / (2 * sigma**2)).sum())
    return total / (len(x) * len(y))
