"""Faces that are cut from clips of an unusual kind."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from keysync_jax.data.faces import Faces, Task, cut_all, read_crops
from keysync_jax.data.sources import Clip
from keysync_jax.media.audio import RATE
from tests.clips import face_landmarks, write_voice
from tests.media import test_anamorphic as anamorphic
from tests.media.test_timestamps import FLASHES, HOURS, after_jump, write_flashes


def cut(path: Path, landmarks: np.ndarray, folder: Path) -> tuple[Faces, list[np.ndarray]]:
    np.save(folder / "landmarks.npy", landmarks)
    clip = Clip("clip", path, path.name, folder / "landmarks.npy")
    ((_, found),) = cut_all([Task(clip, folder / "crops", 128, 14, "", None)], 0)
    assert isinstance(found, Faces), found
    return found, list(read_crops(folder / "crops"))


@pytest.mark.parametrize("aspect", [Fraction(16, 11), Fraction(8, 9)], ids=str)
def test_crops_of_anamorphic_video_are_round(tmp_path: Path, aspect: Fraction) -> None:
    frames = anamorphic.FRAMES
    path = anamorphic.write(tmp_path / "clip.mp4", aspect, write_voice(tmp_path / "voice.wav", frames / 25))
    found, crops = cut(path, anamorphic.points_of(frames, aspect), tmp_path)
    assert len(crops) == frames
    for crop, points in zip(crops, found.landmarks, strict=True):
        ratio, centre = anamorphic.shape_of(crop)
        assert ratio == pytest.approx(1, rel=0.03)
        np.testing.assert_allclose((points[0] + points[16]) / 2, centre, atol=1.5)


@pytest.mark.parametrize("between", [0, 60 * 25], ids=["sound jumps", "sound goes on"])
def test_sound_and_frames_of_a_clip_that_jumps_are_in_step(tmp_path: Path, between: int) -> None:
    jump = after_jump(60 if between else HOURS)
    path = write_flashes(tmp_path / "clip.mkv", jump, Fraction if between else jump, between)
    found, crops = cut(path, face_landmarks(len(FLASHES), 64, 48), tmp_path)
    white = np.array([crop.mean() > 128 for crop in crops])
    loud = np.abs(found.wave.reshape(-1, RATE // 25)).mean(axis=1) > 0.07
    np.testing.assert_array_equal(white, FLASHES)
    np.testing.assert_array_equal(loud, FLASHES)
