"""Intervals that cover, tests with known answers, and distances whose bias is told."""

import numpy as np
import pytest

from keysync_jax.evaluation.statistics import (
    Resampling,
    compare,
    distance,
    holm,
    lsd,
    permutation_test,
    shift,
    wilcoxon,
)

# Of arXiv 2511.08613: table 5 (AM) and 4 (XM), LSE-C and LSE-D as (AR, CR); table 6 as (LSD-CR, LSD-AR).
STUDY = {
    "Wav2Lip": (((7.59, 6.75), (7.73, 6.44)), ((7.98, 6.79), (7.35, 7.18)), (0.56, 0.22)),
    "TalkLip": (((8.53, 6.08), (9.27, 5.54)), ((6.04, 8.21), (4.80, 9.40)), (4.16, 2.31)),
    "IP-LAP": (((5.96, 7.54), (6.49, 7.16)), ((3.63, 10.10), (3.71, 10.02)), (2.82, 2.45)),
    "AVTFG": (((7.94, 6.35), (7.95, 6.30)), ((6.90, 8.63), (6.84, 7.90)), (1.36, 1.66)),
    "PLGAN": (((7.68, 6.43), (8.41, 6.03)), ((7.95, 6.64), (7.58, 6.81)), (0.80, 0.24)),
    "Diff2Lip": (((7.82, 6.48), (7.87, 6.46)), ((7.62, 6.59), (6.71, 7.26)), (0.98, 0.15)),
}


@pytest.mark.parametrize("system", STUDY)
def test_lsd_of_the_studys_tables(system: str) -> None:
    matched, mismatched, (current, alternative) = STUDY[system]
    found = lsd(np.array(matched), np.array(mismatched))
    np.testing.assert_allclose(found, [alternative, current], atol=0.006)


def test_an_interval_covers_as_often_as_it_says() -> None:
    """Means of 40 exponential clips; a percentile interval is a little short on skewed ones."""
    rng, inside = np.random.default_rng(0), 0
    for n in range(400):
        found = Resampling([str(i) for i in range(40)], draws=400, seed=n).mean(rng.exponential(size=40))
        inside += found.low <= 1 <= found.high
    assert 0.90 <= inside / 400 <= 0.97


def test_clips_of_a_speaker_are_drawn_together() -> None:
    """12 speakers with 10 clips each, which differ by speaker: drawing clips would promise too much."""
    rng, covered = np.random.default_rng(1), {"clip": 0, "speaker": 0}
    speakers = [f"s{i // 10}" for i in range(120)]
    for n in range(300):
        values = np.repeat(rng.normal(size=12), 10) + 0.3 * rng.normal(size=120)
        for unit, names in (("clip", [str(i) for i in range(120)]), ("speaker", speakers)):
            found = Resampling(names, draws=300, seed=n).mean(values)
            covered[unit] += found.low <= 0 <= found.high
    assert covered["speaker"] / 300 >= 0.86
    assert covered["clip"] / 300 <= 0.6


def test_all_metrics_and_systems_share_their_draws() -> None:
    first, second = (Resampling(["a", "b", "b", "c"], draws=50, seed=7) for _ in range(2))
    np.testing.assert_array_equal(first.weights, second.weights)
    np.testing.assert_array_equal(first.weights[:, 1], first.weights[:, 2])
    values = np.arange(8.0).reshape(4, 2)
    np.testing.assert_allclose(first.means(values)[:, 1], first.means(values[:, 1]))
    np.testing.assert_allclose(first.means(np.full(4, 3.5)), 3.5)


def test_a_difference_is_drawn_as_a_difference() -> None:
    """Clips that differ much and systems that differ little: the pairs show it, two intervals would not."""
    rng = np.random.default_rng(2)
    clips = 10 * rng.normal(size=30)
    better = clips + 0.5 + 0.1 * rng.normal(size=30)
    resampling = Resampling([str(i) for i in range(30)], seed=0)
    first, second = resampling.mean(better), resampling.mean(clips)
    assert first.low < second.high
    found = compare(better, clips, resampling)
    assert 0.4 < found.difference.low < found.difference.high < 0.6
    assert found.permutation < 0.001
    assert found.wilcoxon is not None
    assert found.wilcoxon < 0.001
    assert 0.02 < found.visible < 0.1
    same = compare(clips, clips, resampling)
    assert (same.difference.value, same.permutation, same.wilcoxon) == (0, 1, None)


def test_permutations_are_counted_exactly_where_they_are_few() -> None:
    """Of 2^4 signs two reach |1 + 2 + 3 + 4|; of 2^3 with a 0 among them four reach 3."""
    assert permutation_test(np.array([1.0, 2, 3, 4])) == 2 / 16
    assert permutation_test(np.array([1.0, 2, 0])) == 4 / 8
    rng = np.random.default_rng(3)
    several = [permutation_test(rng.normal(size=20), seed=n, draws=500) for n in range(200)]
    assert 0.02 <= np.mean(np.array(several) <= 0.05) <= 0.09


def test_wilcoxon_and_holm_by_hand() -> None:
    # All of 6 positive: p = 2 / 2^6.
    assert wilcoxon(np.arange(1.0, 7)) == pytest.approx(2 / 64)
    assert wilcoxon(np.zeros(5)) is None
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})


def test_lsd_knows_what_chance_gives() -> None:
    rng = np.random.default_rng(4)
    resampling = Resampling([str(i) for i in range(60)], seed=0)
    sync = np.array([7.0, 7.0]) + rng.normal(size=(60, 2))
    nothing = shift(sync, np.array([7.0, 7.0]) + rng.normal(size=(60, 2)), resampling)
    assert nothing.p > 0.05
    # Of two means of |N(0, s)|, s = sqrt(2 / 60): .8 s.
    assert nothing.chance == pytest.approx(0.8 * np.sqrt(2 / 60), rel=0.15)
    leaking = shift(sync, sync + [-1.0, 2.0] + 0.5 * rng.normal(size=(60, 2)), resampling)
    assert leaking.p < 0.001
    assert leaking.value.low < 1.5 < leaking.value.high
    assert leaking.signed[0] > 0 > leaking.signed[1]


def test_a_distance_of_sets_tells_its_bias() -> None:
    """|mean difference|^2 in 20 dimensions: two halves of one set are 2 * 20 / (n / 2) apart."""
    rng, n = np.random.default_rng(5), 40
    real = rng.normal(size=(n, 20))
    fake = real + 1.0

    def between(a: np.ndarray, b: np.ndarray) -> float:
        return float(((real[a].mean(0) - fake[b].mean(0)) ** 2).sum())

    def within(a: np.ndarray, b: np.ndarray) -> float:
        return float(((real[a].mean(0) - real[b].mean(0)) ** 2).sum())

    found = distance(between, within, n)
    assert found.value == pytest.approx(20)
    assert found.halves.clips == n // 2
    assert found.bias == pytest.approx(2 * 20 / (n / 2), rel=0.35)
    with pytest.raises(ValueError, match="4 clips"):
        distance(between, within, 3)


def test_a_single_speaker_has_no_interval() -> None:
    found = Resampling(["a", "a"], draws=20).mean(np.array([1.0, 2.0]))
    assert (found.value, found.clips) == (1.5, 2)
    assert np.isnan([found.low, found.high]).all()
