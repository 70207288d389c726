"""Distances of sets against what is known of Gaussians and of unit vectors."""

import numpy as np
import pytest

from keysync_jax.metrics import distributions
from keysync_jax.metrics.catalogue import METRICS
from keysync_jax.metrics.distributions import cmmd, frechet_distance
from keysync_jax.metrics.meter import Record, Unavailable
from keysync_jax.metrics.registry import combine


def test_shifted_gaussians_are_apart_by_the_square_of_the_shift() -> None:
    x, shift = np.random.default_rng(0).normal(size=(500, 12)), np.arange(12) / 4
    assert frechet_distance(x, x + shift) == pytest.approx((shift**2).sum())
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_covariances_are_compared_as_the_formula_says() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(1)
    x = rng.normal(size=(300, 8)) @ rng.normal(size=(8, 8))
    y = rng.normal(size=(200, 8)) @ rng.normal(size=(8, 8)) + 1
    s, r = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + r - 2 * linalg.sqrtm(s @ r).real)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(x.astype(np.float32), y.astype(np.float32)) == pytest.approx(expected, rel=1e-4)
    # One deviation a and another b, in D dimensions: D (a - b)^2.
    z = rng.normal(size=(4000, 3))
    z -= z.mean(axis=0)
    assert frechet_distance(z, 3 * z) == pytest.approx(4 * np.trace(np.cov(z.T)))


def test_few_samples_of_one_distribution_are_apart() -> None:
    """The bias that reports must state: 2048 of 400 dimensions are 40 apart, 100 are 482."""
    x, y = np.random.default_rng(2).normal(size=(2, 100, 40))
    few, many = frechet_distance(x, y), frechet_distance(*np.random.default_rng(3).normal(size=(2, 2000, 40)))
    assert many < 1 < 5 < few


def test_cmmd_is_the_mean_shift_and_does_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(70, 24)) + 1, rng.normal(size=(90, 24)) + 1.3
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    found = cmmd(x, y)
    assert found == pytest.approx(10 * ((a.mean(0) - b.mean(0)) ** 2).sum(), rel=0.02)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)
    kernel = [np.exp(-((p[:, None] - q) ** 2).sum(-1) / 200).mean() for p, q in ((a, a), (b, b), (a, b))]
    assert found == pytest.approx(1000 * (kernel[0] + kernel[1] - 2 * kernel[2]), rel=1e-9)
    monkeypatch.setattr(distributions, "_BLOCK", 16)
    assert cmmd(x, y) == pytest.approx(found, rel=1e-9)
    assert frechet_distance(x, y) > 0


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="two or more rows"):
        frechet_distance(np.zeros((1, 3)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="one width"):
        frechet_distance(np.zeros((4, 3)), np.zeros((5, 2)))
    with pytest.raises(ValueError, match="no embedding"):
        cmmd(np.zeros((0, 3)), np.zeros((5, 3)))


@pytest.mark.parametrize(("metric", "series"), [("fid", "inception"), ("cmmd", "clip"), ("fvd", "i3d")])
def test_sets_of_clips_are_joined(metric: str, series: str) -> None:
    rng = np.random.default_rng(5)
    clips = [rng.normal(size=(n, 6)) for n in (4, 9, 7)]
    records = [Record(series={series: x}) for x in clips]
    shifted = [Record(series={series: x + 1}) for x in clips]
    assert METRICS[metric].resampling == "halves"
    assert combine(metric, {"dub": records, "real": records}) == pytest.approx(0, abs=1e-9)
    found = combine(metric, {"dub": records, "real": shifted})
    assert isinstance(found, float)
    assert found > 1
    lacking = combine(metric, {"dub": records, "real": [*shifted[:2], Record()]})
    assert str(lacking) == f"not available: every clip needs its features of {series}"
    told = Record(missing={metric: Unavailable("needs its weights")})
    assert str(combine(metric, {"dub": records, "real": [told]})) == "not available: needs its weights"
