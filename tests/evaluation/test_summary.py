"""From scores to tables: which measures tell sync, distances of sets, what is missing in some clips."""

import re
from pathlib import Path

import numpy as np
import pytest

from keysync_jax.evaluation.protocol import PROTOCOLS, Cell
from keysync_jax.evaluation.report.charts import Point, plane, ticks
from keysync_jax.evaluation.report.tables import as_csv, columns, latex, markdown, number
from keysync_jax.evaluation.scoring import Scored
from keysync_jax.evaluation.statistics import Resampling
from keysync_jax.evaluation.summary import Judged, comparisons, distances, row, sync_measures

CLIPS = tuple(f"c{i}" for i in range(8))
STUDY = {"AM-CR": (7.73, 6.44), "XM-CR": (7.35, 7.18), "SI-CR": (3.64, 8.15)}
"""Wav2Lip of arXiv 2511.08613, current reference: LSE-C and LSE-D (tables 5, 4, 3)."""


def judged(name: str = "wav2lip", shift: float = 0.0, clips: tuple[str, ...] = CLIPS) -> Judged:
    """Clips that scatter about the study's means."""
    scatter = np.linspace(-1, 1, len(clips))
    scores = {}
    for cell in PROTOCOLS["leakage"][:3]:
        c, d = STUDY[cell.name]
        scores[cell] = {
            clip: Scored({"lse_c": c + shift + s, "lse_d": d - s})
            for clip, s in zip(clips, scatter, strict=True)
        }
    return Judged(name, scores, clips)


def table(one: Judged) -> dict[str, object]:
    return row(one, "CR", Resampling(one.clips, draws=200), {}, {}, sync_measures([one]))


def test_syncnets_measures_give_the_studys_table() -> None:
    one = judged()
    assert sync_measures([one]) == ("lse_c", "lse_d")
    leakage = table(one)["leakage"]
    assert leakage["lse_c_s"]["value"] == pytest.approx(3.64)  # type: ignore[index]
    assert leakage["lse_d_s"]["value"] == pytest.approx(8.15)  # type: ignore[index]
    assert leakage["lsd"]["value"] == pytest.approx(0.56, abs=0.006)  # type: ignore[index]
    assert leakage["lsd"]["signed"] == pytest.approx({"lse_c": 0.38, "lse_d": -0.74})  # type: ignore[index]
    one.scores[Cell("SI", "CR")]["c3"].values.pop("lse_d")  # type: ignore[attr-defined]
    assert sync_measures([one]) == ()


def test_a_clip_without_a_number_is_counted() -> None:
    one, cell = judged(), Cell("XM", "CR")
    one.scores[cell]["c0"].values.pop("lse_c")  # type: ignore[attr-defined]
    cells = table(one)["cells"]
    assert cells["XM-CR"]["lse_c"]["clips"] == 7  # type: ignore[index]
    assert cells["XM-CR"]["lse_d"]["clips"] == 8  # type: ignore[index]


def test_systems_are_compared_on_common_clips_and_not_in_silence() -> None:
    first, second = judged(), judged("other", 1.0, CLIPS[2:])
    found = comparisons([first, second], list(first.scores), CLIPS, Resampling(CLIPS, draws=200))
    assert {(one["cell"], one["clips"]) for one in found} == {("AM-CR", 6), ("XM-CR", 6)}
    assert {one["metric"] for one in found} == {"lse_c", "lse_d"}
    assert all(one["holm"] >= one["permutation"] for one in found)


def test_distances_of_sets_are_told_with_their_bias(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def written(name: str, offset: float) -> Judged:
        scores = {}
        for clip in CLIPS:
            path = tmp_path / f"{name}-{clip}.npz"
            np.savez(path, inception=rng.normal(size=(40, 3)) + offset)
            scores[clip] = Scored({}, {}, {}, path)
        return Judged(name, {Cell("AM"): scores}, CLIPS)

    real, dubs = written("real video", 0.0), written("dubs", 2.0)
    found = distances(dubs, real, "", seed=0)
    assert list(found["AM"]) == ["fid"]
    fid = found["AM"]["fid"]
    assert fid["value"] == pytest.approx(12, rel=0.15)
    assert 0 < fid["bias"] < 0.5
    assert fid["low"] < fid["value"] < fid["high"]
    assert distances(Judged("few", dubs.scores, CLIPS[:3]), real, "", seed=0) == {}


CONTENT = {
    "metrics": {"psnr": {"title": "PSNR", "unit": "dB", "better": "higher", "what": "w"}},
    "rows": [
        {
            "system": "=cmd_1 50% | \\x", "reference": "", "clips": 2, "leakage": {}, "distances": {},
            "cells": {"AM": {"psnr": {"value": "inf", "low": None, "high": None, "clips": 2}}},
        },
        {
            "system": "real video", "reference": "", "clips": 2, "leakage": {}, "distances": {},
            "cells": {"AM": {"psnr": {"value": 31.25, "low": -0.5, "high": 1234.5, "clips": 2}}},
        },
    ],
}  # fmt: skip


def test_tables_are_safe_to_paste() -> None:
    assert [column.title for column in columns(CONTENT)] == ["PSNR"]
    assert r"\_1 50\% | \textbackslash{}x & 2 & $\infty$" in latex(CONTENT)
    assert r"31.25 {\tiny [$-$0.500, 1234]}" in latex(CONTENT)
    assert "| =cmd_1 50% \\| \\x | 2 | ∞ |" in markdown(CONTENT)
    lines = as_csv(CONTENT).splitlines()
    # A spreadsheet takes what begins with = for a formula.
    assert lines[1] == "'=cmd_1 50% | \\x,,AM,psnr,higher,dB,inf,,,2"
    assert lines[2] == "real video,,AM,psnr,higher,dB,31.25,-0.5,1234.5,2"


def test_numbers_are_written_as_people_read_them() -> None:
    found = [number(x) for x in (None, "inf", 0.00012, -0.0001, -1.5, 12.345, 123.45, 12345.6)]
    assert found == ["–", "∞", "0.000", "0.000", "−1.500", "12.35", "123.5", "12346"]


def test_charts_are_made_of_round_numbers() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(-0.3, 0.3, 3) == pytest.approx([-0.2, 0, 0.2])
    points = [Point(f"<{i}>", 0.5, 0.5, None, (0.4, 0.6), i) for i in range(4)]
    drawn = plane(points, "x", "y")
    assert drawn == plane(points, "x", "y")
    assert "<0>" not in drawn
    # Four names about one place: no two of them over each other.
    places = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" dy=".32em">', drawn)
    assert len(places) == len(set(places)) == 4
