"""The measures against numbers worked out by hand, and their extremes."""

import cv2
import numpy as np
import pytest

from keysync_jax.metrics.leakage import (
    lip_leak,
    lip_leak_lite,
    lip_leak_of_stds,
    lip_sync_difference,
    source_correlation,
)
from keysync_jax.metrics.quality import (
    flicker,
    flicker_ratio,
    laplacian_variance,
    psnr,
    sharpness_ratio,
    ssim_map,
)
from keysync_jax.metrics.sync import (
    best_lag,
    correlation,
    lagged_correlation,
    mean_correlation,
    mean_lag,
    pooled_correlation,
)


@pytest.fixture
def series() -> np.ndarray:
    return np.random.default_rng(0).normal(size=80)


def test_correlation_is_pearsons() -> None:
    # Centred: (-1, 0, 1) and (-2, 1, 1); 3 / sqrt(2 * 6).
    assert correlation(np.array([1, 2, 3]), np.array([0, 3, 3])) == pytest.approx(3 / np.sqrt(12))


def test_correlation_ignores_offset_and_gain_but_not_sign(series: np.ndarray) -> None:
    assert correlation(series, 3 * series + 7) == pytest.approx(1)
    assert correlation(series, -0.01 * series) == pytest.approx(-1)


def test_correlation_of_unrelated_series_is_near_zero() -> None:
    a, b = np.random.default_rng(1).normal(size=(2, 20_000))
    assert abs(correlation(a, b)) < 0.03


@pytest.mark.parametrize("still", [np.zeros(80), np.full(80, 0.1), np.full(80, 0.1, np.float32)])
def test_a_mouth_that_does_not_move_follows_nothing(series: np.ndarray, still: np.ndarray) -> None:
    assert correlation(series, still) == 0
    assert correlation(still, series) == 0


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros(3), np.zeros(4), r"got \(3,\) and \(4,\)"),
        (np.zeros(1), np.zeros(1), "two or more"),
        (np.array([0.0, np.nan]), np.zeros(2), "not finite"),
    ],
)
def test_correlation_refuses_what_it_cannot_compare(a: np.ndarray, b: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        correlation(a, b)


def test_mean_and_pooled_correlation_differ_by_the_clips_offsets() -> None:
    up = np.array([0.0, 1, 2])
    pairs = [(up, up), (up, up + 10)]
    assert mean_correlation(pairs) == pytest.approx(1)
    # Pooled and centred: (-1, 0, 1) twice and (-6, -5, -4, 4, 5, 6).
    assert pooled_correlation(pairs) == pytest.approx(4 / np.sqrt(4 * 154))


def test_mean_correlation_weighs_clips_alike() -> None:
    up = np.array([0.0, 1, 2])
    assert mean_correlation([(up, up), (up, -up), (up, np.ones(3))]) == pytest.approx(0)


@pytest.mark.parametrize("measure", [mean_correlation, pooled_correlation, mean_lag, source_correlation])
def test_no_clip_is_an_error(measure) -> None:
    with pytest.raises(ValueError, match="no clip"):
        measure([])


@pytest.mark.parametrize("late", [-5, -2, 0, 3, 5])
def test_the_lag_of_a_delayed_mouth_is_its_delay(series: np.ndarray, late: int) -> None:
    mouth, truth = series[10 - late : 70 - late], series[10:70]
    assert best_lag(mouth, truth) == late
    assert lagged_correlation(mouth, truth, late) == pytest.approx(1)
    assert mean_lag([(mouth, truth), (-2 + 3 * mouth, truth)]) == late


def test_a_still_mouth_has_no_lag(series: np.ndarray) -> None:
    assert best_lag(np.ones(80), series) == 0


def test_lip_leak_is_a_ratio_of_deviations() -> None:
    # Deviations 0.1 and 0.2.
    assert lip_leak(np.array([0.1, 0.3]), np.array([0.2, 0.6, 0.2, 0.6])) == pytest.approx(0.1 / 0.20001)


def test_lip_leak_extremes(series: np.ndarray) -> None:
    assert lip_leak(np.full(50, 0.04), series) == pytest.approx(0, abs=1e-12)
    assert lip_leak(series, series) == pytest.approx(1, abs=1e-4)
    assert lip_leak(series, np.zeros(9)) == pytest.approx(series.std() / 1e-5)


def test_lip_leak_lite_is_the_share_of_open_mouths() -> None:
    mar = np.array([0.0, 0.25, 0.26, 0.9])
    assert lip_leak_lite(mar) == 0.5
    assert lip_leak_lite(mar, threshold=0.2) == 0.75
    assert lip_leak_lite(mar, threshold=1) == 0


@pytest.mark.parametrize("mar", [np.zeros(0), np.array([0.1, np.nan])])
def test_leakage_of_nothing_is_an_error(mar: np.ndarray) -> None:
    with pytest.raises(ValueError, match="finite MAR"):
        lip_leak(mar, np.ones(3))
    with pytest.raises(ValueError, match="finite MAR"):
        lip_leak_lite(mar)


def test_source_correlation_tells_a_copy_from_a_mouth_of_its_own() -> None:
    source, own = np.random.default_rng(2).normal(size=(2, 5000))
    assert source_correlation([(source, source)]) == pytest.approx(1)
    assert abs(source_correlation([(own, source)])) < 0.05


def test_psnr_of_a_known_difference() -> None:
    a = np.full((2, 4, 6, 3), 100, np.uint8)
    assert psnr(a, a - 5) == pytest.approx(20 * np.log10(255 / 5))
    assert psnr(a - 5, a) == psnr(a, a - 5)
    assert psnr(a[0], a[0]) == np.inf
    assert psnr(np.zeros_like(a), np.full_like(a, 255)) == 0


def test_psnr_counts_the_region_alone() -> None:
    a = np.full((2, 4, 6, 3), 100, np.uint8)
    b = a.copy()
    b[:, 1, 2] += 10
    b[0, 0, 0] += 200
    spot = np.zeros((4, 6), bool)
    spot[1, 2:4] = True
    assert psnr(a, b, spot) == pytest.approx(10 * np.log10(255**2 / 50))
    away = np.stack([~spot, ~spot])
    away[0, 0, 0] = False
    assert psnr(a, b, away) == np.inf
    assert psnr(a[1], b[1], spot.astype(np.uint8)) == pytest.approx(10 * np.log10(255**2 / 50))


def test_psnr_refuses_other_shapes_dtypes_and_nothing() -> None:
    a = np.zeros((4, 6, 3), np.uint8)
    with pytest.raises(ValueError, match="equal shapes"):
        psnr(a, a[:2])
    with pytest.raises(ValueError, match="float64"):
        psnr(a, a.astype(float))
    with pytest.raises(ValueError, match="empty"):
        psnr(a, a, np.zeros((4, 6), bool))


def test_flicker_of_known_steps() -> None:
    frames = np.zeros((3, 4, 6, 3), np.uint8)
    frames[1] = 10
    frames[2, ..., 0] = 10
    whole = np.ones((4, 6), bool)
    # Steps of 10, and of 10 less the red's share.
    assert flicker(frames, whole) == pytest.approx((10 + 10 * (1 - 0.299)) / 2)
    assert flicker(iter(frames), whole) == flicker(frames, whole)
    assert flicker(frames[[0, 0, 0]], whole) == 0


def test_flicker_compares_where_both_frames_have_the_region() -> None:
    frames = np.zeros((2, 1, 3, 3), np.uint8)
    frames[1, 0] = [[5], [20], [90]]
    region = np.array([[[1, 1, 0]], [[0, 1, 1]]])
    assert flicker(frames, region) == pytest.approx(20)


def test_flicker_refuses_nothing_to_compare() -> None:
    frames = np.zeros((2, 2, 2, 3), np.uint8)
    with pytest.raises(ValueError, match="two or more frames"):
        flicker(frames[:1], np.ones((2, 2)))
    with pytest.raises(ValueError, match="common region"):
        flicker(frames, np.zeros((2, 2)))
    with pytest.raises(ValueError, match="zip"):
        flicker(frames, np.ones((3, 2, 2)))


def test_sharpness_ratio_is_one_for_the_truth_and_less_for_a_soft_mouth() -> None:
    truth = np.random.default_rng(0).integers(0, 256, (4, 24, 24, 3), np.uint8)
    mouth = np.zeros((24, 24), bool)
    mouth[8:16, 8:16] = True
    soft = truth.copy()
    soft[:, 4:20, 4:20] = np.stack([cv2.GaussianBlur(frame, (5, 5), 1.0) for frame in truth])[:, 4:20, 4:20]
    assert sharpness_ratio(truth, truth, mouth) == 1
    assert sharpness_ratio(soft, truth, mouth) < 0.3
    assert (
        sharpness_ratio(soft, truth, ~cv2.dilate(mouth.astype(np.uint8), np.ones((15, 15))).astype(bool)) == 1
    )
    with pytest.raises(ValueError, match="empty"):
        sharpness_ratio(soft, truth, np.zeros((24, 24), bool))


def test_flicker_ratio_is_one_for_the_truth_and_more_for_noise() -> None:
    rng = np.random.default_rng(3)
    truth = (100 + 20 * np.sin(np.arange(20))[:, None, None, None] * np.ones((1, 8, 8, 3))).astype(np.uint8)
    noisy = (truth + rng.integers(-15, 16, truth.shape)).astype(np.uint8)
    whole = np.ones((8, 8), bool)
    assert flicker_ratio(truth, truth, whole) == 1
    assert flicker_ratio(truth // 2, truth, whole) == pytest.approx(0.5, abs=0.03)
    assert flicker_ratio(noisy, truth, whole) > 1.05
    with pytest.raises(ValueError, match="does not move"):
        flicker_ratio(noisy, truth[[0] * 20], whole)


# Yaman et al. 2025, tables 4 (mismatched), 5 (matched) and 6: (LSE-C, LSE-D) of each system, AR and CR.
LEAKAGE_STUDY = {
    "Wav2Lip": ((7.98, 6.79), (7.35, 7.18), (7.59, 6.75), (7.73, 6.44), 0.56, 0.22),
    "TalkLip": ((6.04, 8.21), (4.80, 9.40), (8.53, 6.08), (9.27, 5.54), 4.16, 2.31),
    "IP-LAP": ((3.63, 10.10), (3.71, 10.02), (5.96, 7.54), (6.49, 7.16), 2.82, 2.45),
    "AVTFG": ((6.90, 8.63), (6.84, 7.90), (7.94, 6.35), (7.95, 6.30), 1.36, 1.66),
    "PLGAN": ((7.95, 6.64), (7.58, 6.81), (7.68, 6.43), (8.41, 6.03), 0.80, 0.24),
    "Diff2Lip": ((7.62, 6.59), (6.71, 7.26), (7.82, 6.48), (7.87, 6.46), 0.98, 0.15),
}
"""System -> mismatched AR, mismatched CR, matched AR, matched CR, LSD-CR, LSD-AR."""


@pytest.mark.parametrize("system", LEAKAGE_STUDY)
def test_the_leakage_studys_table_follows_from_its_other_tables(system: str) -> None:
    other_ar, other_cr, own_ar, own_cr, lsd_cr, lsd_ar = LEAKAGE_STUDY[system]
    assert lip_sync_difference(own_cr, other_cr) == pytest.approx(lsd_cr, abs=0.006)
    assert lip_sync_difference(own_ar, other_ar) == pytest.approx(lsd_ar, abs=0.006)


def test_lip_leak_of_a_set_is_not_decided_by_one_quiet_clip() -> None:
    silent, speech = np.array([0.02, 0.02]), np.array([0.1, 1e-6])
    assert lip_leak_of_stds(silent, speech) == pytest.approx(0.02 / 0.05001, rel=1e-4)
    assert lip_leak_of_stds(np.zeros(2), speech) == lip_leak_of_stds(np.zeros(2), np.zeros(2)) == 0
    with pytest.raises(ValueError, match="finite MAR"):
        lip_leak_of_stds(np.array([np.nan]), speech)


def test_ssim_is_the_formula_under_each_window() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 256, (2, 16, 13, 3), dtype=np.uint8)
    window = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    expected = np.zeros((6, 3))
    for y, x in np.ndindex(6, 3):
        for c in range(3):
            p, q = (v[y : y + 11, x : x + 11, c].astype(float) for v in (a, b))
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            both = (window * (p - mp) * (q - mq)).sum()
            top = (2 * mp * mq + 6.5025) * (2 * both + 58.5225)
            expected[y, x] += top / (mp**2 + mq**2 + 6.5025) / (vp + vq + 58.5225) / 3
    np.testing.assert_allclose(ssim_map(a, b), expected, atol=1e-9)
    np.testing.assert_allclose(ssim_map(a, a), 1)
    for other, match in ((b[:9], "equal shapes"), (b.astype(float), "float64")):
        with pytest.raises(ValueError, match=match):
            ssim_map(a, other)
    with pytest.raises(ValueError, match="11 pixels each way, not 13 x 9"):
        ssim_map(a[:9], b[:9])


def test_sharpness_of_a_checkerboard_and_of_nothing() -> None:
    board = np.where(np.indices((6, 6)).sum(axis=0) % 2, 255, 0).astype(np.uint8)
    # Every pixel's four neighbours are the other colour, mirrored ones at the edge too: -4 x 255 or 4 x 255.
    assert laplacian_variance(np.repeat(board[..., None], 3, axis=-1)) == pytest.approx((4 * 255) ** 2)
    assert laplacian_variance(np.full((6, 6, 3), 90, np.uint8)) == 0
