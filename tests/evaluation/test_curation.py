"""Curation: what is measured of a clip, what the thresholds make of it, and that no clip is read twice."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from keysync_jax.cli import main
from keysync_jax.data.sources import Clip
from keysync_jax.errors import UserError
from keysync_jax.evaluation import curation
from keysync_jax.evaluation.curation import CurationSettings, Scores, curate, decide
from keysync_jax.evaluation.curation import reason_to_drop as reason
from keysync_jax.media.scenes import SceneCuts
from tests.clips import face_landmarks
from tests.data.preparing import add_clip

SETTINGS = CurationSettings(by=("cuts", "face"), least_face=30)
GOOD = {"cuts": 0.0, "face": 200.0, "hyperiqa": 0.6, "active_speaker": 0.9, "lse_c": 7.0, "av_offset": 1.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two clips that will do, one with a small face, one without any, and one that is no video."""
    made = tmp_path / "raw"
    add_clip(made, "a", 16)
    add_clip(made, "b", 16)
    add_clip(made, "small", 16, face_landmarks(16) / 2)
    add_clip(made, "nobody", 16, np.full((16, 68, 2), np.nan, np.float32))
    (made / "broken.mp4").write_bytes(b"nothing")
    return made


def test_clips_are_kept_and_dropped_with_reasons(folder: Path, tmp_path: Path) -> None:
    found = curate(folder, tmp_path / "scores", SETTINGS)
    assert [path.name for path in found.kept] == ["a.mp4", "b.mp4"]
    dropped = dict(found.dropped)
    assert dropped["nobody.mp4"] == "face: face is 0 (least face 30)"
    assert dropped["small.mp4"].startswith("face: face is ")
    assert "broken.mp4" in dropped["broken.mp4"]
    assert sum(found.histograms["face"][1]) == 4
    assert "curated    2 kept, 3 dropped" in found.table()
    said = json.loads((tmp_path / "scores" / "curation.json").read_bytes())
    assert said["settings"]["least_face"] == 30
    assert len(said["dropped"]) == 3
    kept = (tmp_path / "scores" / "kept.txt").read_text().splitlines()
    assert kept == [str(folder / "a.mp4"), str(folder / "b.mp4")]


def test_other_thresholds_need_no_new_pass_and_changed_clips_do(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "broken.mp4").unlink()
    curate(folder, tmp_path / "scores", SETTINGS)
    measured: list[str] = []
    measure = curation._measure

    def counted(clip: Clip, *rest: object) -> Scores:
        measured.append(clip.name)
        return measure(clip, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(curation, "_measure", counted)
    found = curate(folder, tmp_path / "scores", replace(SETTINGS, least_face=5))
    assert not measured
    assert [path.name for path in found.kept] == ["a.mp4", "b.mp4", "small.mp4"]
    np.save(folder / "b.npy", face_landmarks(16) / 4)
    assert len(curate(folder, tmp_path / "scores", SETTINGS).kept) == 1
    assert measured == ["b"]
    next((tmp_path / "scores").glob("*[0-9a-f].json")).write_text("{")
    curate(folder, tmp_path / "scores", SETTINGS)
    assert len(measured) == 2


def test_each_criterion_has_its_say() -> None:
    settings = CurationSettings()
    assert reason(Scores(GOOD), settings) is None
    for name, value, said in (
        ("cuts", 1, "cuts: cuts is 1 (most cuts 0)"),
        ("face", 99, "face: face is 99 (least face 100)"),
        ("hyperiqa", 0.39, "quality: hyperiqa is 0.39 (least quality 0.4)"),
        ("active_speaker", 0.7, "speaking: active_speaker is 0.7 (least speaking 0.75)"),
        ("lse_c", 2.9, "sync: lse_c is 2.9 (least confidence 3)"),
        ("av_offset", -7, "sync: av_offset is -7 (most offset 6)"),
    ):
        assert reason(Scores({**GOOD, name: value}), settings) == said
    lacking = {name: value for name, value in GOOD.items() if name != "av_offset"}
    found = Scores(lacking, {"av_offset": "not available: it is noise"})
    assert reason(found, settings) == "sync: av_offset is not available: it is noise"
    assert reason(found, replace(settings, by=("cuts", "quality"))) is None
    assert reason(Scores(fault="cannot be read"), settings) == "cannot be read"
    clips = [Clip(name, Path(f"{name}.mp4"), f"{name}.mp4") for name in "ab"]
    decided = decide(clips, [Scores(GOOD), Scores({**GOOD, "hyperiqa": 0.1})], settings)
    assert decided.kept == (Path("a.mp4"),)
    assert decided.histograms["hyperiqa"][1] == (1, 0, 0, 0, 0, 0, 0, 0, 0, 1)


def test_a_cut_is_counted_and_a_flash_after_it_is_not() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 60, (48, 64, 3)), rng.integers(180, 256, (48, 64, 3))
    cuts = SceneCuts()
    for t in range(60):
        scene = second if t in (20, 22) or t >= 40 else first
        cuts.update(scene.astype(np.uint8))
    assert cuts.frames == [20, 40]  # At 20 and at 40; what follows at once is the same one.
    still = SceneCuts()
    slope = np.linspace(0, 250, 64)[:, None] * np.array([1, 0.9, 0.8])
    for t in range(40):
        still.update(np.roll(np.tile(slope, (48, 1, 1)), t % 2, axis=1).astype(np.uint8))
    assert still.count == 0


def test_metrics_that_are_absent_are_named_with_the_way_out(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sync: lse_c is not available: .*; or curate without sync"):
        curate(folder, tmp_path / "scores", CurationSettings(by=("sync",)))
    with pytest.raises(UserError, match="by any of cuts, face, quality, speaking, sync, not beauty"):
        CurationSettings(by=("beauty",))
    with pytest.raises(UserError, match=r"none of the 5 clips is kept; the first: "):
        curate(folder, tmp_path / "scores", replace(SETTINGS, least_face=5000))


def test_the_command_curates_and_stops_or_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    curated = ["--curate", str(tmp_path / "scores"), "--curate-by", "cuts,face", "--least-face", "30"]
    assert main(["prepare", str(folder), *curated]) == 0
    assert "curated    2 kept, 3 dropped" in capsys.readouterr().out
    assert main(["prepare", str(folder), *curated, "--crop", "32", "-o", str(tmp_path / "data")]) == 0
    assert "clips      2 prepared, 0 skipped" in capsys.readouterr().out
    assert main(["prepare", str(folder)]) == 2
    assert "--curate DIR" in capsys.readouterr().err
