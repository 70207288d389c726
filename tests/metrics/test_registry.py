"""The registry: one pass for all metrics, and a sentence wherever there is no number."""

import dataclasses
import importlib
from pathlib import Path

import numpy as np
import pytest

from keysync_jax.extras import EXTRAS
from keysync_jax.metrics.catalogue import MEASURES, METRICS, WEIGHTS
from keysync_jax.metrics.landmarks import landmark_distance
from keysync_jax.metrics.meter import NEEDS, Moment, Record, Subject, Unavailable
from keysync_jax.metrics.quality import laplacian_variance, psnr, ssim_map
from keysync_jax.metrics.registry import Bench, combine, provenance, unavailable

ROOT = Path(__file__).parents[2]
PLAIN = [name for name, measure in MEASURES.items() if not measure.weights and not measure.packages]


def a_face(frames: int = 6) -> np.ndarray:
    """Landmarks `[T, 68, 2]` whose inner lips open and close; the rest stays."""
    points = np.random.default_rng(0).uniform(10, 50, (68, 2))
    points[60:68] = [[20, 40], [24, 40], [28, 40], [32, 40], [36, 40], [32, 40], [28, 40], [24, 40]]
    landmarks = np.repeat(points[None], frames, axis=0)
    landmarks[:, 65:68, 1] += 16 * np.linspace(0, 0.5, frames)[:, None]
    return landmarks


def pictures(seed: int, frames: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 48, 40, 3), dtype=np.uint8)


def measured(bench: Bench, subject: Subject, moments: list[Moment]) -> Record:
    reading = bench.start(subject)
    for moment in moments:
        reading.update(moment)
    return reading.result()


def test_each_row_names_what_exists() -> None:
    for metric in METRICS.values():
        assert metric.measure in MEASURES, metric.name
        assert set(metric.needs) <= set(NEEDS), metric.name
        assert bool(metric.runs) == (metric.combine is not None), metric.name
    for name, measure in MEASURES.items():
        module, _, function = measure.opens.partition(":")
        assert callable(getattr(importlib.import_module(f"keysync_jax.metrics.{module}"), function)), name
        assert set(measure.weights) <= set(WEIGHTS), name
        assert set(measure.packages) <= set(EXTRAS), name
        assert bool(measure.packages) == bool(measure.extra), name
    assert {m.measure for m in METRICS.values()} == set(MEASURES)


def test_identical_videos_have_the_best_numbers() -> None:
    frames, landmarks = pictures(0), a_face()
    mask = np.zeros((48, 40), bool)
    mask[20:40, 5:30] = True
    subject = Subject(6, frozenset({"source", "truth", "mask"}), None, landmarks, landmarks)
    moments = [Moment(x, x, x, mask) for x in frames]
    record = measured(Bench([n for n, m in METRICS.items() if m.measure in PLAIN]), subject, moments)
    for region in ("", "_inside", "_outside"):
        assert record.values[f"psnr{region}"] == np.inf
        assert record.values[f"ssim{region}"] == pytest.approx(1)
    assert record.values["lmd"] == record.values["lmd_sum"] == record.values["lmd_eyes"] == 0
    assert record.values["vl"] == pytest.approx(np.mean([laplacian_variance(x) for x in frames]))
    assert record.values["mar_std"] == pytest.approx(np.linspace(0, 0.5, 6).std())
    assert record.values["mar_open"] == 0.5
    np.testing.assert_allclose(record.series["mar"], np.linspace(0, 0.5, 6), atol=1e-6)
    assert not record.missing


def test_streaming_gives_what_the_functions_of_whole_clips_give() -> None:
    frames, truth, source = pictures(1), pictures(2), pictures(3)
    mask = np.random.default_rng(4).random((6, 48, 40)) < 0.5
    subject = Subject(6, frozenset({"source", "truth", "mask"}))
    moments = [Moment(*x) for x in zip(frames, source, truth, mask, strict=True)]
    values = measured(Bench(["psnr"]), subject, moments).values
    assert values["psnr"] == pytest.approx(psnr(frames, truth))
    assert values["psnr_inside"] == pytest.approx(psnr(frames, truth, mask))
    assert values["psnr_outside"] == pytest.approx(psnr(frames, source, ~mask))
    maps = [ssim_map(a, b) for a, b in zip(frames, truth, strict=True)]
    assert values["ssim"] == pytest.approx(np.mean(maps))
    inside = [m[k[5:-5, 5:-5]].mean() for m, k in zip(maps, mask, strict=True)]
    assert values["ssim_inside"] == pytest.approx(np.mean(inside))


def test_pictures_are_compared_in_the_declared_square() -> None:
    frames, truth = pictures(1), pictures(2)
    boxes = np.array([[x, 3, x + 20, 23] for x in range(6)])
    values = measured(
        Bench(["psnr", "vl"]),
        Subject(6, frozenset({"truth"}), boxes=boxes),
        [Moment(a, truth=b) for a, b in zip(frames, truth, strict=True)],
    ).values
    cut = [
        np.stack([x[y0:y1, x0:x1] for x, (x0, y0, x1, y1) in zip(v, boxes, strict=True)])
        for v in (frames, truth)
    ]
    assert values["psnr"] == pytest.approx(psnr(*cut))
    assert values["vl"] < np.mean([laplacian_variance(x) for x in cut[0]])  # enlarged to 512


def test_what_a_clip_does_not_bring_is_said_and_never_a_number() -> None:
    frames = pictures(0)
    gone = np.full((6, 68, 2), np.nan)
    record = measured(Bench(["psnr", "lmd", "lip_leak"]), Subject(6, landmarks=gone), [Moment(frames[0])])
    assert not record.values
    assert str(record.missing["psnr"]) == "not available: needs frames that show the right mouth"
    assert "needs the output's landmarks and the truth's landmarks" in str(record.missing["lmd"])
    assert "mar_std" in record.missing
    subject = Subject(6, frozenset({"truth", "mask"}), None)
    record = measured(Bench(["psnr"]), subject, [Moment(frames[0], None, frames[0], np.zeros((48, 40)))])
    assert str(record.missing["psnr_inside"]) == "not available: there is no pixel to compare"
    assert "the source video's frames" in str(record.missing["psnr_outside"])


def test_weights_that_are_absent_are_a_sentence_with_the_way_to_them(tmp_path: Path) -> None:
    for name, metric in METRICS.items():
        measure = MEASURES[metric.measure]
        if not measure.weights:
            continue
        reason = str(unavailable(name, tmp_path))
        needed = WEIGHTS[measure.weights[0]]
        assert reason.startswith(f"not available: needs {needed.what}, {needed.file} in {tmp_path}; "), name
        assert needed.get in reason
        assert needed.terms in reason
        bench = Bench([name], tmp_path)
        assert isinstance(bench.missing[name], Unavailable)
        assert name not in measured(bench, Subject(1), []).values


def test_provenance_names_what_computed_a_number() -> None:
    assert provenance("psnr")["computed by"].startswith("PSNR and SSIM")
    assert provenance("psnr")["keysync_jax"]


def test_a_still_mouth_leaks_nothing_and_a_set_is_a_ratio_of_means() -> None:
    still = Record({"mar_std": 0.0, "mar_open": 0.0})
    moving, lively = (Record({"mar_std": x, "mar_open": x}) for x in (0.1, 0.3))
    assert combine("lip_leak", {"silent": [still, still], "dub": [moving, lively]}) == 0
    leaking = combine("lip_leak", {"silent": [moving, moving], "dub": [moving, lively]})
    assert leaking == pytest.approx(0.1 / 0.20001)
    assert combine("lip_leak", {"silent": [still], "dub": [still]}) == 0
    assert combine("lip_leak_lite", {"silent": [moving, lively]}) == pytest.approx(0.2)


def test_a_set_that_lacks_a_run_or_a_number_is_a_sentence() -> None:
    assert str(combine("lip_leak", {"dub": []})) == "not available: needs the runs silent, dub"
    lacking = combine("lip_leak", {"silent": [Record()], "dub": [Record({"mar_std": 1.0})]})
    assert str(lacking) == "not available: every clip needs its mar_std"
    with pytest.raises(ValueError, match="metric of a clip"):
        combine("psnr", {})


def test_lmd_centres_each_mouth_and_has_both_conventions() -> None:
    truth = a_face()
    assert landmark_distance(truth + np.array([7, -3]), truth) == pytest.approx(np.zeros(6))
    moved = truth.copy()
    moved[:, 48] += [3, 4]
    # One point is 5 px away; the mean of the 20 is moved by a twentieth of it.
    assert landmark_distance(moved, truth) == pytest.approx(np.full(6, (5 * 19 / 20 + 19 * 5 / 20) / 20))
    values = measured(Bench(["lmd"]), Subject(6, landmarks=moved, truth_landmarks=truth), []).values
    assert values["lmd_sum"] == pytest.approx(20 * values["lmd"])
    with pytest.raises(ValueError, match="equal shapes"):
        landmark_distance(truth[:2], truth)


def test_a_subject_needs_a_face_somewhere() -> None:
    landmarks = np.full((3, 68, 2), np.nan)
    assert not Subject(3, landmarks=landmarks).has("landmarks")
    landmarks[1] = 0
    assert Subject(3, landmarks=landmarks).has("landmarks")
    assert not dataclasses.replace(Subject(3), streams=frozenset({"speaker"})).has("speaker")


def test_the_documentation_has_every_metric_and_every_file() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    for metric in METRICS.values():
        row = f"| `{metric.name}` | {metric.title} | {metric.unit or '-'} | {metric.better} |"
        assert row in text, metric.name
    for weights in WEIGHTS.values():
        assert f"| `{weights.file}` | {weights.what} |" in text
        assert weights.get in text
